"""What differs in protocol between a published row and ours, as data; facts a paper does not give are not compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from advtune.report.published import DISTANCES
from advtune.report.table import shown
from advtune.results import Row

Fact = dict[str, str]
HUB = {  # the end of a hub id or a folder's name, which is all a row knows of an architecture
    "ViT-B/32": "clip-vit-base-patch32",
    "ViT-B/16": "clip-vit-base-patch16",
    "ViT-L/14": "clip-vit-large-patch14",
}
BUDGET = {"name": "", "eps": " eps", "steps": " steps", "step_size": " step", "norm": " norm"}


def differences(paper: Mapping[str, Any], group: Sequence[Row]) -> list[Fact]:
    """`{"what", "ours", "paper"}`, texts, for rows of one setting beside a published row; see `against`."""
    row = group[0]
    facts = _model(paper, row) + _attack("attack", paper.get("attack", {}), row.attack or {"name": "none"})
    if row.train is not None:
        facts += _training(paper, row, row.train)
        seeds = len({each.train["seed"] for each in group if each.train})
        facts += _unequal("seeds", seeds, paper.get("seeds"))
    return facts + _data(paper, group)


def same_backbone(name: str | None, facts: Mapping[str, Any]) -> bool:
    """Whether a row's backbone bears the name of a paper's architecture (`ViT-B/32`); true when that is not known."""
    return name is None or _end(facts).lower() == HUB.get(name)


def shots_of(train: Mapping[str, Any]) -> Any:
    """Training images a class, `all` when they were not limited."""
    return train.get("shots") or "all"


def _end(backbone: Mapping[str, Any]) -> str:
    return str(backbone.get("name", "")).rstrip("/").rpartition("/")[2]


def _model(paper: Mapping[str, Any], row: Row) -> list[Fact]:
    facts, backbone = [], row.backbone
    if not same_backbone(paper.get("backbone"), backbone):
        stand_in = "" if not backbone.get("notice") else " (a stand-in)"
        facts.append(_fact("backbone", f"{_end(backbone)}{stand_in}", paper["backbone"]))
    tower = (backbone.get("tuned") or {}).get("method", "none")
    facts += _unequal("tuned before", tower, paper.get("tower"))
    size = row.data.get("resolution")
    return facts + (_unequal("resolution", size, paper.get("resolution"), " px") if size else [])


def _attack(what: str, paper: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Fact]:
    """An attack's fields that both have; with another attack its steps mean nothing."""
    facts = []
    for key, suffix in BUDGET.items():
        told, own = paper.get(key), ours.get(key)
        if key == "norm":
            told, own = ("linf" if "eps" in paper else None), own or "linf"
        if told is None or own is None or (isinstance(told, float) and math.isclose(told, own)):
            continue
        if told != own:
            facts.append(_fact(what + suffix, _shown(key, own), _shown(key, told)))
        if key == "name" and told != own and own == "none":
            break
    return facts


def _shown(key: str, value: Any) -> str:
    return f"{255 * value:.3g}/255" if key in DISTANCES else str(value)


def _training(paper: Mapping[str, Any], row: Row, train: Mapping[str, Any]) -> list[Fact]:
    facts = []
    home = paper.get("train") == "same"
    facts += [] if home else _unequal("tuned on", train.get("name"), paper.get("train"))
    facts += _unequal("shots", shots_of(train), paper.get("shots"))
    if train.get("limit"):
        facts.append(_fact("training images", f"only {train.get('n', train['limit'])}", "no limit"))
    facts += _attack("training attack", paper.get("train_attack", {}), train.get("attack") or {})
    for key, told in paper["recipe"].items():
        own = row.recipe.get(key)
        if own is not None and own != told:
            facts.append(_fact(key.replace("_", " "), shown(key, own), shown(key, told)))
    if changed := _changed(row):
        facts.append(_fact("options", changed, "the method's defaults"))
    if row.reconstructed:
        facts.append(_fact("reconstructed by us", ", ".join(row.reconstructed), "not public"))
    return facts


def _changed(row: Row) -> str:
    """The method's options that are not at their defaults, for a method that is here."""
    from advtune.methods import METHODS  # brings torch
    from advtune.options import as_options

    if row.method not in METHODS:
        return ""
    usual = as_options(METHODS[row.method]())
    return ", ".join(f"{key}={shown(key, own)}" for key, own in row.options.items() if usual.get(key, own) != own)


def _data(paper: Mapping[str, Any], group: Sequence[Row]) -> list[Fact]:
    sets = list(dict.fromkeys(str(row.data.get("name")) for row in group))
    wanted = paper["data"]
    facts = []
    if len(sets) < len(wanted):
        ours = f"{len(sets)} of {len(wanted)}: {', '.join(sets)}"
        facts.append(_fact("test sets", ours, f"average of {len(wanted)}"))
    cut = sorted({row.data["limit"] for row in group if row.data.get("limit")})
    if cut:
        facts.append(_fact("test images", f"{', '.join(map(str, cut))} a set", "no limit given"))
    split = paper.get("split")
    if split:
        own = sorted({str(row.data.get("split") or "") for row in group})
        if any(split.lower() not in each.lower() for each in own):
            facts.append(_fact("split", ", ".join(each or "not named" for each in own), f"{split}'s"))
    return facts


def _unequal(what: str, own: Any, told: Any, unit: str = "") -> list[Fact]:
    return [] if told is None or own == told else [_fact(what, f"{own}{unit}", f"{told}{unit}")]


def _fact(what: str, ours: Any, paper: Any) -> Fact:
    return {"what": what, "ours": str(ours), "paper": str(paper)}
