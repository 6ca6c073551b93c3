"""Projected gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from advtune.errors import UserError
from advtune.losses import cross_entropy
from advtune.options import check, option


@dataclass(frozen=True)
class PGD:
    """PGD in the l_inf ball, on pixels in [0, 1] (Madry et al., arXiv:1706.06083).

    x <- clip(x + step_size * sign(grad), x0 - eps, x0 + eps), inside [0, 1]. Losses are summed over the batch;
    gradients are taken with respect to the input alone.
    """

    eps: float = option(1 / 255, "radius of the l_inf ball, in pixels of [0, 1]: 1/255", pixel=True)
    steps: int = option(10, "gradient steps", low=1)
    step_size: float | None = option(
        None, "length of a step; none: max(eps/4, 2 eps/steps), at most eps (2 eps/3 at 3 steps)", pixel=True
    )
    restarts: int = option(1, "runs from new random starts, on what still stands", low=1)
    random_start: bool = option(True, "start from a uniform point of the ball")
    keep: str = option("best", "the iterate to return; best costs one more forward", choices=("best", "last"))
    early_stop: bool = option(True, "images that are fooled leave the batch (exact for accuracy)")

    def __post_init__(self) -> None:
        check(self, "attack pgd")
        if self.step_size == 0:
            raise UserError("attack pgd: step_size 0 does not move; leave it out for the default")
        if self.restarts > 1 and not self.random_start:
            raise UserError("attack pgd: restarts from the same point find the same; set random_start=true")

    @property
    def step(self) -> float:
        """The step length used: the papers' 2 eps/3 for PGD-3, eps for PGD-2, eps/4 from 8 steps on."""
        if self.step_size is not None:
            return self.step_size
        return min(self.eps, max(self.eps / 4, 2 * self.eps / self.steps))

    def __call__(
        self,
        f: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    ) -> Tensor:
        """Images x [B, 3, S, S] and labels y [B] -> adversarial images [B, 3, S, S], detached.

        f maps images to logits; loss(f(x), y) gives one number an image, to be raised. With early_stop, y
        must hold integer labels. Nothing of f's state is changed.
        """
        x = x.detach()
        if self.eps == 0:
            return x.clone()
        if self.restarts == 1:
            return self._climb(f, x, y, loss)[0]
        best, height = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)
        for _ in range(self.restarts):
            rows = (height < torch.inf).nonzero().squeeze(1)  # those that still stand
            if len(rows) == 0:
                break
            found, reached = self._climb(f, x[rows], y[rows], loss)
            higher = reached > height[rows]
            best[rows[higher]], height[rows[higher]] = found[higher], reached[higher]
        return best

    def _climb(
        self,
        f: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """One run: iterates [B, 3, S, S] and their losses [B], infinite where the label changed."""
        z = x
        if self.random_start:
            z = (x + torch.empty_like(x).uniform_(-self.eps, self.eps)).clamp(0, 1)
        if self.keep == "last" and not self.early_stop and self.restarts == 1:  # training: no look back
            for _ in range(self.steps):
                z = self._ascend(gradient(f, z, y, loss)[0], z, x)
            return z, torch.empty(0)
        best, height = z.clone(), torch.full((len(x),), -torch.inf, device=x.device)
        live = torch.arange(len(x), device=x.device)
        for step in range(self.steps + 1):
            last = step == self.steps
            slope, each, logits = gradient(f, z, y[live], loss, needed=not last)
            fooled = logits.argmax(1) != y[live] if self.early_stop else torch.zeros_like(each) > 0
            each = torch.where(fooled, torch.inf, each)
            better = fooled | (each > height[live]) | (self.keep == "last")
            best[live[better]], height[live[better]] = z[better], each[better]
            if last or bool(fooled.all()):
                break
            z = self._ascend(slope, z, x[live])
            if bool(fooled.any()):
                z, live = z[~fooled], live[~fooled]
        return best, height

    def _ascend(self, slope: Tensor, z: Tensor, x: Tensor) -> Tensor:
        z = z + self.step * slope.sign()
        return torch.minimum(torch.maximum(z, x - self.eps), x + self.eps).clamp(0, 1)


def gradient(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    needed: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """d(sum of losses)/dx [B, 3, S, S], the losses [B] and the logits, all detached. With needed=False the
    gradient is left out (an empty tensor), at the price of a forward."""
    with torch.set_grad_enabled(needed):
        x = x.detach().requires_grad_(needed)
        logits = f(x)
        each = loss(logits, y)
        slope = torch.autograd.grad(each.sum(), x)[0] if needed else torch.empty(0)
    return slope, each.detach(), logits.detach()
