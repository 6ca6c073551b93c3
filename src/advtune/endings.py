"""How a verb ends: its exit status, and one line on stderr for what the user can mend. Of several processes that end
for one reason, one says it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from advtune import distributed
from advtune.determinism import LACKS, deterministic
from advtune.errors import UserError
from advtune.untrusted import visible

SHARED = ("train", "evaluate")  # verbs that several processes do together


def ended(work: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Do the work of a verb, together with the other processes that torchrun started; 0 when done or what `work` says,
    2 on bad input, 130 when interrupted."""
    try:
        if args.verb not in SHARED and distributed.wanted():
            raise UserError(f"{args.verb} is done by one process; torchrun is for {' and '.join(SHARED)}")
        if getattr(args, "deterministic", False):
            deterministic()
        distributed.start(getattr(args, "device", "auto"))
        status = work(args) or 0
        distributed.stop()
        return status
    except UserError as error:
        return say(f"error: {error}", 2)
    except BrokenPipeError:
        return 0
    except OSError as error:
        return say(visible(f"error: {error.filename or ''}: {error.strerror or error}"), 2)
    except KeyboardInterrupt as stop:
        way = str(stop) or "tuning goes on with --resume, evaluation by the same command"
        return say(f"interrupted; {way}", 130)
    except Exception as error:
        if line := mendable(error):
            return say(f"error: {line}", 2)
        if distributed.speaks():
            raise
        return 1


def say(line: str, status: int) -> int:
    """Print a line, in one process; the exit status."""
    if distributed.speaks():
        print(f"advtune: {line}", file=sys.stderr, flush=True)
    return status


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
