"""Clean against robust accuracy, one point a table line."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from advtune.errors import UserError
from advtune.report.formats import heading, label
from advtune.report.table import sections, table
from advtune.results import Row, write_atomic

# Okabe and Ito's eight, told apart with any colour vision; yellow last, it is faint on white
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MARKERS = (
    "o",
    "s",
    "^",
    "D",
    "v",
    "P",
    "X",
    "*",
    "<",
)  # nine against eight colours: 72 pairs before a repeat
FORMATS = (".png", ".pdf", ".svg")
PLACES = [
    (6, 6),
    (6, -14),
    (-6, 6),
    (-6, -14),
    (6, 20),
    (6, -28),
    (-6, 20),
    (-6, -28),
]  # points from the marker


def scatter(rows: Sequence[Row], path: str | os.PathLike[str], title: str | None = None) -> None:
    """Writes a picture (.png, .pdf, .svg): a panel a section, bars are 95 % Wilson intervals over the images.

    Raises UserError when no row has a robust accuracy, or for another file type.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"cannot draw {path.name}; end the name in {', '.join(FORMATS)}")
    panels = [each for each in sections(table(rows)) if each[0]["robust_accuracy"] is not None]
    if not panels:
        raise UserError("no row has a robust accuracy, so there is nothing to plot; evaluate with an attack")
    names = list(dict.fromkeys(label(line) for section in panels for line in section))
    wide = min(3, len(panels))
    tall = math.ceil(len(panels) / wide)
    figure = Figure(figsize=(5.2 * wide, 4.4 * tall), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, parse_math=False)
    axes = figure.subplots(tall, wide, squeeze=False).flatten()
    for axis, section in zip(axes, panels, strict=False):
        _panel(axis, section, names)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.draw_without_rendering()  # places are in pixels: the layout must stand first
    for axis, section in zip(axes, panels, strict=False):
        _labels(axis, section)
    out = io.BytesIO()
    figure.savefig(out, format=path.suffix[1:].lower())
    write_atomic(path, out.getvalue())


def _panel(axis: Any, section: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    for line in section:
        i = names.index(label(line))
        points = {}
        for name in ("clean", "robust"):
            mean, low, high = (100 * line[f"{name}_{key}"] for key in ("accuracy", "low", "high"))
            points[name] = ([mean], [[max(0, mean - low)], [max(0, high - mean)]])
        (x, x_bar), (y, y_bar) = points["clean"], points["robust"]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axis.errorbar(x, y, xerr=x_bar, yerr=y_bar, fmt=marker, color=colour, markersize=7, elinewidth=1, capsize=2)
    axis.margins(0.15)
    left, right = axis.get_xlim()
    low, high = axis.get_ylim()
    axis.set_xlim(max(left, -3), min(right, 103))
    axis.set_ylim(max(low, -3), min(high, 103))
    axis.set_xlabel("clean accuracy (%)")
    axis.set_ylabel("robust accuracy (%)")
    axis.set_title(heading(section).replace(" · ", "\n"), fontsize=9, parse_math=False)
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def _labels(axis: Any, section: Sequence[dict[str, Any]]) -> None:
    """Each name beside its marker, at the first place that is inside the panel and free of other names."""
    from matplotlib.transforms import Bbox

    inside = axis.get_window_extent()
    points = [(100 * line["clean_accuracy"], 100 * line["robust_accuracy"]) for line in section]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axis.transData.transform(points)]
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
            cost = outside + 100 * box.count_overlaps(taken)
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
