"""What differs in protocol between a published row and ours, as data; facts a paper does not give are not compared."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from advtune.data.catalog import entry, names
from advtune.report.published import DISTANCES
from advtune.report.table import group_by, shown, without
from advtune.results import Row

Fact = dict[str, str]
HUB = {  # the end of a hub id or a folder's name, which is all a row knows of an architecture
    "ViT-B/32": "clip-vit-base-patch32",
    "ViT-B/16": "clip-vit-base-patch16",
    "ViT-L/14": "clip-vit-large-patch14",
}
BUDGET = {"name": "", "eps": " eps", "steps": " steps", "step_size": " step", "norm": " norm"}
# What notes of a row are told as, how they are known, and what the paper has.
NOTES = (("warm-up", "warm-up", "not cut"), ("prompt depth", "prompt depth", "not cut"),
         ("test images", "were tuned on", "none"))  # fmt: skip
SHOWN = 3  # texts in a fact
_entry = cache(entry)  # read, never changed


def differences(paper: Mapping[str, Any], group: Sequence[Row]) -> list[Fact]:
    """`{"what", "ours", "paper"}`, texts, for rows of one setting beside a published row; see `against`."""
    from advtune.attacks import ATTACKS  # brings torch

    row, attack, told = group[0], group[0].attack or {"name": "none"}, paper.get("attack", {})
    facts = _model(paper, row) + _attack("attack", told, attack)
    if kind := ATTACKS.get(attack["name"]):
        facts += _unusual("attack options", attack, _as_used(kind, attack), told, "the defaults")
    if row.train is not None:
        facts += _training(paper, row, row.train) + _seeds(paper, group)
        facts += _words("training ", [each.train or {} for each in group], paper.get("template"))
    facts += _data(paper, group) + _words("", [each.data for each in group], paper.get("template"))
    notes = [note for each in group for note in each.notes]
    for what, mark, theirs in NOTES:
        facts += _some(what, (note.removeprefix(what).strip() for note in notes if mark in note), theirs)
    return facts


def same_backbone(name: str | None, facts: Mapping[str, Any]) -> bool:
    """Whether a row's backbone bears the name of a paper's architecture (`ViT-B/32`); true when that is not known."""
    return name is None or _end(facts).lower() == HUB.get(name)


def shots_of(train: Mapping[str, Any]) -> Any:
    """Training images a class, `all` when they were not limited."""
    return train.get("shots") or "all"


def _end(backbone: Mapping[str, Any]) -> str:
    """The end of the name of what was first tuned; old rows have the run's name alone."""
    root = (backbone.get("tuned") or {}).get("root") or backbone.get("name", "")
    return str(root).rstrip("/").rpartition("/")[2]


def _model(paper: Mapping[str, Any], row: Row) -> list[Fact]:
    facts, backbone = [], row.backbone
    if not same_backbone(paper.get("backbone"), backbone):
        stand_in = "" if not backbone.get("notice") else " (a stand-in)"
        facts.append(_fact("backbone", f"{_end(backbone)}{stand_in}", paper["backbone"]))
    tower, told = backbone.get("tuned") or {}, paper["tower"] or {"method": "none"}
    facts += _unequal("tuned before", tower.get("method", "none"), told["method"])
    if tower and paper["tower"]:
        facts += _unequal("tower tuned on", tower.get("on"), told.get("on"))
        facts += _attack("tower attack", told, without(tower.get("attack"), "name"))
    facts += [] if row.precision == "fp32" else [_fact("precision", row.precision, "fp32, or not told")]
    return facts + _unequal("resolution", row.data.get("resolution"), paper.get("resolution"), " px")


def _attack(what: str, paper: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Fact]:
    """An attack's fields that both have; with another attack its steps mean nothing."""
    facts = []
    for key, suffix in BUDGET.items():
        told, own = paper.get(key), ours.get(key)
        if key == "norm":
            told, own = ("linf" if "eps" in paper else None), own or "linf"
        if told is None or own is None or _equal(told, own):
            continue
        facts.append(_fact(what + suffix, _shown(key, own), _shown(key, told)))
        if key == "name" and own == "none":
            break
    return facts


def _shown(key: str, value: Any) -> str:
    return f"{255 * value:.3g}/255" if key in DISTANCES else str(value)


def _equal(a: Any, b: Any) -> bool:
    return math.isclose(a, b) if isinstance(a, float) and isinstance(b, float) else bool(a == b)


def _as_used(usual: Any, ours: Mapping[str, Any]) -> dict[str, Any]:
    """The options that an attack has of itself, with our budget: eps, steps and norm are compared elsewhere."""
    from advtune.options import as_options

    own = as_options(usual)
    attack = replace(usual, **{key: ours[key] for key in ("eps", "steps", "norm") if key in own and key in ours})
    return as_options(attack) | ({"step_size": attack.step} if hasattr(attack, "step") else {})


def _unusual(
    what: str, ours: Mapping[str, Any], usual: Mapping[str, Any], told: Collection[str], whose: str
) -> list[Fact]:
    """Our options that are not as usual, in one fact; without those that the paper tells."""
    keys = [key for key in usual if key in ours and key not in told and not _equal(ours[key], usual[key])]
    text = ", ".join(f"{key}={shown(key, ours[key])}" for key in keys)
    return [_fact(what, text, whose)] if text else []


def _training(paper: Mapping[str, Any], row: Row, train: Mapping[str, Any]) -> list[Fact]:
    from advtune.methods import METHODS
    from advtune.options import as_options

    facts = []
    home = paper.get("train") == "same"
    facts += [] if home else _unequal("tuned on", train.get("name"), paper.get("train"))
    facts += _unequal("tuned on part", train.get("part"), "train")
    facts += _unequal("training resolution", train.get("resolution"), paper.get("resolution"), " px")
    facts += _unequal("shots", shots_of(train), paper.get("shots"))
    if train.get("limit"):
        facts.append(_fact("training images", f"only {train.get('n', train['limit'])}", "no limit"))
    told, attack = paper.get("train_attack", {}), train.get("attack") or {}
    facts += _attack("training attack", told, attack)
    for key, value in paper["recipe"].items():
        if key in row.recipe and not _equal(row.recipe[key], value):
            facts.append(_fact(key.replace("_", " "), shown(key, row.recipe[key]), shown(key, value)))
    if kind := METHODS.get(row.method):
        usual, own = as_options(kind()) | as_options(kind.recipe), row.options | row.recipe
        facts += _unusual("options", own, usual, paper["recipe"], "the method's defaults")
        usual = {"name": kind.attack.name} | _as_used(kind.attack, attack)
        facts += _unusual("training attack options", attack, usual, told, "the method's defaults")
    if row.reconstructed:
        facts.append(_fact("reconstructed by us", ", ".join(row.reconstructed), "not public"))
    return facts


def _seeds(paper: Mapping[str, Any], group: Sequence[Row]) -> list[Fact]:
    of_a_set = [{row.train.get("seed") for row in rows if row.train} for rows in _by_set(group).values()]
    k, told = len(set.union(*of_a_set)), paper.get("seeds")
    if any(seeds != of_a_set[0] for seeds in of_a_set):
        return [_fact("seeds", f"{k}, not on every set", told or "not told")]
    return _unequal("seeds", k, told)


def _by_set(group: Sequence[Row]) -> dict[str, list[Row]]:
    return group_by(group, lambda row: str(row.data.get("name")))


def _data(paper: Mapping[str, Any], group: Sequence[Row]) -> list[Fact]:
    sets, wanted, facts = list(_by_set(group)), paper["data"], []
    if len(sets) < len(wanted):
        ours = f"{len(sets)} of {len(wanted)}: {', '.join(sets)}"
        facts.append(_fact("test sets", ours, f"average of {len(wanted)}"))
    cut = sorted({row.data["limit"] for row in group if row.data.get("limit")})
    if cut:
        facts.append(_fact("test images", f"{', '.join(map(str, cut))} a set", "no limit given"))
    for what, slices in (("test", [row.data for row in group]), ("training", [row.train or {} for row in group])):
        lost = ((each.get("name"), each.get("skipped")) for each in slices)
        counts = (f"{k if isinstance(k, int) else len(k)} of {name}" for name, k in lost if k)
        facts += _some(f"{what} images skipped", counts, "none")
    if split := paper.get("split"):
        own = {str(row.data.get("split") or "") for row in group if _has_choice(row.data.get("name"), split)}
        other = sorted(each for each in own if split.lower() not in each.lower())
        facts += _some("split", (each or "not named" for each in other), f"{split}'s")
    return facts


def _has_choice(name: Any, split: str) -> bool:
    """Whether a set comes in this split, too: of ImageNet there is no split file of CoOp's."""
    return split != "CoOp" or name not in names() or _entry(name)["coop"] is not None


def _words(which: str, slices: Sequence[Mapping[str, Any]], told: str | None) -> list[Fact]:
    """Templates that are not the paper's, where it is told, or else the catalog's, and class names that are not the
    catalog's; of class names tuned on a row keeps the number alone."""
    known = [(each, _entry(each["name"])) for each in slices if each.get("name") in names() and "template" in each]
    other = (each["template"] for each, usual in known if each["template"] != (told or usual["template"]))
    renamed = (f"other on {each['name']}" for each, usual in known if _renamed(each, usual))
    facts = _some(f"{which}template", other, told or "the set's usual")
    return facts + _some(f"{which}class names", renamed, "the set's usual")


def _renamed(words: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    """Whether the texts differ by more than the template; CoOp's split files bring names of their own."""
    if "texts_sha256" not in words or "CoOp" in words.get("split", ""):
        return False
    classes = usual["classes"]
    half = (len(classes) + 1) // 2
    classes = {"base": classes[:half], "new": classes[half:]}.get(words.get("subset", "all"), classes)
    texts = (words["template"].replace("{}", " ".join(name.split())) for name in classes)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest() != words["texts_sha256"]


def _unequal(what: str, own: Any, told: Any, unit: str = "") -> list[Fact]:
    return [] if None in (own, told) or own == told else [_fact(what, f"{own}{unit}", f"{told}{unit}")]


def _some(what: str, texts: Iterable[str], paper: str) -> list[Fact]:
    """One fact for what some rows have: the first texts, or nothing when there is none."""
    found = list(dict.fromkeys(texts))
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return [_fact(what, f"{', '.join(found[:SHOWN])}{more}", paper)] if found else []


def _fact(what: str, ours: Any, paper: Any) -> Fact:
    return {"what": what, "ours": str(ours), "paper": str(paper)}
