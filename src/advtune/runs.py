"""The run folder: config.json, delta.safetensors (only what was learned), train.jsonl, results.jsonl."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import advtune
from advtune.errors import UserError
from advtune.preprocess import Preprocess
from advtune.results import write_atomic
from advtune.vlm import VLM, Origin, load_vlm

CONFIG, DELTA, LOG, RESULTS = "config.json", "delta.safetensors", "train.jsonl", "results.jsonl"


def is_run(name: str | Path) -> bool:
    """Whether a folder is a finished run."""
    return (Path(name) / DELTA).is_file() and (Path(name) / CONFIG).is_file()


def load(name: str, device: str = "auto", precision: str = "auto") -> VLM:
    """A model from a backbone (`mini`, a Hugging Face CLIP folder, a hub id) or from a run folder.

    device: auto takes an accelerator when there is one. precision: fp32, bf16, or auto (bf16 where the
    hardware has it). Raises UserError when it cannot be had or does not fit.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if is_run(name):
        return load_run(Path(name), device, precision)
    if Path(f"{name}.partial").is_dir():
        raise UserError(f"{name}: the run is not finished; go on with: advtune train ... --out {name} --resume")
    return load_vlm(name, device, precision)


def load_run(folder: Path, device: str, precision: str) -> VLM:
    """The tuned model of a run folder: its backbone, checked by content, with the delta applied."""
    config = read_config(folder)
    base = load(config["backbone"]["name"], device, precision)
    if base.origin.sha256 != config["backbone"]["sha256"]:
        raise UserError(f"{folder}: backbone {base.origin.name!r} has other content than the one the run was tuned on")
    try:
        delta = load_file(folder / DELTA)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / DELTA}: truncated or damaged ({error}); tune again") from error
    model = base.with_delta(delta)
    stored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["preprocess"].items()}
    model.clip.config = dataclasses.replace(model.clip.config, preprocess=Preprocess(**stored))
    digest = hashlib.sha256((base.origin.sha256 + file_sha256(folder / DELTA)).encode()).hexdigest()
    model.origin = Origin(str(folder), digest, base.origin.notice)
    model.run = {**config, "folder": folder.name}
    return model


def read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a run folder ({error})") from None


def write_run(folder: Path, model: VLM, config: dict[str, Any]) -> None:
    """config.json and delta.safetensors; the delta last, because it marks the run as finished."""
    write_atomic(folder / CONFIG, json.dumps(config, indent=1) + "\n")
    beside = folder / f"{DELTA}.tmp"
    save_file(model.delta(), beside)
    beside.replace(folder / DELTA)


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def backbone_facts(model: VLM) -> dict[str, Any]:
    """What a row or a run says of a backbone."""
    origin = model.origin
    return {
        "name": origin.name,
        "sha256": origin.sha256,
        "image_size": model.side,
        "logit_scale": round(float(model.logit_scale), 4),
        "notice": origin.notice,
    }


def versions() -> dict[str, str]:
    return {"advtune": advtune.__version__, "torch": torch.__version__, "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
