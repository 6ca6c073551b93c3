"""A run folder while it is being made: OUT.partial, its log and checkpoint, and the moment it gets its name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advtune import distributed, ending, runs, sealed
from advtune.disk import LOCK, SUMS, alone, check_alone, check_writable, naming
from advtune.errors import UserError
from advtune.results import said, write_atomic
from advtune.tensorboard import Board

SECONDS = 30  # between two checkpoints
CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
FORMAT = 2  # goes up when a parameter that learns changes its meaning; 2: image prompts without their start
OURS = {runs.CONFIG, runs.DELTA, runs.LOG, runs.IMAGES, runs.RESULTS, SUMS, CHECKPOINT, PREVIOUS, LOCK}


def claim(out: Path, resume: bool, overwrite: bool) -> Path:
    """The folder to work in, OUT.partial. Nothing is made or removed yet.

    Raises UserError when OUT or OUT.partial is there and neither resume nor overwrite was asked for, when overwrite
    would remove what is not a run, when another process makes this run, and when nothing can be written there.
    """
    if not out.name:
        raise UserError(f"--out {out}: give the run folder a name")
    partial = out.with_name(out.name + ".partial")
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other; give one")
    check_alone(partial)
    for taken in (out, partial):
        if taken.exists() and not taken.is_dir():
            raise UserError(f"{taken} is a file; give --out a folder")
        if (overwrite or resume) and taken.is_dir() and foreign(taken):
            raise UserError(f"{taken} holds {foreign(taken)}, which is not of a run; choose another --out")
        if taken.exists() and not (overwrite or (resume and (taken is partial or runs.is_run(out)))):
            ways = "go on with --resume, replace it with --overwrite"
            raise UserError(f"{taken} exists; {ways}, or choose another --out")
    check_writable(out.absolute().parent)
    return partial


def foreign(folder: Path) -> str:
    """The first name in a folder that no run writes; empty if there is none. A kill may leave a .tmp file."""
    names = sorted(p.name for p in folder.iterdir() if p.name not in OURS and p.suffix != ".tmp")
    return names[0] if names else ""


def finish(partial: Path, out: Path) -> None:
    """Give the folder its name; what had it goes, and so do the checkpoints. Raises UserError when what had it is no
    longer a run alone: hours may have passed since `claim`."""
    old = beside(out)
    if out.exists():
        if not out.is_dir() or foreign(out):
            what = f"{out}/{foreign(out)}" if out.is_dir() else out
            raise UserError(
                f"{what}: came while this run was tuned, which is whole in {partial}; move it, and --resume"
            )
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    partial.rename(out)
    tidy(out)


def finished(out: Path, config: Mapping[str, Any], resume: bool, overwrite: bool) -> bool:
    """Whether nothing is left to do of a run that is resumed; one that was killed before it got its name gets it.
    Raises UserError when it was started with other settings, and as `claim` does: time has passed since."""
    partial = claim(out, resume, overwrite)
    if not resume or not (runs.is_run(partial) or (runs.is_run(out) and not partial.exists())):
        return False
    if partial.exists():
        with alone(partial):
            same(partial, config)
            finish(partial, out)
    same(out, config)
    tidy(out)
    return True


def beside(out: Path) -> Path:
    """Where a run that is replaced waits for the new one to stand."""
    return out.with_name(f".{out.name}.replaced")


def tidy(out: Path) -> None:
    """Remove what a finished run needs no longer."""
    for name in (CHECKPOINT, PREVIOUS, LOCK):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(beside(out), ignore_errors=True)


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what may differ between two sittings of one run; what an older one does not say was so."""
    plain = {"prompt_template": "", "prompt_classes": [], "compiled": False} | json.loads(json.dumps(config))
    train = {"subset": "all", "all_classes": plain["train"]["classes"]} | plain["train"]
    plain["train"] = {k: v for k, v in train.items() if k != "split"}  # a name; the images are known by content
    plain["recipe"] = said(plain["recipe"])
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
    """train.jsonl and the checkpoint, which need a folder, and the curves of a board, if there is one.

    As a context it has the folder to itself. Raises UserError when another process works there.
    """

    def __init__(self, folder: Path | None, config: Mapping[str, Any], resume: bool, board: Board | None = None):
        self.folder, self.config, self.board = folder, config, board
        self.resume = resume and folder is not None and (folder / runs.CONFIG).is_file()
        self.saved, self.crc, self.stack = float("-inf"), 0, ExitStack()
        self.asked: ending.Asked = []
        self.now: tuple[int, Mapping[str, Tensor], torch.optim.Optimizer] | None = None

    def __enter__(self) -> Log:
        if self.folder is not None:
            if self.resume:
                same(self.folder, self.config)
            with ExitStack() as stack:
                stack.enter_context(alone(self.folder))
                self.prepare(self.folder)
                self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def prepare(self, folder: Path) -> None:
        """A folder with its config.json, and nothing that a killed run left half-written."""
        for path in folder.iterdir():
            if path.name != LOCK and (not self.resume or path.suffix == ".tmp"):
                path.unlink()
        write_atomic(folder / runs.CONFIG, json.dumps(self.config, indent=1) + "\n")

    def restore(self, learning: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> int:
        """Load the last checkpoint that is whole, if there is one; the step to go on with."""
        if self.folder is None:
            if self.board:
                self.board.open(0)
            return 0
        first, lines = 0, list[bytes]()
        if self.resume and (found := self.whole(learning)) is not None:
            state, lines = found
            for name, value in learning.items():
                value.data.copy_(state["learning"][name])
            optimiser.load_state_dict(state["optimiser"])
            first = state["step"]
        write_atomic(self.folder / runs.LOG, b"".join(lines))
        self.crc = zlib.crc32(b"".join(lines))
        self.stream = self.stack.enter_context((self.folder / runs.LOG).open("ab", buffering=0))
        if self.board:
            self.board.open(first, [line.decode() for line in lines])
        return first

    def whole(self, learning: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[bytes]] | None:
        """The newest checkpoint that nothing is wrong with and its lines of train.jsonl; says what is damaged. Raises
        UserError for one of another version."""
        assert self.folder is not None
        log, damaged = self.folder / runs.LOG, False
        lines = log.read_bytes().splitlines(keepends=True) if log.is_file() else []
        for path in (self.folder / CHECKPOINT, self.folder / PREVIOUS):
            if not path.is_file():
                continue
            try:
                state = sealed.read(path)
                if state.get("format") == FORMAT:
                    mine = lines[: state["step"]]
                    if len(mine) < state["step"] or state.get("log") not in (None, zlib.crc32(b"".join(mine))):
                        raise ValueError(f"{runs.LOG} is damaged before it")
            except ValueError as error:
                damaged = True
                print(f"advtune: {path}: {error}; left aside", file=sys.stderr)
                continue
            shapes = {name: value.shape for name, value in state["learning"].items()}
            if state.get("format") != FORMAT or shapes != {name: value.shape for name, value in learning.items()}:
                raise UserError(f"{path}: by a version whose parameters mean something else; start it with --overwrite")
            return state, mine
        if damaged:
            print(f"advtune: {self.folder}: no checkpoint is whole; starting anew", file=sys.stderr)
        return None

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block of steps that Ctrl-C ends after the step under way, which is saved; of several processes, where one
        is asked to stop, all do after the same step."""
        if self.folder is None and distributed.world() == 1:
            yield
            return
        with ending.held() as self.asked:
            yield
            self.stop()

    def step(self, line: dict[str, Any], learning: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
        """Append one line; every SECONDS, and when interrupted, save what is needed to go on."""
        if self.board:
            self.board.step(line)
        self.now = line["step"] + 1, learning, optimiser
        if self.folder is not None:
            text = (json.dumps(line) + "\n").encode()
            with naming(self.folder / runs.LOG):
                if self.stream.write(text) != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.crc = zlib.crc32(text, self.crc)
        self.stop()
        if time.monotonic() - self.saved >= SECONDS:
            self.save()

    def stop(self) -> None:
        """Raises, in all processes, the KeyboardInterrupt that is due in one, after what was done is saved."""
        asked = next((kind for each in distributed.gather(self.asked[:1]) for kind in each), None)
        if asked is None:
            return
        saved = distributed.told(self.save())
        raise asked(f"after step {saved}, which is saved") if saved else asked

    def save(self) -> int:
        """The checkpoint, after what it goes on from is on the disk; the step to go on with. 0: nothing is saved."""
        if self.folder is None or self.now is None:
            return 0
        step, learning, optimiser = self.now
        self.saved = time.monotonic()
        os.fsync(self.stream.fileno())
        if self.board:
            self.board.flush()
        state = {"format": FORMAT, "step": step, "log": self.crc, "optimiser": optimiser.state_dict()}
        state["learning"] = {k: v.detach() for k, v in learning.items()}
        sealed.write(state, self.folder / CHECKPOINT, self.folder / PREVIOUS)
        return step

    def close(self, drop: bool = False) -> None:
        """Close the curves; with `drop`, remove the folder: there is nothing to go on with."""
        if self.board:
            self.board.close(drop)
        if self.folder is not None and drop:
            shutil.rmtree(self.folder)
