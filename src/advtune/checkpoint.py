"""A run folder while it is being made: OUT.partial, its log and checkpoint, and the moment it gets its name."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advtune import runs
from advtune.errors import UserError
from advtune.results import write_atomic
from advtune.tensorboard import Board

SECONDS = 30  # between two checkpoints
CHECKPOINT = "checkpoint.pt"
FORMAT = 2  # goes up when a parameter that learns changes its meaning; 2: image prompts without their start
OURS = {runs.CONFIG, runs.DELTA, runs.LOG, runs.IMAGES, runs.RESULTS, CHECKPOINT}


def claim(out: Path, resume: bool, overwrite: bool) -> Path:
    """The folder to work in, OUT.partial. Nothing is made or removed yet.

    Raises UserError when OUT or OUT.partial is there and neither resume nor overwrite was asked for, and when
    overwrite would remove what is not a run.
    """
    if not out.name:
        raise UserError(f"--out {out}: give the run folder a name")
    partial = out.with_name(out.name + ".partial")
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other; give one")
    for taken in (out, partial):
        if taken.exists() and not taken.is_dir():
            raise UserError(f"{taken} is a file; give --out a folder")
        if (overwrite or resume) and taken.is_dir() and foreign(taken):
            raise UserError(f"{taken} holds {foreign(taken)}, which is not of a run; choose another --out")
        if taken.exists() and not (overwrite or (resume and (taken is partial or runs.is_run(out)))):
            ways = "go on with --resume, replace it with --overwrite"
            raise UserError(f"{taken} exists; {ways}, or choose another --out")
    return partial


def foreign(folder: Path) -> str:
    """The first name in a folder that no run writes; empty if there is none. A kill may leave a .tmp file."""
    names = sorted(p.name for p in folder.iterdir() if p.name not in OURS and p.suffix != ".tmp")
    return names[0] if names else ""


def finish(partial: Path, out: Path) -> None:
    """Drop the checkpoint and give the folder its name."""
    (partial / CHECKPOINT).unlink(missing_ok=True)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what may differ between two sittings of one run; what an older one does not say was so."""
    plain = {"prompt_template": "", "prompt_classes": [], "compiled": False} | json.loads(json.dumps(config))
    train = {"subset": "all", "all_classes": plain["train"]["classes"]} | plain["train"]
    plain["train"] = {k: v for k, v in train.items() if k != "split"}  # a name; the images are known by content
    plain["recipe"] = {"warmup_share": 0.0} | plain["recipe"]
    return {k: v for k, v in plain.items() if k not in ("versions", "device", "notes")}


def same(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError when a folder's run was started with other settings."""
    before = comparable(runs.read_config(folder))
    after = comparable(config)
    if before != after:
        other = next(k for k in before | after if before.get(k) != after.get(k))
        raise UserError(f"{folder}: was started with other settings ({other}); resume with the same, or --overwrite")


def summary(folder: Path) -> dict[str, Any]:
    """A finished run for a program: where it is, its config.json, the last line of its train.jsonl."""
    lines = (folder / runs.LOG).read_text().splitlines()
    return {"run": str(folder), "config": runs.read_config(folder), "last": json.loads(lines[-1]) if lines else None}


class Log:
    """train.jsonl and the checkpoint, which need a folder, and the curves of a board, if there is one."""

    def __init__(self, folder: Path | None, config: Mapping[str, Any], resume: bool, board: Board | None = None):
        self.folder, self.saved, self.board = folder, 0.0, board
        self.resume = resume and folder is not None and (folder / runs.CONFIG).is_file()
        if folder is None:
            return
        if self.resume:
            same(folder, config)
        elif folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / runs.CONFIG, json.dumps(config, indent=1) + "\n")

    def restore(self, learning: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> int:
        """Load the checkpoint, if there is one; the step to go on with."""
        if self.folder is None:
            if self.board:
                self.board.open(0)
            return 0
        first, lines, path = 0, list[str](), self.folder / CHECKPOINT
        if self.resume and path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state.get("format") != FORMAT:
                raise UserError(f"{path}: by a version whose parameters mean something else; start it with --overwrite")
            for name, value in learning.items():
                value.data.copy_(state["learning"][name])
            optimiser.load_state_dict(state["optimiser"])
            first = state["step"]
            lines = (self.folder / runs.LOG).read_text().splitlines(keepends=True)[:first]
        write_atomic(self.folder / runs.LOG, "".join(lines))
        self.stream = (self.folder / runs.LOG).open("a")
        if self.board:
            self.board.open(first, lines)
        return first

    def step(self, line: dict[str, Any], learning: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
        """Append one line; every SECONDS, save what is needed to go on."""
        if self.board:
            self.board.step(line)
        if self.folder is None:
            return
        self.stream.write(json.dumps(line) + "\n")
        now = time.monotonic()
        if now - self.saved < SECONDS:
            return
        self.saved = now
        self.stream.flush()
        if self.board:
            self.board.flush()
        state = {"format": FORMAT, "step": line["step"] + 1, "learning": {k: v.detach() for k, v in learning.items()}}
        beside = self.folder / "checkpoint.tmp"
        torch.save({**state, "optimiser": optimiser.state_dict()}, beside)
        beside.replace(self.folder / CHECKPOINT)

    def close(self, drop: bool = False) -> None:
        """Close the log; with `drop`, remove the folder: there is nothing to go on with."""
        if self.board:
            self.board.close(drop)
        if self.folder is not None:
            self.stream.close()
            if drop:
                shutil.rmtree(self.folder)
