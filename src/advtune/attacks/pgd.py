"""Projected gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from advtune import draws
from advtune.attacks.ball import (
    ascent,
    check_attack,
    draw,
    eps_option,
    image_seeds,
    norm_option,
    project,
    projection,
    random_point,
    wide,
)
from advtune.attacks.gradients import Function, Loss, bpda_option, eot_option, gradient, standing
from advtune.attacks.leaving import Leaving
from advtune.errors import UserError
from advtune.losses import cross_entropy, kl, margin
from advtune.options import option

LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "kl": lambda logits, clean: kl(clean, logits)}


@dataclass(frozen=True)
class PGD:
    """PGD in the l_inf or l_2 ball, on pixels in [0, 1] (Madry et al., arXiv:1706.06083).

    x <- project(x + step_size * sign(grad)), in l_2 with grad / ||grad||. Losses are summed over the batch;
    gradients are taken with respect to the input alone. loss=kl is KL(f(x) || f(x')), as in TRADES; loss=margin
    is what papers call CW. A random start depends on the image and torch's seed, not on the batch, except where
    the last iterate of one run is kept: that is how training attacks, in a hurry.
    """

    eps: float = eps_option()
    steps: int = option(10, "gradient steps", low=1)
    step_size: float | None = option(
        None, "length of a step; none: max(eps/4, 2 eps/steps), at most eps (2 eps/3 at 3 steps)", low=0
    )
    restarts: int = option(1, "runs from new random starts, on what still stands", low=1)
    random_start: bool = option(True, "start from a random point of the ball")
    keep: str = option("best", "the iterate to return; best costs one more forward", choices=("best", "last"))
    early_stop: bool = option(True, "images that are fooled leave the batch (exact for accuracy); not with eot > 1")
    norm: str = norm_option()
    loss: str = option("ce", "what is raised; kl: KL(f(x) || f(x'))", choices=tuple(LOSSES))
    eot: int = eot_option()
    bpda: bool = bpda_option()

    def __post_init__(self) -> None:
        check_attack(self)
        if self.step_size == 0:
            raise UserError(f"attack {self.name}: step_size 0 does not move; leave it out for the default")
        if self.step_size is not None and self.norm == "linf" and self.step_size >= 1:
            raise UserError(f"attack {self.name}: step_size={self.step_size:g}: write {self.step_size:g}/255")
        if self.restarts > 1 and not self.random_start:
            raise UserError(f"attack {self.name}: restarts from the same point find the same; set random_start=true")
        if self.loss == "kl" and not self.random_start:
            raise UserError(f"attack {self.name}: KL(f(x) || f(x')) has no slope at x itself; set random_start=true")

    @property
    def name(self) -> str:
        return "cw-pgd" if self.loss == "margin" else "pgd"

    @property
    def leave(self) -> bool:
        """Whether fooled images leave. What fools a random model once, on average, may not the next time."""
        return self.early_stop and self.eot == 1

    @property
    def step(self) -> float:
        """The step length used: the papers' 2 eps/3 for PGD-3, eps for PGD-2, eps/4 from 8 steps on."""
        if self.step_size is not None:
            return self.step_size
        return min(self.eps, max(self.eps / 4, 2 * self.eps / self.steps))

    def __call__(self, f: Function, x: Tensor, y: Tensor, loss: Loss | None = None) -> Tensor:
        """Images x [B, 3, S, S] and labels y [B] -> adversarial images [B, 3, S, S], detached.

        f maps images to logits; loss(f(x), y), if given, stands in for the field: one number an image, to be
        raised. With early_stop, y must hold integer labels. Nothing of f's state is changed.
        """
        x = x.detach()
        if self.eps == 0:
            return x.clone()
        if loss is not None and self.loss != "ce":
            raise UserError(f"attack {self.name}: what is raised is given by the caller; leave out loss={self.loss}")
        if y.is_floating_point() and self.leave:
            raise UserError(f"attack {self.name}: nothing is fooled where the target is not a label; early_stop=false")
        target, climb = y, loss or LOSSES[self.loss]
        if loss is None and self.loss == "kl":
            with torch.no_grad():
                target = f(x)
        hurry = self.keep == "last" and self.restarts == 1
        if hurry and not self.early_stop:
            return self._rush(f, x, target, climb)
        seeds = image_seeds(x) if self.random_start and not hurry else []

        def attempt(number: int, rows: Tensor) -> tuple[Tensor, Tensor]:
            z = x[rows]
            if self.random_start:
                u = draws.like(z) if hurry else draw(seeds, rows, x, number)
                z = random_point(z, self.eps, self.norm, u)
            return self._climb(f, z, x[rows], y[rows], target[rows], climb)

        return standing(x, (partial(attempt, number) for number in range(self.restarts)))

    def _rush(self, f: Function, x: Tensor, target: Tensor, loss: Loss) -> Tensor:
        """The last iterate, without a look back."""
        z = random_point(x, self.eps, self.norm, draws.like(x)) if self.random_start else x
        into = projection(x, self.eps, self.norm)
        for _ in range(self.steps):
            slope = gradient(f, z, target, loss, eot=self.eot, bpda=self.bpda)[0]
            z = into(z + self.step * ascent(slope, self.norm))
        return z

    def _climb(self, f: Function, z: Tensor, x: Tensor, y: Tensor, target: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """One run from z: iterates [B, 3, S, S] and their losses [B], infinite where the label changed."""
        best, height = z.clone(), torch.full((len(x),), -torch.inf, device=x.device)
        live, leaving = torch.arange(len(x), device=x.device), Leaving(x.device)
        for step in range(self.steps + 1):
            last = step == self.steps
            if last and self.keep == "last" and self.restarts == 1:  # it is returned, however high
                best[live] = torch.where(wide(height[live] == torch.inf), best[live], z)
                break
            slope, each, logits = gradient(f, z, target, loss, not last, self.eot, self.bpda)
            fooled = logits.argmax(1) != y if self.leave else torch.zeros_like(each) > 0
            each = torch.where(fooled, torch.inf, each)
            better = (height[live] != torch.inf) & (fooled | (each > height[live]) | (self.keep == "last"))
            best[live] = torch.where(wide(better), z, best[live])
            height[live] = torch.where(better, each, height[live])
            if last:
                break
            stay = leaving(fooled) if self.leave else None
            if stay is not None:
                z, x, y, target, live, slope = (t[stay] for t in (z, x, y, target, live, slope))
                if len(live) == 0:
                    break
            z = project(z + self.step * ascent(slope, self.norm), x, self.eps, self.norm)
        return best, height


PGD2 = PGD(eps=1 / 255, steps=2, keep="last", early_stop=False)  # what most papers tune against: two steps of eps
