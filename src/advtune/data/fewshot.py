"""Which images: parts, few-shot choices and order, all decided by the content of the images, never by names.

So the same Split picks the same images in the same order on every machine, from a folder, CSV or Parquet.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

from advtune.data.catalog import entry, names
from advtune.data.sources import Part, concat
from advtune.data.task import Task
from advtune.errors import UserError

PARTS = ("train", "fit", "val", "test", "all")
TEST_SHARE, VAL_SHARE = 5, 4  # one fifth of a single split is test; one fourth of train is val


@dataclass(frozen=True)
class Split:
    """A fully specified slice of a Task.

    part: train, fit, val, test or all; fit and val are a 75/25 cut of train, or train and val of a source that
    has a val part (CoOp's files): nothing is tuned on test.
    shots: images a class, chosen by `seed`. limit: the first so many of the fixed order, after `shots`.
    resolution: image side S in pixels before the attack, or "native".
    on_bad: "fail" or "skip" an image that cannot be decoded; it is left out after `shots` and `limit` have
    chosen, so fewer remain.
    Raises UserError for values that mean nothing.
    """

    part: str = "test"
    shots: int | None = None
    seed: int = 0
    limit: int | None = None
    resolution: int | str = 224
    on_bad: str = "fail"

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise UserError(f"part {self.part!r} is unknown; choose from {', '.join(PARTS)}")
        for name in ("shots", "limit"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                raise UserError(f"{name} must be a whole number from 1, not {value!r}; leave it out for all")
        if not _is_int(self.seed):
            raise UserError(f"seed must be a whole number, not {self.seed!r}")
        side = self.resolution
        if side != "native" and (not _is_int(side) or not 1 <= int(side) <= 4096):
            raise UserError(f"resolution must be a side of 1 to 4096 pixels or 'native', not {side!r}")
        if self.on_bad not in ("fail", "skip"):
            raise UserError(f"on_bad must be 'fail' or 'skip', not {self.on_bad!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rank(purpose: str, text: str) -> bytes:
    return hashlib.sha256(f"{purpose}:{text}".encode()).digest()


def select(task: Task, split: Split, track: Callable[[Iterable[int]], Iterable[int]] = iter) -> Part:
    """The records of `split`, in their fixed order. `track` shows the progress of reading the source once."""
    own = split.part in task.parts or split.part not in ("fit", "val")
    source = [split.part] if own else ["train"]
    for name, part in task.parts.items():
        if name in source or split.part == "all" or name == "all":
            part.hashes(track)
    records = named_part(task, split.part)
    if split.shots is not None:
        records = take_shots(records, split.shots, split.seed, task.classes, scarce(task, len(records)))
    records = in_order(records)
    return records.subset(range(len(records))[: split.limit])


def named_part(task: Task, name: str) -> Part:
    """The part called `name` in PARTS, cut from what the source has. Raises UserError if it cannot be had."""
    parts = task.parts
    if name == "fit" and "val" in parts:
        return parts["train"]
    if name in ("fit", "val") and name not in parts:
        fit, val = cut(named_part(task, "train"), VAL_SHARE, task.classes, "fit/val")
        return fit if name == "fit" else val
    if name == "all":
        return reduce(concat, parts.values())
    if "all" in parts:
        train, test = cut(parts["all"], TEST_SHARE, task.classes, "train/test")
        return train if name == "train" else test
    if name not in parts:
        raise UserError(f"{task.spec} has no {name} part, only {', '.join(parts)}; choose another part or source")
    return parts[name]


def cut(records: Part, share: int, classes: Sequence[str], purpose: str) -> tuple[Part, Part]:
    """(the rest, one in `share` of every class), disjoint by content, with every class in both.

    Independent of order, names and seeds. Copies of an image stay on one side, even under different labels.
    Raises UserError if a class has too few distinct images.
    """
    hashes = records.hashes()
    contents: dict[int, set[str]] = {label: set() for label in range(len(classes))}
    for label, sha in zip(records.labels, hashes, strict=True):
        contents[label].add(sha)
    held: set[str] = set()
    for own in contents.values():
        held.update(sorted(own, key=lambda sha: _rank(purpose, sha))[: max(1, len(own) // share)])
    for label, own in contents.items():
        if own <= held:
            few = f"class {classes[label]!r} has {len(own)} distinct image{'s' * (len(own) != 1)}"
            raise UserError(f"{few}, too few to cut into {purpose.replace('/', ' and ')}; add images")
    kept = [i for i, sha in enumerate(hashes) if sha not in held]
    return records.subset(kept), records.subset([i for i, sha in enumerate(hashes) if sha in held])


def scarce(task: Task, n: int) -> str:
    """What else to do where a class has too few of n training images: CoOp's split, where that has more."""
    coop = entry(task.name)["coop"] if task.name in names() else None
    return f", or take CoOp's split ({coop['split']})" if coop and coop["counts"]["train"] > n else ""


def take_shots(records: Part, shots: int, seed: int, classes: Sequence[str], advice: str = "") -> Part:
    """`shots` images of every class, by hash(seed, content). Raises UserError if a class has fewer."""
    by_class: dict[int, list[int]] = {label: [] for label in range(len(classes))}
    keys = content_keys(records)
    for i, label in enumerate(records.labels):
        by_class[label].append(i)
    chosen = []
    for label, own in by_class.items():
        if len(own) < shots:
            few = f"{shots} shots asked for, but class {classes[label]!r} has {len(own)}; ask for fewer"
            raise UserError(f"{few}{advice}")
        chosen += sorted(own, key=lambda i: _rank(f"shots:{seed}", keys[i]))[:shots]
    return records.subset(chosen)


def in_order(records: Part) -> Part:
    """A fixed pseudo-random order that takes the classes in turn: any prefix is balanced to within one image.

    Independent of the source's order. Classes that have run out are passed over.
    """
    keys = [_rank("order", key) for key in content_keys(records)]
    turn: Counter[int] = Counter()
    turns = [0] * len(keys)
    for i in sorted(range(len(keys)), key=lambda i: keys[i]):
        turns[i] = turn[records.labels[i]]
        turn[records.labels[i]] += 1
    return records.subset(sorted(range(len(keys)), key=lambda i: (turns[i], keys[i], records.labels[i])))


def content_keys(records: Part) -> list[str]:
    """A text per record: its content hash, and which copy of that content within its class it is."""
    copies: defaultdict[tuple[int, str], int] = defaultdict(int)
    keys = []
    for label, sha in zip(records.labels, records.hashes(), strict=True):
        keys.append(f"{sha}:{copies[label, sha]}")
        copies[label, sha] += 1
    return keys
