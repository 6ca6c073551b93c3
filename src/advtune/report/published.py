"""Numbers that papers print, as data: papers/KEY.json. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from advtune.errors import UserError, near
from advtune.options import parse_float

DISTANCES = ("eps", "step_size")
KEPT = ("title", "source")  # of a table, in every row of it


def papers() -> dict[str, dict[str, Any]]:
    """Key -> entry, a fresh copy each call.

    An entry has `title`, `arxiv`, `note` and `tables`: name -> `title`, `source` (who printed it), `protocol` and
    `rows`. A row has `method` (a registry name), `clean` and `robust` (percent, null: not at hand) and what it has
    of its own: a `source`, a `remark`, and facts that replace the table's `protocol`: backbone, resolution, tower
    (method, on and eps of what tuned it before), template, train (`same`: each test set itself), shots (a number or
    `all`), data (test sets; the numbers are averages over them), subset, seeds, split, attack, train_attack, recipe.
    A fact that is not there is not known, and not compared; without a tower there was none.
    """
    return json.loads(_read())


def published(name: str) -> list[dict[str, Any]]:
    """The rows of one paper, each with its table's facts; distances between pixels are floats.

    Raises UserError for a paper that is not there.
    """
    known = papers()
    if name not in known:
        raise UserError(f"no published numbers of {name!r}; {near(name, known)}")
    found = []
    for key, table in known[name]["tables"].items():
        shared = {each: table[each] for each in KEPT} | table["protocol"]
        for row in table["rows"]:
            facts: dict[str, Any] = {"paper": name, "table": key} | shared
            for each, value in row.items():
                facts[each] = {**facts.get(each, {}), **value} if isinstance(value, Mapping) else value
            for each in ("attack", "train_attack", "tower"):
                facts[each] = {k: parse_float(v) if k in DISTANCES else v for k, v in facts.get(each, {}).items()}
            found.append({"subset": "all", "remark": "", "recipe": {}} | facts)
    return found


@cache
def _read() -> str:
    folder = files("advtune.report").joinpath("papers")
    texts = {each.name.removesuffix(".json"): each.read_text(encoding="utf-8") for each in folder.iterdir()}
    return json.dumps({key: json.loads(texts[key]) for key in sorted(texts)})
