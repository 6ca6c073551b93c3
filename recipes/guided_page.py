"""The tables of docs/guided.md, from the rows of the search and of the claims in docs/results.

Command:  python recipes/guided_page.py --take runs/design-space   (--check: do page and rows agree?)
--take adds the rows of that folder to docs/results/design-space.jsonl; of a run made again the new rows count.
A mark is a line `<!-- search STAGE -->`, `<!-- others -->` (runs that no candidate of a stage is, any more) or
`<!-- claim NAME FILE ... -->`, and what it makes ends at `<!-- end -->`. All else is written by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import design_space
import numpy as np
from claims import CLAIMS, claimed, interval
from marks import markdown, points, renew

from advtune.protocols import ZERO_SHOT
from advtune.results import Row, read, write_atomic

ROOT = Path(__file__).parents[1]
PAGE, ROWS = ROOT / "docs" / "guided.md", ROOT / "docs" / "results"
SEARCH, SEEDS = "design-space.jsonl", range(3)
ASIDE = ("guide", "none, consistency"), ("transfer", ZERO_SHOT)  # what candidates are held beside, here and away
Tried = dict[str, list[Row]]  # a candidate's rows, by set


def search(stage: str) -> str:
    """A line a candidate, in the order tried: clean / robust accuracy on each set, the mean that decides, and that less
    the reference's on the same images and seeds. What decides: every set; in transfer the classes not tuned on."""
    rows, sets = searched(), design_space.sets_of(stage)
    away, aside = stage in design_space.AWAY, stage != "baselines"
    deciding, beside = ("new",) if away else sets, ASIDE[away]
    mean_of = f"Mean of *{deciding[0]}*" if away else "Mean"
    head = ["Candidate", "Seeds", *sets, mean_of, *([f"Less *{beside[1]}*, points"] if aside else [])]
    out, reference = [head], tried(rows, *beside)
    for label in design_space.STAGES[stage]():
        found = tried(rows, stage, label)
        if found:
            seeds = sorted({len(of) for of in found.values()})
            whole = found.keys() == set(sets) and len(seeds) == 1
            cells = [" / ".join(f"{each:.1f}" for each in both(found[name])) if name in found else "-" for name in sets]
            decides = {name: found[name] for name in deciding} if whole else {}
            mean = f"{np.mean([both(of) for of in decides.values()]):.1f}" if whole else "-"
            less = [against(decides, reference) if whole else "-"] if aside else []
            out.append([label, " to ".join(map(str, seeds)), *cells, mean, *less])
    return markdown(out, words=1)


def searched() -> dict[str, Row]:
    """The rows of the search by run folder. Raises SystemExit for one of other images than those to choose on."""
    rows = read(ROWS / SEARCH)
    for row in rows:
        if row.data["part"] != "val" or (row.train and row.train["part"] != "fit"):
            raise SystemExit(f"{row.run}: the search has no business with its {row.data['part']} images")
    return {place(row): row for row in rows}


def place(row: Row) -> str:
    """The run's key, whatever folder the study was in, or the word for no tuning, and what it was tested on."""
    return "/".join([*(Path(row.run).parts[-3:] if row.train else [ZERO_SHOT]), design_space.scored(row)])


def tried(rows: Mapping[str, Row], stage: str, label: str) -> Tried:
    options = design_space.STAGES[stage]()[label]
    found: Tried = {}
    for name in design_space.sets_of(stage):
        keys = [design_space.run(stage, label, options, name, seed).key for seed in SEEDS]
        runs = [ZERO_SHOT] if label == ZERO_SHOT else keys
        found[name] = [rows[key] for run in runs if (key := f"{run}/{name}") in rows]
    return {name: of for name, of in found.items() if of}


def others() -> str:
    """The runs that are no candidate of a stage: tried before stages were as they are."""
    rows = searched()
    known = {id(row) for stage, of in design_space.STAGES.items() for label in of() for found in
             tried(rows, stage, label).values() for row in found}  # fmt: skip
    out = [["Run", "Set", "Clean / robust", "Options"]]
    for row in rows.values():
        if id(row) not in known:
            told = ("trainable", "guide", "sees", "lam", "consistency")
            options = ", ".join(f"{key}={row.options[key]}" for key in told if key in row.options)
            numbers = "{:.1f} / {:.1f}".format(*both([row]))
            out.append([Path(row.run).parts[-2], design_space.scored(row), numbers, options])
    return markdown(out, words=4)


def both(rows: Sequence[Row]) -> tuple[float, float]:
    """Clean and robust accuracy in percent, the mean over seeds."""
    clean = np.mean([row.clean["accuracy"] for row in rows])
    return 100 * float(clean), 100 * float(np.mean([(row.robust or {})["accuracy"] for row in rows]))


def against(found: Tried, reference: Tried) -> str:
    """The mean of clean and robust accuracy less the reference's, with its bootstrap interval over images and seeds."""
    gaps: list[list[np.ndarray]] = []
    for name, rows in found.items():
        beside = {seed(row): row for row in reference.get(name, [])}
        pairs = [(row, other) for row in rows if (other := beside.get(seed(row)) or beside.get(None))]
        if not pairs:
            return "-"
        gaps.append([np.stack([flags(row) - flags(other) for row, other in pairs])])
    low, high = interval(gaps)
    numbers: dict[str, Any] = {
        "difference": float(np.mean([each[0].mean() for each in gaps])),
        "low": low,
        "high": high,
    }
    return points(numbers)


def seed(row: Row) -> int | None:
    """The training's; none where nothing was tuned."""
    return row.train["seed"] if row.train else None


def flags(row: Row) -> np.ndarray:
    return np.mean([[float(flag) for flag in row.flags[which]] for which in ("clean", "robust")], 0)


def claim(name: str, *files: str) -> str:
    return claimed(CLAIMS[name], read(*(ROWS / file for file in files)))


def take(folder: Path) -> None:
    new = read(*sorted(folder.rglob("results.jsonl")))
    made = {place(row) for row in new}
    kept = [row for row in read(ROWS / SEARCH) if place(row) not in made]
    write_atomic(ROWS / SEARCH, "".join(f"{row.to_json()}\n" for row in [*kept, *new]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true")
    what.add_argument("--take", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.take:
        take(args.take)
    renew(PAGE, {"search": search, "others": others, "claim": claim}, args.check)


if __name__ == "__main__":
    main()
