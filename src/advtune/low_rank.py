"""Low-rank updates of an image tower: little learns, and a merged tower is like any other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from advtune.errors import UserError


class LowRank(nn.Module):
    """W + B A, with A [r, in] and B [out, r] that learn and W [out, in] that does not (LoRA, arXiv:2106.09685, with a
    scale of 1: the learning rate is the dial). B starts at zero, so nothing is changed at first."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        out, width = weight.shape
        start = torch.randn(rank, width, generator=generator) / width**0.5
        self.a = nn.Parameter(start.to(weight))
        self.b = nn.Parameter(weight.new_zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        # A product under autocast is bf16, and what is merged at the end would be another tower.
        with torch.autocast(weight.device.type if weight.device.type != "meta" else "cpu", enabled=False):
            return weight + self.b @ self.a


def attach(tower: nn.Module, rank: int, seed: int) -> None:
    """Low-rank updates to every linear map of a transformer's layers; they alone learn. Raises UserError for a tower
    that is none, and for a rank below 1."""
    if rank < 1:
        raise UserError(f"low-rank updates need a rank of at least 1; got {rank}")
    blocks = getattr(tower, "blocks", None)
    if blocks is None:
        raise UserError(
            "low-rank updates are of a transformer's layers, and this backbone's image tower is a ResNet: take a "
            "method that tunes the image tower or the text context (advtune list methods)"
        )
    tower.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for block in blocks:
        for linear in (block.qkv, block.out, block.fc1, block.fc2):
            update = LowRank(linear.weight, rank, generator)
            parametrize.register_parametrization(linear, "weight", update)


def merge(tower: nn.Module) -> bool:
    """The updates become part of the weights; whether there were any. Copies of the tower that still have theirs are
    of no use afterwards: torch takes the property from the class that they share."""
    updated = [module for module in tower.modules() if parametrize.is_parametrized(module, "weight")]
    for module in updated:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return bool(updated)
