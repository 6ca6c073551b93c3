"""The named sets, facts kept as JSON: title, classes, template, hub source, licence. No torch here."""

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def _read() -> str:
    return files("advtune.data").joinpath("catalog.json").read_text(encoding="utf-8")


def catalog() -> dict[str, dict[str, Any]]:
    """Name -> entry, a fresh copy each call.

    An entry has `title`, `template` (one {}), `licence`, `classes` (label order), `counts` of the full set
    ({} if unknown), `hub` (OWNER/NAME or None), `hub_classes` (the hub's own class names, one for each
    of `classes`, or None) and `embedded` (folder under advtune/assets, or None).
    """
    return json.loads(_read())
