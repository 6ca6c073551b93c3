"""Several processes at one job, as torchrun starts them: which one this is, its share, and what all must know.

With one process nothing here does anything, and torch.distributed is not imported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from advtune.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT, SECONDS = "ADVTUNE_TIMEOUT", 1800.0  # how long a process waits for another one that does not answer
BUCKET = 25_000_000  # numbers that are added up at once
PAUSE = 0.05  # seconds between two looks at the store


@dataclass
class Place:
    """This process among the others. store: what all can read and write, without waiting for each other."""

    rank: int = 0
    world: int = 1
    local: int = 0
    machine: str = "0"
    store: Any = None
    turns: int = 0


_here = Place()


def rank() -> int:
    """The number of this process, from 0."""
    return _here.rank


def world() -> int:
    """How many processes there are."""
    return _here.world


def leader() -> bool:
    """Whether this is the process that writes and prints."""
    return _here.rank == 0


def wanted() -> bool:
    """Whether this process was started as one of several; torch is not imported for it."""
    return environment().world > 1


def environment() -> Place:
    """What torchrun says of this process. Raises UserError when only a part of it is said, or it makes no sense."""
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given.get("WORLD_SIZE", "1") == "1" and "RANK" not in given:
        return Place()
    missing = [name for name in VARIABLES if name not in given]
    if missing:
        one, others = next(iter(given)), ", ".join(missing)
        raise UserError(f"{one} is set in the environment, but not {others}; start with torchrun, or unset {one}")
    try:
        rank, world, local, port = (int(given[name]) for name in (*VARIABLES[:3], VARIABLES[4]))
    except ValueError:
        raise UserError(f"{', '.join(VARIABLES[:3])} and MASTER_PORT are whole numbers; start with torchrun") from None
    if not (0 <= rank < world and 0 <= local < world and 0 < port < 2**16):
        said = " ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{said}: no such process; start with torchrun")
    return Place(rank, world, local, os.environ.get("GROUP_RANK", "0"))


def timeout() -> timedelta:
    """How long to wait for the others. Raises UserError when the environment's ADVTUNE_TIMEOUT is no time."""
    text = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(text or SECONDS)
    except ValueError:
        seconds = 0
    if not 0 < seconds < 1e9:
        raise UserError(f"{TIMEOUT}={text!r} is not a number of seconds; leave it out for {SECONDS:.0f}")
    return timedelta(seconds=seconds)


def start(device: str = "auto") -> None:
    """Join the other processes, if torchrun started several: by NCCL where each has its GPU, else by gloo.

    Raises UserError when the environment or the device does not fit, or the others cannot be reached.
    """
    global _here
    place = environment()
    if place.world == 1 or _here.world > 1:
        return
    import torch
    import torch.distributed as dist

    wait, gpu = timeout(), device != "cpu" and torch.cuda.is_available()
    if not dist.is_available():
        raise UserError("this build of torch knows one process only; install another, or go without torchrun")
    import torch.distributed.nn  # imported later (by torch._dynamo), its defaults keep the group, and its threads

    if gpu:
        check_gpu(device, place, torch.cuda.device_count())
        torch.cuda.set_device(place.local)
    try:
        place.store, *_ = next(dist.rendezvous("env://", timeout=wait))
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"  # what is said goes over gloo, tensors over NCCL
        store = dist.PrefixStore("group", place.store)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=wait)
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"process {place.rank} of {place.world} cannot join the others: {reason}") from error
    _here = place


def check_gpu(device: str, place: Place, count: int) -> None:
    """Raises UserError unless this process finds a GPU of its own among `count`."""
    if device not in ("auto", "cuda"):
        raise UserError(f"--device {device} is one for {place.world} processes; leave it out, and each takes its own")
    if place.local >= count:
        raise UserError(f"process {place.local} of this machine, which has {count} GPUs; --nproc-per-node {count}")


def stop() -> None:
    """Part from the other processes when all are done; nothing waits for those that failed."""
    global _here
    if world() > 1:
        import torch.distributed as dist

        gather(None)
        dist.destroy_process_group()
    _here = Place()


def share(n: int, among: int | None = None, number: int | None = None) -> slice:
    """Which of n things in a row are this process's: the shares differ by one at most, the leader's is the largest."""
    k, r = world() if among is None else among, rank() if number is None else number
    return slice(-(-r * n // k), -(-(r + 1) * n // k))


def gather(value: T) -> list[T]:
    """What every process has, in their order; all must call it."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def attempt(work: Callable[[], T]) -> list[T]:
    """What every process's `work` gives; all must call it. A UserError of one is raised in all."""
    value, wrong = None, None
    try:
        value = work()
    except UserError as error:
        if world() == 1:
            raise
        wrong = error
    said = gather((value, wrong))
    if first := next((each for _, each in said if each is not None), None):
        raise first
    return [each for each, _ in said]  # type: ignore[misc]


def told(value: T) -> T:
    """What the leader has; all must call it."""
    if world() == 1:
        return value
    import torch.distributed as dist

    found = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def agree(value: object, what: str) -> None:
    """Raises UserError, in all processes, unless all have the same value."""
    found = gather(value)
    other = next((number for number, each in enumerate(found) if each != found[0]), None)
    if other is not None:
        raise UserError(f"{what}: not the same in process {other} as in process 0; all must see the same files")


def total(tensors: Sequence[Tensor]) -> None:
    """Every tensor becomes its sum over the processes, where it lies; all must call it with the same shapes."""
    if world() == 1 or not tensors:
        return
    import torch
    import torch.distributed as dist

    for bucket in buckets(tensors):
        flat = torch.cat([each.detach().flatten() for each in bucket])
        dist.all_reduce(flat)
        for each, summed in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            each.detach().copy_(summed.view_as(each))


def buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors in their order, as many together as go through one sum: of one kind, about BUCKET numbers."""
    found, size = list[list["Tensor"]](), 0
    for each in tensors:
        fits = found and found[-1][0].dtype == each.dtype and size + each.numel() <= BUCKET
        size = size + each.numel() if fits else each.numel()
        if fits:
            found[-1].append(each)
        else:
            found.append([each])
    return found


@contextmanager
def in_turn() -> Iterator[None]:
    """Every machine's first process goes before its others, which then find in the cache what it has made."""
    if world() == 1:
        yield
        return
    _here.turns += 1
    done = f"turn {_here.turns} on {_here.machine}"
    if _here.local > 0:
        wait_for(done)
    yield
    if _here.local == 0:
        _here.store.set(done, "1")


def wait_for(key: str) -> None:
    """Wait until another process has set a key, however long it works. Raises UserError when one has ended."""
    while not _here.store.check([key]):
        if _here.store.check(["ended"]):
            raise UserError("another process has ended")
        time.sleep(PAUSE)


def lost(error: BaseException) -> bool:
    """Whether this is how torch says that another process is gone."""
    if world() == 1 or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in ("gloo", "NCCL", "onnection closed"))


def speaks() -> bool:
    """Whether this process, which is about to end, says why: of all that end, the first one does."""
    if world() == 1:
        return True
    try:
        return bool(_here.store.add("ended", 1) == 1)
    except RuntimeError:  # the store went with the process that kept it, which was the first
        return False
