"""What is exported: the model, its words, where it came from and what was measured, without this machine's paths."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advtune import runs
from advtune.data.catalog import entry, names
from advtune.data.task import TEMPLATE, Words
from advtune.data.templates import parts
from advtune.errors import UserError
from advtune.formats.spec import Spec, parse
from advtune.predict import words
from advtune.pretrained import locate
from advtune.results import Row, read
from advtune.untrusted import HUB_ID, expanded
from advtune.vlm import VLM

PATH = re.compile(r"(?<![\w.:/])(?:~|\.{1,2})?(?:/[^\s/,;]+)+")  # in a text: absolute, or from here or home


@dataclass(frozen=True)
class Source:
    """A loaded model (fp32, on the processor) with what an export says of it. `config`: the run's config.json as it
    may be published, empty for a backbone. `root`: the folder of the first backbone; `base`: its hub id, or none.
    `classes` is empty when there are none."""

    name: str
    model: VLM
    config: dict[str, Any]
    rows: list[Row]
    root: Path
    base: str
    classes: tuple[str, ...]
    template: str


def open_source(name: str, classes: Words | None, template: str | None, out: Path, published: bool) -> Source:
    """Load a run folder or a backbone. Raises UserError when it cannot be had or the words do not fit.

    A local backbone is named by its last part; where it is, seen from `out`, is left out when published.
    """
    model = runs.load(name, "cpu", "fp32")
    given, filled = (), template or TEMPLATE
    if classes is not None or model.run.get("train", {}).get("classes"):
        given, filled = words(model, classes, template)  # type: ignore[assignment]
    if len(parts(filled)) > 1:
        raise UserError("an export holds one template, and these words have several; give one --template")
    root = foundation(name)
    spec = parse(root)
    base = root if HUB_ID.fullmatch(spec.name) and spec == Spec(root) and not expanded(root).is_dir() else ""
    config = public(model, Path(name), out, published) if model.run else {}
    return Source(plain(name), model, config, measured(Path(name), model), locate(spec.name), base, given, filled)


def foundation(name: str) -> str:
    """The backbone that a chain of runs ends in: embedded, a folder or a hub id."""
    return runs.below(name)[-1]


def plain(name: str) -> str:
    """A backbone or run as others may read it: local folders and files by their last part, a hub id as it is."""
    spec = parse(name)
    return str(Spec(last(spec.name), last(spec.tower), spec.side))


def last(name: str) -> str:
    local = expanded(name)
    return local.resolve().name if name and (local.exists() or name.startswith(("/", ".", "~"))) else name


def plain_spec(spec: str) -> str:
    """A data set's spec as others may read it: a local one by its last part."""
    kind, colon, where = spec.partition(":")
    return f"{kind}:{Path(where).name}" if colon and kind != "hf" else spec


def public(model: VLM, folder: Path, out: Path, published: bool) -> dict[str, Any]:
    """config.json of the run, for another folder and other eyes."""
    config = {key: value for key, value in model.run.items() if key != "folder"}
    train, backbone = dict(config["train"]), dict(config["backbone"])
    train["spec"] = plain_spec(train["spec"])
    train["skipped"] = [Path(each).name for each in train["skipped"]]
    beside = folder / backbone["path"]
    local = bool(backbone["path"]) and beside.is_dir() and not published
    backbone["path"] = os.path.relpath(beside.resolve(), out.resolve()) if local else ""
    backbone["name"] = plain(backbone["name"]) if not backbone["path"] else Path(backbone["path"]).name
    if tuned := backbone.get("tuned"):
        backbone["tuned"] = {**tuned, "on": plain_spec(tuned["on"]), "root": plain(tuned["root"])}
    return {**config, "train": train, "backbone": backbone}


def measured(folder: Path, model: VLM) -> list[Row]:
    """The rows of a run folder that are of these weights; older rows do not say of which they are."""
    file = folder / runs.RESULTS
    rows = read(file) if model.run and file.is_file() else []
    return [without_paths(row) for row in rows if row.model in ("", model.origin.sha256)]


def without_paths(row: Row) -> Row:
    """A row in which models are named by the last part of their path."""
    attack = row.attack
    if attack and "source" in attack:
        attack = {**attack, "source": plain(attack["source"])}
    threat = PATH.sub(lambda found: found[0].rsplit("/", 1)[-1], row.threat)
    return dataclasses.replace(
        row, attack=attack, threat=threat, backbone={**row.backbone, "name": plain(row.backbone["name"])}
    )


def dataset_ids(source: Source) -> list[str]:
    """Hub ids of what it was tuned on, as far as they are known."""
    spec = source.config.get("train", {}).get("spec", "")
    hub = spec.removeprefix("hf:") if spec.startswith("hf:") else (entry(spec)["hub"] if spec in names() else None)
    return [hub.partition(":")[0]] if hub else []
