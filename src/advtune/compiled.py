"""The image tower through torch.compile: fused kernels, and CUDA graphs in attacks and predictions."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from advtune.errors import UserError

PROGRAMS = 64  # torch's limit, raised: sizes x with and without gradient x precisions
_pixels_only = ContextVar("pixels_only", default=False)


@contextmanager
def pixels_only() -> Iterator[None]:
    """Here gradients are asked for by the pixels alone. A compiled backward computes all that it can; nothing else
    changes."""
    token = _pixels_only.set(True)
    try:
        yield
    finally:
        _pixels_only.reset(token)


def check_compiler() -> None:
    """Raises UserError when there is no C++ compiler for torch.compile to call."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        raise UserError("compile needs a C++ compiler: install g++, or set CXX, or go without --compile")


def frozen(tower: nn.Module) -> nn.Module:
    """A tower with the same weights, in the same memory, none of which learns."""
    return copy.deepcopy(tower, {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in tower.parameters()})


class Compiled:
    """A tower as few programs of fixed shape: a batch is filled up to the widest seen, its half or its quarter.

    In an attack images leave the batch, and a program for each number of them would be compiled. Attacks and
    predictions have programs of their own, in which weights are constants. graphs: these replay CUDA graphs, which
    write every result where the last one was, so what is given is a copy. (The gradient by the pixels is one, too: it
    went through the normalisation.)
    """

    def __init__(self, tower: nn.Module, backend: str, graphs: bool):
        import torch._dynamo

        torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
        mode = "reduce-overhead" if graphs else None
        self.still = torch.compile(frozen(tower).forward, backend=backend, dynamic=False, mode=mode)
        self.learning = torch.compile(tower.forward, backend=backend, dynamic=False)
        self.graphs, self.widest = graphs, 0

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        """Normalised images [B, 3, S, S] and what else the tower takes -> what it gives, [B, ...]."""
        n, self.widest = len(x), max(len(x), self.widest)
        size = min(each for each in (self.widest, -(-self.widest // 2), -(-self.widest // 4)) if each >= n)
        if size > n:
            x = torch.cat([x, x.new_zeros(size - n, *x.shape[1:])])
        if torch.is_grad_enabled() and not _pixels_only.get():
            found: Tensor = self.learning(x, *rest)
            return found[:n]
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        found = self.still(x, *rest)
        return found[:n].clone() if self.graphs else found[:n]
