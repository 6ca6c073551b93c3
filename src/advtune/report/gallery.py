"""A handful of images before and after a short attack, for the model before tuning and the tuned one side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advtune import runs
from advtune.attacks import PGD
from advtune.data import Split, load_images
from advtune.errors import UserError
from advtune.evaluation import task_for
from advtune.report.classes import Labelled, labelled
from advtune.report.found import Measured, score
from advtune.results import Row
from advtune.vlm import VLM

STEPS = 20  # of the gallery's PGD
COUNT, FALLEN = 5, 2  # images shown, and of these at most so many on which the tuned model falls, too
LOOKED = 200  # images of the split that are looked at
TOP = 3


@dataclass(frozen=True)
class View:
    """What one model makes of an image: the adversarial image [3, S, S] in [0, 1], and the top classes (name,
    probability) before and after."""

    model: str
    x_adv: Tensor
    before: list[tuple[str, float]]
    after: list[tuple[str, float]]


@dataclass(frozen=True)
class Example:
    """An image [3, S, S] in [0, 1], its class, and what each model makes of it."""

    x: Tensor
    truth: str
    views: list[View]


@dataclass(frozen=True)
class Gallery:
    """Examples, and in one sentence each what was done and how they were chosen."""

    examples: list[Example]
    attack: PGD
    told: list[str]


def examples(models: Mapping[str, VLM], task: Any, x: Tensor, y: Tensor, attack: PGD, seed: int = 0) -> list[Example]:
    """Attack images x [B, 3, S, S] in [0, 1] with labels y [B] on each model by itself, by name."""
    views: list[list[View]] = [[] for _ in x]
    for name, model in models.items():
        with torch.no_grad():
            f = model.classifier(model.tokens(task.classes, task.template))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            x_adv = attack(f, x.to(model.device), y.to(model.device)).cpu()
        with torch.no_grad():
            before, after = (f(each.to(model.device)).softmax(1).cpu() for each in (x, x_adv))
        for i, own in enumerate(views):
            own.append(View(name, x_adv[i], top(before[i], task.classes), top(after[i], task.classes)))
    return [Example(x[i].cpu(), task.classes[int(y[i])], own) for i, own in enumerate(views)]


def top(probabilities: Tensor, classes: Sequence[str], k: int = TOP) -> list[tuple[str, float]]:
    """The k most probable classes, the most probable first."""
    found = probabilities.topk(min(k, len(classes)))
    return [(classes[i], p) for p, i in zip(found.values.tolist(), found.indices.tolist(), strict=True)]


def choose(before: Row | None, tuned: Row, labels: Sequence[int], count: int = COUNT) -> list[int]:
    """Places of images to show: at first those that both models see right and the tuned one still sees right when
    attacked, then some on which it falls, too, then whatever there is; in the split's order, new classes first."""
    n = min(len(labels), LOOKED)
    right, stands = tuned.flags["clean"], tuned.flags.get("robust", tuned.flags["clean"])
    known = (before or tuned).flags["clean"]
    both = [i for i in range(n) if right[i] == known[i] == "1"]
    kept = _varied([i for i in both if stands[i] == "1"], labels)[: count - FALLEN]
    fallen = _varied([i for i in both if stands[i] == "0"], labels)[:FALLEN]
    rest = [i for flag in "10" for i in _varied([i for i in range(n) if right[i] == flag], labels)]
    return list(dict.fromkeys([*kept, *fallen, *rest]))[:count]


def _varied(places: Sequence[int], labels: Sequence[int]) -> list[int]:
    """The first of each class, then the others."""
    seen: set[int] = set()
    first = [i for i in places if not (labels[i] in seen or seen.add(labels[i]))]  # type: ignore[func-returns-value]
    return first + [i for i in places if i not in first]


def gallery(lines: Sequence[Measured], count: int = COUNT, device: str = "auto") -> Gallery:
    """Of the table lines of one section: the most robust tuned model whose run folder is here, and its backbone.

    The attack is a PGD of STEPS steps at the eps of the rows. Raises UserError, in one line, when run folder,
    backbone, data or class texts cannot be had.
    """
    here = [each for each in lines if each.rows[0].train is not None and each.folders[0] is not None]
    if not here:
        raise UserError("no run folder of a tuned model is here")
    best = max(here, key=lambda each: score(each.line))
    row, folder = best.rows[0], best.folders[0]
    assert folder is not None
    budget = row.attack or {}
    if row.robust is None or not budget.get("eps") or "behind" in row.threat:
        raise UserError("it needs rows of an attack with an eps, without a defence in front")
    zero = next((each for each in lines if each.rows[0].train is None), None)
    data = labelled(row, folder)
    tuned = runs.load(str(folder), device)
    if row.model and tuned.origin.sha256 != row.model:
        raise UserError(f"{folder} holds another model than the row was measured on")
    models = {_before(row): runs.load(_backbone(row, folder), device), best.name: tuned}
    task = task_for(tuned, row.data["spec"], None, row.data.get("template"), row.data.get("subset", "all"))
    if hashlib.sha256("\n".join(task.texts()).encode()).hexdigest() != row.data.get("texts_sha256"):
        raise UserError("the rows were measured with other class texts than are known here")
    same = zero is not None and zero.rows[0].data["sha256"] == row.data["sha256"]
    chosen = choose(zero.rows[0] if zero and same else None, row, data.labels, count)
    x, y = _images(row, data, chosen)
    attack = PGD(eps=budget["eps"], norm=budget.get("norm", "linf"), steps=STEPS)
    return Gallery(examples(models, task, x, y, attack), attack, _told(zero is not None and same))


def _before(row: Row) -> str:
    tower = row.backbone.get("tuned")
    return f"before {row.method} (backbone tuned with {tower['method']})" if tower else "zero-shot"


def _backbone(row: Row, folder: Path) -> str:
    beside = folder / row.backbone["path"] if row.backbone.get("path") else None
    return str(beside) if beside is not None and beside.is_dir() else str(row.backbone["name"])


def _images(row: Row, data: Labelled, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of the first images of the row's split those at the chosen places."""
    facts = row.data
    skipped = facts.get("skipped")
    most = LOOKED + (len(skipped) if isinstance(skipped, list) else 0)
    limit = min(facts.get("limit") or most, most)  # which counts the unreadable ones
    split = Split(part=facts["part"], shots=facts.get("shots"), seed=facts.get("seed", 0), limit=limit,
                  resolution=facts["resolution"], on_bad=facts.get("on_bad", "fail"))  # fmt: skip
    images = load_images(data.task, split)
    x, y = images.batch(torch.tensor(list(chosen)), torch.device("cpu"))
    if y.tolist() != [data.labels[i] for i in chosen]:
        raise UserError("the images are not in the order of the rows")
    return x, y


def _told(compared: bool) -> list[str]:
    who = "both models see" if compared else "the tuned model sees"
    return [
        f"Chosen, not typical: the first images of the test set, of different classes, that {who} right before the "
        f"attack, at most {FALLEN} of them images on which the tuned model falls; then others, if there are too few.",
        "Each model is attacked by itself, so the perturbations differ.",
    ]
