"""Random noise: not an attack to believe, but the floor under one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from advtune.attacks.ball import check_attack, draw, eps_option, image_seeds, norm_option, random_point
from advtune.attacks.gradients import Function, Loss, standing
from advtune.losses import cross_entropy
from advtune.options import option


@dataclass(frozen=True)
class Noise:
    """Random points of the ball; the worst of several. A gradient attack that is no stronger is blind."""

    eps: float = eps_option()
    draws: int = option(10, "points tried", low=1)
    norm: str = norm_option()

    name = "noise"

    def __post_init__(self) -> None:
        check_attack(self)

    @torch.no_grad()
    def __call__(self, f: Function, x: Tensor, y: Tensor, loss: Loss = cross_entropy) -> Tensor:
        """Images x [B, 3, S, S] and labels y [B] -> images [B, 3, S, S]: fooled, or of the greatest loss(f(x), y)."""
        x = x.detach()
        seeds = image_seeds(x)

        def attempt(number: int, rows: Tensor) -> tuple[Tensor, Tensor]:
            u = draw(seeds, rows, x, number)
            z = random_point(x[rows], self.eps, self.norm, u)
            logits = f(z)
            return z, torch.where(logits.argmax(1) != y[rows], torch.inf, loss(logits, y[rows]).float())

        return standing(x, (partial(attempt, number) for number in range(self.draws)))
