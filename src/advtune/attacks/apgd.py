"""Auto-PGD: projected gradient descent that chooses its own step length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from advtune.attacks.ball import (
    TINY,
    ascent,
    check_attack,
    distance,
    draw,
    eps_option,
    image_seeds,
    norm_option,
    project,
    wide,
)
from advtune.attacks.gradients import Function, Loss, bpda_option, eot_option, gradient, standing
from advtune.attacks.leaving import Leaving
from advtune.losses import cross_entropy, dlr, targeted_dlr
from advtune.options import option

LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "dlr": dlr,
    "dlr-targeted": lambda logits, pair: targeted_dlr(logits, *pair.T),
}
NAMES = {"ce": "apgd-ce", "dlr": "apgd-dlr", "dlr-targeted": "apgd-t"}


@dataclass(frozen=True)
class APGD:
    """APGD with cross-entropy, DLR or targeted DLR (Croce and Hein, arXiv:2003.01690).

    Steps with momentum 0.75 from length 2 eps. At checkpoints, 0.22 N steps apart and then closer, an image's step
    is halved and its best point taken up again when fewer than rho of its steps raised the loss, or when neither
    step nor best loss changed since the last one. Targeted: a run for each of the likeliest wrong classes.
    """

    eps: float = eps_option()
    steps: int = option(100, "gradient steps of a run", low=1)
    restarts: int = option(1, "runs from new random starts, on what still stands", low=1)
    loss: str = option("ce", "what is raised", choices=tuple(NAMES))
    targets: int = option(9, "wrong classes that dlr-targeted tries, likeliest first", low=1)
    rho: float = option(0.75, "share of steps that must raise the loss", low=0, high=1)
    early_stop: bool = option(True, "images that are fooled leave the batch (exact for accuracy); not with eot > 1")
    norm: str = norm_option()
    eot: int = eot_option()
    bpda: bool = bpda_option()

    def __post_init__(self) -> None:
        check_attack(self)

    @property
    def name(self) -> str:
        return NAMES[self.loss]

    def notes(self, classes: int) -> list[str]:
        """What few classes change."""
        least = {"ce": 2, "dlr": 3, "dlr-targeted": 4}[self.loss]
        notes = [f"{self.name}: with {classes} classes the margin stands in for DLR"] if classes < least else []
        if self.loss == "dlr-targeted" and self.targets > classes - 1:
            notes.append(f"{self.name}: {classes - 1} targets, all the wrong classes there are, not {self.targets}")
        return notes

    def __call__(self, f: Function, x: Tensor, y: Tensor, loss: Loss | None = None) -> Tensor:
        """Images x [B, 3, S, S] and labels y [B] -> adversarial images [B, 3, S, S], detached.

        loss(f(x), y), if given, stands in for the field: one number an image, to be raised.
        """
        x = x.detach()
        if self.eps == 0 or len(x) == 0:
            return x.clone()
        seeds = image_seeds(x)
        raised, aims = loss or LOSSES[self.loss], [y]
        if loss is None and self.loss == "dlr-targeted":
            aims = [torch.stack([y, to], 1) for to in wrong(f, x, y, self.targets)]  # each [B, 2]

        def attempt(number: int, aim: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            u = draw(seeds, rows, x, number)
            return self._climb(f, start(x[rows], self.eps, self.norm, u), x[rows], y[rows], aim[rows], raised)

        return standing(x, (partial(attempt, number, aim) for number, aim in enumerate(aims * self.restarts)))

    def _climb(self, f: Function, z: Tensor, x: Tensor, y: Tensor, target: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """One run from z: the best iterates [B, 3, S, S] and their losses [B], infinite where the label changed."""
        found, height = z.clone(), torch.full((len(x),), -torch.inf, device=x.device)
        live, leaving = torch.arange(len(x), device=x.device), Leaving(x.device)
        window, shrink, least = (max(1, int(share * self.steps)) for share in (0.22, 0.03, 0.06))
        until, leave = window, self.early_stop and self.eot == 1
        s = {"x": x, "y": y, "target": target, "z": z, "old": z}
        for i in range(self.steps + 1):
            if i > 0:
                s["z"], s["old"] = self._move(s, 0.75 if i > 1 else 1.0), s["z"]
            last = i == self.steps
            slope, each, logits = gradient(f, s["z"], s["target"], loss, not last, self.eot, self.bpda)
            fooled = logits.argmax(1) != s["y"] if leave else torch.zeros_like(each) > 0
            better = (height[live] != torch.inf) & (fooled | (each > height[live]))
            found[live] = torch.where(wide(better), s["z"], found[live])
            height[live] = torch.where(better, torch.where(fooled, torch.inf, each), height[live])
            if last:
                break
            if i == 0:
                s |= {"best": s["z"], "best_slope": slope, "best_loss": each, "checked": each, "loss": each}
                s |= {"step": torch.full_like(each, 2 * self.eps), "rises": torch.zeros_like(each)}
                s |= {"halved": torch.ones_like(each) > 0}
            higher = each > s["best_loss"]
            s["best"] = torch.where(wide(higher), s["z"], s["best"])
            s["best_slope"] = torch.where(wide(higher), slope, s["best_slope"])
            s["best_loss"] = torch.where(higher, each, s["best_loss"])
            s["rises"], s["loss"], s["slope"] = s["rises"] + (each > s["loss"]), each, slope
            if i == until:
                s |= self._checkpoint(s, window)
                window = max(window - shrink, least)
                until += window
            stay = leaving(fooled) if leave else None
            if stay is not None:
                s, live = {name: v[stay] for name, v in s.items()}, live[stay]
                if len(live) == 0:
                    break
        return found, height

    def _move(self, s: dict[str, Tensor], share: float) -> Tensor:
        """A step along the gradient, mixed with the step before it."""
        to = s["z"] + wide(s["step"]) * ascent(s["slope"], self.norm)
        to = project(to, s["x"], self.eps, self.norm)
        to = s["z"] + share * (to - s["z"]) + (1 - share) * (s["z"] - s["old"])
        return project(to, s["x"], self.eps, self.norm)

    def _checkpoint(self, s: dict[str, Tensor], window: int) -> dict[str, Tensor]:
        """Images that oscillate or got nowhere halve their step and go on from their best point."""
        stuck = ~s["halved"] & (s["checked"] >= s["best_loss"])
        halve = (s["rises"] <= self.rho * window) | stuck
        return {
            "halved": halve,
            "checked": s["best_loss"],
            "rises": torch.zeros_like(s["rises"]),
            "step": torch.where(halve, s["step"] / 2, s["step"]),
            "z": torch.where(wide(halve), s["best"], s["z"]),
            "slope": torch.where(wide(halve), s["best_slope"], s["slope"]),
        }


def start(x: Tensor, eps: float, norm: str, u: Tensor) -> Tensor:
    """A random point at the full distance eps, before it is clipped to [0, 1]."""
    d = 2 * u - 1 if norm == "linf" else torch.erfinv(2 * u.clamp(1e-6, 1 - 1e-6) - 1)
    return (x + eps * d / wide(distance(d, norm) + TINY)).clamp(0, 1)


def wrong(f: Function, x: Tensor, y: Tensor, most: int) -> list[Tensor]:
    """The likeliest wrong classes of each image, the likeliest first: at most `most` tensors [B]."""
    with torch.no_grad():
        logits = f(x).scatter(1, y[:, None], -torch.inf)
    return list(logits.topk(min(most, logits.shape[1] - 1), dim=1).indices.T)
