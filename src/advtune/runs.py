"""The run folder: config.json, delta.safetensors (only what was learned), train.jsonl, images.json (content
hashes of the training images), SHA256SUMS of these, results.jsonl."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

import advtune
from advtune import untrusted
from advtune.disk import SUMS, check_sums, sums
from advtune.errors import UserError
from advtune.formats.spec import Spec, parse
from advtune.preprocess import Preprocess
from advtune.pretrained import EMBEDDED
from advtune.results import write_atomic
from advtune.untrusted import expanded, is_there, visible
from advtune.vlm import VLM, Origin, load_vlm
from advtune.weights import check_floats

CONFIG, DELTA, LOG, RESULTS = "config.json", "delta.safetensors", "train.jsonl", "results.jsonl"
IMAGES = "images.json"
DEEP = 20  # runs on runs


def is_run(name: str | Path) -> bool:
    """Whether a folder is a finished run."""
    return all(is_there(Path(name) / file, Path.is_file) for file in (DELTA, CONFIG))


def load(name: str, device: str = "auto", precision: str = "auto", compile: bool = False) -> VLM:
    """A model from a backbone (see `read_pretrained`) or from a run folder.

    device: auto takes an accelerator when there is one. precision: fp32, bf16, or auto (bf16 where the
    hardware has it). compile: the image tower through torch.compile, worth its minute in long runs. Raises UserError
    when it cannot be had or does not fit.
    """
    device = check_device(device)
    if name not in EMBEDDED and is_run(name):
        return load_run(Path(name), device, precision, compile)
    if is_there(Path(f"{name}.partial"), Path.is_dir):
        raise UserError(f"{name}: the run is not finished; go on with: advtune train ... --out {name} --resume")
    if name != (base := parse(name).name) and is_run(base):
        raise UserError(f"{base} is a run, and stays with the backbone and image size it was tuned on; tune another")
    return load_vlm(name, device, precision, compile)


def check_device(device: str) -> str:
    """The device to use; auto takes an accelerator when there is one. Raises UserError when it is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0][:120]
        raise UserError(f"device {device!r} cannot be used ({reason}); try --device cpu") from None
    return device


def load_run(folder: Path, device: str, precision: str, compile: bool = False) -> VLM:
    """The tuned model of a run folder: its files and its backbone, checked by content, with the delta applied."""
    check_sums(folder, CONFIG, IMAGES, DELTA)
    below(str(folder))
    config = read_config(folder)
    facts = config["backbone"]
    base = load(backbone_of(folder, config), device, precision, compile)
    if base.origin.sha256 != facts["sha256"]:
        raise UserError(f"{folder}: backbone {facts['name']!r} has other content than the one the run was tuned on")
    try:
        delta = load_file(folder / DELTA)
    except Exception as error:  # the library raises nearly anything on hostile bytes
        raise UserError(f"{folder / DELTA}: truncated or damaged ({visible(str(error))[:120]}); tune again") from error
    for name, value in delta.items():
        check_floats(visible(name)[:60], value, folder / DELTA)
    stored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["preprocess"].items()}
    try:
        preprocess = Preprocess(**stored)
    except TypeError:
        raise UserError(f"{folder / CONFIG}: its preprocessing makes no sense; tune again") from None
    model = base.with_delta(delta).with_preprocess(preprocess)
    model.template, model.classes = config.get("prompt_template", ""), tuple(config.get("prompt_classes", ()))
    return settle(model, base, config, read_json(folder / IMAGES), folder)


def below(name: str) -> list[str]:
    """A model's name, and what it was tuned on, and that, down to the backbone. Raises UserError for runs that stand on
    each other."""
    found = [name]
    while found[-1] not in EMBEDDED and is_run(found[-1]):
        if len(found) > DEEP:
            raise UserError(f"{name}: stands on more than {DEEP} runs, or on itself; tune again")
        found.append(backbone_of(Path(found[-1]), read_config(Path(found[-1]))))
    return found


def backbone_of(folder: Path, config: dict[str, Any]) -> str:
    """What a run was tuned on top of: where it lies as seen from the run folder, else by its name."""
    facts = config["backbone"]
    spec = parse(facts["path"] or "")
    beside = Spec(str(folder / spec.name), str(folder / spec.tower) if spec.tower else "", spec.side)
    there = spec.name and Path(beside.name).exists() and (not beside.tower or Path(beside.tower).is_file())
    return str(beside) if there else str(facts["name"])


def path_from(out: Path, name: str) -> str:
    """A local backbone as seen from the run folder `out`; nothing for one that is not local."""
    spec = parse(name)
    if name in EMBEDDED or not spec.name or not expanded(spec.name).exists():
        return ""
    seen = [os.path.relpath(expanded(part).resolve(), out.resolve()) for part in (spec.name, spec.tower) if part]
    return str(Spec(seen[0], seen[1] if spec.tower else "", spec.side))


def settle(model: VLM, base: VLM, config: dict[str, Any], hashes: list[str], folder: Path | None) -> VLM:
    """Make a tuned model what others take as given: frozen, named by its content, knowing how it was made."""
    model.requires_grad_(False).eval()
    digest = hashlib.sha256(base.origin.sha256.encode() + save(model.delta())).hexdigest()
    name = str(folder) if folder else f"{config['method']} on {base.origin.name}, in memory"
    model.origin = Origin(name, digest, base.origin.notice)
    model.run = {**config, "folder": str(folder) if folder else ""}
    model.folders = base.folders | ({str(folder.resolve())} if folder else set())
    model.seen = frozenset(short(hashes)) | base.seen
    return model


def short(hashes: list[str]) -> list[str]:
    """Content hashes as the run folder keeps them: enough to tell images apart."""
    return [sha[:16] for sha in hashes]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run folder. Raises UserError when it is not there, damaged, or does not say what a run is of."""
    config = read_json(folder / CONFIG)
    facts = config.get("backbone") if isinstance(config, dict) else None
    texts = [facts.get(key) for key in ("name", "path", "sha256")] if isinstance(facts, dict) else [None]
    tables = [config.get(key) for key in ("train", "preprocess", "recipe")] if isinstance(config, dict) else [None]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{folder / CONFIG}: is not of a run, or damaged; tune again")
    return config


def read_json(path: Path) -> Any:
    try:
        return untrusted.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); tune again") from None


def write_run(folder: Path, model: VLM, config: dict[str, Any], hashes: list[str]) -> None:
    """config.json, images.json (content hashes of what was tuned on), SHA256SUMS and delta.safetensors; the delta
    last, because it marks the run as finished. The folder has its train.jsonl."""
    contents = {
        CONFIG: (json.dumps(config, indent=1) + "\n").encode(),
        IMAGES: (json.dumps(short(hashes)) + "\n").encode(),
        DELTA: save(model.delta()),
    }
    text = sums({**contents, LOG: (folder / LOG).read_bytes()})
    for name in (CONFIG, IMAGES):
        write_atomic(folder / name, contents[name])
    write_atomic(folder / SUMS, text)
    write_atomic(folder / DELTA, contents[DELTA])


def backbone_facts(model: VLM, out: Path | None = None) -> dict[str, Any]:
    """What a row or a run says of a backbone. `path` leads from the run folder `out` to a local backbone, so
    that both can be moved together; `tuned` says how, when the backbone is itself a run, and `root` what
    the first of its runs was tuned on top of."""
    origin, run = model.origin, model.run
    base = run.get("backbone", {})
    return {
        "name": origin.name,
        "sha256": origin.sha256,
        "path": path_from(out, origin.name) if out is not None else "",
        "image_size": model.side,
        "logit_scale": round(float(model.logit_scale), 4),
        "notice": origin.notice,
        "tuned": {k: run[k] for k in ("method", "options", "recipe", "attack")}
        | {"on": run["train"]["spec"], "part": run["train"]["part"]}
        | {"root": (base.get("tuned") or {}).get("root", base["name"])}
        if run
        else None,
    }


def versions() -> dict[str, str]:
    return {"advtune": advtune.__version__, "torch": torch.__version__, "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
