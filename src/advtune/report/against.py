"""Published rows with ours beside them: which of our rows is meant, its numbers, what differs in protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from advtune.report.differences import differences, same_backbone, shots_of
from advtune.report.published import published
from advtune.report.table import canonical, group_by, latest, line_key
from advtune.results import Row, mean_and_spread, wilson

LEAKED = {"test", "all"}  # parts that hold test images: what is tuned on them is not put beside anything
# What the rows of an average may differ in, and what more when each set was tuned on: of one set, they may not.
OF_A_SET = ("data.name", "data.spec", "data.classes", "data.template", "data.texts_sha256", "data.split",
            "data.on_bad", "train.on_bad", "attack.stages")  # fmt: skip
OF_ITS_OWN = ("train.name", "train.spec", "train.classes", "train.template", "train.split")
FAR = 99.0  # no attack, or none of a length
ALL_SHOTS = 2**12  # farther from any few than they are from each other


def against(rows: Sequence[Row], name: str) -> list[dict[str, Any]]:
    """One dict a published row of the paper: its facts, `ours` (None: not run) and `differs`.

    `ours` holds the settings of ours that are nearest: the same method and subset of classes, tuned on the test set
    itself or on another as there; of those the nearest in shots, attack and data, then backbone, training attack and
    epochs. Its numbers are fractions, averages over `sets`, those of the paper's that ours has, each in one setting.
    Where rows of a table differ in shots and attack alone, ours stands beside the nearest. `differs` lists `what`,
    `ours` and `paper` as texts. Rows of other parts than test, tuned on test images, of a transfer attack or behind a
    defence are left out. Raises UserError for an unknown paper.
    """
    usable = [row for row in latest(rows) if _usable(row)]
    pairs = [(paper, _nearest(paper, usable)) for paper in published(name)]
    lines = []
    for paper, group in pairs:
        rivals = [other for other, theirs in pairs if theirs == group and _place(other) == _place(paper)]
        if group and _distance(paper, group) > min(_distance(other, group) for other in rivals):
            group = []  # these numbers stand beside another row of the table, with other shots or another eps
        ours = _numbers(group) if group else None
        lines.append(paper | {"ours": ours, "differs": differences(paper, group) if group else []})
    return lines


def left_out(rows: Sequence[Row]) -> int:
    """How many rows cannot stand beside a published number: see `against`."""
    return sum(not _usable(row) for row in latest(rows))


def _place(paper: Mapping[str, Any]) -> tuple[str, ...]:
    """Rows of a table that differ only in shots and attacks share a place."""
    return (*(paper[key] for key in ("table", "method", "subset")), canonical(paper.get("data")))


def _usable(row: Row) -> bool:
    white = not row.threat or (row.threat.startswith("white-box") and "behind" not in row.threat)
    tuned_on = {(facts or {}).get("part") for facts in (row.train, row.backbone.get("tuned"))}
    return row.data.get("part", "test") == "test" and not LEAKED & tuned_on and white


def _alike(paper: Mapping[str, Any], row: Row) -> bool:
    """The same method, measured on one of the paper's sets and the same kind of classes, tuned on the same kind."""
    subset = paper["subset"]
    if row.data.get("name") not in paper["data"]:
        return False
    if row.method != paper["method"] or (row.data.get("subset") or "all") != subset:
        return False
    if row.train is None:
        return True
    if (row.train.get("subset") or "all") != ("all" if subset == "all" else "base"):
        return False
    home = row.train.get("name") == row.data.get("name")
    if paper.get("train") == "same":
        return home
    return not home or row.data.get("name") == paper.get("train")


def _nearest(paper: Mapping[str, Any], rows: Sequence[Row]) -> list[Row]:
    """Our rows of one setting on the paper's sets, of each set one a seed; [] when nothing is alike."""
    alike = [row for row in rows if _alike(paper, row)]
    if not alike:
        return []
    free = OF_A_SET + (OF_ITS_OWN if paper.get("train") == "same" else ())
    groups = _newest_first(alike, *free)
    best = min(groups, key=lambda group: _distance(paper, group))
    sets = group_by(best, lambda row: row.data["name"])
    return [row for some in sets.values() for row in _of_one_set(paper, some)]


def _of_one_set(paper: Mapping[str, Any], rows: Sequence[Row]) -> list[Row]:
    """The rows of the setting that differs least from the paper in split and words, of each seed the latest."""
    best = min(_newest_first(rows), key=lambda group: len(differences(paper, group)))
    return list({(row.train or row.data).get("seed"): row for row in sorted(best, key=lambda row: row.time)}.values())


def _newest_first(rows: Sequence[Row], *free: str) -> list[list[Row]]:
    groups = group_by(rows, lambda row: line_key(row, *free)).values()
    return sorted(groups, key=lambda group: max(row.time for row in group), reverse=True)


def _distance(paper: Mapping[str, Any], group: Sequence[Row]) -> tuple[float, ...]:
    """How far a setting of ours is from a published row; the first that differs decides."""
    row, sets = group[0], {row.data["name"] for row in group}
    train, attack, recipe = row.train or {}, row.attack or {}, row.recipe
    told, trained, tower = paper["attack"], paper["train_attack"], row.backbone.get("tuned") or {}
    foreign = bool(train) and paper.get("train") not in (None, "same", train.get("name"))
    return (
        foreign,
        _apart(_many(paper.get("shots")), _many(shots_of(train))) if train else 0,
        _apart(told.get("eps"), attack.get("eps") if row.robust else 0),
        told.get("name", attack.get("name")) != attack.get("name"),
        len(set(paper["data"]) - sets),
        not same_backbone(paper.get("backbone"), row.backbone),
        paper["tower"].get("method") != tower.get("method"),
        _apart(paper["tower"].get("eps"), (tower.get("attack") or {}).get("eps")),
        _apart(trained.get("eps"), (train.get("attack") or {}).get("eps")) if train else 0,
        _apart(told.get("steps"), attack.get("steps")),
        _apart(paper["recipe"].get("epochs"), recipe.get("epochs")),
    )


def _many(shots: Any) -> Any:
    return ALL_SHOTS if shots == "all" else shots


def _apart(wanted: float | None, got: float | None) -> float:
    """Distance of two amounts in doublings; 0 when the paper's is not known."""
    if wanted is None:
        return 0
    return FAR if not (wanted and got) else abs(round(math.log2(wanted / got), 3))


def _numbers(group: Sequence[Row]) -> dict[str, Any]:
    by_set = group_by(group, lambda row: str(row.data.get("name")))
    seeds = {each: [(row.train or row.data).get("seed") for row in rows] for each, rows in by_set.items()}
    shared = set.intersection(*(set(each) for each in seeds.values()))
    found: dict[str, Any] = {
        "sets": list(by_set),
        "seeds": sorted({seed for each in seeds.values() for seed in each}, key=str),
        "n": sum(rows[0].clean["n"] for rows in by_set.values()),
        "runs": [row.run for row in group],
    }
    for name in ("clean", "robust"):
        counts = [[getattr(row, name) for row in rows] for rows in by_set.values()]
        found |= _average(name, counts)
        totals = [
            [getattr(row, name) for row in group if row.train and row.train.get("seed") == seed]
            for seed in sorted(shared - {None}, key=str)
        ]
        means = [mean_and_spread([each["accuracy"] for each in some])[0] for some in totals if some and all(some)]
        found[f"{name}_sd"] = mean_and_spread(means)[1] if means else None
    return found


def _average(name: str, counts: Sequence[Sequence[Mapping[str, Any] | None]]) -> dict[str, Any]:
    """Mean over the sets of the means over the seeds, with a 95 % interval over the images.

    The interval joins the sets' Wilson intervals: low = mean - sqrt(sum_i (p_i - l_i)^2) / k over k sets, high alike
    (Zou and Donner 2008, Statistics in Medicine 27). Of one set it is that set's Wilson interval.
    """
    keys = [f"{name}_{key}" for key in ("accuracy", "low", "high")]
    sets = [[each for each in some if each is not None] for some in counts]
    if not all(sets):
        return dict.fromkeys(keys)
    means, below, above = [], 0.0, 0.0
    for some in sets:
        mean, n = mean_and_spread([each["accuracy"] for each in some])[0], some[0]["n"]
        low, high = wilson(round(mean * n), n)
        means.append(mean)
        below, above = below + (mean - low) ** 2, above + (high - mean) ** 2
    mean, k = sum(means) / len(means), len(means)
    return dict(zip(keys, (mean, mean - math.sqrt(below) / k, mean + math.sqrt(above) / k), strict=True))
