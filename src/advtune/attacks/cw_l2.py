"""Carlini and Wagner's l_2 attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advtune.attacks.ball import check_attack, distance, wide
from advtune.attacks.gradients import Function
from advtune.errors import UserError
from advtune.losses import margin
from advtune.options import option

EDGE = 1 - 1e-6  # arctanh of 0 and 1 is infinite


@dataclass(frozen=True)
class CWL2:
    """C&W l_2 with binary search (Carlini and Wagner, arXiv:1608.04644).

    min ||x' - x||^2 + c max(z_y - max_{k != y} z_k, -confidence) over x' = (tanh(w) + 1) / 2 with Adam; c is
    raised tenfold until the image falls, then searched by halving. What papers call CW in l_inf is `cw-pgd`.
    """

    eps: float = option(0.5, "the longest change that counts, l_2 length on pixels of [0, 1]", low=0)
    steps: int = option(100, "steps of Adam for each c", low=1)
    searches: int = option(9, "values of c tried", low=1)
    c: float = option(0.1, "the first c", low=0)
    lr: float = option(0.01, "Adam's learning rate", low=0)
    confidence: float = option(0.0, "margin to reach, in logits", low=0)
    early_stop: bool = option(True, "images leave once fooled within eps; if not, the nearest is looked for")

    name, norm = "cw-l2", "l2"

    def __post_init__(self) -> None:
        check_attack(self)
        if self.c == 0 or self.lr == 0:
            raise UserError(f"attack {self.name}: c or lr 0 does not move; leave it out for the default")

    def __call__(self, f: Function, x: Tensor, y: Tensor, loss: object = None) -> Tensor:
        """Images x [B, 3, S, S] and labels y [B] -> the nearest adversarial images found within eps, or x where
        there was none. The attack has its own loss: the argument is not used."""
        x = x.detach()
        best, length = x.clone(), torch.full((len(x),), torch.inf, device=x.device)
        low, high = torch.zeros_like(length), torch.full_like(length, torch.inf)
        c = torch.full_like(length, self.c)
        for _ in range(self.searches):
            rows = ((length > self.eps) | (not self.early_stop)).nonzero().squeeze(1)
            if self.eps == 0 or len(rows) == 0:
                break
            found, far = self._descend(f, x[rows], y[rows], c[rows])
            nearer = far < length[rows]
            best[rows[nearer]], length[rows[nearer]] = found[nearer], far[nearer]
            fell = far < torch.inf
            high[rows] = torch.where(fell, torch.minimum(high[rows], c[rows]), high[rows])
            low[rows] = torch.where(fell, low[rows], torch.maximum(low[rows], c[rows]))
            c = torch.where(high < torch.inf, (low + high) / 2, 10 * c)
        return torch.where(wide(length <= self.eps), best, x)

    def _descend(self, f: Function, x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest adversarial images of one run and their distances [B], infinite where there was none."""
        best, length = x.clone(), torch.full((len(x),), torch.inf, device=x.device)
        start = torch.atanh((2 * x - 1) * EDGE)
        w = start.clone().requires_grad_(True)
        adam = torch.optim.Adam([w], self.lr)
        for _ in range(self.steps):
            with torch.enable_grad():
                # tanh(start) is x but for rounding: the first point is x itself
                z = x + (torch.tanh(w) - torch.tanh(start)) / (2 * EDGE)
                logits = f(z)
                lead = margin(logits, y)
                cost = ((z - x) ** 2).flatten(1).sum(1) + c * (self.confidence - lead).clamp(min=0)
                w.grad = torch.autograd.grad(cost.sum(), w)[0]
            clipped = z.detach().clamp(0, 1)
            far = distance(clipped - x, "l2")
            nearer = (logits.argmax(1) != y) & (lead >= self.confidence) & (far < length)
            best, length = torch.where(wide(nearer), clipped, best), torch.where(nearer, far, length)
            adam.step()
        return best, length
