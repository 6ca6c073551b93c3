"""The ball around an image: distances, projections, random points. d is the number of pixels of one image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from advtune.errors import UserError
from advtune.options import check, option, parse_eps

NORMS = ("linf", "l2")
TINY, LEAST = 1e-12, torch.finfo(torch.float32).tiny
FAR = 32.0  # an l2 radius of this many whole pixels is a mistake in the unit


def eps_option(default: float = 1 / 255) -> Any:
    return option(default, "radius of the ball, in pixels of [0, 1]: 1/255; in l2 the length, 0.5", low=0)


def norm_option() -> Any:
    return option("linf", "linf: no pixel moves further than eps; l2: the length of the change", choices=NORMS)


def check_attack(attack: Any) -> None:
    """Raises UserError for a field of an attack that breaks its rules, an eps above all."""
    what = f"attack {attack.name}"
    check(attack, what)
    if attack.norm == "linf":
        parse_eps(attack.eps, f"{what}: eps")
    elif attack.eps == 1 / 255:  # the default, for l_inf
        raise UserError(f"{what}: in l2 eps is the length of the whole change; give one, such as eps=0.5")
    elif attack.eps >= FAR:
        raise UserError(f"{what}: eps={attack.eps:g} in l2; pixels are floats in [0, 1]: write {attack.eps:g}/255")


def wide(v: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1], to go with images."""
    return v[:, None, None, None]


def distance(d: Tensor, norm: str) -> Tensor:
    """Lengths [B] of differences [B, 3, S, S]."""
    flat = d.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def ascent(slope: Tensor, norm: str) -> Tensor:
    """The direction of length 1 that raises a loss fastest, however flat the loss."""
    if norm == "linf":
        return slope.sign()
    slope = slope / wide(distance(slope, "linf").clamp(min=LEAST))  # a confident model's squares would underflow
    return slope / wide(distance(slope, norm) + TINY)


def project(z: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    """The nearest images to z in the ball around x, then clipped to [0, 1], which only brings them nearer to x."""
    if norm == "linf":
        return torch.clamp(z, x - eps, x + eps).clamp_(0, 1)  # one pass less over the pixels, the same bits
    d = z - x
    return (x + d * wide((eps / (distance(d, norm) + TINY)).clamp(max=1))).clamp(0, 1)


def projection(x: Tensor, eps: float, norm: str) -> Callable[[Tensor], Tensor]:
    """`project` into one ball, for many steps: z -> the nearest image; the walls are computed once."""
    if norm != "linf":
        return lambda z: project(z, x, eps, norm)
    low, high = (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1)
    return lambda z: torch.clamp(z, low, high)


def image_seeds(x: Tensor) -> list[int]:
    """A seed for each image, from its pixels and torch's seed: what an image meets does not depend on the batch
    that it is attacked in."""
    key = torch.initial_seed().to_bytes(8, "little")
    texts = [pixels.tobytes() for pixels in x.detach().cpu().contiguous().numpy()]
    return [int.from_bytes(hashlib.blake2b(text, digest_size=7, key=key).digest(), "little") for text in texts]


def uniform(seeds: Sequence[int], shape: Sequence[int], like: Tensor, salt: int = 0) -> Tensor:
    """Numbers in [0, 1), [B, *shape], one stream an image; `salt` tells restarts apart."""
    out = torch.empty(len(seeds), *shape)
    for each, seed in zip(out, seeds, strict=True):
        each.uniform_(generator=torch.Generator().manual_seed(seed + salt * 1_000_003))
    return out.to(like.device)


def draw(seeds: Sequence[int], rows: Tensor, x: Tensor, salt: int) -> Tensor:
    """A number in [0, 1) for every pixel of the images `rows` of x [B, 3, S, S], whose seeds are given."""
    return uniform([seeds[i] for i in rows.tolist()], x.shape[1:], x, salt)


def random_point(x: Tensor, eps: float, norm: str, u: Tensor) -> Tensor:
    """Points of the ball around x, clipped to [0, 1], from uniform numbers u [B, 3, S, S]: in l_inf uniform in the
    ball; in l_2 uniform in direction and radius (uniform in the volume would be the surface: d is large)."""
    if norm == "linf":
        return (x + eps * (2 * u - 1)).clamp(0, 1)
    radius, u = u.flatten(1)[:, 0], u.clamp(1e-6, 1 - 1e-6)
    return (x + ascent(torch.erfinv(2 * u - 1), norm) * wide(eps * radius)).clamp(0, 1)
