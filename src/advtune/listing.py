"""What `advtune list` shows, as data and as a table."""

from __future__ import annotations

import inspect
import json
from fractions import Fraction
from importlib.resources import files
from typing import Any

from advtune.options import describe

BACKBONES: dict[str, dict[str, Any]] = json.loads(
    files("advtune").joinpath("backbones.json").read_text(encoding="utf-8")
)
HUB_BACKBONES = [name for name, facts in BACKBONES.items() if facts["where"] == "hub"]
COLUMNS = ["Name", "Size", "px", "Robust", "Licence"]
NAME = 41  # letters of a name's column: a longer one moves the rest of its own line, so that all fit 80

END = {
    "methods": "† reconstructed: no public source gives it; our choice, see docs/log.md",
    "attacks": "transfer: any of these but autoattack, with --source MODEL: the images are made on that model",
    "backbones": """\
Size: parameters of both towers. px: side of its images. Robust: what its image
tower was tuned to withstand; with k1 in the name its text tower, too, edits of
one character. ?: not known. Source: the hub, from the owner before the slash;
mini is embedded, a small stand-in, not OpenAI CLIP, for non-commercial
research; a .pt is OpenAI's file, given by its path.
On trust: none of the others could be downloaded by us. Sizes are counted from
the published shapes, licences are those that the cards were seen to state.
Also folders, other files and run folders (docs/backbones.md). What one is, and
whether it can be used: advtune backbone inspect NAME""",
    "data": "* not yet loaded from the hub by us: `advtune list data --json` says what is taken on trust",
}
FASTER = "to tune faster, in place of the method's training attack: -a name=NAME, at its eps"


def listing(what: str) -> list[dict[str, Any]]:
    """The known methods, attacks, data sets or backbones, JSON-ready."""
    return {"methods": _methods, "attacks": _attacks, "data": _data, "backbones": _backbones}[what]()


def _about(thing: Any) -> str:
    """The first paragraph of its docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def _methods() -> list[dict[str, Any]]:
    from advtune.methods import METHODS

    return [
        {
            "name": name,
            "about": _about(kind),
            "paper": kind.paper,
            "trains": kind.trains,
            "presets": {name: dict(fields) for name, fields in getattr(kind, "presets", {}).items()},
            "options": describe(kind),
            "recipe": describe(kind.recipe),
            "attack": describe(kind.attack),
        }
        for name, kind in METHODS.items()
    ]


def _attacks() -> list[dict[str, Any]]:
    from advtune.attacks import ATTACKS
    from advtune.edits import TEXTUAL

    known = (ATTACKS | TEXTUAL).items()
    return [{"name": name, "about": _about(attack), "options": describe(attack)} for name, attack in known]


def _data() -> list[dict[str, Any]]:
    from advtune.data.catalog import catalog

    return [{"name": name, **facts} for name, facts in catalog().items()]


def _backbones() -> list[dict[str, Any]]:
    return [{"name": name, **facts} for name, facts in BACKBONES.items()]


def backbone_row(fact: dict[str, Any]) -> list[str]:
    """A known backbone under COLUMNS."""
    robust, size = fact["robust"], fact["parameters"]
    much = "?" if size is None else f"{size / 1e9:.3g}B" if size >= 1e9 else f"{size / 1e6:.3g}M"
    withstands = f"{robust['norm']} {robust['eps']}" if robust else ""
    return [fact["name"], much, str(fact["resolution"] or "?"), withstands, fact["licence"] or "?"]


def training() -> list[dict[str, Any]]:
    """The attacks that stand in for a paper's when it takes too long."""
    from advtune.attacks import ATTACKS, TRAINING

    return [
        {"name": name, "about": _about(kind), "options": describe(kind)}
        for name, kind in TRAINING.items()
        if name not in ATTACKS
    ]


def source(fact: dict[str, Any]) -> str:
    """Where the images of a set come from; * when nobody has tried."""
    where = "the package" if fact["embedded"] else fact["hub"] or "your own copy (ADVTUNE_DATA)"
    where += ", or CoOp's split file with its images" if fact["coop"] else ""
    return where + (" *" if fact["unverified"] else "")


def recipes(fact: dict[str, Any]) -> list[tuple[str, str]]:
    """A method's recipe and training attack, each with its values; nothing for what does not train."""
    found = []
    for kind, title in (("recipe", "recipe"), ("attack", "training attack")):
        if fact.get(kind) and fact["trains"] != "nothing":
            values = ", ".join(f"{option['name']}={shown(option['name'], option['default'])}" for option in fact[kind])
            found.append((title, "none; it tunes on clean images" if values.startswith("eps=0,") else values))
    return found


def show(what: str, facts: list[dict[str, Any]]) -> None:
    """Print a listing for a person."""
    from rich.console import Console

    console = Console(highlight=False)
    if what == "data":
        for fact in facts:
            line = f"{fact['title']}, {len(fact['classes'])} classes, from {source(fact)}"
            console.print(f"[bold]{fact['name']}[/]  {line}", soft_wrap=True)
        console.print(END["data"], soft_wrap=True)
    elif what == "backbones":
        rows = [COLUMNS, *map(backbone_row, facts)]
        wide = [NAME, *(max(map(len, column)) for column in zip(*[row[1:] for row in rows], strict=True))]
        for row in rows:
            line = "  ".join(text.ljust(width) for text, width in zip(row, wide, strict=True))
            console.print(line.rstrip(), markup=False, soft_wrap=True)
        console.print(END["backbones"], markup=False, soft_wrap=True)
    else:
        for fact in facts:
            _show_options(console, fact)
    if what == "attacks":
        console.print(END["attacks"], soft_wrap=True)
    if what == "methods":
        _show_training(console)
        console.print(END["methods"])


def _show_training(console: Any) -> None:
    console.print(f"{FASTER}\n")
    for fact in training():
        _show_options(console, fact)


def _show_options(console: Any, fact: dict[str, Any]) -> None:
    trains = f"  (trains {fact['trains']})" if "trains" in fact else ""
    console.print(f"[bold]{fact['name']}[/]{trains}", markup=True)
    console.print(f"  {fact['about']}", markup=False, soft_wrap=True)
    for preset, fields in fact.get("presets", {}).items():
        values = ", ".join(f"{key}={value}" for key, value in fields.items()) or "the defaults below"
        console.print(f"    -o preset={preset}: {values}", markup=False, soft_wrap=True)
    for option in fact["options"]:
        mark = "†" if option["reconstructed"] else ""
        choices = f" ({' | '.join(map(str, option['choices']))})" if option["choices"] else ""
        default = shown(option["name"], option["default"])
        line = f"    {option['name']}{mark}={default}{choices}: {option['help']}"
        console.print(line, markup=False, soft_wrap=True)
    for title, values in recipes(fact):
        console.print(f"    {title}: {values}", markup=False, soft_wrap=True)
    console.print()


def shown(name: str, value: Any) -> str:
    """A default as a user would write it: 1/255, true, none."""
    if name in ("eps", "step_size") and value is not None:
        return str(Fraction(value).limit_denominator(2040))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
