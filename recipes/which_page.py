"""The table and the picture of docs/which-method.md: every method's place on clean and robust accuracy, from rows.

Command:  python recipes/which_page.py   (--check: do page and rows agree?)
Reads:    docs/results/offline-few-shot.jsonl (cifar10, 16 shots, PGD), and of benchmarks/results/scale.json what a
          training image costs.
All outside the two marks is written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from marks import renew

from advtune.methods import METHODS
from advtune.options import as_options
from advtune.report.plot import pareto, pictures, scatter_panels
from advtune.report.table import table
from advtune.results import Row, read, write_atomic

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "which-method.md", ROOT / "docs" / "assets" / "which-method.svg"
ROWS, COUNTS = ROOT / "docs" / "results" / "offline-few-shot.jsonl", ROOT / "benchmarks" / "results" / "scale.json"
DATA, SHOTS = "cifar10", 16
NEAR, FAR = 1 / 255, 4 / 255
NO_LABELS = ("fare", "agft")


def rows_at(eps: float) -> list[Row]:
    """The rows that the page compares: one data set, one amount of images, one attack."""
    attacked = [row for row in read(ROWS) if row.attack and (row.attack["name"], row.attack["eps"]) == ("pgd", eps)]
    found = [row for row in attacked if row.data["name"] == DATA and (not row.train or row.train["shots"] == SHOTS)]
    if len(table(found)) != len({row.method for row in found}):
        raise SystemExit(f"{ROWS}: a method has two settings at eps {eps}")
    return found


def percent(line: dict[str, Any], kind: str) -> str:
    spread = line[f"{kind}_sd"]
    return f"{100 * line[f'{kind}_accuracy']:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "")


def lines() -> str:
    """Markdown: a line a method, the most robust first; bold where no other is at least as good in both."""
    rows, far_rows = rows_at(NEAR), rows_at(FAR)
    near, far = ({line["method"]: line for line in table(of)} for of in (rows, far_rows))
    counts = json.loads(COUNTS.read_text())["B/32"]
    points = [(line["clean_accuracy"], line["robust_accuracy"]) for line in near.values()]
    tuned = [row for row in rows if row.method in METHODS]
    usual = {row.method for row in tuned if row.options == as_options(METHODS[row.method]())}  # what counts are of
    front = {name for i, name in enumerate(near) if i in pareto(points)}
    out = [
        "| method | trains | labels | clean | 1/255 | 4/255 | GFLOP |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for name in sorted(near, key=lambda name: -near[name]["robust_accuracy"]):
        cost = f"{counts[name]['image'] / 1e9:.0f}" if name in counts and name in usual else "-"
        labels = "-" if name == "zero-shot" else "no" if name in NO_LABELS else "yes"
        trains = "-" if name == "zero-shot" else METHODS[name].trains.partition(", or what ")[0]
        accuracies = [percent(near[name], "clean"), percent(near[name], "robust"), percent(far[name], "robust")]
        shown = f"**`{name}`**" if name in front else f"`{name}`"
        out.append(f"| {' | '.join([shown, trains, labels, *accuracies, cost])} |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.check and not PICTURE.is_file():
        sys.exit(f"{PICTURE} is not there; run: python {sys.argv[0]}")
    if not args.check:
        write_atomic(PICTURE, pictures(scatter_panels(rows_at(NEAR)), ["svg"])["svg"])
    renew(PAGE, {"which": lines}, args.check)


if __name__ == "__main__":
    main()
