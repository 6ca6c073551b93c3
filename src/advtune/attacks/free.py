"""Free replay: the gradient that moves the weights moves the perturbation, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advtune.attacks.ball import check_attack, eps_option
from advtune.attacks.gradients import Function, Loss
from advtune.errors import UserError
from advtune.options import option


@dataclass(frozen=True)
class Free:
    """Free adversarial training (arXiv:1904.12843): each batch is gone through `replay` times; only to tune on.

    x' = clip(x + d);  with each update  d <- clip(d + eps * sign(dL/dd), -eps, eps)

    L is the method's whole loss, whose one backward pass gives the weights their gradient and d its own. d is kept
    from batch to batch: the next batch's first image takes over the first one's. An epoch is as many updates as
    ever, so the images are gone through epochs / replay times. One difference: d starts as a random point of the
    ball and not as 0, where a loss that compares f(x') with f(x) has no slope.
    """

    eps: float = eps_option()
    replay: int = option(4, "times that each batch is gone through (the paper's m)", low=1)

    name = "free"
    norm = "linf"

    def __post_init__(self) -> None:
        check_attack(self)

    def start(self, shape: Sequence[int], seed: int) -> Tensor:
        """The d that a run starts from, [B, 3, S, S]; the same bits on every machine."""
        return (2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 1) * self.eps

    def __call__(self, f: Function, x: Tensor, y: Tensor, loss: Loss | None = None) -> Tensor:
        """x + 0, which takes a gradient: outside of the training loop there is no d."""
        return Replay(self, torch.zeros_like(x))(f, x, y, loss)


class Replay:
    """One time through a batch, as an attack: adds d [B, 3, S, S], and moves it where it lies after the loss has gone
    backward."""

    name, norm = Free.name, Free.norm

    def __init__(self, free: Free, d: Tensor):
        self.eps, self.kept = free.eps, d
        self.d = d.clone().requires_grad_(True)

    def __call__(self, f: Function, x: Tensor, y: Tensor, loss: Loss | None = None) -> Tensor:
        """Images x [B, 3, S, S] -> images [B, 3, S, S] through which the gradient goes on to d; f is not asked."""
        return (x + self.d).clamp(0, 1)

    def climb(self) -> None:
        """Move d. Raises UserError when the loss gave it no gradient."""
        if self.d.grad is None:
            raise UserError("free replay: the loss says nothing of the adversarial images; tune with -a name=pgd")
        self.kept.add_(self.d.grad.sign(), alpha=self.eps).clamp_(-self.eps, self.eps)
