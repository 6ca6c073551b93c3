"""What a list of runs will cost: images through the backbone, counted from the plan, and a second of timing."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advtune import runs
from advtune.answers import Todo, missing, rows_of
from advtune.attacks import PGD, Attack
from advtune.averaging import with_average
from advtune.data import Task, load_task
from advtune.data.catalog import entry as facts_of
from advtune.data.catalog import names
from advtune.data.fewshot import TEST_SHARE, VAL_SHARE
from advtune.data.named import is_here
from advtune.edits import TEXTUAL
from advtune.errors import UserError
from advtune.progress import clock
from advtune.protocols import ZERO_SHOT, Run
from advtune.recipe import Recipe
from advtune.rows import attack_facts
from advtune.vlm import VLM, Batch

TYPICAL = 3  # evaluation: the worst case is that every image withstands everything; a third of it is typical
SECONDS = 0.5  # of timing, for each of forward and gradient


@dataclass(frozen=True)
class Cost:
    """Images that go forward and images whose gradient is taken, training and evaluation (worst case); None where
    the number of images is not known. done: nothing is left of the run."""

    key: str
    done: bool
    train: tuple[float, float] | None
    evaluate: tuple[float, float] | None

    def hours(self, pace: tuple[float, float] | None, typical: bool = False) -> float | None:
        """Hours at so many seconds an image (forward, gradient); None where something is not known."""
        if pace is None or self.train is None or self.evaluate is None:
            return None
        share = 1 / TYPICAL if typical else 1.0
        return sum(p * (t + share * e) for p, t, e in zip(pace, self.train, self.evaluate, strict=True)) / 3600


def costs(wanted: Sequence[Run], out: Path | None) -> list[Cost]:
    """What is left of each run under OUT: nothing for one that is done, no training for one that is tuned."""
    sizes: dict[Any, tuple[int | None, int | None]] = {}
    found = []
    for run in wanted:
        todo = missing(run, [] if out is None else rows_of(run, out / run.key))
        if not todo:
            found.append(Cost(run.key, True, (0, 0), (0, 0)))
            continue
        tuned = run.method == ZERO_SHOT or (out is not None and (out / run.key / runs.DELTA).is_file())
        n = None if tuned else images(run.data, run.subset, run.part, sizes)
        if run.shots is not None and not tuned:
            classes = size_of(run.data, run.subset, run.part, sizes)[1]
            most = None if classes is None else run.shots * classes
            n = None if most is not None and n is not None and n < most else most  # too few: the run will say so
        n = n if n is None or run.limit is None else min(n, run.limit)
        train = (0.0, 0.0) if tuned else None if n is None else training(run, n)
        found.append(Cost(run.key, False, train, evaluation(todo, sizes)))
    return found


def training(run: Run, n: int) -> tuple[float, float]:
    """(forwards, gradients) of tuning on n images, prepared once and gone through in every epoch; text towers are not
    counted. Raises UserError for options that do not fit."""
    method, recipe, attack = run.configured()
    cycles = getattr(method, "cycles", 1)
    worst: Any = replace(attack, early_stop=False) if isinstance(attack, PGD) else attack
    once, each = step(method, Recipe(augment=recipe.augment, average=recipe.average), worst, cycles)
    passes = recipe.epochs * cycles
    return n * (once[0] + passes * each[0]), n * (once[1] + passes * each[1])


@cache
def step(method: Any, recipe: Recipe, attack: Attack, cycles: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """(forwards, gradients) of an image: of preparing it, and of a training step, the mean over the cycles. Counted
    while the embedded backbone does it, so that it is true of every method."""
    task = Task("three", "three", ("cat", "dog", "bird"), "a photo of a {}.", {})
    model = runs.load("mini", "cpu", "fp32").requires_grad_(False)
    models = with_average(method.setup(model, task, 0), recipe)
    tokens = {name: vlm.tokens(task.classes, task.template) for name, vlm in models.items()}
    batch = Batch(torch.rand(2, 3, model.side, model.side), torch.tensor([0, 1]), tokens)
    seen = [0.0, 0.0]

    def count(_: Any, __: Any, features: Tensor) -> None:
        seen[features.requires_grad] += len(features) / len(batch.x)

    for tower in {vlm.clip.image for vlm in models.values()}:
        tower.register_forward_hook(count)
    with torch.random.fork_rng():
        make = None if recipe.augment else getattr(method, "prepare", None)
        kept = {} if make is None else make(models, batch, attack)
        once = seen[0], seen[1]
        for cycle in range(cycles):
            method.loss(models, replace(batch, cycle=cycle, kept=kept), attack)
    return once, ((seen[0] - once[0]) / cycles, (seen[1] - once[1]) / cycles)


def evaluation(todo: Todo, sizes: dict[Any, Any]) -> tuple[float, float] | None:
    """(forwards, gradients) of the evaluations, were every image to withstand everything; None if a size is not
    known."""
    total = [0.0, 0.0]
    for test, attacks in todo:
        n = images(test.data, test.subset, test.part, sizes)
        n = test.limit if n is None else n if test.limit is None else min(n, test.limit)
        if n is None:
            return None
        total[0] += n
        for attack in attacks:
            for i, amount in enumerate((0, 0) if attack is None else attacked(attack)):
                total[i] += n * amount
    return total[0], total[1]


def attacked(attack: Any) -> tuple[float, float]:
    """(forwards, gradients) that an attack takes for an image that withstands it."""
    if attack.name in TEXTUAL:
        return 0.0, 0.0  # its images are those of the clean accuracy; texts are not counted
    if hasattr(attack, "stages"):
        each = [attacked(stage) for stage in attack.stages()]
        return sum(f for f, _ in each), sum(g for _, g in each)
    if hasattr(attack, "queries") or hasattr(attack, "draws"):
        return float(getattr(attack, "queries", 0) or attack.draws), 0.0
    targets = getattr(attack, "targets", 1) if getattr(attack, "loss", "dlr-targeted") == "dlr-targeted" else 1
    factors = [getattr(attack, name, 1) for name in ("steps", "restarts", "eot", "searches")]
    return 1.0, float(math.prod([*factors, targets]))


def images(spec: str, subset: str, part: str, sizes: dict[Any, Any]) -> int | None:
    """The number of images of a slice, or None if it cannot be known without fetching the data."""
    return size_of(spec, subset, part, sizes)[0]


def size_of(spec: str, subset: str, part: str, sizes: dict[Any, Any]) -> tuple[int | None, int | None]:
    """(images, classes) of a slice: of data on this machine, else as the catalog says; None if not known."""
    key = (spec, subset, part)
    if key not in sizes:
        known = spec in names()
        found = opened(spec, subset, part) if not known or is_here(spec) else (None, None)
        sizes[key] = printed(facts_of(spec), subset, part) if known and found[0] is None else found
    size: tuple[int | None, int | None] = sizes[key]
    return size


def opened(spec: str, subset: str, part: str) -> tuple[int | None, int | None]:
    """(images, classes) of a source on this machine; the hub is not asked."""
    if spec.startswith("hf:"):
        return None, None
    try:
        task = load_task(spec, subset=subset)
    except UserError:
        return None, None
    return of_part({name: len(each) for name, each in task.parts.items()}, part), len(task.classes)


def printed(entry: Mapping[str, Any], subset: str, part: str) -> tuple[int | None, int]:
    """(images, classes) as the catalog says: of the hub's split, or of CoOp's where the hub has none. Where only all
    images are known, a fifth is taken to be tested on, as of a set without a split."""
    every = len(entry["classes"])
    classes = {"all": every, "base": (every + 1) // 2, "new": every // 2}[subset]
    coop = (entry["coop"] or {}).get("counts", {})
    n = of_part(entry["counts"] or ({"all": entry["total"] or sum(coop.values())} if entry["hub"] else coop), part)
    return (None if n is None else round(n * classes / every)), classes


def of_part(parts: Mapping[str, int], part: str) -> int | None:
    """Images of a part of a set with these parts, cut as `advtune.data.fewshot` cuts them."""
    if part == "all":
        return sum(parts.values()) or None
    if part not in parts and "all" in parts:
        test = parts["all"] / TEST_SHARE
        parts = {"train": round(parts["all"] - test), "test": round(test)}
    if part == "fit" and "val" in parts:
        return parts.get("train")
    if part in ("fit", "val") and part not in parts:
        n, share = parts.get("train"), 1 / VAL_SHARE
        return None if n is None else round(n * (share if part == "val" else 1 - share))
    return parts.get(part)


def pace(model: VLM) -> tuple[float, float]:
    """Seconds an image of a forward and of a gradient by the image, on the model's device; takes about a second."""
    size = 64 if model.device.type == "cuda" else 8
    x = torch.rand(size, 3, model.side, model.side, device=model.device)
    with torch.no_grad():
        f = model.classifier(model.tokens(["cat", "dog"], "a photo of a {}."))

    def forward() -> None:
        with torch.no_grad():
            f(x).sum().item()

    def gradient() -> None:
        z = x.clone().requires_grad_(True)
        torch.autograd.grad(f(z).float().sum(), z)[0].sum().item()

    return timed(forward) / size, timed(gradient) / size


def timed(call: Callable[[], None]) -> float:
    """Seconds of one call, after one that is not counted."""
    call()
    begin, count = time.monotonic(), 0
    while time.monotonic() - begin < SECONDS or count == 0:
        call()
        count += 1
    return (time.monotonic() - begin) / count


def estimate(wanted: Sequence[Run], out: Path | None, device: str, precision: str, as_json: bool) -> str:
    """The dry run as text: a table, or JSON. Loads the first backbone to time it; without it hours are unknown."""
    found = costs(wanted, out)
    speed, reason = None, ""
    try:
        if not all(each.done for each in found):
            speed = pace(runs.load(wanted[0].backbone, device, precision))
    except UserError as error:
        reason = f"No timing: {error}"
    if as_json:
        facts = [
            {"key": cost.key, "done": cost.done, "train": cost.train, "evaluate": cost.evaluate,
             "tests": [asdict(test) for test in run.tests],
             "attacks": [None if attack is None else attack_facts(attack) for attack in run.attacks],
             "hours": cost.hours(speed), "hours_typical": cost.hours(speed, True), **run.settings()}
            for run, cost in zip(wanted, found, strict=True)
        ]  # fmt: skip
        return json.dumps(facts, indent=1)
    return drawn(found, speed, reason)


def drawn(found: Sequence[Cost], speed: tuple[float, float] | None, reason: str) -> str:
    """The costs as a table with sums and what they mean."""
    from rich.console import Console
    from rich.table import Table

    grid = Table("Run", "State", "Train", "Evaluate", "Worst case", "Typical")
    for cost in found:
        both = [cost.hours(speed), cost.hours(speed, True)]
        state = "done" if cost.done else "to do"
        grid.add_row(cost.key, state, thousands(cost.train), thousands(cost.evaluate), *map(number, both))
    left = [cost for cost in found if not cost.done]
    lines = [f"{len(found)} runs, {len(found) - len(left)} done. Nothing was written."]
    for typical, words in ((False, "worst case"), (True, "typical case")):
        known = [hours for cost in left if (hours := cost.hours(speed, typical)) is not None]
        unknown = f"; {len(left) - len(known)} runs unknown" if len(known) < len(left) else ""
        lines.append(f"{words}: {number(sum(known) if known or not left else None)}{unknown}")
    lines += [
        "Train, Evaluate: thousands of images through the backbone, forwards + gradients. Worst case: every image",
        f"withstands every attack. Typical: an evaluation takes 1/{TYPICAL} of that. Text towers that learn, the texts",
        "that the attack text tries, and the weights' gradients beside the image's, are not counted.",
    ]
    if speed:
        lines.append(f"Timed here: {1e3 * speed[0]:.2f} ms a forward, {1e3 * speed[1]:.2f} ms a gradient, an image.")
    console = Console(width=max(120, Console().width))
    with console.capture() as text:
        console.print(grid)
    return "\n".join([text.get().rstrip(), *lines, *([reason] if reason else [])])


def thousands(amount: tuple[float, float] | None) -> str:
    return "unknown" if amount is None else " + ".join(f"{each / 1000:.3g}" for each in amount)


def number(hours: float | None) -> str:
    return "unknown" if hours is None else clock(3600 * hours)
