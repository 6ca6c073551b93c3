"""Kills at random moments: work that is done once in a process of its own, and again and again in one that is killed.

Python and torch are started once; each try is a fork, which has one thread and no pool. Run as a program: the verb, a
folder with clip/ and colours/, the number of kills wanted, a seed; prints what happened as JSON.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy starts its pool at once

import torch

torch.set_num_threads(1)

from advtune import checkpoint, evaluation  # noqa: E402
from advtune.attacks import autoattack  # noqa: E402
from advtune.cli import main  # noqa: E402

MODEL = ["--device", "cpu", "--precision", "fp32"]
TIMES = ("time", "seconds", "crc32")


def command(verb, place):
    """What is killed, on the tiny backbone and images; it writes to `place`/out."""
    base = ["--backbone", str(place / "clip"), *MODEL, "--out", str(place / "out")]
    data = ["--data", f"folder:{place / 'colours'}"]
    how = ["-o", "lr=0.02", "-o", "warmup_epochs=0", "-o", "batch_size=4"]
    return {
        "train": ["train", "capt", *data, "--shots", "4", "--epochs", "5", *how, *base],
        "evaluate": ["evaluate", "zero-shot", *data, "--attack", "pgd", "-a", "steps=3", "-a", "eps=1/255,4/255,8/255",
                     "--batch-size", "1", *base],
        "autoattack": ["evaluate", "zero-shot", *data, "--attack", "autoattack", "-a", "eps=1/255", "--limit", "6",
                       "--batch-size", "1", *base],
        "study": ["study", "few-shot", "--methods", "zero-shot", "capt", "tecoa", *data, "--shots", "2", "--epochs",
                  "3", *how, "--eps", "2/255", "4/255", "-a", "steps=2", *base],
    }[verb]  # fmt: skip


def fork(work):
    """A child that does the work and goes; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os._exit(work())
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(99)


def wait(child):
    """How it ended: an exit code, or a signal as a negative number."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def clear(place):
    for name in ("out", "out.partial", ".out.replaced", "cache"):
        shutil.rmtree(place / name, ignore_errors=True)


def left(place):
    """What a command left behind, but for times: bytes of the files of runs, rows without seconds, all other names."""
    found = {}
    for path in sorted((place / "out").rglob("*")):
        name = str(path.relative_to(place))
        if path.name == "results.jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.is_file():
            found[name] = path.read_bytes().hex()
    found["beside"] = sorted(path.name for path in place.iterdir())
    found["evaluations"] = sorted(path.name for path in (place / "cache").rglob("*") if path.is_file())
    return found


def timeless(row):
    stages = [{key: value for key, value in stage.items() if key != "seconds"} for stage in row["stages"]]
    return {key: value for key, value in row.items() if key not in TIMES} | {"stages": stages}


def done(verb, place):
    """Whether a killed command had come to its end: its rows are there, and its journal is gone."""
    rows, journals = place / "out" / "results.jsonl", place / "cache" / "evaluations"
    return verb in ("evaluate", "autoattack") and rows.exists() and not any(journals.glob("*"))


def midway(place):
    """Whether there is something to go on with."""
    return any(place.rglob("checkpoint*.pt")) or any((place / "cache" / "evaluations").glob("*.jsonl"))


def kills(verb, place, wanted, seed):
    """Kill the command until `wanted` kills hit it at work, a quarter of them in the middle, where there is something
    to go on with; each is followed by what a user would do: the same again, or --resume. How many there were, and the
    differences to the work of one sitting."""
    given, chance = command(verb, place), random.Random(seed)
    again = [*given, "--resume"] if verb == "train" else given
    clear(place)
    times = []
    for _ in range(3):
        clear(place)
        begin = time.monotonic()
        assert wait(fork(lambda: main(given))) == 0
        times.append(time.monotonic() - begin)
    whole, span = left(place), min(times)
    hits = late = middle = 0
    wrong = []
    while (hits < wanted or middle < wanted // 4) and hits + late < 4 * wanted:
        clear(place)
        child = fork(lambda: main(given))
        time.sleep(chance.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        if wait(child) != -signal.SIGKILL:
            late += 1
            continue
        hits += 1
        middle += midway(place)
        if done(verb, place):
            continue
        if hits % 5 == 0:  # and now and then killed again
            child = fork(lambda: main(again if begun(verb, place) else given))
            time.sleep(chance.uniform(0, span))
            os.kill(child, signal.SIGKILL)
            wait(child)
        if not done(verb, place) and (code := wait(fork(lambda: main(again if begun(verb, place) else given)))):
            wrong.append(f"kill {hits}: exit code {code}")
        elif left(place) != whole:
            now = left(place)
            wrong.append(f"kill {hits}: {[name for name in {**whole, **now} if whole.get(name) != now.get(name)]}")
    return {"hits": hits, "late": late, "middle": middle, "wrong": wrong, "files": len(whole), "seconds": span}


def begun(verb, place):
    return verb != "train" or (place / "out.partial").exists() or (place / "out").exists()


def together(place):
    """Two processes that evaluate into one folder, and two that tune into one: exit codes, rows, and what was said."""
    found = {}
    for verb in ("evaluate", "train"):
        clear(place)
        assert wait(fork(lambda verb=verb: main(command(verb, place)))) == 0
        whole = left(place)
        clear(place)
        two = [fork(lambda verb=verb: main(command(verb, place))) for _ in range(2)]
        found[f"{verb} codes"] = sorted(wait(child) for child in two)
        now = left(place)
        if verb == "evaluate":
            rows = now.pop("out/results.jsonl")
            wanted = whole.pop("out/results.jsonl")
            found["rows"] = [rows.count(row) for row in wanted]
            found["other rows"] = [row for row in rows if row not in wanted]
        found[f"{verb} the same"] = now == whole
    return found


def start(place):
    """All that a forked child needs, without a thread."""
    os.environ["ADVTUNE_CACHE"] = str(place / "cache")
    checkpoint.SECONDS = 0.02
    autoattack.APGD, autoattack.FAB = partial(autoattack.APGD, steps=10), partial(autoattack.FAB, steps=10)
    autoattack.Square = partial(autoattack.Square, queries=30)
    evaluation.other_model = lambda s: None  # mini takes longer to load than all the rest
    for verb in ("study", "autoattack"):  # imports what is imported late
        with redirect_stdout(io.StringIO()):
            assert main(command(verb, place)) == 0
        clear(place)
    assert threading.active_count() == torch.get_num_threads() == len(os.listdir("/proc/self/task")) == 1


if __name__ == "__main__":
    verb, folder, wanted, seed = sys.argv[1:]
    start(Path(folder))
    made = together(Path(folder)) if verb == "together" else kills(verb, Path(folder), int(wanted), int(seed))
    print(json.dumps(made))
