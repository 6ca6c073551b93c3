"""Training curves for TensorBoard, through its own package: loss terms by name, their sum, the learning rate."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from advtune.errors import UserError

EVENTS = "events.out.tfevents.*"
ASIDE = ("step", "epoch", "lr")  # of a line of train.jsonl; the others are loss terms


def board(folder: str | Path, resume: bool = False, overwrite: bool = False) -> Board:
    """What writes the curves of one run into a folder; nothing is written yet.

    Raises UserError when the package is missing, and when the folder is a file or holds events of a run that is
    neither resumed nor overwritten.
    """
    if find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs its package: pip install 'advtune[tensorboard]'")
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise UserError(f"{place} is a file; give --tensorboard a folder")
    if any(place.glob(EVENTS)) and not (resume or overwrite):
        raise UserError(f"{place} holds the curves of another run; give --tensorboard a folder of its own for each run")
    return Board(place)


class Board:
    """The event file of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def open(self, first: int, done: Iterable[str] = ()) -> None:
        """Begin at step `first`. What an earlier sitting wrote from there on no longer counts; where it wrote
        nothing, the lines of train.jsonl that are `done` are told first. A run from step 0 replaces what is there."""
        from torch.utils.tensorboard import SummaryWriter

        earlier = list(self.folder.glob(EVENTS))
        if first == 0:
            for path in earlier:
                path.unlink()
        self.writer = SummaryWriter(str(self.folder), purge_step=first if first and earlier else None)
        for line in () if earlier else done:
            self.step(json.loads(line))

    def step(self, line: Mapping[str, Any]) -> None:
        """The scalars of one line of train.jsonl."""
        terms = {name: value for name, value in line.items() if name not in ASIDE}
        for name, value in terms.items():
            self.writer.add_scalar(f"loss/{name}", value, line["step"])
        self.writer.add_scalar("loss/sum", sum(terms.values()), line["step"])
        self.writer.add_scalar("lr", line["lr"], line["step"])

    def flush(self) -> None:
        """Everything is on disk; called before a checkpoint that goes on from here."""
        self.writer.flush()

    def close(self, drop: bool = False) -> None:
        """Close the file; with `drop`, remove it: there is nothing to go on with."""
        self.writer.close()
        for path in self.folder.glob(EVENTS) if drop else ():
            path.unlink()
