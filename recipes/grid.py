"""One cell of a grid: tune once, evaluate once, whatever was interrupted. Shared by the recipes here."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import advtune
from advtune import results, runs
from advtune.attacks import PGD
from advtune.errors import UserError
from advtune.methods import configure
from advtune.options import as_options


@dataclass(frozen=True)
class Cell:
    """A method tuned on a part of a data set, evaluated on parts of others."""

    name: str
    method: str
    data: str
    evaluate: tuple[str, ...]
    shots: int | None = None
    seed: int = 0
    epochs: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    train_attack: dict[str, Any] = field(default_factory=dict)
    attacks: tuple[PGD, ...] = ()
    part: str = "train"
    eval_part: str = "test"
    limit: int | None = None
    train_limit: int | None = None


def work(cells: list[Cell], backbone: str, out: Path) -> None:
    """Do every cell that is not done. A cell that is refused (UserError) does not stop the rest; exits with 1."""
    model = advtune.load(backbone)
    tasks: dict[str, Any] = {}
    begin, failed = time.monotonic(), []
    for i, cell in enumerate(cells):
        try:
            one(cell, model, tasks, out / cell.name)
        except UserError as error:
            failed.append(f"{cell.name}: {error}")
        print(f"[{i + 1}/{len(cells)}, {time.monotonic() - begin:.0f} s] {cell.name}", file=sys.stderr, flush=True)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    if failed:
        sys.exit(1)


def one(cell: Cell, backbone: Any, tasks: dict[str, Any], folder: Path) -> None:
    """Tune unless the run folder is finished, then add the rows that its results.jsonl lacks."""
    for name in {cell.data, *cell.evaluate}:
        tasks.setdefault(name, None)
        tasks[name] = tasks[name] or advtune.load_task(name)
    path = folder / runs.RESULTS
    rows = results.read(path) if path.is_file() else []
    check_settings(cell, rows, backbone, folder)
    have = {key(row) for row in rows}
    todo = [
        (d, a)
        for d in cell.evaluate
        for a in cell.attacks
        if (d, cell.eval_part, cell.limit, a.eps, a.steps) not in have
    ]
    if not todo:
        return
    tuned = backbone
    if cell.method != "zero-shot":
        partial = folder.with_name(folder.name + ".partial")
        tuned = advtune.tune(
            cell.method, backbone, tasks[cell.data], shots=cell.shots, seed=cell.seed, epochs=cell.epochs,
            options=cell.options, attack=cell.train_attack, part=cell.part, limit=cell.train_limit, out=folder,
            resume=folder.exists() or partial.exists(), show=False,
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for data, attack in todo:
        row = advtune.evaluate(tuned, tasks[data], attack, part=cell.eval_part, limit=cell.limit, show=False)
        results.append(path, row)


def check_settings(cell: Cell, rows: list[advtune.Row], backbone: Any, folder: Path) -> None:
    """Raises UserError when a cell's rows were made with other settings: a name proves nothing."""
    if cell.method == "zero-shot":
        same = [row.backbone["sha256"] == backbone.origin.sha256 for row in rows]
    else:
        epochs = {} if cell.epochs is None else {"epochs": cell.epochs}
        method, recipe, attack = configure(cell.method, {**cell.options, **epochs}, cell.train_attack)
        want = (as_options(method), as_options(recipe), attack.eps, attack.steps, backbone.origin.sha256)
        same = [
            want == (r.options, r.recipe, r.train["attack"]["eps"], r.train["attack"]["steps"], r.backbone["sha256"])
            for r in rows
            if r.train
        ]
    if not all(same):
        raise UserError(f"{folder}: its rows were made with other settings; remove it or choose another --out")


def key(row: advtune.Row) -> tuple[Any, ...]:
    attack = row.attack or {}
    return row.data["spec"], row.data["part"], row.data["limit"], attack.get("eps"), attack.get("steps")
