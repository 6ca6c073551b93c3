"""A task is a labelled image source with its words: class names in label order and a prompt template."""

import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from advtune.data.catalog import entry, names
from advtune.data.named import open_named
from advtune.data.parquet import open_hub, open_parquet
from advtune.data.sources import Part, Source, normal, open_csv, open_folder
from advtune.data.templates import check_template, filled
from advtune.errors import UserError, suggest
from advtune.untrusted import UNSEEN, read_json

OPENERS: dict[str, Callable[[str], Source]] = {
    "folder": open_folder,
    "parquet": open_parquet,
    "csv": open_csv,
    "hf": open_hub,
}
FORMS = "folder:PATH, parquet:PATH, csv:PATH or hf:OWNER/NAME"
TEMPLATE = "a photo of a {}."
SUBSETS = ("all", "base", "new")
SINGLE = "80/20 by content"  # what a source without a test part gets
Words = str | Sequence[str] | Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """A labelled image source with its words.

    `spec` is what the user gave, `name` is short and for tables. `classes` are distinct texts in label order.
    `parts` are what the source has: "train" and "test", only "test", or "all" (one split, cut 80/20 at need).
    `source` are the class names as the source has them, before any renaming. `subset` is all, base (the first half
    of the classes, rounded up) or new (the others); labels count from 0 in each. `all_classes` are the texts before
    the subset was taken. `split` says in words which split the parts come from.
    """

    spec: str
    name: str
    classes: tuple[str, ...]
    template: str
    parts: dict[str, Part]
    source: tuple[str, ...] = ()
    subset: str = "all"
    all_classes: tuple[str, ...] = ()
    split: str = ""

    def texts(self) -> list[str]:
        """The template filled with each class name, in label order: C texts; of several templates one after another."""
        return filled(self.classes, self.template)


def load_task(
    spec: str, *, classes: Words | None = None, template: str | None = None, subset: str = "all",
    tuned: Mapping[str, Any] | None = None,
) -> Task:  # fmt: skip
    """Open a source: a catalog name, or `folder:`, `parquet:`, `csv:`, `hf:` and where it is.

    classes: a JSON file (a list with one name per label, or {old: new}), comma-separated names, or a sequence
    with one name per label, in the source's label order.
    template: exactly one {} and no other brace; or several with " | " between them, averaged.
    subset: all, base or new; `classes` names every class still.
    tuned: a run's record of its training set; if that is this set, its words are used where no others are given.
    Raises UserError for anything that is missing, empty, ambiguous or not distinct.
    """
    kind, colon, where = spec.partition(":")
    if colon and kind in OPENERS:
        source, default = OPENERS[kind](where), TEMPLATE
    elif spec in names():
        source, default = open_named(spec), entry(spec)["template"]
    else:
        forms = [f"{each}:{where}" for each in OPENERS] if colon else []
        hint = suggest(spec, [*names(), *forms], 3) or f"known sets: {', '.join(names())};"
        raise UserError(f"unknown set {spec!r}: {hint} otherwise give {FORMS}")
    if tuned and tuned.get("spec") == spec and tuned["source_classes"] == source.classes:
        words = tuned.get("all_classes", tuned["classes"])
        classes, template = classes or dict(zip(source.classes, words, strict=True)), template or tuned["template"]
    if classes is None:
        _check_numbers(spec, source.classes)
    given = source.classes if classes is None else rename(source.classes, classes)
    texts = tuple(" ".join(name.split()) for name in given)
    split = SINGLE if "all" in source.parts else source.split
    template = default if template is None else template
    task = Task(spec, source.name, texts, template, source.parts, tuple(source.classes), "all", texts, split)
    check_task(task)
    return take_subset(task, subset)


def _check_numbers(spec: str, found: Sequence[str]) -> None:
    """Numbers as class texts are a warning. Raises UserError for a set of the catalog: it has words, but whose?"""
    facts = entry(spec) if spec in names() else {}
    if not found or not all(name.isdecimal() for name in found) or found == facts.get("classes"):
        return
    if not facts:
        warnings.warn(f"{spec}: the class texts are numbers, like the labels; give classes=", stacklevel=3)
        return
    which = f"class name or by 0 to {len(facts['classes']) - 1}" if facts["numbered"] else "class name"
    raise UserError(f"{spec}: its labels are {len(found)} numbers from {found[0]}, whose classes are not known: "
                    f"label the images by {which}, or give classes= (--classes), one name a number")  # fmt: skip


def take_subset(task: Task, subset: str) -> Task:
    """The task over its base classes (the first ceil(C/2) in label order) or its new ones (the rest), labels from 0.

    The cut is that of Zhou et al. 2022 (CoCoOp, arXiv 2203.05557). Raises UserError for another subset, and when it
    has fewer than two classes or no images.
    """
    if subset not in SUBSETS:
        raise UserError(f"subset {subset!r} is unknown; choose from {', '.join(SUBSETS)}")
    if subset == "all":
        return task
    base = (len(task.classes) + 1) // 2
    first, stop = (0, base) if subset == "base" else (base, len(task.classes))
    parts = {}
    for name, part in task.parts.items():
        parts[name] = part.subset([i for i, label in enumerate(part.labels) if first <= label < stop])
        parts[name].labels = [label - first for label in parts[name].labels]
    taken = replace(task, classes=task.classes[first:stop], parts=parts, subset=subset)
    if len(taken.classes) < 2:
        raise UserError(f"{task.spec}: the {subset} subset of {len(task.classes)} classes has {len(taken.classes)}; "
                        "a classifier needs two or more")  # fmt: skip
    check_task(taken)
    return taken


def check_task(task: Task) -> None:
    """Raises UserError unless class texts are distinct, the template is sound and every part has images."""
    for part, records in task.parts.items():
        if not len(records):
            raise UserError(f"{task.spec}: the {part} part has no images; check the path and the file types")
    check_words(task.classes, task.template, task.spec)


def check_words(classes: Sequence[str], template: str, what: str) -> None:
    """Raises UserError unless there are two or more distinct class texts and the template is sound; `what` has them."""
    check_template(template)
    if len(classes) < 2:
        raise UserError(f"{what} has {len(classes)} class; a classifier needs two or more")
    seen: dict[str, str] = {}
    for name in classes:
        if not name or set("{}") & set(name):
            raise UserError(f"the class name {name[:60]!r} is empty or holds a brace; rename it with classes=")
        if UNSEEN.search(name):
            raise UserError(f"the class name {name[:60]!a} holds a control character; rename it with classes=")
        folded = unicodedata.normalize("NFC", name).casefold()  # as the tokenizer sees it
        if folded in seen:
            raise UserError(f"the classes {seen[folded][:60]!r} and {name[:60]!r} are one text; give classes=")
        seen[folded] = name


def rename(old: Sequence[str], given: Words) -> list[str]:
    """New class names in label order, from a mapping {old: new} or one name per label."""
    words = read_classes(given) if isinstance(given, str) else given
    values = list(words.values()) if isinstance(words, Mapping) else words
    if (
        isinstance(values, str)
        or not isinstance(values, Sequence)
        or not all(isinstance(value, str) for value in values)
    ):
        raise UserError("classes must be names, one per label, or a mapping {old: new}")
    if isinstance(words, Mapping):
        index = {normal(name): i for i, name in enumerate(old)}
        names = list(old)
        for key, value in words.items():
            if normal(key) not in index:
                hint = suggest(key, old) or f"its first is {old[0]!r}"
                raise UserError(f"classes: the source has no class {key!r}; {hint}")
            names[index[normal(key)]] = value
        return names
    if len(words) != len(old):
        raise UserError(f"classes: {len(words)} names for {len(old)} labels; give one each, or {{old: new}}")
    known = {normal(name): i for i, name in reversed(list(enumerate(old)))}
    for i, name in enumerate(words):
        place = known.get(normal(name), i)
        if place != i and normal(old[i]) != normal(name):  # positional renaming would swap labels unseen
            raise UserError(f"classes: {name!r} is number {i} but {place} in the source; keep its order")
    return list(words)


def read_classes(given: str) -> Any:
    """What a JSON file holds, or names with commas. Raises UserError."""
    if not given.endswith(".json"):
        return [name.strip() for name in given.split(",")]
    try:
        return read_json(Path(given))
    except OSError as error:
        raise UserError(f"classes: cannot read {given}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"classes: {given} is not JSON: {error}") from None
