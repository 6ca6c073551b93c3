"""Class texts in portions: texts of about the same length together, and no more with a gradient than memory holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from advtune.clip import TowerConfig

LEAST, SHARE = 512, 1 / 8  # a further portion must save so many tokens, and such a share of all: it costs a launch


def graph_bytes(config: TowerConfig, length: int, shared: int, low: bool) -> int:
    """About how many bytes autograd keeps of one text of `length` tokens, of which `shared` are computed for all texts
    at once; `low`: under bf16 autocast."""
    own = 8 * config.width + 2 * config.mlp  # two norms, q, k, v, their mixture, the sums, the MLP twice
    numbers = (length - shared) * own + length * 2 * config.width  # and all keys and values, side by side
    return config.layers * numbers * (3 if low else 4)  # sums and norms stay fp32


def by_length(lengths: Tensor) -> list[Tensor]:
    """The places of texts with so many tokens [C], in groups that are each cut at their own longest text.

    The best cut first, then each side's best, as long as one is worth it: few groups, since each costs a launch.
    """
    order = lengths.argsort(stable=True)
    ascending = lengths[order].tolist()
    worth = max(LEAST, SHARE * len(ascending) * ascending[-1])
    steps = [i for i in range(1, len(ascending)) if ascending[i] > ascending[i - 1]]

    def cut(begin: int, end: int) -> list[tuple[int, int]]:
        gains = {i: (i - begin) * (ascending[end - 1] - ascending[i - 1]) for i in steps if begin < i < end}
        best = max(gains, key=lambda i: gains[i], default=begin)
        if not gains or gains[best] < worth:
            return [(begin, end)]
        return cut(begin, best) + cut(best, end)

    return [order[begin:end].sort().values for begin, end in cut(0, len(ascending))]


def encode(
    tower: Callable[[Tensor, Tensor | None], Tensor], config: TowerConfig, tokens: Tensor, lengths: Tensor,
    prompts: Tensor | None, low: bool, memory: float, shared: int = 1,
) -> Tensor:  # fmt: skip
    """tower(tokens [C, L], prompts) -> [C, D], the same numbers portion by portion.

    lengths: tokens of each text up to its end [C]; shared: how many all begin with. memory: bytes that the graph may
    take; where more would be kept, each portion is forgotten and computed once more when its gradient is asked for.
    """
    groups = by_length(lengths)
    sizes = [graph_bytes(config, int(lengths[rows].max()), shared, low) for rows in groups]
    again = torch.is_grad_enabled() and sum(n * len(g) for n, g in zip(sizes, groups, strict=True)) > memory
    if not again and len(groups) == 1:
        return tower(tokens, prompts)
    if again:
        groups = [part for n, g in zip(sizes, groups, strict=True) for part in g.split(max(1, int(memory // n)))]
    found = []
    for rows in groups:
        own = prompts[:, rows.to(prompts.device)] if prompts is not None and prompts.dim() == 4 else prompts
        found.append(
            checkpoint(tower, tokens[rows], own, use_reentrant=False, preserve_rng_state=False)
            if again
            else tower(tokens[rows], own)
        )
    back = torch.cat(groups).argsort().to(found[0].device)
    return torch.cat(found)[back]
