"""The claims of docs/guided.md: what was promised before any test image was looked at, and what the rows say of it.

A claim is won against a rival when robust accuracy is at least 2 points higher and clean accuracy no less, or the
reverse, both on the average of the promised sets. Higher: the 95 % interval leaves 0 out. No less: the difference is
not negative and its interval begins above -2 points. Lost: the rival wins in this sense. The interval is a bootstrap
over test images, drawn within each set, and over training seeds, drawn within each set and number of shots; p is of a
test that flips the signs of images, and is of these models. Our rows under AutoAttack make the claim. Where a rival has
none its PGD row stands for it: met by the weaker attack it looks no worse, but for chance, than it is, so that ours may
win such a comparison and cannot lose it. AutoAttack may be on the first images of the slice that PGD is on; clean
accuracy is then of the whole slice. A model that was not tuned stands beside every seed of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from marks import markdown, points

from advtune.protocols import ZERO_SHOT
from advtune.report.table import canonical, group_by, pixels
from advtune.results import Row

MARGIN, EPS, OURS, DRAWS = 0.02, "1/255", "guided", 10_000
ATTACKS = {"autoattack": "AutoAttack", "pgd": "PGD"}
HEAD = [
    "Against", "Models", "Attack, ours / theirs", "n", "Robust", "Robust, points", "p", "Clean", "Clean, points", "p",
    "Told",
]  # fmt: skip
Cell = tuple[str, int | None, int]  # set tested on, shots, seed of the training


@dataclass(frozen=True)
class Claim:
    """What is promised: the rivals, and each model that is compared. `trained`: one set, else each set itself.
    `beside`: methods that are compared likewise, and of which nothing is promised."""

    rivals: tuple[str, ...]
    sets: tuple[str, ...]
    shots: tuple[int | None, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    trained: str = ""
    beside: tuple[str, ...] = ()

    def cells(self) -> list[Cell]:
        return [(name, shots, seed) for name in self.sets for shots in self.shots for seed in self.seeds]


SETS = ("caltech101", "cifar10", "fashion-mnist")
CLAIMS = {
    "few-shot": Claim(("capt", "apd", "fap", "advmaple"), SETS, (4, 16), beside=("tecoa",)),
    "transfer": Claim(
        ("tecoa", "fare", "pmg-aft", "agft", "tga-zsr"), SETS, (None,), trained="tinyimagenet", beside=(ZERO_SHOT,)
    ),
}


def claimed(claim: Claim, rows: Sequence[Row]) -> str:
    """A Markdown table, a line a rival, first under AutoAttack, then under PGD, and a sentence on the first.

    Raises SystemExit for a rival without a row, and for rows that may not be compared.
    """
    ours, against = models(claim, rows, OURS), (*claim.rivals, *claim.beside)
    theirs = {rival: models(claim, rows, rival) for rival in against}
    whole, won, missing, lines = len(claim.cells()), 0, False, [HEAD]
    for attack in ATTACKS:
        for rival in against:
            pairs = paired(ours, theirs[rival], attack)
            if not pairs:
                raise SystemExit(f"{OURS} and {rival} have no model in common under {attack}")
            clean, robust = differences(pairs, "clean"), differences(pairs, "robust")
            same = all(row.attack["name"] == other.attack["name"] for (row, _), (other, _) in pairs.values())
            word = verdict(robust, clean, same) if len(pairs) == whole else f"{len(pairs)} of {whole} models"
            counts = rival in claim.rivals
            if attack == "autoattack" and counts:
                won += word.startswith("won")
                missing |= len(pairs) < whole
            name = rival if counts else f"beside: {rival}"
            lines.append([name, str(len(pairs)), *facts(pairs), *shown(robust), *shown(clean), word])
    holds = "the claim holds" if won == len(claim.rivals) else "the claim does not hold"
    end = "not all of the models are there" if missing else holds
    return f"{markdown(lines, words=1)}\n\nUnder AutoAttack: won against {won} of {len(claim.rivals)}; {end}."


def models(claim: Claim, rows: Sequence[Row], method: str) -> dict[Cell, dict[str, Row]]:
    """Of each promised model its rows at 1/255, by attack. Raises SystemExit for rows that do not belong together."""
    found: dict[Cell, dict[str, Row]] = {}
    for row in rows:
        attack = row.attack or {}
        asked = row.method == method and attack.get("name") in ATTACKS and pixels(attack["eps"]) == EPS
        for cell in promised(claim, row) if asked else ():
            if found.setdefault(cell, {}).setdefault(attack["name"], row) is not row:
                raise SystemExit(f"{method}: two rows of {cell} under {attack['name']}")
    flat = [row for each in found.values() for row in each.values()]
    how = [[row.options, row.recipe, (row.train or {}).get("attack")] for row in flat]
    one("options, recipe or training attack", how, method)
    for cell, each in found.items():
        one(f"model of {cell}", [row.model for row in each.values()], method)
    return found


def promised(claim: Claim, row: Row) -> list[Cell]:
    """The promised models that a row is of: one or none; of a set's all where nothing was tuned."""
    name, train = row.data["name"], row.train
    if train and train["name"] != (claim.trained or name):
        return []
    return [
        cell for cell in claim.cells() if cell[0] == name and (not train or cell[1:] == (train["shots"], train["seed"]))
    ]


def paired(ours: dict[Cell, dict[str, Row]], theirs: dict[Cell, dict[str, Row]], attack: str) -> dict[Cell, Any]:
    """For each model of both sides: (the row attacked, the row with the most images) of ours and of theirs."""
    found = {}
    for cell, mine in ours.items():
        rival = theirs.get(cell, {})
        if attack in mine and (other := rival.get(attack) or rival.get("pgd")):
            found[cell] = tuple((row, longest(side)) for row, side in ((mine[attack], mine), (other, rival)))
    for name, cells in group_by(list(found), lambda cell: cell[0]).items():
        rows = [row for cell in cells for side in found[cell] for row in side]
        about = [
            [row.data.get(key) for key in ("part", "subset", "resolution", "classes", "texts_sha256")] for row in rows
        ]
        one(f"words, classes, part or resolution of {name}", about, "both")
        one(f"backbone on {name}", [row.backbone["sha256"] for row in rows], "both")
        for n, of in group_by(rows, lambda row: row.clean["n"]).items():
            one(f"first {n} images of {name}", [row.data["sha256"] for row in of], "both")
        if any(row.data.get("skipped") or row.data["part"] != "test" for row in rows):
            raise SystemExit(f"{name}: rows with images left out, or not of test images")
    return found


def one(what: str, values: Sequence[Any], who: str) -> None:
    if len({canonical(value) for value in values}) > 1:
        raise SystemExit(f"{who}: not one {what}")


def longest(rows: dict[str, Row]) -> Row:
    return max(rows.values(), key=lambda row: row.clean["n"])


def facts(pairs: dict[Cell, Any]) -> list[str]:
    """The attacks on both sides, and on how many images of each set."""
    sides = [sorted({ATTACKS[pair[side][0].attack["name"]] for pair in pairs.values()}) for side in (0, 1)]
    n = sorted({min(row.clean["n"] for row, _ in pair) for pair in pairs.values()})
    return [
        " / ".join(" or ".join(side) for side in sides),
        " to ".join(str(each) for each in dict.fromkeys((n[0], n[-1]))),
    ]


def differences(pairs: dict[Cell, Any], which: str) -> dict[str, Any]:
    """Accuracy of ours and of theirs, and their difference with interval and p: the mean over sets, of each over shots,
    of these over seeds, of these over images."""
    sets: list[list[np.ndarray]] = []  # a set's, for each number of shots, [seeds, ours and theirs, images]
    for own in group_by(list(pairs), lambda cell: cell[0]).values():
        rows = {cell: [row[which == "clean"] for row in pairs[cell]] for cell in own}
        n = min(row.clean["n"] for pair in rows.values() for row in pair)
        flags = {cell: np.array([[float(f) for f in r.flags[which][:n]] for r in pair]) for cell, pair in rows.items()}
        sets.append([np.stack([flags[cell] for cell in same]) for same in group_by(own, lambda cell: cell[1]).values()])
    ours, theirs = (float(np.mean([np.mean([each[:, i].mean() for each in own]) for own in sets])) for i in (0, 1))
    gaps = [[each[:, 0] - each[:, 1] for each in own] for own in sets]
    low, high = interval(gaps)
    numbers = {"ours": ours, "theirs": theirs, "difference": ours - theirs, "low": low, "high": high}
    return numbers | {"p": flipped([np.mean([each.mean(0) for each in own], 0) for own in gaps])}


def interval(sets: Sequence[Sequence[np.ndarray]]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over sets, of each over shots, of `sets[..][..]` [seeds, images]:
    images are drawn once a set, the same for all its models, seeds within each number of shots."""
    rng, total = np.random.default_rng(0), np.zeros(DRAWS)
    for own in sets:
        n = own[0].shape[1]
        images = rng.multinomial(n, np.full(n, 1 / n), DRAWS) / n
        for each in own:
            seeds = rng.multinomial(len(each), np.full(len(each), 1 / len(each)), DRAWS) / len(each)
            total += np.einsum("ds,sn,dn->d", seeds, each, images, optimize=True) / len(own) / len(sets)
    low, high = np.quantile(total, [0.025, 0.975])
    return float(low), float(high)


def flipped(sets: Sequence[np.ndarray]) -> float:
    """Two-sided p of a mean of 0 over sets of numbers [images]: how often signs of chance give as much."""
    rng = np.random.default_rng(0)
    chance = sum(rng.choice([-1.0, 1.0], (DRAWS, len(each))) @ each / len(each) for each in sets)
    seen = abs(sum(each.mean() for each in sets))
    return float((1 + (np.abs(chance) >= seen - 1e-9).sum()) / (1 + DRAWS))


def verdict(robust: dict[str, Any], clean: dict[str, Any], same: bool = True) -> str:
    """same: one attack on both sides. Under a stronger one than theirs ours cannot lose."""
    kinds = {"robust": (robust, clean), "clean": (clean, robust)}
    for word, sides in (("won", kinds), ("lost", {k: (turned(a), turned(b)) for k, (a, b) in kinds.items()})):
        if found := [kind for kind, (more, other) in sides.items() if higher(more) and no_less(other)]:
            return f"{word}: {' and '.join(found)}" if same or word == "won" else "not told"
    return "not told"


def higher(numbers: dict[str, Any]) -> bool:
    return bool(numbers["difference"] >= MARGIN - 1e-9 and numbers["low"] > 0)


def no_less(numbers: dict[str, Any]) -> bool:
    return bool(numbers["difference"] >= 0 and numbers["low"] > -MARGIN)


def turned(numbers: dict[str, Any]) -> dict[str, Any]:
    return {"difference": -numbers["difference"], "low": -numbers["high"], "high": -numbers["low"]}


def shown(numbers: dict[str, Any]) -> list[str]:
    p = f"{numbers['p']:.4f}" if numbers["p"] >= 0.0005 else "< 0.0005"
    return [f"{100 * numbers['ours']:.1f} / {100 * numbers['theirs']:.1f}", points(numbers), p]
