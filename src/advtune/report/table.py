"""Result rows to table lines: sections of comparable numbers, seeds merged, repeats dropped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from advtune.errors import UserError
from advtune.results import Row, mean_and_spread, wilson

K = TypeVar("K")
V = TypeVar("V")
BLIND = 0.10  # share of exactly-zero input gradients above which an attack may have seen nothing
FINE = 8  # steps of 1/255, below which quarters of one are written
KIND = "train.attack.name"
TRAINED_ON = ("train.name", "train.part", "train.shots")  # with the method, columns of their own
LATER = {"loss": "ce", "eot": 1, "bpda": False, "norm": "linf"}  # fields of attacks, as in rows that are without them
VARIES = ("seed", "n", "sha256", "skipped")  # of a split: what a seed changes


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One dict a line: section by section, zero-shot first, then in the order first seen.

    Accuracies are fractions. A line is all rows that differ only in seed; of rows that differ only in when
    and where they were computed the latest counts. Raises UserError when there is no row.
    """
    return [line for line, _ in lines_with_rows(rows)]


def lines_with_rows(rows: Sequence[Row]) -> list[tuple[dict[str, Any], list[Row]]]:
    """The lines of `table`, each with the rows it was made of. Raises as `table`."""
    if not rows:
        raise UserError("no result rows to report; evaluate something first or name another file")
    lines = []
    for number, section in enumerate(group_by(latest(rows), section_key).values()):
        groups = list(group_by(section, line_key).values())
        groups.sort(key=lambda group: group[0].train is not None)
        for group, differs in zip(groups, what_differs(groups), strict=True):
            lines.append(({"section": number} | _line(group, differs), group))
    return lines


def sections(lines: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The lines of `table`, one list a section."""
    return list(group_by(lines, lambda line: line["section"]).values())


def attacks(line: Mapping[str, Any]) -> bool:
    """Whether a line has a robust accuracy under an attack; at eps 0 there is none."""
    return line["robust_accuracy"] is not None and line["eps"] != 0


def pixels(value: Any) -> str:
    """A distance between pixels as people write it: `4/255` when it is a multiple of 1/255; of a few, quarters, too."""
    steps = value * 255
    near = round(4 * steps) / 4 if steps < FINE else round(steps)
    return f"{near:g}/255" if 0 < near < 255 and abs(steps - near) < 1e-6 else f"{value:g}"


def shown(key: str, value: Any) -> str:
    """An option's value as text: `4/255` for a distance, short floats, lists with commas."""
    if isinstance(value, (list, tuple)):
        return ",".join(shown(key, each) for each in value)
    last = key.replace(" ", ".").rpartition(".")[2]
    if isinstance(value, float):
        return pixels(value) if last in ("eps", "step_size") else f"{value:g}"
    return "none" if value is None else str(value)[:12] if last.endswith("sha256") else str(value)


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined with dots."""
    found: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def group_by(items: Sequence[V], key: Callable[[V], K]) -> dict[K, list[V]]:
    found: dict[K, list[V]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def canonical(facts: Any) -> str:
    return json.dumps(facts, sort_keys=True)


def without(facts: Mapping[str, Any] | None, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in (facts or {}).items() if key not in keys}


def attacked(attack: Mapping[str, Any] | None) -> dict[str, Any]:
    """What an attack did: equal for rows of versions that name more of its fields and of older ones."""
    facts = {key: value for key, value in (attack or {}).items() if key not in LATER or value != LATER[key]}
    if isinstance(facts.get("stages"), Sequence):
        facts["stages"] = [attacked(each) for each in facts["stages"]]
    return facts


def section_key(row: Row) -> str:
    """Equal for rows whose numbers may stand in one table: data, n, attack and backbone."""
    data = [row.data.get(key) for key in ("name", "part", "resolution")] + [row.data.get("subset", "all")]
    sizes = [row.clean["n"], row.robust and row.robust["n"]]
    backbone = [row.backbone.get(key) for key in ("name", "sha256")]
    return canonical([data, sizes, without(attacked(row.attack), "seed"), backbone])


def setting(row: Row) -> dict[str, Any]:
    """All that decides a row's numbers, seeds aside, and is not in its section's heading."""
    train = _slice(row.train)
    if isinstance(train.get("attack"), Mapping):
        train["attack"] = without(attacked(train["attack"]), "seed")
    return {
        "method": row.method,
        "options": row.options,
        "recipe": without(row.recipe, "seed"),
        "train": train,
        "data": without(_slice(row.data), "name", "part", "resolution", "subset"),
        "threat": row.threat,
        "precision": row.precision,
    }


def _slice(facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """The slice without what a seed changes; older rows do not name a subset (it was all) or a usual split."""
    kept = without(facts, *VARIES)
    if kept:
        kept["subset"] = kept.get("subset", "all")
    return without(kept, "split") if kept.get("split") in ("", "as given") else kept


def slice_name(name: Any, subset: Any, part: Any) -> str:
    """What a slice is called: `pets new test`; a subset of all goes without saying."""
    return " ".join(str(each) for each in (name, None if subset == "all" else subset, part) if each)


def line_key(row: Row, *free: str) -> str:
    """Equal for rows that differ in nothing but seeds and the facts `free`, named with dots: `data.classes`."""
    backbone = {key: row.backbone.get(key) for key in ("name", "sha256")}
    where = {"data": _slice(row.data), "attack": without(attacked(row.attack), "seed"), "backbone": backbone}
    return canonical(without(flat(setting(row) | where), *free))


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of rows that differ only in when and where they were computed, the latest."""
    found: dict[str, Row] = {}
    for row in rows:
        train = row.train and row.train | {"attack": attacked(row.train.get("attack"))}
        seeds = [train, row.data, row.recipe, attacked(row.attack)]
        key = section_key(row) + line_key(row) + canonical(seeds)
        if key not in found or row.time >= found[key].time:
            found[key] = row
    return list(found.values())


def what_differs(groups: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """What tells each line of a section from the others.

    Options, recipe and training attack are compared within a method (but its eps in all), the training slice
    within a set, the rest in all.
    """
    flats = [flat(setting(group[0])) for group in groups]
    found = []
    for own in flats:
        peers = [each for each in flats if each["method"] == own["method"]]
        trained = [each for each in flats if "train" not in each]  # {} stays one empty key: zero-shot
        same_set = [each for each in trained if all(each.get(key) == own.get(key) for key in TRAINED_ON)]
        differs = {}
        for key, value in own.items():
            if key in ("method", "train", *TRAINED_ON):
                continue
            others = flats
            if key == "train.attack.eps":
                others = trained
            elif key.startswith(("options", "recipe", "train.attack")):
                others = peers
                if key.startswith("train.attack.") and key != KIND:  # the fields of another attack say nothing
                    others = [each for each in peers if each.get(KIND) == own.get(KIND)]
            elif key.startswith("train"):
                others = same_set
            if any(each.get(key) != value for each in others):
                differs[key] = value
        if "data.template" in differs:
            differs.pop("data.texts_sha256", None)
        found.append(differs)
    return found


def _line(group: Sequence[Row], differs: dict[str, Any]) -> dict[str, Any]:
    row = group[0]
    attack, train = row.attack or {}, row.train or {}
    line: dict[str, Any] = {
        "dataset": row.data.get("name"),
        "part": row.data.get("part"),
        "subset": row.data.get("subset", "all"),
        "resolution": row.data.get("resolution"),
        "n": row.clean["n"],
        "attack": attack.get("name"),
        "eps": attack.get("eps"),
        "steps": attack.get("steps"),
        "norm": attack.get("norm", "linf"),
        "attack_options": without(attack, "name", "eps", "steps", "seed", "norm", "stages"),
        "backbone": row.backbone.get("name"),
        "backbone_sha256": row.backbone.get("sha256"),
        "method": row.method,
        "differs": {_short(key): value for key, value in differs.items()},
        "train": train.get("name"),
        "train_subset": train.get("subset", "all") if train else None,
        "train_part": train.get("part"),
        "train_shots": train.get("shots"),
        "seeds": [_seed(each) for each in group],
    }
    line |= _numbers("clean", [each.clean for each in group])
    line |= _numbers("robust", [each.robust for each in group if each.robust])
    zero = [each.zero_gradient for each in group if each.zero_gradient]
    worst = max(zero, key=lambda each: each["share"]) if zero else {}
    checks = [finding for each in group for finding in each.checks]
    return line | {
        "stages": merged([each.stages for each in group]),
        "checks": list(dict.fromkeys(finding["name"] for finding in checks)),
        "alarms": [
            {key: finding[key] for key in ("name", "value", "n", "text")} for finding in checks if finding["alarm"]
        ],
        "zero_gradient_share": worst.get("share"),
        "zero_gradient_n": worst.get("n"),
        "reconstructed": sorted({name for each in group for name in each.reconstructed}),
        "notice": row.backbone.get("notice") or "",
        "notes": list(dict.fromkeys(note for each in group for note in each.notes)),
        "skipped": [each.data.get("skipped") or 0 for each in group],
        "settings": setting(row),
        "data_sha256": [each.data.get("sha256") for each in group],
        "texts_sha256": [each.data.get("texts_sha256") for each in group],
        "train_sha256": [(each.train or {}).get("sha256") for each in group],
        "runs": [each.run for each in group],
        "times": [each.time for each in group],
        "devices": [each.device for each in group],
        "advtune": [each.advtune for each in group],
    }


def merged(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The stages of an attack with their counts summed over the seeds."""
    found: dict[str, dict[str, Any]] = {}
    for stage in (each for stages in runs for each in stages):
        counts = found.setdefault(stage["attack"], {"attack": stage["attack"], "attacked": 0, "fell": 0})
        counts["attacked"] += stage["attacked"]
        counts["fell"] += stage["fell"]
    return list(found.values())


def _seed(row: Row) -> Any:
    """The training seed; without training, the seed of the evaluated slice."""
    return row.data.get("seed") if row.train is None else row.train.get("seed")


def _short(key: str) -> str:
    """`options.alpha` -> `alpha`, `train.attack.eps` -> `train attack eps`."""
    for top in ("options.", "recipe.", "data."):
        key = key.removeprefix(top)
    return key.replace(".", " ")


def _numbers(name: str, counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, spread over the rows, and the Wilson interval over the n images, taken at the mean."""
    keys = ("accuracy", "sd", "low", "high", "n")
    if not counts:
        return dict.fromkeys(f"{name}_{key}" for key in keys) | {f"{name}_values": []}
    values = [each["accuracy"] for each in counts]
    mean, sd = mean_and_spread(values)
    n = counts[0]["n"]
    low, high = wilson(round(mean * n), n)
    numbers = dict(zip(keys, (mean, sd, low, high, n), strict=True))
    return {f"{name}_{key}": value for key, value in numbers.items()} | {f"{name}_values": values}
