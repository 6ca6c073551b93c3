"""How a verb ends: its exit status, and one line on stderr for what the user can mend; Ctrl-C, SIGTERM, a disk that
takes no more, and the command that goes on. Of several processes that end for one reason, one says it."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from advtune import distributed
from advtune.determinism import LACKS, deterministic
from advtune.disk import FULL
from advtune.errors import UserError
from advtune.untrusted import visible

SHARED = ("train", "evaluate")  # verbs that several processes do together
ONCE = 0.5  # seconds in which a second signal is the same one: a launcher passes on what the terminal sent already
GOES_ON = ("train", "evaluate", "study", "audit")
Asked = list[type[KeyboardInterrupt]]
_first: list[float] = []  # when the first signal came
_held: list[Asked] = []  # the blocks under way that end whole, and what ends them


class Terminated(KeyboardInterrupt):
    """SIGTERM: what a batch system sends before it kills."""


def ended(work: Callable[[argparse.Namespace], int | None], args: argparse.Namespace, given: Sequence[str]) -> int:
    """Do the work of a verb, together with the other processes that torchrun started; 0 when done or what `work` says,
    2 on bad input or a full disk, 130 when interrupted, 143 at SIGTERM. given: the words of the command."""
    before = state(args)
    try:
        if args.verb not in SHARED and distributed.wanted():
            raise UserError(f"{args.verb} is done by one process; torchrun is for {' and '.join(SHARED)}")
        if getattr(args, "deterministic", False):
            deterministic()
        with caught():
            distributed.start(getattr(args, "device", "auto"))
            status = work(args) or 0
            distributed.stop()
        return status
    except UserError as error:
        return say(f"error: {error}", 2)
    except BrokenPipeError:
        return 0
    except (OSError, KeyboardInterrupt) as error:
        code, line = said(error, again(args, given, before))
        return say(line, code)
    except Exception as error:
        if line := mendable(error):
            return say(f"error: {line}", 2)
        if distributed.speaks():
            raise
        return 1


def say(line: str, status: int) -> int:
    """Print a line, in one process; the exit status."""
    if distributed.speaks():
        print(f"advtune: {visible(line)}", file=sys.stderr, flush=True)
    return status


@contextmanager
def caught(*signals: int) -> Iterator[None]:
    """A block that the signals, by default Ctrl-C and SIGTERM, end as a KeyboardInterrupt, where nothing is `held`; a
    second one ends the process. Only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _first.clear()
    before = {each: signal.signal(each, _stop) for each in signals or (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)  # None: not set from Python


@contextmanager
def held() -> Iterator[Asked]:
    """A block that ends whole: yields a list that holds the KeyboardInterrupt to raise as soon as one is asked for."""
    asked: Asked = []
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # from Python: the verbs have theirs
        with caught(signal.SIGINT), _holding(asked):
            yield asked
    else:
        with _holding(asked):
            yield asked


@contextmanager
def _holding(asked: Asked) -> Iterator[None]:
    _held.append(asked)
    try:
        yield
    finally:
        _held.remove(asked)


def _stop(number: int, frame: FrameType | None) -> None:
    if _first:
        if time.monotonic() - _first[0] > ONCE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        return
    _first.append(time.monotonic())
    if sys.stderr is not None and os.isatty(2):
        os.write(2, b"\033[?25h")  # the cursor that a bar hides: a second Ctrl-C could not show it
    kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
    if not _held:
        raise kind
    _held[-1].append(kind)


def state(args: argparse.Namespace) -> tuple[int, ...]:
    """What changes when a verb begins to tune: the folder in the making."""
    out = getattr(args, "out", None)
    if args.verb not in ("train", "audit") or not out or (args.verb == "audit" and not args.fix):
        return ()
    place = Path(out) if args.verb == "train" else Path(out) / args.fix
    try:
        found = (place.parent / f"{place.name}.partial").stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns


def again(args: argparse.Namespace, given: Sequence[str], before: tuple[int, ...]) -> str:
    """The command that goes on where this one stopped, or begins anew where there was nothing to keep; empty for a
    verb that has nothing to go on with. before: `state` as it was."""
    if args.verb not in GOES_ON:
        return ""
    words = list(given)
    if state(args) not in (before, ()):  # begun: --overwrite would begin anew
        words = [word for word in words if word not in ("--overwrite", "--resume")]
        words += ["--resume"] * (args.verb == "train")
    return shlex.join([*program(), *words])


def program() -> list[str]:
    """How this process was started: by its name, or by torchrun as one of several, on several machines with flags of
    theirs that it does not know."""
    if not distributed.wanted():
        return ["advtune"]
    here, all_ = os.environ.get("LOCAL_WORLD_SIZE", ""), os.environ["WORLD_SIZE"]
    return ["torchrun", *(["--nproc-per-node", here] if here == all_ else ["..."]), "-m", "advtune"]


def said(error: OSError | KeyboardInterrupt, command: str) -> tuple[int, str]:
    """Exit code and one line for what ended a verb."""
    if isinstance(error, KeyboardInterrupt):
        code, word = (143, "terminated") if isinstance(error, Terminated) else (130, "interrupted")
        return code, f"{word} {error}".rstrip() + (f"; go on with: {command}" if command else "")
    place = error.filename2 or error.filename
    line = f"error: {place}: {error.strerror or error}" if place else f"error: {error.strerror or error}"
    if error.errno in FULL:
        line += "; make room" + (f" and go on with: {command}" if command else " and try again")
    elif error.errno in (errno.EROFS, errno.EACCES):
        line += "; write elsewhere"
    return 2, line


def mendable(error: Exception) -> str:
    """What the user can do about an error of torch's; nothing for others."""
    from advtune.step import out_of_memory

    if out_of_memory(error):
        return "out of memory; lower --batch-size or --micro-batch, or choose another --device"
    if LACKS in str(error):
        return f"--deterministic: {str(error).split(LACKS)[0]}has no form that gives the same bits; go without it"
    if distributed.lost(error):
        return "another process has ended; tuning goes on with --resume, evaluation by the same command"
    return ""


def warned(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"advtune: warning: {visible(str(message))}", file=sys.stderr)
