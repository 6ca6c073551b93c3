"""What the page is about: the undefended model, tuned ones beside it, and pictures to begin with."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import advtune
from advtune import runs
from advtune.data import Split, Task, load_images, load_task
from advtune.data.cache import cache_dir
from advtune.data.fewshot import named_part
from advtune.data.templates import BETWEEN, parts
from advtune.demo import BACKBONE, DATA, ENTRIES, SHOTS, Entry
from advtune.errors import UserError
from advtune.pretrained import EMBEDDED
from advtune.serve.play import CLASSES, TEMPLATES, read_classes, read_picture
from advtune.train import tune
from advtune.vlm import VLM

DEMO = Path("runs/demo")
LOCAL = ("folder:", "parquet:", "csv:")  # sources whose pictures are shown without a network
EACH, EXAMPLES = 2, 30  # pictures a class, and in all


@dataclass(frozen=True)
class Example:
    """A picture to begin with: its encoded bytes and its class."""

    data: bytes
    label: str


@dataclass
class Shelf:
    """Models by name, read when first needed: `tuned` run folders, and the one backbone if there are none."""

    backbone: str
    tuned: dict[str, Path] = field(default_factory=dict)
    device: str = "auto"
    _read: dict[str, VLM] = field(default_factory=dict)

    def pair(self, name: str | None) -> dict[str, VLM]:
        """The undefended model and, with a name from `tuned`, that one, by title."""
        if not self.tuned:
            return {f"Undefended {Path(self.backbone).name}": self._model(self.backbone)}
        folder = self.tuned.get(name or "")
        if folder is None:
            raise UserError(f"There is no tuned model {name}; choose one of {', '.join(self.tuned)}.")
        first = undefended(folder)
        method = runs.read_config(folder)["method"]
        which = "" if len(self.tuned) == 1 or name == method else f" ({name})"
        return {
            f"Undefended {Path(first).name}": self._model(first),
            f"Tuned with {method}{which}": self._model(str(folder)),
        }

    def _model(self, name: str) -> VLM:
        place = name if name in EMBEDDED or not Path(name).is_dir() else str(Path(name).resolve())
        if place not in self._read:
            self._read[place] = runs.load(name, self.device)
        return self._read[place]


def open_shelf(name: str | None, device: str = "auto") -> Shelf:
    """What `advtune serve NAME` shows: a run, a folder of runs, a backbone; without a name the demo's runs or, where
    there are none, one that is tuned now and kept. Raises UserError when it cannot be had."""
    if name is None:
        found = runs_under(DEMO)
        return Shelf(BACKBONE, found or {ENTRIES[0].method: quick_run(ENTRIES[0], device)}, device)
    if name not in EMBEDDED and runs.is_run(name):
        return Shelf(undefended(Path(name)), {Path(name).resolve().name: Path(name)}, device)
    found = runs_under(Path(name)) if name not in EMBEDDED else {}
    return Shelf(name, found, device)


def runs_under(folder: Path) -> dict[str, Path]:
    """The finished runs in a folder by name, those of the demo first and in its order."""
    order = [entry.method for entry in ENTRIES]
    found = sorted(p for p in folder.glob("*") if runs.is_run(p))
    return {p.name: p for p in sorted(found, key=lambda p: order.index(p.name) if p.name in order else len(order))}


def undefended(folder: Path) -> str:
    """The backbone below a run, and below the runs that it was tuned on."""
    return runs.below(str(folder))[-1]


def quick_run(entry: Entry, device: str = "auto") -> Path:
    """A run of the demo in the cache folder, tuned now if it is not there: about 20 seconds on two cores. Its name is a
    hash of all that decides it."""
    clip, task = runs.load(BACKBONE, device), load_task(DATA)
    images = load_images(task, Split(part="train", shots=SHOTS, resolution=clip.side), progress=False)
    facts = [
        entry.method, entry.epochs, entry.options, SHOTS, clip.origin.sha256, images.sha256, task.classes,
        task.template, clip.precision, str(clip.device), torch.__version__, advtune.__version__,
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    folder = cache_dir() / "serve" / f"{entry.method}-{key}"
    if not runs.is_run(folder):
        print(f"no {DEMO}: tuning {entry.method} once, kept in {folder}", file=sys.stderr)
        options: dict[str, Any] = {"shots": SHOTS, "epochs": entry.epochs, "options": entry.options}
        tune(entry.method, clip, task, out=folder, overwrite=True, **options)
    return folder


def open_task(shelf: Shelf, spec: str | None = None) -> Task:
    """The set whose words and pictures the page begins with: `spec`, else the first tuned model's own if it is on this
    machine, else the embedded one. Raises UserError for a `spec` that cannot be had."""
    if spec is not None:
        return load_task(spec)
    for folder in list(shelf.tuned.values())[:1]:
        train = runs.read_config(folder)["train"]
        if train["spec"] != DATA and not train["spec"].startswith(LOCAL):
            continue
        try:
            return load_task(train["spec"], tuned=train, subset=train.get("subset", "all"))
        except UserError as error:
            warnings.warn(f"the pictures are those of {DATA}: {error}", stacklevel=2)
    return load_task(DATA)


def examples(task: Task) -> list[Example]:
    """The first pictures of each class of the test part that the page can read, a class after the other. Raises
    UserError when there is none."""
    part, taken = named_part(task, "test"), Counter[int]()
    each = max(1, min(EACH, EXAMPLES // len(task.classes)))
    chosen = []
    for i, label in enumerate(part.labels):
        if taken[label] < each and label < EXAMPLES and _is_readable(data := part.read(i)):
            taken[label] += 1
            chosen.append((label, i, data))
    if not chosen:
        raise UserError(f"{task.spec}: none of its pictures can be shown; give another set with --data")
    return [Example(data, task.classes[label]) for label, _, data in sorted(chosen)]


def _is_readable(data: bytes) -> bool:
    try:
        read_picture(data, 8)
    except UserError:
        return False
    return True


def words(task: Task) -> str:
    """The class names that the page begins with."""
    names = task.classes[:CLASSES]
    return ("\n" if any("," in name for name in names) else ", ").join(names)


def around(task: Task) -> str:
    """The text around a name that the page begins with: of more templates than it takes, the first."""
    return BETWEEN.join(parts(task.template)[:TEMPLATES])


def begin(shelf: Shelf, task: Task, shown: list[Example]) -> int:
    """The picture to begin with: the first that the tuned model names rightly. Of one that it does not, an attack
    has little to tell."""
    model = list(shelf.pair(next(iter(shelf.tuned), None)).values())[-1]
    classes = read_classes(words(task))
    with torch.no_grad():
        f = model.classifier(model.tokens(classes, around(task)))
        for i, each in enumerate(shown):
            if classes[int(f(read_picture(each.data, model.side).to(model.device)).argmax())] == each.label:
                return i
    return 0
