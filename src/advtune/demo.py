"""The main job on what is in the package: four methods against zero-shot, on two cores, in minutes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advtune import runs
from advtune.attacks import PGD
from advtune.data import load_task
from advtune.evaluation import evaluate
from advtune.report import render, scatter
from advtune.results import Row, append, write_atomic
from advtune.train import tune

BACKBONE, DATA, SHOTS = "mini", "fashion-mnist-mini", 16
ATTACK = PGD(eps=1 / 255, steps=20)


@dataclass(frozen=True)
class Entry:
    """A method of the demo with what differs from its paper's recipe, to fit 160 images and two cores."""

    method: str
    epochs: int
    options: dict[str, Any] = field(default_factory=dict)


SHORT = {"batch_size": 8, "augment": False}
# Chosen on the fit/val parts of the embedded training images, never on its test images.
ENTRIES = (
    Entry("tecoa", 10, {"lr": 3e-3, "batch_size": 32}),
    Entry("pmg-aft", 10, {"lr": 3e-3, "batch_size": 32}),
    Entry("capt", 6, {**SHORT, "lr": 0.3, "ce": "both", "lam": 1.0}),
    Entry("apd", 6, {**SHORT, "lr": 0.1, "ce": 1.0}),
)


def run(out: Path, seed: int = 0) -> list[Row]:
    """Tune, evaluate, and write OUT/report.md with clean-robust.png; the rows."""
    task = load_task(DATA)
    clip = runs.load(BACKBONE)
    rows = []
    for entry in (None, *ENTRIES):
        name = entry.method if entry else "zero-shot"
        folder, model = out / name, clip
        if entry:
            model = tune(
                entry.method, clip, task, shots=SHOTS, seed=seed, epochs=entry.epochs,
                options=entry.options, out=folder, overwrite=True,
            )  # fmt: skip
        else:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / runs.RESULTS).unlink(missing_ok=True)
        print(f"{name}: evaluating", file=sys.stderr)
        rows.append(evaluate(model, task, ATTACK))
        append(folder / runs.RESULTS, rows[-1])
    table = render(rows, "markdown")
    scatter(rows, out / "clean-robust.png", title="Clean against robust accuracy")
    intro = (
        "# advtune demo\n\n"
        f"{SHOTS} images a class of {DATA} to tune, {rows[0].clean['n']} to test, on the embedded backbone. "
        "It is a small stand-in: read these numbers as a demonstration, not as results of CLIP.\n\n"
    )
    write_atomic(out / "report.md", f"{intro}{table}\n\n![clean against robust accuracy](clean-robust.png)\n")
    return rows
