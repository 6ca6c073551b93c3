"""Panels, and clean against robust accuracy: one point a table line, with the Pareto front."""

from __future__ import annotations

import io
import math
import os
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from advtune.errors import UserError
from advtune.report.formats import heading, label
from advtune.report.table import attacks, sections, table
from advtune.results import Row, write_atomic

# Okabe and Ito's, told apart with any colour vision; for their yellow, which is faint on white, Tol's wine
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")  # nine against eight colours: 72 pairs before a repeat
FORMATS = (".png", ".pdf", ".svg")
STYLE = {"svg.hashsalt": "advtune", "pdf.fonttype": 42}  # TrueType: publishers refuse the default, Type 3
UNDATED: dict[str, dict[str, Any]] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
PLACES = [(6, 6), (6, -14), (-6, 6), (-6, -14), (6, 20), (6, -28), (-6, 20), (-6, -28)]  # points from the marker
FRONT = "#888888"
CROWD, WORDY = 12, 26  # lines of a panel, letters of a name, beyond which names stand in a legend below
WIDE, TALL, ENTRY = 5.2, 4.4, 0.16  # inches: a panel, and a line of its legend


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `draw` fills them; `finish`, if any, does what needs the layout to stand."""

    title: str
    draw: Callable[[Any], None]
    finish: Callable[[Any], None] | None = None
    size: tuple[float, float] = (WIDE, TALL)  # inches


def scatter(rows: Sequence[Row], path: str | os.PathLike[str], title: str | None = None) -> None:
    """Writes a picture (.png, .pdf, .svg): a panel a section, bars are 95 % Wilson intervals over the images.

    Raises UserError when no row has a robust accuracy, or for another file type.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"cannot draw {path.name}; end the name in {', '.join(FORMATS)}")
    panels = scatter_panels(rows)
    if not panels:
        raise UserError("no row has a robust accuracy, so there is nothing to plot; evaluate with an attack")
    kind = path.suffix[1:].lower()
    write_atomic(path, pictures(panels, [kind], title)[kind])


def pictures(
    panels: Sequence[Panel], kinds: Sequence[str], title: str | None = None, dpi: int = 120
) -> dict[str, bytes]:
    """The panels side by side, at most three in a row, as a file of each kind (png, pdf or svg). The same panels
    give the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide = min(3, len(panels))
    tall = math.ceil(len(panels) / wide)
    width, height = (max(panel.size[i] for panel in panels) for i in (0, 1))
    figure = Figure(figsize=(width * wide, height * tall), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, parse_math=False)
    axes = figure.subplots(tall, wide, squeeze=False).flatten()
    out = {kind: io.BytesIO() for kind in kinds}
    with warnings.catch_warnings(), matplotlib.rc_context(STYLE):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a class name in a script that the font has not
        for axis, panel in zip(axes, panels, strict=False):
            axis.set_axisbelow(True)
            axis.grid(True, color="#dddddd", linewidth=0.6)
            if panel.title:
                axis.set_title(panel.title, fontsize=9, parse_math=False)
            panel.draw(axis)
        for axis in axes[len(panels) :]:
            axis.remove()
        figure.draw_without_rendering()  # places are in pixels: the layout must stand first
        for axis, panel in zip(axes, panels, strict=False):
            if panel.finish is not None:
                panel.finish(axis)
        figure.set_layout_engine("none")  # it stands; names beside markers are not to move it, and to lay out is slow
        for kind, stream in out.items():
            figure.savefig(stream, format=kind, metadata=UNDATED[kind])
    return {kind: stream.getvalue() for kind, stream in out.items()}


def scatter_panels(rows: Sequence[Row], least: int = 1, names: Sequence[str] = ()) -> list[Panel]:
    """Clean against robust accuracy, a panel for each section with an attack and at least so many lines; `names`
    fixes colours across figures."""
    found = [each for each in sections(table(rows)) if attacks(each[0]) and len(each) >= least]
    names = list(dict.fromkeys([*names, *(label(line) for section in found for line in section)]))
    panels = []
    for section in found:
        own = [label(line) for line in section]
        crowded = len(section) > CROWD or any(len(name) > WORDY for name in own)
        draw = partial(_points, section=section, names=names, legend=crowded)
        finish = None if crowded else partial(_labels, section=section)
        panels.append(Panel(heading(section).replace(" · ", "\n"), draw, finish, room(own if crowded else ())))
    return panels


def room(names: Sequence[str]) -> tuple[float, float]:
    """The size of a panel with a legend of these names below."""
    return WIDE, TALL + ENTRY * sum(folded(name).count("\n") + 1 for name in names)


def look(name: str, names: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of a name, by its place among the names of a page."""
    i = names.index(name)
    return COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other beats: none is at least as good in both and better in one. By ascending first number."""

    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in points)

    return sorted((i for i, point in enumerate(points) if not beaten(point)), key=lambda i: points[i])


def front(section: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a section on the Pareto front of clean and robust accuracy, by ascending clean accuracy."""
    lines = [line for line in section if line["robust_accuracy"] is not None]
    return [lines[i] for i in pareto([(line["clean_accuracy"], line["robust_accuracy"]) for line in lines])]


def _points(axis: Any, section: Sequence[dict[str, Any]], names: Sequence[str], legend: bool) -> None:
    for line in section:
        points = {}
        for name in ("clean", "robust"):
            mean, low, high = (100 * line[f"{name}_{key}"] for key in ("accuracy", "low", "high"))
            points[name] = ([mean], [[max(0, mean - low)], [max(0, high - mean)]])
        (x, x_bar), (y, y_bar) = points["clean"], points["robust"]
        colour, marker = look(label(line), names)
        axis.errorbar(x, y, xerr=x_bar, yerr=y_bar, fmt=marker, color=colour, markersize=7, elinewidth=1, capsize=2,
                      label=folded(label(line)))  # fmt: skip
    axis.margins(0.15)
    left, right = axis.get_xlim()
    low, high = axis.get_ylim()
    axis.set_xlim(max(left, -3), min(right, 103))
    axis.set_ylim(max(low, -3), min(high, 103))
    axis.set_xlabel("clean accuracy (%)")
    axis.set_ylabel("robust accuracy (%)")
    best = [(100 * line["clean_accuracy"], 100 * line["robust_accuracy"]) for line in front(section)]
    if len(section) > 1:  # the corner that the points of the front leave to the others
        x = [axis.get_xlim()[0], *(clean for clean, _ in best), best[-1][0]]
        y = [best[0][1], *(robust for _, robust in best), axis.get_ylim()[0]]
        axis.step(x, y, where="pre", color=FRONT, linewidth=1, linestyle="--", zorder=0.5)
    if legend:
        legend_below(axis)


def legend_below(axis: Any, columns: int = 1) -> None:
    """A legend under the axis and its name, where a panel has `room` for it."""
    from matplotlib.transforms import offset_copy

    below = offset_copy(axis.transAxes, axis.figure, 0, -34, "points")
    where = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below}
    plain_legend(axis, frameon=False, fontsize=7, ncols=columns, **where)


def plain_legend(axis: Any, **how: Any) -> None:
    """A legend whose names are no formulas, and whose markers are not hidden by whiskers."""
    handles, names = axis.get_legend_handles_labels()
    marks = [each[0] if hasattr(each, "has_xerr") else each for each in handles]
    for text in axis.legend(marks, names, **{"fontsize": 8, "framealpha": 0.85} | how).get_texts():
        text.set_parse_math(False)


def folded(text: str, most: int = 66) -> str:
    """The text in lines of so many letters, by default those of a legend."""
    return textwrap.fill(text, most)


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _labels(axis: Any, section: Sequence[dict[str, Any]]) -> None:
    """Each name beside its marker, at the first place that is inside the panel and free of other names."""
    from matplotlib.transforms import Bbox

    inside = axis.get_window_extent()
    points = [(100 * line["clean_accuracy"], 100 * line["robust_accuracy"]) for line in section]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axis.transData.transform(points)]
    whiskers = [Bbox(axis.transData.transform(ends)) for line in section for ends in _whiskers(line)]
    for line, point in zip(section, points, strict=True):
        best = None
        for dx, dy in PLACES:
            side = "left" if dx > 0 else "right"
            text = axis.annotate(
                label(line),
                point,
                (dx, dy),
                textcoords="offset points",
                ha=side,
                fontsize=8,
                parse_math=False,
            )
            box = text.get_window_extent().padded(2)
            outside = max(0, inside.x0 - box.x0) + max(0, box.x1 - inside.x1)
            outside += max(0, inside.y0 - box.y0) + max(0, box.y1 - inside.y1)
            cost = outside + 100 * box.count_overlaps(taken) + box.count_overlaps(whiskers)
            if best is None or cost < best[0]:
                if best:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
            if cost == 0:
                break
        assert best is not None
        taken.append(best[2])


def _whiskers(line: dict[str, Any]) -> list[list[tuple[float, float]]]:
    """The ends of a point's two whiskers."""
    (x, left, right), (y, low, high) = (
        [100 * line[f"{name}_{key}"] for key in ("accuracy", "low", "high")] for name in ("clean", "robust")
    )
    return [[(left, y), (right, y)], [(x, low), (x, high)]]
