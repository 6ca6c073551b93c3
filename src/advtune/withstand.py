"""Which images withstand an attack: over the whole set, in full batches, with a journal that a killed run goes on
from."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advtune import distributed
from advtune.attacks import Attack
from advtune.attacks.ball import distance
from advtune.data import Images
from advtune.draws import seeded
from advtune.progress import progress
from advtune.results import write_atomic


class Journal:
    """What is done of an evaluation, batch by batch, as lines of JSON; does nothing without a path.

    The file's name is a hash of all that decides the evaluation, and batches come in a fixed order, so what it holds
    is what would be computed again.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.lines = path.read_bytes().splitlines(keepends=True) if path is not None and path.exists() else []
        self.used = 0  # lines that were believed

    def next(self, stage: str, rows: Tensor) -> Tensor | None:
        """Which of these images stood, if that is known. A line that is cut or of other images ends the journal."""
        if self.path is None or self.used == len(self.lines):
            return None
        try:
            line = json.loads(self.lines[self.used])
        except (ValueError, RecursionError):  # cut by the kill
            line = {}
        line = line if isinstance(line, dict) else {}
        whole = self.lines[self.used].endswith(b"\n")
        stands = line.get("stands")
        known = isinstance(stands, list) and len(stands) == len(rows) and all(one in (True, False) for one in stands)
        if not (whole and known) or (line.get("stage"), line.get("rows")) != (stage, rows.tolist()):
            del self.lines[self.used :]
            write_atomic(self.path, b"".join(self.lines))
            return None
        self.used += 1
        return torch.tensor(stands, dtype=torch.bool)

    def known(self, stage: str, batches: Sequence[Tensor]) -> list[Tensor]:
        """The answers to the first of these batches, as far as they are known."""
        found = [*takewhile(lambda stands: stands is not None, (self.next(stage, rows) for rows in batches))]
        return [stands for stands in found if stands is not None]

    def add(self, stage: str, rows: Tensor, stands: Tensor) -> None:
        """Keep an answer, on the disk before this returns."""
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps({"stage": stage, "rows": rows.tolist(), "stands": stands.tolist()}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                warnings.warn(f"no journal, so no going on after a kill: {self.path}: {error.strerror}", stacklevel=2)
                self.path = None

    def close(self) -> None:
        """The evaluation is complete: its row takes the place of the journal."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@dataclass
class Outcome:
    """stands [N]: robust; after: the images [N] that stand after each stage; stages: a line for each, with counts."""

    stands: Tensor
    after: dict[str, Tensor] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)


def withstand(
    f: Callable[[Tensor], Tensor], images: Images, start: Tensor, attack: Attack, size: int,
    device: torch.device, seed: int, show: bool, journal: Journal | None = None, label: str = "",
) -> Outcome:  # fmt: skip
    """The images of `start` [N] that are classified correctly under the attack, the others are not attacked. The
    stages of an ensemble run in turn, each over all that still stand."""
    journal = journal or Journal()
    outcome = Outcome(start.clone())
    for stage in attack.stages() if hasattr(attack, "stages") else [attack]:
        begin, rows, key = time.monotonic(), outcome.stands.nonzero().squeeze(1), f"{label}{stage.name}"
        with progress(key, len(rows), "image", show) as advance:
            seen = Seen(f, lambda n: advance(0, note=f"{int(outcome.stands.sum())} of {len(images.y)} stand, {n} seen"))
            batches = [some for some in rows.split(size) if len(some)]
            for some, left in answers(seen, images, batches, stage, device, seed, journal, key):
                outcome.stands[some] = left
                advance(len(some), note=f"{int(outcome.stands.sum())} of {len(images.y)} stand")
        fell = len(rows) - int(outcome.stands.sum())
        seconds = round(time.monotonic() - begin, 2)
        outcome.stages.append({"attack": stage.name, "attacked": len(rows), "fell": fell, "seconds": seconds})
        outcome.after[stage.name] = outcome.stands.clone()
    return outcome


class Seen:
    """f, telling after every call how many images it was shown: a batch can take many minutes."""

    def __init__(self, f: Any, tell: Callable[[int], None]):
        self.f, self.tell, self.images = f, tell, 0
        if hasattr(f, "approximate"):
            self.approximate = lambda x: self.told(f.approximate, x)

    def __call__(self, x: Tensor) -> Tensor:
        return self.told(self.f, x)

    def told(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self.images += len(x)
        self.tell(self.images)
        return f(x)


def answers(
    f: Callable[[Tensor], Tensor], images: Images, batches: Sequence[Tensor], stage: Attack, device: torch.device,
    seed: int, journal: Journal, key: str,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """The batches in their order, each with which of its images still stand: as the leader's journal knows, which is
    told once, or attacked now. Several processes take a batch each at a time, the same batches as one process: nothing
    depends on how many there are."""
    known = distributed.told(journal.known(key, batches))
    done, k = len(known), distributed.world()
    if 0 < done < len(batches) and distributed.leader():
        told = sum(map(len, batches[:done]))
        print(f"advtune: {key}: {told} images were done before an interruption; going on", file=sys.stderr)
    yield from zip(batches, known, strict=False)
    for turn in range(done, len(batches), k):
        mine = turn + distributed.rank()
        left = None
        if mine < len(batches):
            with seeded(seed, device):
                left = attacked(f, images, batches[mine], stage, device)
        for some, stands in zip(batches[turn:], distributed.gather(left), strict=False):
            if stands is not None:
                journal.add(key, some, stands)
                yield some, stands


def attacked(
    f: Callable[[Tensor], Tensor], images: Images, rows: Tensor, attack: Attack, device: torch.device
) -> Tensor:
    """Which of the images `rows` [B] are still classified correctly after the attack. Raises RuntimeError when it
    left its budget."""
    x, y = images.batch(rows, device)
    x_adv = attack(f, x, y)
    check_budget(x, x_adv, attack)
    with torch.no_grad():
        logits = f(x_adv)
    return ((logits.argmax(1) == y) & logits.isfinite().all(1)).cpu()


def check_budget(x: Tensor, x_adv: Tensor, attack: Attack) -> None:
    """Raises RuntimeError when an attack left its ball or [0, 1]: such a number would mean nothing."""
    far = float(distance(x_adv - x, attack.norm).max())
    limit = attack.eps * (1 + 1e-5) + 1e-6
    if not (far <= limit and float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1):  # nan is out, too
        raise RuntimeError(f"attack {attack.name} left its budget: moved {far:.6f}, eps {attack.eps:.6f}")
