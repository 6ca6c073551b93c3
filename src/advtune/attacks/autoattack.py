"""AutoAttack: the ensemble that a robust accuracy is reported under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advtune.attacks.apgd import APGD
from advtune.attacks.ball import check_attack, eps_option, norm_option
from advtune.attacks.fab import FAB
from advtune.attacks.gradients import Function, bpda_option
from advtune.attacks.square import Square
from advtune.options import option

EOT = 20  # forwards a gradient, version rand


@dataclass(frozen=True)
class AutoAttack:
    """AutoAttack (Croce and Hein, arXiv:2003.01690): each attack on what still stands after those before it.

    standard: APGD-CE, targeted APGD-DLR and targeted FAB with 100 steps for each of 9 targets, Square with 5000
    queries. rand, for models that answer at random: APGD-CE and APGD-DLR, 20 forwards a gradient. An image counts
    as robust when it withstands all. `evaluate` runs each attack over the whole set, so that batches stay full.
    """

    eps: float = eps_option()
    norm: str = norm_option()
    version: str = option("standard", "rand is for models that are random", choices=("standard", "rand"))
    bpda: bool = bpda_option()

    name = "autoattack"

    def __post_init__(self) -> None:
        check_attack(self)

    @property
    def eot(self) -> int:
        """Forwards a gradient."""
        return EOT if self.version == "rand" else 1

    def stages(self) -> list[Any]:
        """The attacks, cheapest first."""
        way: dict[str, Any] = {"eps": self.eps, "norm": self.norm, "bpda": self.bpda}
        if self.version == "rand":
            return [APGD(loss=loss, eot=EOT, **way) for loss in ("ce", "dlr")]
        return [APGD(**way), APGD(loss="dlr-targeted", **way), FAB(**way), Square(self.eps, norm=self.norm)]

    def notes(self, classes: int) -> list[str]:
        """What few classes change."""
        return [note for stage in self.stages() if hasattr(stage, "notes") for note in stage.notes(classes)]

    @torch.no_grad()
    def __call__(self, f: Function, x: Tensor, y: Tensor, loss: object = None) -> Tensor:
        """Images x [B, 3, S, S] and labels y [B] -> adversarial images, or the last attack's. `loss` is not used."""
        found = x.detach().clone()
        rows = (f(found).argmax(1) == y).nonzero().squeeze(1)
        for attack in self.stages():
            if len(rows) == 0:
                break
            found[rows] = attack(f, x[rows], y[rows])
            rows = rows[f(found[rows]).argmax(1) == y[rows]]
        return found
