"""Fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from advtune.attacks.ball import ascent, check_attack, eps_option, norm_option, project
from advtune.attacks.gradients import Function, Loss, gradient
from advtune.losses import cross_entropy


@dataclass(frozen=True)
class FGSM:
    """One step of length eps along the gradient's sign (Goodfellow et al., arXiv:1412.6572).

    x' = clip(x + eps * sign(grad)), in l_2 with grad / ||grad||. A model that withstands only this withstands nothing.
    """

    eps: float = eps_option()
    norm: str = norm_option()

    name = "fgsm"

    def __post_init__(self) -> None:
        check_attack(self)

    def __call__(self, f: Function, x: Tensor, y: Tensor, loss: Loss = cross_entropy) -> Tensor:
        """Images x [B, 3, S, S] and labels y [B] -> images [B, 3, S, S], detached; loss(f(x), y) is raised."""
        x = x.detach()
        return project(x + self.eps * ascent(gradient(f, x, y, loss)[0], self.norm), x, self.eps, self.norm)
