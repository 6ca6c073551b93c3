"""Base and new classes of the same run, and the harmonic mean of their accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from advtune.report.table import canonical, group_by, line_key, pixels, setting
from advtune.results import Row, mean_and_spread

OF_A_HALF = ("data.subset", "data.classes", "data.texts_sha256")


def harmonic(a: float, b: float) -> float:
    """H = 2ab / (a + b), of fractions; 0 when both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


def harmonic_means(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each method and setting whose base and new classes were both evaluated, of the same run.

    `clean` and `robust` hold base, new and h, the mean over the seeds of what each seed has, `h_sd` its spread;
    robust is None without an attack. Of an evaluation that was made twice the latest counts.
    """
    lines = []
    rows = [row for row in rows if row.data.get("subset") in ("base", "new")]
    for group in group_by(rows, lambda row: line_key(row, *OF_A_HALF)).values():
        pairs = []
        for own in group_by(group, _run_key).values():
            halves = {row.data["subset"]: row for row in sorted(own, key=lambda row: row.time)}
            if len(halves) == 2:
                pairs.append((halves["base"], halves["new"]))
        if not pairs:
            continue
        row = pairs[0][0]
        attack, train = row.attack or {}, row.train or {}
        lines.append(
            {
                "dataset": row.data["name"],
                "method": row.method,
                "shots": train.get("shots"),
                "seeds": [(base.train or {}).get("seed") for base, _ in pairs],
                "attack": attack.get("name"),
                "eps": attack.get("eps"),
                "steps": attack.get("steps"),
                "backbone": row.backbone["name"],
                "clean": _numbers([(base.clean, new.clean) for base, new in pairs]),
                "robust": _numbers([(b.robust, n.robust) for b, n in pairs if b.robust and n.robust]),
                "settings": setting(row),
            }
        )
    return lines


def harmonic_table(lines: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Header and lines as plain text: base, new and H, clean and robust, in %."""
    names = [f"{kind} {part}" for kind in ("Clean", "Robust") for part in ("base", "new", "H")]
    cells = [["Data", "Method", "Shots", "Seeds", "n base / new", "Attack", *names]]
    for line in lines:
        attack = "-"
        if line["attack"]:
            steps = f", {line['steps']} steps" if line["steps"] else ""
            attack = f"{line['attack']} eps {pixels(line['eps'])}{steps}"
        seeds = ", ".join("-" if seed is None else str(seed) for seed in line["seeds"])
        shots = "-" if line["seeds"] == [None] else "all" if line["shots"] is None else str(line["shots"])
        n = " / ".join(map(str, line["clean"]["n"]))
        numbers = [text for kind in ("clean", "robust") for text in _texts(line[kind])]
        cells.append([line["dataset"], line["method"], shots, seeds, n, attack, *numbers])
    return cells


def _run_key(row: Row) -> str:
    """The training itself: its slice with the seed, and the content of what was tuned on."""
    return canonical([row.train, row.recipe, (row.attack or {}).get("seed")])


def _numbers(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any] | None:
    if not pairs:
        return None
    base, new = ([half["accuracy"] for half in side] for side in zip(*pairs, strict=True))
    mean, sd = mean_and_spread([harmonic(a, b) for a, b in zip(base, new, strict=True)])
    return {"base": mean_and_spread(base)[0], "new": mean_and_spread(new)[0], "h": mean, "h_sd": sd,
            "n": [pairs[0][0]["n"], pairs[0][1]["n"]]}  # fmt: skip


def _texts(numbers: dict[str, Any] | None) -> list[str]:
    if numbers is None:
        return ["-"] * 3
    spread = "" if numbers["h_sd"] is None else f" ± {100 * numbers['h_sd']:.1f}"
    return [f"{100 * numbers['base']:.1f}", f"{100 * numbers['new']:.1f}", f"{100 * numbers['h']:.1f}{spread}"]
