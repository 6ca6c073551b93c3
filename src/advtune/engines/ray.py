"""A study on Ray: a task a run, on this machine or on a cluster whose machines all see the study's folder."""

from __future__ import annotations

import math
import os
import platform
import re
import socket
import sys
from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advtune.errors import UserError

if TYPE_CHECKING:
    from advtune.grid import Bench, Failure, Report
    from advtune.protocols import Run

HERE, THERE = "local", re.compile(r"auto|(?P<host>.+):(?P<port>\d{1,5})")
STORE = 10**8  # bytes of Ray's object store: what tasks tell each other is small, images and weights are in files
PATIENCE = 10  # seconds for a cluster to answer: Ray itself would wait for minutes
GRACE = 20  # seconds that tasks have to end by themselves when the study is interrupted


@dataclass(frozen=True)
class Ray:
    """address: a cluster that is there (`auto`, `HOST:PORT`), else one is started here for this study; where `ray.init`
    was called before, that one is used. cpus, gpus: of a run; a fraction of a GPU is shared (None: one, where there are
    any). retries: so often a run whose worker died is tried again; one that raised an error is not. parallel: runs at
    once (None: as many as fit). Raises UserError without Ray, and for numbers that make no sense."""

    address: str = HERE
    cpus: float = 1
    gpus: float | None = None
    retries: int = 2
    parallel: int | None = None

    def __post_init__(self) -> None:
        gpus = float(self.gpus or 0)
        known = self.address == HERE or THERE.fullmatch(self.address)
        for flag, right, wanted in (
            (f"--cpus-per-run {self.cpus:g}", 0 < self.cpus < math.inf, "more than 0"),
            (f"--gpus-per-run {gpus:g}", 0 <= gpus < math.inf, "0 or more"),
            (f"--gpus-per-run {gpus:g}", gpus <= 1 or gpus.is_integer(), "a fraction below 1, or a whole number"),
            (f"--retries {self.retries}", self.retries >= 0, "0 or more"),
            (f"--ray-address {self.address}", known, "auto or HOST:PORT"),
            (f"--parallel {self.parallel}", self.parallel is None or self.parallel > 0, "1 or more"),
        ):
            if not right:
                raise UserError(f"study: {flag}: give {wanted}")
        library()

    def __call__(self, todo: Mapping[int, Run], bench: Bench) -> Generator[Report, None, None]:
        """Do the runs; each as soon as it is over, with what failed of it and how many others are under way. What a
        task keeps (rows, checkpoints, tracebacks) it writes into OUT itself. Raises UserError when no machine could
        take a run."""
        if not todo:
            return
        ray = library()
        ours = not ray.is_initialized()
        if ours:
            connect(ray, self.address)
        try:
            yield from self.tasks(ray, todo, bench)
        finally:
            if ours:
                ray.shutdown()

    def tasks(self, ray: Any, todo: Mapping[int, Run], bench: Bench) -> Generator[Report, None, None]:
        """As a call, with a cluster at hand."""
        gpus = self.share(ray, bench.device)
        if not room(ray, self.cpus, gpus) and (self.parallel is None or self.address == HERE):
            what = f"{self.cpus:g} CPUs and {gpus:g} GPUs"
            raise UserError(f"study: no machine has {what} for a run; lower --cpus-per-run or --gpus-per-run")
        # what Ray would do about a dead worker is done here, so that it is counted, told, and never endless
        task = ray.remote(num_cpus=self.cpus, num_gpus=gpus, max_retries=0)(one)
        where = os.getcwd(), {name: value for name, value in os.environ.items() if name.startswith("ADVTUNE_")}
        device = "cpu" if bench.device == "auto" and not gpus else bench.device
        waiting, running = deque((place, 0) for place in todo), dict[Any, tuple[int, int]]()

        def start() -> None:
            while waiting and len(running) < (self.parallel or max(1, room(ray, self.cpus, gpus))):
                place, tries = waiting.popleft()
                worker = replace(bench, device=device, show=False, models={}, tasks={})
                ref = task.remote(todo[place], worker, max(1, int(self.cpus)), *where)
                running[ref] = place, tries

        try:
            start()
            while running:
                ref = ray.wait(list(running))[0][0]
                place, tries = running.pop(ref)
                found = answer(ray, ref, todo[place], bench, self.retries - tries)
                if found is None:
                    waiting.appendleft((place, tries + 1))
                start()
                if found is not None:
                    yield place, found, len(running)
        finally:
            stop(ray, list(running))

    def share(self, ray: Any, device: str) -> float:
        """GPUs of a run."""
        if self.gpus is not None:
            return self.gpus
        return 1.0 if device != "cpu" and ray.cluster_resources().get("GPU", 0) else 0.0


def library() -> Any:
    """Ray. Raises UserError when it is not installed."""
    try:
        import ray
    except ImportError:
        raise UserError("study: --engine ray needs its package: pip install 'advtune[ray]'") from None
    return ray


def connect(ray: Any, address: str) -> None:
    """Start a cluster here, or join one. Raises UserError when it cannot be had."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told that a study runs
    size = {"object_store_memory": STORE, "include_dashboard": False} if address == HERE else {}
    there = THERE.fullmatch(address)
    try:
        if there and there["port"]:
            socket.create_connection((there["host"].strip("[]"), int(there["port"])), PATIENCE).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **size)
    except (OSError, ValueError, OverflowError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"study: --ray-address {address}: no cluster ({reason}); leave it out, and one is started here"
        ) from None


def room(ray: Any, cpus: float, gpus: float) -> int:
    """How many runs fit on the cluster's machines at once."""
    found = 0
    for machine in (each["Resources"] for each in ray.nodes() if each["Alive"]):
        fit = int(machine.get("CPU", 0) / cpus)
        found += min(fit, int(machine.get("GPU", 0) / gpus)) if gpus else fit
    return found


def one(run: Run, bench: Bench, threads: int, place: str, settings: dict[str, str]) -> list[Failure]:
    """A task: do a run in the folder `place`, with the driver's ADVTUNE_ variables; what failed. Raises UserError on a
    machine that does not see the study's folder."""
    import torch

    from advtune.disk import LOCK
    from advtune.grid import do

    if not (Path(place) / bench.out / LOCK).is_file():
        where = f"{bench.out} is not seen by {platform.node()}"
        raise UserError(f"{where}; put it, and the data, where all machines of the cluster see them")
    os.environ.update(settings)
    os.chdir(place)
    torch.set_num_threads(threads)
    return do(run, bench)


def answer(ray: Any, ref: Any, run: Run, bench: Bench, retries: int) -> list[Failure] | None:
    """What failed of a task that is over; None: its worker died, and it may be tried again. Raises OSError when the
    task could not write down what failed."""
    from advtune.grid import failure

    try:
        return list(ray.get(ref))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError):
            raise error.cause from None
        error.cause.__cause__ = error  # with the worker's own traceback
        return [failure(run, "", error.cause, bench.out)]
    except ray.exceptions.RayError as error:
        if retries > 0:
            why = f"its worker died ({type(error).__name__}); it is tried again"
            if bench.show:
                print(f"advtune: {run.key}: {why}", file=sys.stderr, flush=True)
            return None
        return [failure(run, "", error, bench.out)]


def stop(ray: Any, refs: list[Any]) -> None:
    """End tasks: as Ctrl-C would, and then those that do not listen; nobody works on their runs any more."""
    for force in (False, True):
        for ref in refs:
            ray.cancel(ref, force=force)
        refs = ray.wait(refs, num_returns=len(refs), timeout=GRACE)[1] if refs else []
