"""The image tower through torch.compile: fused kernels, and CUDA graphs where nothing learns."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from advtune.errors import UserError

PROGRAMS = 64  # torch's limit, raised: sizes x with and without gradient x precisions


def check_compiler() -> None:
    """Raises UserError when there is no C++ compiler for torch.compile to call."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        raise UserError("compile needs a C++ compiler: install g++, or set CXX, or go without --compile")


class Compiled:
    """tower(x, ...) as few programs of fixed shape: a batch is filled up to the widest seen, its half or its quarter.

    In an attack images leave the batch, and a program for each number of them would be compiled. graphs: replay CUDA
    graphs, which write every result where the last one was: what is given is a copy. (The gradient by the pixels is
    one, too: it went through the normalisation.)
    """

    def __init__(self, tower: Callable[..., Tensor], backend: str, graphs: bool):
        import torch._dynamo

        torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
        how: dict[str, Any] = {"mode": "reduce-overhead"} if graphs else {}
        self.program = torch.compile(tower, backend=backend, dynamic=False, **how)
        self.graphs, self.widest = graphs, 0

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        """Normalised images [B, 3, S, S] and what else the tower takes -> what it gives, [B, ...]."""
        n, self.widest = len(x), max(len(x), self.widest)
        size = min(each for each in (self.widest, -(-self.widest // 2), -(-self.widest // 4)) if each >= n)
        if size > n:
            x = torch.cat([x, x.new_zeros(size - n, *x.shape[1:])])
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        found: Tensor = self.program(x, *rest)
        return found[:n].clone() if self.graphs else found[:n]
