"""Progress: a bar with rate and time left on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[..., None]
QUIET_SECONDS = 10  # between two plain lines


@contextmanager
def progress(label: str, total: int, unit: str = "step", show: bool = True) -> Iterator[Advance]:
    """Yields advance(n=1, note=""). Goes to stderr, so that stdout stays what was asked for."""
    if not show or total == 0:
        yield lambda n=1, note="": None
    elif sys.stderr.isatty():
        with _bar(label, total, unit) as advance:
            yield advance
    else:
        yield _lines(label, total, unit)


@contextmanager
def _bar(label: str, total: int, unit: str) -> Iterator[Advance]:
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
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, rate="", note="")
        begin = time.monotonic()

        def advance(n: int = 1, note: str = "") -> None:
            done = bar.tasks[0].completed + n
            rate = f"{done / max(1e-9, time.monotonic() - begin):.1f} {unit}/s"
            bar.update(task, advance=n, rate=rate, note=note)

        yield advance


def _lines(label: str, total: int, unit: str) -> Advance:
    state = {"done": 0, "begin": time.monotonic(), "said": time.monotonic()}

    def advance(n: int = 1, note: str = "") -> None:
        state["done"] += n
        now, done = time.monotonic(), int(state["done"])
        if now - state["said"] < QUIET_SECONDS and done < total:
            return
        state["said"] = now
        rate = done / max(1e-9, now - state["begin"])
        left = (total - done) / max(1e-9, rate)
        text = f"{label}: {done}/{total} {unit}s, {rate:.1f} {unit}/s, {left:.0f} s left  {note}"
        print(text.rstrip(), file=sys.stderr, flush=True)

    return advance
