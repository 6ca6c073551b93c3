"""Two methods on the same images: McNemar's exact test and a bootstrap interval of their difference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from advtune.errors import UserError
from advtune.report.formats import escape
from advtune.report.table import (
    TRAINED_ON,
    attacked,
    canonical,
    flat,
    group_by,
    pixels,
    setting,
    shown,
    slice_name,
    without,
)  # fmt: skip
from advtune.results import Row, flag_text

ALPHA = 0.05
CAPTION = (
    "Difference: accuracy of B less that of A in points, with the 95 % percentile bootstrap interval over the images "
    "(of the mean over the seed pairs; it does not cover other training seeds). p: exact two-sided McNemar test on "
    "the images that only one of the two gets right, not corrected for the number of lines. "
    "Better means p < 0.05; with several seed pairs, an interval that leaves 0 out."
)
SIDES = ("first", "second")
ASIDE = ("class texts", "backbone", "precision", "threat")  # a fair comparison shares them, and of the training:
NOTED = (*TRAINED_ON, "train.attack.eps")


def mcnemar(a: Iterable[Any], b: Iterable[Any]) -> float:
    """Exact two-sided p-value of equal accuracy, from flags [N] of two models on the same N images.

    With m images that one model alone gets right, k of them the weaker one: p = 2 sum_{i <= k} C(m, i) / 2^m, at
    most 1, and 1 when m = 0. Source: McNemar 1947, Psychometrika 12, in its exact form. Raises ValueError for unequal
    lengths and for what is not a flag.
    """
    difference = _difference(a, b)
    m, k = int((difference != 0).sum()), int(min((difference < 0).sum(), (difference > 0).sum()))
    term = total = 1
    for i in range(k):  # whole numbers: exact, and their ratio is rounded once
        term = term * (m - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / (1 << m))


def bootstrap(
    differences: Sequence[float] | np.ndarray, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `differences` [N], one number an image.

    Images are the unit that is drawn anew. With several training seeds an image's number is the mean over the seed
    pairs, so the interval covers other images, not other seeds. Source: Efron 1979, Annals of Statistics 7. Equal
    differences give a single point, which says less than it seems. Raises ValueError when there is no difference, one
    is not finite, or level or draws mean nothing.
    """
    values, counts = np.unique(np.asarray(differences, dtype=float), return_counts=True)
    if not (len(values) and np.isfinite(values).all() and 0 < level < 1 and draws > 0):
        raise ValueError(f"no bootstrap of {counts.sum()} differences at level {level} with {draws} draws")
    rng, n, means = np.random.default_rng(seed), counts.sum(), []
    chunk = max(1, 2**22 // len(values))
    for done in range(0, draws, chunk):  # how often each distinct value is drawn: same law as N images, few numbers
        means.append(rng.multinomial(n, counts / n, min(chunk, draws - done)) @ values / n)
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> list[dict[str, Any]]:
    """One JSON-ready dict for each data, attack and "clean" or "robust" that both sides have; fractions, b less a.

    Rows belong together when images (sha256), class count, resolution and attack, its seed aside, are equal. They are
    paired by training seed; a model that was not tuned goes with every seed. Of repeated rows the latest counts.
    `differences` and `p_values` hold one number a seed pair, `p` is that of an only pair and else None; `only_a` and
    `only_b` are summed over the pairs. Raises UserError when nothing can be paired, and when a side holds several
    settings under the same data and attack.
    """
    sides = [group_by([row for row in rows if row.data.get("sha256")], _key) for rows in (rows_a, rows_b)]
    found, why = [], ""
    for key in sorted(sides[0].keys() & sides[1].keys()):
        first, second = (_by_seed(side[key], name) for side, name in zip(sides, SIDES, strict=True))
        free = not all(row.train for row in (*first.values(), *second.values()))
        seeds = sorted(((s, t) for s in first for t in second if free or s == t), key=lambda st: [s or 0 for s in st])
        pairs = [(first[s], second[t]) for s, t in seeds]
        if not pairs:
            why = f"no training seed in common; first: {_some(first)}; second: {_some(second)}"
            continue
        facts = _facts(pairs[0][0]) | {"pairs": [list(pair) for pair in seeds]} | _words(*pairs[0])
        if alone := {*first, *second}.difference(*seeds):
            facts["notes"] = [*facts["notes"], f"Training seeds that only one side has are left out: {_some(alone)}."]
        for which in ("clean", "robust") if pairs[0][0].robust else ("clean",):
            found.append(facts | {"which": which} | _numbers(pairs, which))
    if not found:
        raise UserError(f"nothing to compare: {why or _why(*sides)}")
    return sorted(found, key=lambda each: (str(each["dataset"]), str(each["part"]), each["n"], each["eps"] or 0))


def render(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The dicts of `compare` as a Markdown table, each line also in plain words. Raises UserError for none."""
    if not comparisons:
        raise UserError("no comparison to show")
    names = [", ".join(dict.fromkeys(each[f"label_{side}"] for each in comparisons)) for side in "ab"]
    cells = [["Data", "Attack", "n", "Which", "A %", "B %", "Difference, points", "p", "Right: only A, only B"]]
    words, notes = [], []
    for each in comparisons:
        data, attack = _data(each), _attack(each, comparisons)
        points = f"{100 * each['difference']:+.1f} [{100 * each['low']:.1f}, {100 * each['high']:.1f}]"
        p = ", ".join(_p(value).removeprefix("= ") for value in each["p_values"])
        accuracies = [f"{100 * each[side]:.1f}" for side in "ab"]
        line = [data, attack, str(each["n"]), each["which"], *accuracies, points]
        cells.append([*line, p if each["p"] is not None else f"per seed: {p}", f"{each['only_a']}, {each['only_b']}"])
        words.append(f"{data}, {attack}: {_sentence(each)}")
        notes += [f"Note on {data}: {note}" for note in each["notes"]]
    lines = ["| " + " | ".join(map(escape, line)) + " |" for line in cells]
    lines.insert(1, "|---|---|--:|---|--:|--:|--:|--:|--:|")
    items = [f"- {escape(item)}" for item in dict.fromkeys([*words, *notes])]
    return "\n".join([escape(f"A: {names[0]}. B: {names[1]}."), "", *lines, "", *items, "", escape(CAPTION), ""])


def _difference(a: Iterable[Any], b: Iterable[Any]) -> np.ndarray:
    """b less a, -1, 0 or 1 an image [N]."""
    one, other = (np.frombuffer(flag_text(flags).encode(), np.uint8).astype(np.int8) for flags in (a, b))
    if len(one) != len(other):
        raise ValueError(f"flags of {len(one)} and of {len(other)} images")
    return other - one


def _numbers(pairs: Sequence[tuple[Row, Row]], which: str) -> dict[str, Any]:
    flags = [(a.flags[which], b.flags[which]) for a, b in pairs]
    differences = np.stack([_difference(a, b) for a, b in flags])  # [pairs, N]
    low, high = bootstrap(differences.mean(0))
    p = [mcnemar(a, b) for a, b in flags]
    a, b = (fmean(each.count("1") / len(each) for each in side) for side in zip(*flags, strict=True))
    numbers: dict[str, Any] = {"a": a, "b": b, "difference": float(differences.mean()), "low": low, "high": high}
    numbers["differences"] = differences.mean(1).tolist()
    numbers |= {"p": p[0] if len(p) == 1 else None, "p_values": p}
    return numbers | {"only_a": int((differences < 0).sum()), "only_b": int((differences > 0).sum())}


def _words(a: Row, b: Row) -> dict[str, Any]:
    """The labels, and what else than the method tells the two sides apart."""
    flats = one, other = flat(_about(a)), flat(_about(b))
    differing = _differing(flats)
    labels = [a.method, b.method]
    if a.method == b.method:
        for i, each in enumerate(flats):
            more = ", ".join(f"{key.partition('.')[2] or key} {shown(key, each.get(key))}" for key in differing)
            labels[i] += f" ({more or SIDES[i]})"
    notes = []
    for key in differing:
        if (key in NOTED and key in one and key in other) or key.partition(".")[0] in ASIDE:
            values = " against ".join(shown(key, each.get(key)) or "none" for each in flats)
            notes.append(f"Not the same {key.replace('.', ' ')}: {values}.")
    return {"label_a": labels[0], "label_b": labels[1], "notes": notes}


def _about(row: Row) -> dict[str, Any]:
    """All that decides a row's numbers, seeds and images aside."""
    texts = f"{row.data.get('template')} ({str(row.data.get('texts_sha256'))[:12]})"
    about = {key: value for key, value in setting(row).items() if key != "data"}
    return about | {"class texts": texts, "backbone": {"sha256": row.backbone.get("sha256")}}


def _differing(flats: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for each in flats for key in each)
    return [key for key in keys if len({canonical(each.get(key)) for each in flats}) > 1]


def _by_seed(rows: Sequence[Row], side: str) -> dict[Any, Row]:
    """The latest row of each training seed. Raises UserError when more than seeds differ."""
    flats = [flat(_about(row)) for row in rows]
    if differing := _differing(flats):
        keys = ["method"] if "method" in differing else differing
        values = (f"{key} {' / '.join(sorted({shown(key, each.get(key)) for each in flats}))}" for key in keys)
        facts = _facts(rows[0])
        where, has = _some([f"{_data(facts)}, {_attack(facts, [facts])}"]), _some(values)
        raise UserError(f"the {side} side has several settings on {where}: {has}; name one run, or the seeds of one")
    return {(row.train or {}).get("seed"): row for row in sorted(rows, key=lambda row: row.time)}


def _key(row: Row) -> tuple[str, str]:
    images = [row.data.get(key) for key in ("sha256", "classes", "resolution")]
    return canonical([*images, row.clean["n"]]), canonical(without(attacked(row.attack), "seed"))


def _facts(row: Row) -> dict[str, Any]:
    facts = {"dataset": row.data.get("name"), "data_sha256": row.data.get("sha256"), "n": row.clean["n"]}
    facts |= {"subset": row.data.get("subset", "all")}
    facts |= {key: row.data.get(key) for key in ("part", "resolution", "classes")}
    attack = row.attack or {}
    facts |= {"attack": attack.get("name"), "eps": attack.get("eps"), "steps": attack.get("steps")}
    return facts | {"attack_options": without(attack, "name", "eps", "steps", "seed", "stages")}


def _why(*sides: Mapping[tuple[str, str], Sequence[Row]]) -> str:
    """Why no row has a partner on the other side, and what each side has."""
    shared = set.intersection(*({images for images, _ in side} for side in sides))
    reason, have, clean = "not the same attack", [], False
    for side in sides:
        rows = [some[0] for (images, _), some in side.items() if not shared or images in shared]
        clean |= all(row.attack is None for row in rows)
        facts = [_facts(row) for row in rows]
        size = "n = {n}, {classes} classes, sha256 {data_sha256:.8}"
        have.append(_some(f"{_data(each)}, {_attack(each) if shared else size.format_map(each)}" for each in facts))
    if not shared:
        reason = "not the same images (sha256, class count, resolution)"
    elif clean:
        reason = "one side has no robust accuracy, evaluate it with --attack"
    return f"{reason}; first: {have[0]}; second: {have[1]}"


def _some(items: Iterable[Any], most: int = 4) -> str:
    """The first few, sorted, on one line."""
    texts = sorted({" ".join(str(item).split()) for item in items})
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return "; ".join(texts[:most]) + more or "no rows of known images"


def _data(facts: Mapping[str, Any]) -> str:
    name = slice_name(facts["dataset"], facts["subset"], facts["part"])
    return f"{name}, {facts['resolution']} px" if facts["resolution"] else name


def _attack(facts: Mapping[str, Any], peers: Sequence[Mapping[str, Any]] = ()) -> str:
    """The attack with eps and steps; of its other options those that differ among peers, all when there are none."""
    texts, norm = [facts["attack"] or "no attack"], facts["attack_options"].get("norm", "linf")
    texts[0] += f" {norm}" if norm != "linf" else ""
    texts[0] += f" eps {pixels(facts['eps'])}" if facts["eps"] is not None else ""
    texts += [f"{facts['steps']} steps"] if facts["steps"] is not None else []
    for key, value in without(facts["attack_options"], "norm").items():
        others = [each["attack_options"].get(key) for each in peers if each["attack"] == facts["attack"]]
        texts += [f"{key} {shown(key, value)}"] if not peers or any(other != value for other in others) else []
    return ", ".join(texts)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _sentence(each: Mapping[str, Any]) -> str:
    a, b, which, difference = each["label_a"], each["label_b"], each["which"], each["difference"]
    if each["p"] is not None:
        better, how = each["p"] < ALPHA, f"p {_p(each['p'])}"
    elif better := each["low"] > 0 or each["high"] < 0:
        ahead = sum(one * difference > 0 for one in each["differences"])
        how = f"ahead in {ahead} of {len(each['pairs'])} seed pairs, the interval leaves 0 out"
    else:
        how = f"{len(each['pairs'])} seed pairs, the interval holds 0"
    if not better:
        return f"no {which} difference between {a} and {b} that n = {each['n']} can show ({how})"
    first, second = (b, a) if difference > 0 else (a, b)
    return f"{first} is better than {second} by {abs(100 * difference):.1f} points {which} ({how})"
