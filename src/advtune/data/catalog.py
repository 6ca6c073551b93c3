"""The named sets, facts kept as JSON, one file a set in sets/. No torch here."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

BLANK: dict[str, Any] = {
    "hub": None, "label": "", "split": "official", "embedded": None, "counts": {}, "coop": None, "numbered": False,
    "by_index": False, "hub_classes": None, "folders": None, "unverified": "", "total": None,
}  # fmt: skip


@cache
def names() -> tuple[str, ...]:
    """The names of all sets, in alphabetic order."""
    found = files("advtune.data").joinpath("sets").iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in found if file.name.endswith(".json")))


@cache
def _read(name: str) -> str:
    return files("advtune.data").joinpath("sets", f"{name}.json").read_text(encoding="utf-8")


def entry(name: str) -> dict[str, Any]:
    """The facts of one of `names`, a fresh copy each call. Raises KeyError for another name.

    `title`, `template` (one {}), `licence`, `classes` (label order), `counts` of the hub's, the embedded or the
    official parts ({} if unknown), `total` (images in all, where no split is known), `split` (what these parts are),
    `hub` (OWNER/NAME, OWNER/NAME:CONFIG or None), `label` (its label column, "" if it has a usual name), `embedded`
    (folder under advtune/assets, or None), `coop` (folder, images, split and counts of CoOp's split file, or None),
    `unverified` (what was not seen at its source, "" if nothing).
    How another copy's classes are known: `hub_classes` and `folders`, a name for each of `classes` or None; `numbered`,
    whole numbers are places in `classes`; `by_index`, so are the labels of the hub.
    A file may say `classes_of` another set, and `take` some places there: names are then those of that set.
    """
    if name not in names():
        raise KeyError(name)
    facts = {**BLANK, **json.loads(_read(name))}
    if other := facts.pop("classes_of", None):
        source = entry(other)
        take = facts.pop("take", range(len(source["classes"])))
        for key in ("classes", "hub_classes", "folders"):
            facts[key] = facts.get(key) or [source[key][i] for i in take]
    return facts


def catalog() -> dict[str, dict[str, Any]]:
    """Name -> `entry`, all of them."""
    return {name: entry(name) for name in names()}
