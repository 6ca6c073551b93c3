"""How much a device can hold, and what is computed twice so that it holds less."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

SHARE = 1 / 4  # of a device's memory: what one thing that could do without may take


def room(device: torch.device) -> float:
    """Bytes of a device that one thing may take; without end where its memory cannot be asked for."""
    if device.type == "cuda":
        return SHARE * torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return SHARE * min(container(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return float("inf")


def container(file: Path = Path("/sys/fs/cgroup/memory.max")) -> float:
    """Bytes that a container may have; without end where none is set."""
    try:
        return float(file.read_text())  # "max" where there is no limit
    except (OSError, ValueError):
        return float("inf")


def through(block: nn.Module, again: bool, *given: Any) -> Any:
    """block(*given); with `again`, what it computes on the way is forgotten, and computed once more for a gradient."""
    if again and torch.is_grad_enabled():
        return checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
    return block(*given)
