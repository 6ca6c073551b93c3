"""One self-contained page: summary, tables, figures and a gallery; opens from disk, asks the network for nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advtune import __version__
from advtune.errors import UserError
from advtune.report.classes import FRAGILE, ClassLine
from advtune.report.figures import MOST, class_columns, class_panels, eps_panels, training_panels
from advtune.report.formats import CAPTION, cells, footnotes, heading, label, subheading
from advtune.report.found import Measured, headline, measured
from advtune.report.harmonic import harmonic_means, harmonic_table
from advtune.report.plot import FRONT, Panel, front, pictures, scatter_panels
from advtune.report.summary import blind, notices, tiles, words
from advtune.report.table import attacks, flat, pixels, shown
from advtune.results import Row, now

if TYPE_CHECKING:
    from advtune.report.gallery import Gallery

SHRUNK = 0.8  # of a panel's size, so that its letters can be read on a phone
SIDE = 160  # pixels of a gallery picture; a larger one is made smaller, and JPEG
ELSEWHERE = ("Alarm, ", "Warning, ", "† ", "Backbone ")  # footnotes that the page has in the table or the summary
NO_ATTACK = "No row has a robust accuracy: evaluate with an attack."
NO_EPS = (
    "Every setting was attacked at one eps alone. For a curve: "
    "advtune evaluate DIR --data SPEC --attack pgd -a eps=0,1/255,2/255,4/255"
)
OFFLINE = "A report downloads nothing, unless HF_HUB_OFFLINE=0 is set."
NO_LOG = "No run folder with a train.jsonl is among the folders of this report."


@dataclass(frozen=True)
class Given:
    """What an audit brings to the page itself: HTML (Markup) at head and foot, class lines, a gallery."""

    opening: str
    closing: str
    columns: list[tuple[str, list[ClassLine]]]
    gallery: Gallery


def page(
    rows: Sequence[Row], folders: Mapping[str, Path], gallery: bool = True, title: str = "", given: Given | None = None
) -> str:
    """The report as HTML. `folders`: run folders by the run's name in the rows (see `gather`); what needs one that
    is not there says so in its place. gallery: attack a handful of images, which loads models and data. given: an
    audit's own parts.

    Raises UserError when there is no row.
    """
    from jinja2 import Environment, StrictUndefined

    lines = measured(rows, dict(folders))
    best = headline(lines)
    columns, why = (given.columns, "") if given else class_columns(best)
    facts = {
        "title": title or "Robustness report",
        "date": now()[:16].replace("T", " ") + " UTC",
        "version": __version__,
        "given": given,
        "tiles": [] if given else tiles(lines),
        "words": [each for each in words(lines) if not given or each[0] != "Most robust"],
        "notices": notices(lines),
        "tables": _tables(lines),
        "harmonic": harmonic_table(harmonic_means(rows)) if harmonic_means(rows) else [],
        "caption": CAPTION,
        "setting": heading([best[0].line]),
        "figures": _figures(rows, lines, best, columns, why, given is not None),
        "classes": _class_table(columns),
        "gallery": (_pictured(given.gallery) if given else _gallery(best)) if gallery else None,
        "rows": len(rows),
        "runs": len({row.run for row in rows if row.run}),
        "devices": sorted({row.device for row in rows if row.device}),
        "versions": sorted({row.advtune for row in rows}),
        "front_colour": FRONT,
    }
    text = (files("advtune.report") / "page.html").read_text(encoding="utf-8")
    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return engine.from_string(text).render(facts)


def _tables(lines: Sequence[Measured]) -> list[dict[str, Any]]:
    """A table a section: heading, columns, lines with their numbers, intervals and findings, notes, settings."""
    tables: dict[int, list[Measured]] = {}
    for each in lines:
        tables.setdefault(each.line["section"], []).append(each)
    return [_table([each.line for each in section]) for section in tables.values()]


def _table(section: Sequence[dict[str, Any]]) -> dict[str, Any]:
    header, *body = cells(section)
    names = ["clean", "robust"] if section[0]["attack"] else ["clean"]
    on_front = front(section) if len(section) > 1 else []
    lines = [
        {
            "texts": texts[: -len(names)],
            "numbers": [_number(line, name, texts[i - len(names)]) for i, name in enumerate(names)],
            "front": any(line is each for each in on_front),
            "checks": len(line["checks"]),
            "findings": _findings(line),
        }
        for line, texts in zip(section, body, strict=True)
    ]
    return {
        "heading": heading(section),
        "below": subheading(section),
        "header": header,
        "attacked": bool(section[0]["attack"]),
        "lines": lines,
        "notes": _notes(section),
        "settings": [(label(line), _settings(line)) for line in section],
    }


def _notes(section: Sequence[dict[str, Any]]) -> list[str]:
    """The footnotes that the page has nowhere else."""
    return [note for note in footnotes(section) if not note.startswith(ELSEWHERE)]


def _number(line: Mapping[str, Any], name: str, text: str) -> dict[str, Any] | None:
    if line[f"{name}_accuracy"] is None:
        return None
    facts = {key: round(100 * line[f"{name}_{key}"], 2) for key in ("accuracy", "low", "high")}
    return facts | {"name": name, "text": text.replace(", ", ",\u00a0")}


def _findings(line: dict[str, Any]) -> list[str]:
    found = [f"{each['name']}: {each['text']} (n = {each['n']})" for each in line["alarms"]]
    if blind(line):
        share = 100 * line["zero_gradient_share"]
        found.append(f"{share:.1f} % of the input gradients (n = {line['zero_gradient_n']}) were exactly zero: the "
                     "attack may have seen nothing")  # fmt: skip
    return found


def _settings(line: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={shown(key, value)}" for key, value in flat(line["settings"]).items() if value != {})


def _figures(
    rows: Sequence[Row], lines: Sequence[Measured], best: Sequence[Measured], columns: Any, why: str, one: bool
) -> dict[str, dict[str, Any]]:
    """Pictures by kind, and why there are none. one: scatter the headline's setting alone."""
    names = [each.name for each in lines]
    points = [row for each in best for row in each.rows] if one else rows
    scattered = scatter_panels(points, 2, names) or scatter_panels(points, 1, names)
    attacked = any(attacks(each.line) for each in lines)
    found: dict[str, tuple[list[Panel], str]] = {
        "scatter": (scattered, NO_ATTACK),
        "eps": (eps_panels(rows, names), NO_EPS if attacked else NO_ATTACK),
        "classes": (class_panels(columns), f"Not to be had here: {_why(why)}"),
        "training": (training_panels(best), NO_LOG),
    }
    return {
        kind: {"pictures": [_drawn(panel) for panel in panels[:MOST]], "why": missing,
               "more": max(0, len(panels) - MOST)}
        for kind, (panels, missing) in found.items()
    }  # fmt: skip


def _drawn(panel: Panel) -> dict[str, str]:
    small = replace(panel, size=(SHRUNK * panel.size[0], SHRUNK * panel.size[1]))
    return {"alt": panel.title.replace("\n", ", "), "uri": uri(pictures([small], ["svg"])["svg"], "svg+xml")}


def _class_table(columns: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The numbers of the bars: class, n, then clean and robust of each method."""
    by_name: dict[str, list[Any]] = {}
    for _, column in columns:
        for line in column:
            by_name.setdefault(line.name, []).append(line)
    return {"names": [name for name, _ in columns], "lines": by_name, "drawn": FRAGILE,
            "attacked": any(line.robust is not None for column in by_name.values() for line in column)}  # fmt: skip


def _gallery(best: Sequence[Measured]) -> dict[str, Any]:
    """Pictures and sentences for the page, or why there are none."""
    from advtune.report.gallery import gallery

    try:
        found = gallery(best)
    except (UserError, OSError, KeyError, TypeError, ValueError) as error:
        return {"why": _why(str(error) or type(error).__name__), "examples": []}
    return _pictured(found)


def _why(reason: str) -> str:
    """The reason as a sentence, and where it is the network, that a report is kept from it."""
    return f"{reason}." + (f" {OFFLINE}" if "online" in reason or "download" in reason else "")


def _pictured(found: Gallery) -> dict[str, Any]:
    """A gallery's pictures and sentences for the page."""
    eps, norm = found.attack.eps, found.attack.norm
    examples = []
    for each in found.examples:
        views = []
        for view in each.views:
            change = view.x_adv - each.x
            reach = eps if norm == "linf" else float(change.abs().max()) or 1.0
            wrong = view.after[0][0] != each.truth
            views.append({"model": view.model, "before": view.before, "after": view.after, "wrong": wrong,
                          "was_right": view.before[0][0] == each.truth, "factor": round(0.5 / reach),
                          "change": tensor_uri((change / reach / 2 + 0.5).clamp(0, 1), smooth=False),
                          "adversarial": tensor_uri(view.x_adv)})  # fmt: skip
        examples.append({"truth": each.truth, "clean": tensor_uri(each.x), "views": views})
    side = found.examples[0].x.shape[-1]
    length = f"{'' if norm == 'linf' else norm + ' '}eps {pixels(eps)}"
    told = [f"Attack: {found.attack.name}, {length}, {found.attack.steps} steps.", *found.told]
    if side > SIDE:
        told.append(f"Images of {side} pixels are shown at {SIDE}.")
    told.append("Pictures are rounded to 8 bits; the classes are those of the images before rounding.")
    return {"why": "", "told": told, "examples": examples}


def tensor_uri(x: Any, smooth: bool = True) -> str:
    """An image [3, H, W] in [0, 1] as a data URI: PNG, or JPEG of SIDE pixels when it is larger. smooth: shrink by
    averaging, which would level noise."""
    from PIL import Image

    array = (x * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    image, out = Image.fromarray(array), io.BytesIO()
    if max(image.size) <= SIDE:
        image.save(out, "PNG", optimize=True)
        return uri(out.getvalue(), "png")
    scale = SIDE / max(image.size)
    way = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image.resize(size, way).save(out, "JPEG", quality=88)
    return uri(out.getvalue(), "jpeg")


def uri(content: bytes, kind: str) -> str:
    """A picture of a kind (svg+xml, png, jpeg) as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
