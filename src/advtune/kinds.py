"""Of which kind every field of a result row is: strangers' rows are read, compared and drawn, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

KINDS: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "dict": dict, "list": list}
COUNTS = {"correct": "int", "n": "int", "accuracy": "float", "low": "float", "high": "float"}
INSIDE = {  # of a field, or of each of its items
    "clean": COUNTS,
    "robust": COUNTS,
    "zero_gradient": {"share": "float", "n": "int"},
    "stages": {"attack": "str", "attacked": "int", "fell": "int"},
    "checks": {"name": "str", "alarm": "int", "value": "float", "n": "int", "text": "str"},
    "backbone": {"name": "str", "sha256": "str", "notice": "str", "tuned": "dict"},
    "data": {"spec": "str", "name": "str", "part": "str", "subset": "str", "sha256": "str", "seed": "int"},
    "train": {"spec": "str", "name": "str", "part": "str", "subset": "str", "sha256": "str", "seed": "int"},
    "attack": {"name": "str", "norm": "str", "eps": "float", "seed": "int"},
}
OPEN = ("backbone", "data", "train", "attack")  # of these a row may leave something out
LARGEST = 1e300  # beyond, a whole number is no float


def check_kinds(row: Any) -> None:
    """Raises ValueError for a field of a row that is not of its kind."""
    for field in dataclasses.fields(row):
        value, kind = getattr(row, field.name), str(field.type)
        if value is None and kind.endswith("| None"):
            continue
        items: Iterable[Any] = value if isinstance(value, list) else ()
        if kind == "dict[str, str]" and isinstance(value, dict):
            items = value.values()
        wanted = str if "str]" in kind else dict
        if not isinstance(value, KINDS[kind.partition("[")[0].partition(" ")[0]]) or not all(
            isinstance(item, wanted) for item in items
        ):
            raise ValueError(f"{field.name} is no {kind}")
        for each in value if isinstance(value, list) else [value]:
            _inside(field.name, each)


def _inside(field: str, facts: Mapping[str, Any]) -> None:
    for key, kind in INSIDE.get(field, {}).items():
        value = facts.get(key)
        if value is None and field in OPEN and not (field == "attack" and key in facts):
            continue
        if not isinstance(value, KINDS[kind]) or (isinstance(value, int) and abs(value) > LARGEST):
            raise ValueError(f"{field}: {key} is no {kind}")
