"""What stands PGD and falls to AutoAttack: counted image by image, the same model and the same images."""

from __future__ import annotations

from collections.abc import Sequence

from marks import by, markdown

from advtune.methods import METHODS
from advtune.protocols import ZERO_SHOT
from advtune.report.table import pixels
from advtune.results import Row, wilson

ORDER = list(METHODS)


def survivors(rows: Sequence[Row]) -> str:
    """A Markdown table for each set and eps: a line a method, and the sum of those that were tuned.

    AutoAttack may be on the first images of those that PGD is on; both are then counted there. Raises SystemExit when
    no model has rows of both, and when two of one model cannot be laid side by side.
    """
    attacked = [row for row in rows if row.model and (row.attack or {}).get("name") in ("pgd", "autoattack")]
    attacked.sort(key=lambda row: ORDER.index(row.method))
    texts = []
    for (data, half, eps), of_set in by(attacked, lambda row: row.data["name"], subset, radius):
        counted = []
        for (method, shots), own in by(of_set, lambda row: row.method, lambda row: (row.train or {}).get("shots")):
            models = [stood(*pair) for _, same in by(own, lambda row: row.model) if (pair := pgd_and_auto(same))]
            counted += [(method, shots, models)] if models else []
        if counted:
            where = f"**{data}{'' if half == 'all' else f', {half} classes'}**, {eps}, n = {counted[0][2][0][0]}"
            tuned = [model for method, _, models in counted for model in models if method != ZERO_SHOT]
            lines = [[method, str(shots or "-"), *line(models)] for method, shots, models in counted]
            head = ["Method", "Shots", "Models", "Clean", "PGD-20", "AutoAttack", "Fell, of PGD's survivors"]
            texts.append(f"{where}\n\n{markdown([head, *lines, ['all tuned', '', *line(tuned)]], words=1)}")
    if not texts:
        raise SystemExit("no model has rows of both PGD and AutoAttack")
    return "\n\n".join(texts)


def subset(row: Row) -> str:
    return str(row.data.get("subset", "all"))


def radius(row: Row) -> str:
    return pixels((row.attack or {})["eps"])


def pgd_and_auto(rows: Sequence[Row]) -> tuple[Row, Row] | None:
    """One model's rows under both attacks, when there are."""
    found = {(row.attack or {})["name"]: row for row in rows}
    if len(found) != len(rows):
        raise SystemExit(f"{rows[0].method}: one model has two rows under one attack")
    if not {"pgd", "autoattack"} <= found.keys():
        return None
    pgd, auto = found["pgd"], found["autoattack"]
    n = auto.clean["n"]
    same = pgd.data["sha256"] == auto.data["sha256"] if n == pgd.clean["n"] else not pgd.data.get("skipped")
    if (pgd.attack or {})["steps"] != 20 or not same or pgd.flags["clean"][:n] != auto.flags["clean"]:
        raise SystemExit(f"{auto.method}: the rows of PGD-20 and AutoAttack are not of the same images")
    return pgd, auto


def stood(pgd: Row, auto: Row) -> list[int]:
    """Images: all, right without an attack, under PGD, under AutoAttack, and under PGD alone."""
    n = auto.clean["n"]
    both = list(zip(pgd.flags["robust"][:n], auto.flags["robust"], strict=True))
    one, two = (sum(pair[side] == "1" for pair in both) for side in (0, 1))
    return [n, auto.flags["clean"].count("1"), one, two, both.count(("1", "0"))]


def line(models: Sequence[Sequence[int]]) -> list[str]:
    """The cells of some models; an interval for one alone, since images of several are the same images."""
    n, clean, one, two, fell = (sum(each) for each in zip(*models, strict=True))
    low, high = wilson(two, n)
    interval = f" \\[{100 * low:.1f}, {100 * high:.1f}\\]" if len(models) == 1 else ""
    percent = [f"{100 * each / n:.1f}" for each in (clean, one, two)]
    return [str(len(models)), *percent[:2], percent[2] + interval, f"{fell} of {one}"]
