"""Progress: a bar with rate and time left on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

Advance = Callable[..., None]
QUIET_SECONDS = 10  # between two plain lines, at least; later a twentieth of the time so far


@contextmanager
def progress(label: str, total: int, unit: str = "step", show: bool = True, brief: bool = False) -> Iterator[Advance]:
    """Yields advance(n=1, note=""). Goes to stderr, so that stdout stays what was asked for. `brief` leaves no
    trace of what is over at once."""
    if not show or total == 0:
        yield lambda n=1, note="": None
    elif sys.stderr.isatty():
        with _bar(label, total, unit, brief) as advance:
            yield advance
    else:
        yield _lines(label, total, unit, brief)


@contextmanager
def _bar(label: str, total: int, unit: str, brief: bool) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=brief) as bar:
        task = bar.add_task(label, total=total, rate="", note="")
        begin = time.monotonic()

        def advance(n: int = 1, note: str = "") -> None:
            done = bar.tasks[0].completed + n
            rate = f"{done / max(1e-9, time.monotonic() - begin):.3g} {unit}/s"
            bar.update(task, advance=n, rate=rate, note=note)

        yield advance


def _lines(label: str, total: int, unit: str, brief: bool) -> Advance:
    done, begin = 0, time.monotonic()
    said = begin

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, said
        now, done = time.monotonic(), done + n
        if now - said < max(QUIET_SECONDS, (now - begin) / 20) and (brief or n == 0 or done < total):
            return
        said = now
        rate = done / max(1e-9, now - begin)
        left = f"{(total - done) / rate:.0f} s left" if done else f"{now - begin:.0f} s"
        text = f"{label}: {done}/{total} {unit}s, {rate:.3g} {unit}/s, {left}  {note}"
        print(text.rstrip(), file=sys.stderr, flush=True)

    return advance


def track(
    items: Iterable[T], label: str, *, total: int | None = None, unit: str = "image", show: bool = True
) -> Iterator[T]:
    """Yield the items, showing progress; nothing is left on the screen of what is done at once."""
    total = len(items) if total is None else total  # type: ignore[arg-type]
    with progress(label, total, unit, show, brief=True) as advance:
        for item in items:
            yield item
            advance()


@dataclass
class Tally:
    """How far a list of runs is, told on stderr in a line a run."""

    total: int
    todo: int
    show: bool
    told: int = 0
    worked: int = 0
    failed: int = 0
    begin: float = field(default_factory=time.monotonic)

    def tell(self, key: str, state: str, running: int | None) -> None:
        """One more run is over; running: how many others are under way, where several can be."""
        self.told += 1
        if not self.show:
            return
        seconds = time.monotonic() - self.begin
        ahead = seconds / max(1, self.worked) * (self.todo - self.worked)
        counts = "" if running is None else f"{running} running, {self.failed} failed; "
        times = f"{counts}{clock(seconds)} so far, about {clock(ahead)} left"
        print(f"[{self.told}/{self.total}] {key}: {state} ({times})", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as people say them: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
