"""The other figures of a report, as panels: robust accuracy over eps, classes, loss terms; and all of them as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from advtune.errors import UserError
from advtune.report.classes import ClassLine, fragile, labelled, per_class
from advtune.report.formats import heading, label
from advtune.report.found import Measured, headline, log_of, measured, terms_of
from advtune.report.plot import (
    COLOURS,
    CROWD,
    WIDE,
    WORDY,
    Panel,
    folded,
    legend_below,
    look,
    pictures,
    plain_legend,
    room,
    scatter_panels,
    shortened,
)  # fmt: skip
from advtune.report.table import group_by, latest, line_key, lines_with_rows, pixels, section_key, without
from advtune.results import Row, mean_and_spread, wilson, write_atomic

CLEAN, ROBUST = "#56B4E9", "#D55E00"  # sky and vermilion: told apart by lightness, too
KINDS = ("pdf", "png")
DPI = 300  # of a .png for a paper
MOST = 12  # panels of a kind
TITLE = 44  # letters of a line above a panel
POINTS = 400  # of a drawn curve; a longer log is thinned to means


@dataclass(frozen=True)
class Curve:
    """Robust accuracy of one setting over eps: (eps, mean, low, high, n), ascending, fractions. eps 0 is clean."""

    name: str
    points: list[tuple[float, float, float, float, int]]


def eps_curves(rows: Sequence[Row]) -> list[tuple[str, list[Curve]]]:
    """(what the curves share, the curves) for each setting of data, attack and backbone that has several eps.

    A curve is all rows that differ only in eps, in the step that goes with it, and in seeds; without a row at eps 0
    the clean accuracy stands there. Two attacks of one eps that differ in their step are no curve: the setting is
    left out.
    """
    attacked = [row for row in latest(rows) if row.robust is not None and "eps" in (row.attack or {})]
    found = []
    for section in group_by(attacked, lambda row: section_key(_plain(row))).values():
        groups = list(group_by(section, lambda row: line_key(_plain(row))).values())
        # the names of a table without eps, whose lines differ in nothing else
        names = [label(line) for line, _ in lines_with_rows([_plain(group[0]) for group in groups])]
        groups.sort(key=lambda group: group[0].train is not None)  # as there: zero-shot first
        curves = [Curve(name, points) for name, group in zip(names, groups, strict=True) if (points := _curve(group))]
        if curves:
            line = lines_with_rows([_plain(section[0])])[0][0]
            found.append((heading([line]), curves))
    return found


def _plain(row: Row) -> Row:
    """The row as if its attack had no eps."""
    return replace(row, attack=without(row.attack, "eps", "step_size", "stages"))


def _curve(group: Sequence[Row]) -> list[tuple[float, float, float, float, int]]:
    """Means over the seeds, or nothing when there is one eps alone or an eps was attacked in two ways."""
    by_eps = group_by(group, lambda row: float((row.attack or {})["eps"]))
    steps = [{(row.attack or {}).get("step_size") for row in each} for each in by_eps.values()]
    if len(by_eps) < 2 or any(len(each) > 1 for each in steps):
        return []
    counts = {eps: [row.robust for row in each if row.robust] for eps, each in by_eps.items()}
    counts.setdefault(0.0, [row.clean for row in group])
    points = []
    for eps, each in sorted(counts.items()):
        mean, n = mean_and_spread([found["accuracy"] for found in each])[0], each[0]["n"]
        points.append((eps, mean, *wilson(round(mean * n), n), n))
    return points


def eps_panels(rows: Sequence[Row], names: Sequence[str] = ()) -> list[Panel]:
    """A panel for each set of curves; `names` fixes colours across figures."""
    found = eps_curves(rows)
    names = list(dict.fromkeys([*names, *(curve.name for _, curves in found for curve in curves)]))
    panels = []
    for title, curves in found[:MOST]:
        own = [curve.name for curve in curves]
        crowded = len(own) > CROWD // 2 or any(len(name) > WORDY for name in own)
        draw = partial(_draw_curves, curves=curves, names=names, below=crowded)
        panels.append(Panel(title.replace(" · ", "\n"), draw, size=room(own if crowded else ())))
    return panels


def _draw_curves(axis: Any, curves: Sequence[Curve], names: Sequence[str], below: bool) -> None:
    for curve in curves:
        eps, mean, low, high, _ = zip(*curve.points, strict=True)
        colour, marker = look(curve.name, names)
        bars = [[100 * max(0, m - l) for m, l in zip(mean, low, strict=True)],
                [100 * max(0, h - m) for m, h in zip(mean, high, strict=True)]]  # fmt: skip
        axis.errorbar(eps, [100 * m for m in mean], yerr=bars, fmt=f"-{marker}", color=colour, markersize=5,
                      linewidth=1.4, elinewidth=0.8, capsize=2, label=folded(curve.name))  # fmt: skip
    ticks = sorted({point[0] for curve in curves for point in curve.points})
    texts = [pixels(eps) for eps in ticks]
    whole = all(text.endswith("/255") or text == "0" for text in texts)  # beside each other there is little room
    axis.set_xticks(ticks, [text.removesuffix("/255") if whole else text for text in texts])
    axis.set_ylim(bottom=-2)
    axis.set_xlabel(f"eps of the attack{', steps of 1/255' if whole else ''} (0: clean)")
    axis.set_ylabel("accuracy (%)")
    if below:
        legend_below(axis)
    else:
        plain_legend(axis)


def class_columns(lines: Sequence[Measured]) -> tuple[list[tuple[str, list[ClassLine]]], str]:
    """(name, class lines) for each of these table lines, which share their data; and, when there are none, why."""
    first = lines[0]
    folder = next((folder for each in lines for folder in each.folders if folder), None)
    try:
        data = labelled(first.rows[0], folder)
    except (UserError, OSError, KeyError, TypeError, ValueError) as error:
        return [], f"{error}" if isinstance(error, UserError) else f"the rows do not say enough of their data ({error})"
    same = first.rows[0].data.get("sha256")
    columns = []
    for each in lines:
        rows = [row for row in each.rows if row.data.get("sha256") == same]
        if rows:
            columns.append((each.name, per_class(rows, data.labels, data.task.classes)))
    return columns, ""


def class_panels(columns: Sequence[tuple[str, Sequence[ClassLine]]]) -> list[Panel]:
    """A panel of bars for each method; all in one order, the most fragile class on top."""
    order = fragile([column for _, column in columns])
    size = (WIDE, 1.8 + 0.24 * len(order))
    return [Panel(folded(name, TITLE), partial(_draw_classes, column=column, order=order), size=size)
            for name, column in columns[:MOST]]  # fmt: skip


def _draw_classes(axis: Any, column: Sequence[ClassLine], order: Sequence[str]) -> None:
    by_name = {line.name: line for line in column}
    lines = [by_name[name] for name in order if name in by_name]
    places = range(len(lines))
    clean, attacked = [100 * line.clean for line in lines], lines[0].robust is not None
    last = [100 * (line.robust or 0) for line in lines] if attacked else clean
    bars = [[max(0, mean - 100 * line.low) for mean, line in zip(last, lines, strict=True)],
            [max(0, 100 * line.high - mean) for mean, line in zip(last, lines, strict=True)]]  # fmt: skip
    whiskers = {"xerr": bars, "error_kw": {"elinewidth": 0.8, "capsize": 1.5}}
    if attacked:
        axis.barh(places, clean, height=0.78, color=CLEAN, label="clean")
        axis.barh(places, last, height=0.4, color=ROBUST, label="robust, 95 % interval", **whiskers)
    else:
        axis.barh(places, clean, height=0.78, color=CLEAN, label="clean, 95 % interval", **whiskers)
    axis.set_yticks(places, [f"{shortened(line.name, 28)} ({line.n})" for line in lines], fontsize=8)
    for text in axis.get_yticklabels():
        text.set_parse_math(False)
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.set_xlim(0, 100)
    axis.set_xlabel("accuracy (%), n in brackets", fontsize=8)
    legend_below(axis, columns=2)


def training_panels(lines: Sequence[Measured]) -> list[Panel]:
    """The loss terms over the steps, a panel for the first run of each table line whose log is here."""
    panels = []
    for each in lines:
        log = next((log for folder in each.folders if folder and (log := log_of(folder))), [])
        if terms := terms_of(log):
            panels.append(
                Panel(folded(each.name, TITLE), partial(_draw_training, log=log, terms=terms), size=(WIDE, 3.9))
            )
    return panels[:MOST]


def _draw_training(axis: Any, log: Sequence[Mapping[str, float]], terms: Sequence[str]) -> None:
    highest = []
    for i, term in enumerate(terms):
        steps, values = thinned([(line["step"], line[term]) for line in log if term in line])
        epochs = group_by([line for line in log if term in line], lambda line: line.get("epoch", 0)).values()
        mean = [(fmean([line["step"] for line in each]), fmean([line[term] for line in each])) for each in epochs]
        colour = COLOURS[i % len(COLOURS)]
        axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        axis.plot(*zip(*mean, strict=True), "-" + look(term, terms)[1], color=colour, label=term, markersize=4)
        highest.append(max(abs(value) for _, value in mean))
    if min(highest) > 0 and max(highest) > 20 * min(highest):
        axis.set_yscale("log", nonpositive="mask")
    axis.set_xlabel("step (markers: means of the epochs)")
    axis.set_ylabel("loss term")
    axis.xaxis.get_major_locator().set_params(integer=True)
    legend_below(axis, columns=min(4, len(terms)))


def fmean(values: Sequence[float]) -> float:
    return mean_and_spread(values)[0]


def thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """At most POINTS of a curve, means of neighbours."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [fmean([x for x, _ in each]) for each in groups], [fmean([y for _, y in each]) for each in groups]


def write_figures(rows: Sequence[Row], folders: Mapping[str, Path], out: Path) -> tuple[list[Path], list[str]]:
    """scatter, eps, classes and training as .pdf and .png in `out`; the files, and why a figure is missing.

    Raises UserError when there is nothing to draw.
    """
    lines = measured(rows, dict(folders))
    shown, names = headline(lines), [each.name for each in lines]
    columns, why = class_columns(shown)
    panels = {
        "scatter": (scatter_panels(rows, 2, names) or scatter_panels(rows, 1, names), "no row has a robust accuracy"),
        "eps": (
            eps_panels(rows, names),
            "no setting was attacked at several eps: advtune evaluate ... -a eps=0,1/255,2/255",
        ),
        "classes": (class_panels(columns), why),
        "training": (training_panels(shown), "no run folder with train.jsonl is here"),
    }
    files, missing = [], []
    for name, (some, reason) in panels.items():
        for kind, content in pictures(some, KINDS, dpi=DPI).items() if some else ():
            files.append(out / f"{name}.{kind}")
            write_atomic(files[-1], content)
        missing += [] if some else [f"no {name} figure: {reason}"]
    if not files:
        raise UserError("nothing to draw: " + "; ".join(missing))
    return files, missing
