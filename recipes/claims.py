"""One method of ours against each of its rivals, from rows on disk: the tables of claims in docs/which-method.md.

A claim is won against a rival when robust accuracy is at least 2 points higher and clean accuracy no less, or the
reverse, on the average of the sets. Higher: the 95 % interval leaves 0 out, and every seed points that way. No less:
the interval's lower end is above -2 points. The interval is a bootstrap over images, drawn within each set; an image's
number is the mean over shots and seeds. Where a rival has no row under our attack its PGD row stands for it: the rival
is then met by the weaker attack, and the difference shown is, but for chance, the least that it can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from advtune.report.table import group_by, pixels
from advtune.results import Row

MARGIN = 0.02
EPS = "1/255"
ATTACKS = {"pgd": "PGD", "autoattack": "AutoAttack"}  # the weaker first
HEAD = [
    "Against", "Sets", "Models", "Images a set", "Attack on ours / theirs", "Robust, ours / theirs", "Robust, points",
    "Clean, ours / theirs", "Clean, points", "Claim",
]  # fmt: skip
Cell = tuple[str, int | None, int]  # set tested on, shots, seed of the training


def claim(rows: Sequence[Row], ours: str, rivals: Sequence[str]) -> str:
    """A Markdown table: under each attack that ours has rows of, a line a rival."""
    lines = [HEAD, ["---", *["---:"] * (len(HEAD) - 1)]]
    for attack in reversed(ATTACKS):
        for rival in rivals:
            if pairs := paired(rows, ours, rival, attack):
                lines.append(line(rival, pairs))
    return "\n".join(f"| {' | '.join(each)} |" for each in lines)


def paired(rows: Sequence[Row], ours: str, rival: str, attack: str) -> dict[str, list[tuple[Row, Row]]]:
    """Ours and theirs of the same set, shots and seed, by set; only what both sides have."""
    mine, theirs = (cells(rows, method) for method in (ours, rival))
    found: dict[str, list[tuple[Row, Row]]] = {}
    for cell in sorted(mine.keys() & theirs.keys(), key=str):
        other = theirs[cell].get(attack) or theirs[cell].get("pgd")
        if attack in mine[cell] and other:
            found.setdefault(cell[0], []).append((mine[cell][attack], other))
    return found


def cells(rows: Sequence[Row], method: str) -> dict[Cell, dict[str, Row]]:
    """Of each model the rows at 1/255 by attack. Raises SystemExit when one is there twice."""
    found: dict[Cell, dict[str, Row]] = {}
    for row in rows:
        if row.method != method or not (row.train and row.attack and row.robust) or pixels(row.attack["eps"]) != EPS:
            continue
        if row.data["part"] != "test":
            raise SystemExit(f"{method}: a row of {row.data['name']} is not of test images")
        of = found.setdefault((row.data["name"], row.train["shots"], row.train["seed"]), {})
        if of.setdefault(row.attack["name"], row) is not row:
            raise SystemExit(
                f"{method}: two rows of {row.data['name']}, seed {row.train['seed']}, {row.attack['name']}"
            )
    return found


def line(rival: str, pairs: dict[str, list[tuple[Row, Row]]]) -> list[str]:
    flat = [pair for each in pairs.values() for pair in each]
    names = [sorted({ATTACKS[(row.attack or {})["name"]] for row in side}) for side in zip(*flat, strict=True)]
    robust, clean = numbers(pairs, "robust"), numbers(pairs, "clean")
    images = sorted({common(each) for each in pairs.values()})
    counts = [", ".join(pairs), str(len(flat)), " to ".join(map(str, dict.fromkeys((images[0], images[-1]))))]
    attacks = " / ".join(", ".join(each) for each in names)
    return [rival, *counts, attacks, *shown(robust), *shown(clean), verdict(robust, clean)]


def common(pairs: Sequence[tuple[Row, Row]]) -> int:
    """Images that all rows of a set hold: of two test slices of one set the shorter is the beginning of the longer."""
    return min(row.clean["n"] for pair in pairs for row in pair)


def numbers(pairs: dict[str, list[tuple[Row, Row]]], which: str) -> dict[str, Any]:
    """The accuracy of both sides and their difference: on average over sets, with its interval, and seed by seed."""
    sides = {
        name: np.array([[flags(row, which, common(each)) for row in pair] for pair in each])  # [pairs, 2, images]
        for name, each in pairs.items()
    }
    ours, theirs = (fmean(float(side[:, i].mean()) for side in sides.values()) for i in (0, 1))
    low, high = interval([(side[:, 0] - side[:, 1]).mean(0) for side in sides.values()])
    seeds = group_by(
        [(row.train["seed"], set_, i) for set_, each in pairs.items() for i, (row, _) in enumerate(each) if row.train],
        lambda place: place[0],
    )
    of_seeds = [
        fmean(float((sides[name][i, 0] - sides[name][i, 1]).mean()) for _, name, i in places)
        for places in seeds.values()
    ]
    return {"ours": ours, "theirs": theirs, "difference": ours - theirs, "low": low, "high": high, "seeds": of_seeds}


def flags(row: Row, which: str, n: int) -> list[float]:
    return [float(flag) for flag in row.flags[which][:n]]


def interval(sets: Sequence[np.ndarray], draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over sets of the mean of `sets`, each [N], drawn within each."""
    rng = np.random.default_rng(0)
    means = [each[rng.integers(len(each), size=(draws, len(each)))].mean(1) for each in sets]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    return float(low), float(high)


def verdict(robust: dict[str, Any], clean: dict[str, Any]) -> str:
    for more, other, what in ((robust, clean, "robust"), (clean, robust, "clean")):
        higher = more["difference"] >= MARGIN and more["low"] > 0 and min(more["seeds"]) > 0
        if higher and other["low"] > -MARGIN:
            return f"won: {what}"
    return "not won"


def shown(found: dict[str, Any]) -> list[str]:
    difference, low, high = (100 * found[key] for key in ("difference", "low", "high"))
    both = f"{100 * found['ours']:.1f} / {100 * found['theirs']:.1f}"
    return [both, f"{difference:+.1f} \\[{low:.1f}, {high:.1f}\\]"]
