"""N-FGSM: one step from a strongly noisy image, to tune on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from advtune import draws
from advtune.attacks.ball import check_attack, eps_option, random_point
from advtune.attacks.gradients import Function, Loss, gradient
from advtune.losses import cross_entropy
from advtune.options import option


@dataclass(frozen=True)
class NFGSM:
    """N-FGSM (arXiv:2202.01181): a single step, from noise that reaches beyond the ball; only to tune on.

    x' = clip(z + step_size * sign(grad at z)),  z = clip(x + U(-noise * eps, noise * eps))

    clip is to [0, 1] alone, as released: nothing is projected into the ball, so pixels move up to
    noise * eps + step_size. That is the point of it, and why no model may be measured with it.
    """

    eps: float = eps_option()
    noise: float = option(2.0, "how far the noise reaches, in eps (the paper's k)", low=0)
    step_size: float | None = option(None, "length of the step; none: eps, the paper's alpha", pixel=True)

    name = "n-fgsm"
    norm = "linf"

    def __post_init__(self) -> None:
        check_attack(self)

    @property
    def step(self) -> float:
        """The step length used."""
        return self.eps if self.step_size is None else self.step_size

    def __call__(self, f: Function, x: Tensor, y: Tensor, loss: Loss = cross_entropy) -> Tensor:
        """Images x [B, 3, S, S] and labels y [B] -> images [B, 3, S, S], detached; loss(f(x), y) is raised."""
        z = random_point(x.detach(), self.noise * self.eps, self.norm, draws.like(x))
        return (z + self.step * gradient(f, z, y, loss)[0].sign()).clamp(0, 1)
