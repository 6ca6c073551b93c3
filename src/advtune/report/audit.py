"""The page of an audit: the report's, with a verdict at its head and what to do next at its foot."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from advtune.attacks import PGD
from advtune.report.gallery import COUNT, STEPS, Gallery, choose, examples
from advtune.report.html import Given
from advtune.report.html import page as report
from advtune.report.table import pixels
from advtune.report.verdict import FEW, SHOWN, columns, following, fragile, name_of, percent, verdict

if TYPE_CHECKING:
    from advtune.audit import Audit

CHOSEN = (
    "Chosen, not typical: of the first images, of different classes, some that are right and stand, if there are any, "
    "then some that are right and fall, then others."
)


def page(found: Audit) -> str:
    """The audit as one self-contained page of HTML."""
    names = titles(found)
    folders = {side.auto.run: Path(side.auto.run) for side in found.sides if side.auto.run}
    given = Given(
        opening=rendered(found, "head"), closing=rendered(found, "foot"),
        columns=columns(found, names), gallery=gallery(found, names),
    )  # fmt: skip
    rows = [row for side in reversed(found.sides) for row in side.rows]  # its pictures are of the first that ties
    return report(rows, folders, title=f"Robustness audit of {name_of(found.sides[0])}", given=given)


def titles(found: Audit) -> list[str]:
    """A name for each side."""
    methods = [side.auto.method for side in found.sides]
    if len(methods) == 1:
        return methods
    return [f"{when} ({method})" for when, method in zip(("before", "after"), methods, strict=True)]


def tiles(found: Audit) -> list[tuple[str, str, str]]:
    """The numbers to see at first: (what, number, detail)."""
    shown = []
    for side, when in zip(found.sides, ("", " after the fix"), strict=False):
        eps = pixels((side.auto.attack or {})["eps"])
        for what, counts in (("clean", side.auto.clean), (f"attacked, eps {eps}", side.auto.robust or {})):
            detail = f"95 % interval {100 * counts['low']:.1f} to {100 * counts['high']:.1f}, n = {counts['n']}"
            shown.append((what + when, f"{100 * counts['accuracy']:.1f} %", detail))
    return shown


def gallery(found: Audit, names: list[str]) -> Gallery:
    """A handful of the images attacked, on each side."""
    rows = [side.auto for side in found.sides]
    before = rows[0] if len(rows) > 1 else None
    chosen = choose(before, rows[-1], found.images.y.tolist(), COUNT)
    x, y = found.images.batch(torch.tensor(chosen), torch.device("cpu"))
    models = {name: side.model for name, side in zip(names, found.sides, strict=True)}
    attack = PGD(eps=(rows[0].attack or {})["eps"], steps=STEPS)
    told = [CHOSEN] if before is None else [CHOSEN, "Each model is attacked by itself, so the perturbations differ."]
    return Gallery(examples(models, found.task, x, y, attack), attack, told)


def rendered(found: Audit, half: str) -> Any:
    """The head or the foot as Markup."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    classes, each = fragile(found), len(found.images.y) / len(found.task.classes)
    facts = {
        "half": half,
        "verdict": verdict(found),
        "names": titles(found),
        "eps": pixels((found.sides[0].auto.attack or {})["eps"]),
        "curve": curve(found),
        "fragile": classes[:SHOWN],
        "tiles": tiles(found),
        "classes": len(found.task.classes),
        "each": each,
        "few": each < FEW,
        "following": following(found),
        "out": str(found.out),
    }
    text = (files("advtune.report") / "audit.html").read_text(encoding="utf-8")
    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return Markup(engine.from_string(text).render(facts))


def curve(found: Audit) -> list[tuple[str, int, list[str]]]:
    """(eps and attack, n, accuracy of each side), ascending, AutoAttack last."""
    lines = []
    for rows in zip(*(side.rows for side in found.sides), strict=True):
        attack = rows[0].attack or {}
        how = {"pgd": f"PGD-{attack.get('steps')}", "autoattack": "AutoAttack"}[attack["name"]]
        name = f"{pixels(attack['eps'])}, {how}" if attack["eps"] else "0 (as they are)"
        lines.append((name, rows[0].clean["n"], [percent(row.robust) for row in rows if row.robust]))
    return lines
