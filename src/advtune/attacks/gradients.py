"""What gradient attacks share: the gradient with respect to the input, and several tries on what still stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advtune.compiled import pixels_only
from advtune.errors import UserError
from advtune.options import option

Function = Callable[[Tensor], Tensor]  # images [B, 3, S, S] -> logits [B, C]
Loss = Callable[[Tensor, Tensor], Tensor]  # logits [B, C], targets [B, ...] -> one number an image [B], to be raised


def eot_option() -> Any:
    return option(1, "forwards averaged in each gradient, for a model that is random (EOT, arXiv:1707.07397)", low=1)


def bpda_option() -> Any:
    return option(False, "gradient through the stand-in of a step that has none (BPDA, arXiv:1802.00420)")


@dataclass(frozen=True)
class Defended:
    """A classifier behind a step on its images: f(x) = head(step(x)).

    `step` may be random, and may have no gradient: an attack with bpda takes the gradient of head at step(x) and
    lets it go back through `stand_in`, the identity by default (Athalye et al., arXiv:1802.00420).
    """

    step: Function
    head: Function
    stand_in: Function = lambda x: x

    def __call__(self, x: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> logits [B, C]."""
        return self.head(self.step(x))

    def approximate(self, x: Tensor) -> Tensor:
        """The same values; the gradient goes through the stand-in."""
        with torch.no_grad():
            true = self.step(x)
        soft = self.stand_in(x)
        return self.head(true + (soft - soft.detach()))  # exactly true: what is added is 0


def gradient(
    f: Function, x: Tensor, target: Tensor, loss: Loss, needed: bool = True, eot: int = 1, bpda: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """d(sum of losses)/dx [B, 3, S, S], the losses [B] and the logits [B, C], all detached; means over `eot`
    forwards. A function that gives no gradient gives zeros. With needed=False the gradient is left out (an empty
    tensor), at the price of a forward. Raises UserError for bpda on a function that has no stand-in.
    """
    if bpda:
        if not hasattr(f, "approximate"):
            raise UserError("bpda=true: the model has no step to stand in for; use it with a defence (Defended)")
        f = f.approximate
    slope, each, logits = torch.empty(0), torch.zeros(()), torch.zeros(())
    for number in range(eot):
        with torch.set_grad_enabled(needed):
            z = x.detach().requires_grad_(needed)
            with pixels_only():
                out = f(z)
            height = loss(out, target)
            if needed:
                found = torch.autograd.grad(height.sum(), z, allow_unused=True)[0] if height.requires_grad else None
                found = torch.zeros_like(x) if found is None else found
                slope = slope + found if number else found
        each, logits = each + height.detach().float(), logits + out.detach().float()
    return slope / eot if eot > 1 else slope, each / eot, logits / eot


def standing(x: Tensor, tries: Iterable[Callable[[Tensor], tuple[Tensor, Tensor]]]) -> Tensor:
    """The best of several tries, [B, 3, S, S]. A try takes the indices of the images that still stand and gives
    theirs back with the heights reached, infinite where the label changed; those leave."""
    best, height = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)
    for attempt in tries:
        rows = (height < torch.inf).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        found, reached = attempt(rows)
        higher = reached > height[rows]
        best[rows[higher]], height[rows[higher]] = found[higher], reached[higher]
    return best
