"""Random numbers of a batch that goes through whole or in portions: an image gets the same ones either way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_cut: ContextVar[tuple[int, slice] | None] = ContextVar("cut", default=None)
State = tuple[Tensor, Tensor | None]


@contextmanager
def portion(n: int, part: slice) -> Iterator[None]:
    """Here a batch is the images `part` of one of n: what is drawn for it is drawn for all n and cut."""
    token = _cut.set(None if (part.start, part.stop) == (0, n) else (n, part))
    try:
        yield
    finally:
        _cut.reset(token)


def each(draw: Callable[[int], Tensor], n: int) -> Tensor:
    """draw(n), the numbers [n, ...] of a batch's n images; in a portion these images' rows of the whole batch's."""
    cut = _cut.get()
    if cut is None:
        return draw(n)
    found = draw(cut[0])[cut[1]]
    if len(found) != n:
        raise RuntimeError(f"numbers for {n} images in a portion of {len(found)}")
    return found


def like(x: Tensor) -> Tensor:
    """A number in [0, 1) for every pixel of a batch x [B, 3, S, S], on its device."""
    return each(lambda n: torch.rand_like(x if n == len(x) else x.new_empty(n, *x.shape[1:])), len(x))


def state(device: torch.device) -> State:
    """Where torch's streams of numbers are: the processor's, and that of `device` if it has its own."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def back_to(found: State, device: torch.device) -> None:
    """Draw the same numbers again that followed a `state`."""
    torch.set_rng_state(found[0])
    if found[1] is not None:
        torch.cuda.set_rng_state(found[1], device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A block with its own random numbers; the generators of the processor and of `device` are then as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
