"""Square attack: random search with squares, no gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from advtune.attacks.ball import TINY, check_attack, distance, eps_option, image_seeds, norm_option, uniform, wide
from advtune.attacks.gradients import Function
from advtune.attacks.leaving import Leaving
from advtune.losses import margin
from advtune.options import option

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of the squares' area, in queries: the paper's
TILES = 5  # a side: the l_2 attack begins with a pattern in each
NUMBERS = 8  # random numbers that a query uses


@dataclass(frozen=True)
class Square:
    """Square attack, random search without gradients (Andriushchenko et al., arXiv:1912.00049).

    A change of a random square is kept when it raises the margin. In l_inf a square is x +- eps for each channel; in
    l_2 the change of one window moves to another. What it breaks and gradient attacks do not is a sign of masking.
    """

    eps: float = eps_option()
    queries: int = option(5000, "forwards an image", low=1)
    p: float = option(0.8, "share of the pixels that the first squares cover", low=0, high=1)
    early_stop: bool = option(True, "images that are fooled leave the batch (exact for accuracy)")
    norm: str = norm_option()

    name = "square"

    def __post_init__(self) -> None:
        check_attack(self)

    @torch.no_grad()
    def __call__(self, f: Function, x: Tensor, y: Tensor, loss: object = None) -> Tensor:
        """Images x [B, 3, S, S] and labels y [B] -> images within eps [B, 3, S, S]. The attack raises the margin:
        the argument `loss` is not used. Random numbers depend on the image and torch's seed, not on the batch."""
        x = x.detach()
        if self.eps == 0 or len(x) == 0:
            return x.clone()
        seeds = image_seeds(x)
        u = uniform(seeds, (self.queries, NUMBERS), x)
        z = begin(x, self.eps, self.norm, seeds)
        found, live, leaving = z.clone(), torch.arange(len(x), device=x.device), Leaving(x.device)
        best = margin(f(z), y)
        propose = square_linf if self.norm == "linf" else square_l2
        for query in range(self.queries):
            stay = leaving(best > 0) if self.early_stop else None
            if stay is not None:
                found[live] = z
                x, y, z, best, live = (t[stay] for t in (x, y, z, best, live))
                if len(live) == 0:
                    break
            new = propose(z, x, self.eps, self._area(query), u[live, query])
            height = margin(f(new), y)
            better = (height > best) & (best <= 0) if self.early_stop else height > best
            z, best = torch.where(wide(better), new, z), torch.where(better, height, best)
        found[live] = z
        return found

    def _area(self, query: int) -> float:
        """The share of the pixels that the square of a query covers."""
        return self.p / 2 ** sum(query > limit for limit in HALVINGS)


def begin(x: Tensor, eps: float, norm: str, seeds: list[int]) -> Tensor:
    """Vertical stripes of +- eps (l_inf); a pattern in every tile, eps long in all (l_2)."""
    b, c, h, w = x.shape
    if norm == "linf":
        return (x + eps * sign(uniform(seeds, (c, 1, w), x, salt=1))).clamp(0, 1)
    d, side = torch.zeros_like(x), max(1, min(h, w) // TILES)
    u = uniform(seeds, (c + 1, h // side, w // side), x, salt=1)
    for i in range(h // side):
        for j in range(w // side):
            top, left = (torch.full((b,), float(k * side), device=x.device) for k in (i, j))
            d += pattern(top, left, side, u[:, -1, i, j], h, w) * wide3(sign(u[:, :c, i, j]))
    return (x + eps * d / wide(distance(d, norm) + TINY)).clamp(0, 1)


def square_linf(z: Tensor, x: Tensor, eps: float, area: float, u: Tensor) -> Tensor:
    """z with a square of x +- eps, one sign a channel."""
    _, c, h, w = x.shape
    side = min(max(round(math.sqrt(area * h * w)), 1), h, w)
    inside = window(corner(u[:, 0], h, side), corner(u[:, 1], w, side), side, h, w)
    return torch.where(inside, (x + eps * wide3(sign(u[:, 2 : 2 + c]))).clamp(0, 1), z)


def square_l2(z: Tensor, x: Tensor, eps: float, area: float, u: Tensor) -> Tensor:
    """z with the change of one window gone and its length, with what is left of eps, in another."""
    _, c, h, w = x.shape
    side = min(max(round(math.sqrt(area * h * w)), 3) | 1, h, w)  # odd, so that the pattern has a middle
    top, left = corner(u[:, 0], h, side), corner(u[:, 1], w, side)
    first = window(top, left, side, h, w)
    second = window(corner(u[:, 2], h, side), corner(u[:, 3], w, side), side, h, w)
    d = z - x
    old = d * first / (length(d * first) + TINY)
    new = pattern(top, left, side, u[:, 4], h, w) * wide3(sign(u[:, 5 : 5 + c])) + old
    spare = wide((eps**2 - distance(d, "l2") ** 2).clamp(min=0))
    size = (spare / c + length(d * (first | second)) ** 2).sqrt()
    d = torch.where(first, new / (length(new) + TINY) * size, torch.where(second, 0, d))
    return (x + eps * d / wide(distance(d, "l2") + TINY)).clamp(0, 1)


def sign(u: Tensor) -> Tensor:
    """Uniform numbers -> -1 or 1."""
    return 1 - 2 * (u < 0.5).float()


def corner(u: Tensor, size: int, side: int) -> Tensor:
    """Uniform numbers [B] -> where a window of `side` begins, 0 .. size - side."""
    return (u * (size - side + 1)).floor()


def wide3(v: Tensor) -> Tensor:
    """[B, C] -> [B, C, 1, 1]."""
    return v[:, :, None, None]


def length(d: Tensor) -> Tensor:
    """l_2 length of each channel: [B, C, H, W] -> [B, C, 1, 1]."""
    return (d**2).sum((2, 3), keepdim=True).sqrt()


def window(top: Tensor, left: Tensor, side: int, h: int, w: int) -> Tensor:
    """Which pixels lie in each image's window: corners [B] -> bool [B, 1, H, W]."""
    i = torch.arange(h, device=top.device) - top[:, None]
    j = torch.arange(w, device=top.device) - left[:, None]
    inside = ((i >= 0) & (i < side))[:, :, None] & ((j >= 0) & (j < side))[:, None, :]
    return inside[:, None]


def pattern(top: Tensor, left: Tensor, side: int, turn: Tensor, h: int, w: int) -> Tensor:
    """The l_2 attack's pattern of length 1 in each image's window, turned where turn > 0.5: [B, 1, H, W]."""
    table = eta(side).to(top.device)
    i = (torch.arange(h, device=top.device) - top[:, None]).clamp(0, side - 1).long()[:, :, None]
    j = (torch.arange(w, device=top.device) - left[:, None]).clamp(0, side - 1).long()[:, None, :]
    values = torch.where((turn > 0.5)[:, None, None], table[j, i], table[i, j])
    return values[:, None] * window(top, left, side, h, w)


@lru_cache(maxsize=64)
def eta(side: int) -> Tensor:
    """A bump above a hole, [side, side], of length 1 (the paper's eta)."""
    half = side // 2
    table = torch.cat([bump(half, side), -bump(side - half, side)])
    return table / (table.norm() + TINY)


def bump(h: int, w: int) -> Tensor:
    """[h, w], highest in the middle: sum of 1 / (k + 1)^2 from k = the distance to the middle, of length 1."""
    middle_h, middle_w = h // 2, w // 2
    far = torch.maximum((torch.arange(h) - middle_h).abs()[:, None], (torch.arange(w) - middle_w).abs()[None, :])
    rings = max(middle_h, middle_w) + 1
    falls = 1 / torch.arange(1, rings + 1).float() ** 2
    tails = torch.cat([falls.flip(0).cumsum(0).flip(0), torch.zeros(1)])
    table = tails[far.clamp(max=rings)]
    return table / (table.norm() + TINY)
