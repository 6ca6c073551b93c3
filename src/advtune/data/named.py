"""A set of the catalog, opened: the user's own copy, the slice in the package, or the hub; relabelled by name."""

import os
import warnings
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from advtune.data.catalog import entry
from advtune.data.coop import open_coop
from advtune.data.parquet import open_hub, open_parquet, shards
from advtune.data.sources import Source, normal, open_folder
from advtune.errors import UserError
from advtune.untrusted import expanded


def open_named(name: str) -> Source:
    """What $ADVTUNE_DATA holds of a set (CoOp's split file, parquet files, or a folder a class), else the slice in the
    package, else the hub; with the catalog's label order and class texts, but CoOp's where its split file is used.

    Raises UserError when it cannot be had, in one line that says how to get it.
    """
    facts = entry(name)
    if (own := _own_copy(name, facts)) is not None:
        return own
    if facts["embedded"]:
        source = open_parquet(str(files("advtune") / "assets" / facts["embedded"]))
        source.split = facts["split"]
        return to_catalog(source, name, facts)
    advice = f"set ADVTUNE_DATA to a folder that holds {_wanted(name, facts)}"
    if not facts["hub"]:
        raise UserError(f"{name} is not on the hub: {advice}; {facts['licence']}")
    try:
        source = open_hub(facts["hub"], facts["label"])
    except UserError as error:
        reason = str(error).split("; be online")[0]
        raise UserError(f"{name}: {advice}, or be online for hf:{facts['hub']} ({reason})") from None
    if _counts_agree(source, facts["counts"], f"{name}: hf:{facts['hub']}"):
        source.split = facts["split"]
    return to_catalog(source, name, facts, hub=True)


def is_here(name: str) -> bool:
    """Whether a set can be opened without the hub, as far as names of files tell."""
    facts = entry(name)
    if facts["embedded"] or not os.environ.get("ADVTUNE_DATA"):
        return bool(facts["embedded"])
    top, coop = expanded(os.environ["ADVTUNE_DATA"]), facts["coop"]
    return (top / name).is_dir() or bool(coop and (top / coop["folder"] / coop["split"]).is_file())


def _own_copy(name: str, facts: Mapping[str, Any]) -> Source | None:
    if not os.environ.get("ADVTUNE_DATA"):
        return None
    top, coop = expanded(os.environ["ADVTUNE_DATA"]), facts["coop"]
    for place in (top / name, top / coop["folder"]) if coop else ():
        if (place / coop["split"]).is_file():
            return _coop(place, name, facts)
        if coop["images"] and (place / coop["images"]).is_dir() and not shards(place):
            raise UserError(f"{name}: {place} has CoOp's images but no {coop['split']}; put that file beside them")
    place = top / name
    if not place.is_dir():
        return None
    folders = any(each.is_dir() for each in place.iterdir())
    if shards(place) or not folders:
        return to_catalog(open_parquet(str(place), facts["label"]), name, facts)
    return to_catalog(open_folder(str(place)), name, facts)


def _coop(place: Path, name: str, facts: Mapping[str, Any]) -> Source:
    source, where = open_coop(place, facts["coop"], name), f"{name}: {place / facts['coop']['split']}"
    if len(source.classes) != len(facts["classes"]):
        raise UserError(f"{where} has {len(source.classes)} classes, not {len(facts['classes'])}; fetch it again")
    _counts_agree(source, facts["coop"]["counts"], where)
    return source


def _counts_agree(source: Source, counts: Mapping[str, int], where: str) -> bool:
    """Whether every part has as many images as it should; a warning for each that has not."""
    found = {part: len(source.parts.get(part, ())) for part in counts}
    for part in counts:
        if found[part] != counts[part]:
            warnings.warn(f"{where} has {found[part]} {part} images, not {counts[part]}", stacklevel=3)
    return found == counts


def _wanted(name: str, facts: Mapping[str, Any]) -> str:
    wanted = f"{name}/train.parquet and {name}/test.parquet (or folders {name}/train/CLASS and {name}/test/CLASS)"
    if coop := facts["coop"]:
        wanted += f", or {'/'.join(filter(None, (coop['folder'], coop['images'])))} with {coop['split']}"
    return wanted


def to_catalog(source: Source, name: str, facts: Mapping[str, Any], *, hub: bool = False) -> Source:
    """Relabel to the catalog's classes; images of other classes (Caltech's Faces_easy) are left out.

    The source's class names are looked up in the catalog's, then in the hub's and in the folders' names; whole numbers
    and, of the hub, labels whose names are not known count as places where the catalog says so. If that leaves
    a class of the catalog out, the source's own names are kept, with a warning.
    """
    new = places(source.classes, facts, hub)
    if new is None:
        warnings.warn(f"{name}: not the catalog's classes; its own names are used", stacklevel=2)
        return Source(name, source.classes, source.parts, source.split)
    if new == list(range(len(new))):
        return Source(name, facts["classes"], source.parts, source.split)
    parts = {}
    for key, part in source.parts.items():
        kept = [i for i, label in enumerate(part.labels) if new[label] is not None]
        parts[key] = part.subset(kept)
        parts[key].labels = [n for label in part.labels if (n := new[label]) is not None]
    return Source(name, facts["classes"], parts, source.split)


def places(found: list[str], facts: Mapping[str, Any], hub: bool) -> list[int | None] | None:
    """Of each class name found, the place in the catalog's classes, or None for one that is not in it; None alone if
    that leaves a class of the catalog out, or if numbers are more than the catalog's classes.

    One table of names at a time: they may share words with other meanings. Labels of the hub do not count as places
    when a name that is known stands elsewhere.
    """
    count = len(facts["classes"])
    if len(found) != count and any(text.isdecimal() for text in found):
        return None
    moved = False
    for table in (facts["classes"], facts["hub_classes"], facts["folders"]):
        index = {normal(text): i for i, text in enumerate(table or ())}
        new = [index.get(normal(text)) for text in found]
        if set(new) >= set(range(count)):
            return new
        moved = moved or any(place not in (None, i) for i, place in enumerate(new))
    if facts["numbered"] and set(found) == {str(i) for i in range(count)}:
        return [int(text) for text in found]
    return list(range(count)) if hub and facts["by_index"] and len(found) == count and not moved else None
