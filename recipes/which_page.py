"""The tables and the picture of docs/which-method.md: every method's place on clean and robust accuracy, and what our
own gains over the others on the same images, from rows.

Command:  python recipes/which_page.py   (--check: do page and rows agree?)
Reads:    docs/results/offline-few-shot.jsonl; of benchmarks/results/scale.json what a training image costs; for a mark
          `<!-- claim FILE RIVAL ... -->` that file of docs/results. All outside the marks is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from advtune.comparison import bootstrap, mcnemar
from advtune.methods import METHODS
from advtune.report.plot import pareto, pictures, scatter_panels
from advtune.report.table import group_by, table
from advtune.results import Row, read, write_atomic

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "which-method.md", ROOT / "docs" / "assets" / "which-method.svg"
ROWS, COUNTS = ROOT / "docs" / "results" / "offline-few-shot.jsonl", ROOT / "benchmarks" / "results" / "scale.json"
MARK = re.compile(r"(<!-- which -->\n).*?(<!-- end -->)", re.DOTALL)
CLAIM = re.compile(r"(<!-- claim (\S+) ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
OURS = "guided"
NEAR, FAR = 1 / 255, 4 / 255
NO_LABELS = ("fare",)


def rows_at(eps: float) -> list[Row]:
    return [row for row in read(ROWS) if row.attack and abs(row.attack["eps"] - eps) < 1e-9]


def percent(line: dict[str, Any], kind: str) -> str:
    spread = line[f"{kind}_sd"]
    return f"{100 * line[f'{kind}_accuracy']:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "")


def lines() -> str:
    """Markdown: a line a method, the most robust first; bold where no other is at least as good in both."""
    near, far = ({line["method"]: line for line in table(rows_at(eps))} for eps in (NEAR, FAR))
    counts = json.loads(COUNTS.read_text())["B/32"]
    points = [(line["clean_accuracy"], line["robust_accuracy"]) for line in near.values()]
    front = {name for i, name in enumerate(near) if i in pareto(points)}
    out = [
        "| method | trains | labels | clean | 1/255 | 4/255 | GFLOP | kept |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in sorted(near, key=lambda name: -near[name]["robust_accuracy"]):
        cost = f"{counts[name]['image'] / 1e9:.0f}" if name in counts else "-"
        labels = "-" if name == "zero-shot" else "no" if name in NO_LABELS else "yes"
        trains = "-" if name == "zero-shot" else METHODS[name].trains
        accuracies = [percent(near[name], "clean"), percent(near[name], "robust"), percent(far[name], "robust")]
        shown = f"**`{name}`**" if name in front else f"`{name}`"
        out.append(f"| {' | '.join([shown, trains, labels, *accuracies, cost])} |")
    return "\n".join(out)


def claim(name: str, rivals: Sequence[str]) -> str:
    """Markdown: what guided gains on each rival, in points on the same images, with 95 % bootstrap intervals over the
    images; the mean over data sets, each the mean over its shots and seeds."""
    rows = [row for row in read(ROWS.parent / name) if row.robust and row.train and row.attack["eps"] == NEAR]
    head = ["against", "under", "sets", "tunings", "clean", "robust", "better : worse", "verdict"]
    out = [head, ["---", "---", *["---:"] * 5, "---"]]
    for rival in rivals:
        ours, theirs = flags_of(rows, OURS), flags_of(rows, rival)
        shared = sorted(ours.keys() & theirs.keys())
        sets = group_by(shared, lambda key: key[0])
        gains, told = {}, [0, 0]
        for which in ("clean", "robust"):
            pairs = {key: cut(theirs[key][which], ours[key][which]) for key in shared}
            images = [np.mean([b - a for a, b in map(pairs.get, keys)], 0) for keys in sets.values()]
            low, high = bootstrap(np.concatenate(images))
            gains[which] = (float(np.concatenate(images).mean()), low, high)
            if which == "robust":
                told = [
                    sum(mcnemar(a, b) < 0.05 and sign * (b - a).sum() > 0 for a, b in pairs.values())
                    for sign in (1, -1)
                ]
        shown = [f"{100 * mean:+.1f} \\[{100 * low:.1f}, {100 * high:.1f}\\]" for mean, low, high in gains.values()]
        under = ", ".join(sorted({theirs[key]["attack"] for key in shared}))
        counts = [str(len(sets)), str(len(shared)), *shown, f"{told[0]} : {told[1]}"]
        out.append([f"`{rival}`", under, *counts, won(gains)])
    return "\n".join(f"| {' | '.join(line)} |" for line in out)


def flags_of(rows: Sequence[Row], method: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """(set, shots, seed) -> which images are right, clean and robust, under AutoAttack; where it was not run, under
    PGD, an upper bound of what it would leave."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row.attack["name"] == "autoattack", row.time)):
        if row.method == method:
            flags = {which: np.array([int(flag) for flag in row.flags[which]]) for which in ("clean", "robust")}
            key = (row.data["name"], row.train["shots"] or 0, row.train["seed"])
            found[key] = flags | {"attack": row.attack["name"]}
    return found


def cut(a: Any, b: Any) -> tuple[Any, Any]:
    """The images that both saw: fewer are the first of more (advtune.data.fewshot)."""
    n = min(len(a), len(b))
    return a[:n], b[:n]


def won(gains: Mapping[str, tuple[float, float, float]]) -> str:
    """Two points more of the one, significant, at no less of the other."""
    clean, robust = gains["clean"], gains["robust"]
    for more, other in ((robust, clean), (clean, robust)):
        if more[0] >= 0.02 and more[1] > 0 and other[0] >= 0:
            return "won"
    return "not won"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    old = PAGE.read_text()
    new = MARK.sub(lambda found: f"{found[1]}\n{lines()}\n\n{found[2]}", old)
    new = CLAIM.sub(lambda found: f"{found[1]}\n{claim(found[2], found[3].split())}\n\n{found[4]}", new)
    if args.check:
        sys.exit(0 if new == old and PICTURE.is_file() else f"{PAGE} is not what the rows give: python {sys.argv[0]}")
    write_atomic(PICTURE, pictures(scatter_panels(rows_at(NEAR)), ["svg"])["svg"])
    write_atomic(PAGE, new)


if __name__ == "__main__":
    main()
