"""FAB: the nearest adversarial image, by steps onto the linearised decision boundary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from advtune.attacks.apgd import wrong
from advtune.attacks.ball import LEAST, check_attack, distance, eps_option, norm_option, wide
from advtune.attacks.gradients import Function, bpda_option, gradient, standing
from advtune.attacks.leaving import Late, Leaving
from advtune.options import option

ETA, ALPHA, BETA = 1.05, 0.1, 0.9  # overshoot, greatest pull towards the image, step back: the paper's


@dataclass(frozen=True)
class FAB:
    """Targeted fast adaptive boundary attack, FAB-T (Croce and Hein, arXiv:1907.02044).

    For each of the likeliest wrong classes t: the boundary z_t = z_y is linearised at x_k; x_k and the image x are
    both projected on it inside [0, 1], overshot by 1.05 and mixed, with at most 0.1 for the image's part; from an
    adversarial point it goes back a tenth of the way to x. Changes longer than eps do not count.
    """

    eps: float = eps_option()
    steps: int = option(100, "steps for each target", low=1)
    targets: int = option(9, "wrong classes tried, likeliest first", low=1)
    early_stop: bool = option(True, "images leave once fooled within eps; if not, the nearest is looked for")
    norm: str = norm_option()
    bpda: bool = bpda_option()

    name = "fab-t"

    def __post_init__(self) -> None:
        check_attack(self)

    def notes(self, classes: int) -> list[str]:
        """What few classes change."""
        if self.targets < classes:
            return []
        return [f"{self.name}: {classes - 1} targets, all the wrong classes there are, not {self.targets}"]

    def __call__(self, f: Function, x: Tensor, y: Tensor, loss: object = None) -> Tensor:
        """Images x [B, 3, S, S] and labels y [B] -> adversarial images within eps [B, 3, S, S], or x where none
        was found. The attack has its own loss: the argument is not used."""
        x = x.detach()
        if self.eps == 0 or len(x) == 0:
            return x.clone()

        def attempt(to: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            return self._run(f, x[rows], y[rows], to[rows])

        return standing(x, (partial(attempt, to) for to in wrong(f, x, y, self.targets)))

    def _run(self, f: Function, x: Tensor, y: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest adversarial images found within eps (or x) and heights [B]: minus their distance, infinite
        with early_stop, -infinite where none was found."""
        found, height = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)
        live, leaving = torch.arange(len(x), device=x.device), Leaving(x.device)
        z = x
        for _ in range(self.steps):
            slope, ahead, _ = gradient(f, z, torch.stack([y, to], 1), lead, bpda=self.bpda)
            z = self._step(z, x, slope, ahead)
            with torch.no_grad():
                fooled = f(z).argmax(1) != y
            length = distance(z - x, self.norm)
            better = fooled & (length <= self.eps) & (-length > height[live])
            found[live] = torch.where(wide(better), z, found[live])
            reached = torch.full_like(length, torch.inf) if self.early_stop else -length
            height[live] = torch.where(better, reached, height[live])
            z = torch.where(wide(fooled), x + BETA * (z - x), z)
            stay = leaving(better) if self.early_stop else None
            if stay is not None:
                x, y, to, z, live = (each[stay] for each in (x, y, to, z, live))
                if len(live) == 0:
                    break
        return found, height

    def _step(self, z: Tensor, x: Tensor, slope: Tensor, ahead: Tensor) -> Tensor:
        """Onto the plane ahead + slope . (x' - z) = 0, from z and from x, mixed."""
        d = onto_plane(z, slope, -ahead, self.norm)
        d0 = onto_plane(x, slope, -ahead + (slope * (z - x)).flatten(1).sum(1), self.norm)
        a, a0 = (distance(each, self.norm).clamp(min=1e-8) for each in (d, d0))
        pull = wide((a / (a + a0)).clamp(max=ALPHA))
        return ((z + ETA * d) * (1 - pull) + (x + ETA * d0) * pull).clamp(0, 1)


def lead(logits: Tensor, pair: Tensor) -> Tensor:
    """z_t - z_y of each image, for pairs (y, t) [B, 2]."""
    z_y, z_t = logits.gather(1, pair).T
    return z_t - z_y


def onto_plane(z: Tensor, slope: Tensor, c: Tensor, norm: str) -> Tensor:
    """The shortest d with slope . d = c and z + d in [0, 1]; as far as it goes where no d is enough.

    |d_i| = min(t u_i, room_i), u = 1 in l_inf and |slope_i| in l_2. What that gains, sum |slope_i| |d_i|, is
    concave in t: Newton's steps from 0 reach |c| from below, in two or three where little is clipped.
    """
    w, need = slope.flatten(1), c.abs()
    way = w.sign() * c.sign()[:, None]
    scale = w.abs().amax(1).clamp(min=LEAST)  # flat or steep, it is the same plane: no square underflows
    w, need, flat = w.abs() / scale[:, None], need / scale, z.flatten(1)
    room = torch.where(way > 0, 1 - flat, flat)
    unit = torch.ones_like(w) if norm == "linf" else w
    t, asked = torch.zeros_like(need), Late(need.device)
    for _ in range(50):
        d = torch.minimum(t[:, None] * unit, room)
        short = need - (w * d).sum(1)
        rate = (w * unit * (d < room)).sum(1)
        go = (short > 1e-4 * need) & (rate > 1e-20)  # a step is overshot by ETA: nothing finer matters
        more = asked(go)
        if more is not None and not more.any():
            break
        t = torch.where(go, t + short / rate, t)
    return (way * torch.minimum(t[:, None] * unit, room)).view_as(z)
