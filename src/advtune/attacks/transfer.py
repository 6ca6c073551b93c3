"""Transfer: adversarial images made on one model, scored on another."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from advtune.attacks.gradients import Function
from advtune.errors import UserError


@dataclass(frozen=True)
class Transfer:
    """`attack`, made on `source` and not on the model that is scored (Papernot et al., arXiv:1605.07277). Images do
    not leave when the source is fooled: they are pushed on, to carry over."""

    attack: Any
    source: Function

    name = "transfer"

    def __post_init__(self) -> None:
        if hasattr(self.attack, "stages") or self.attack.name in ("fab-t", "cw-l2"):
            raise UserError(f"transfer: {self.attack.name} stops at what just fools the source; use pgd or apgd-ce")

    @property
    def eps(self) -> float:
        return float(self.attack.eps)

    @property
    def norm(self) -> str:
        return str(self.attack.norm)

    def __call__(self, f: Function, x: Tensor, y: Tensor, loss: object = None) -> Tensor:
        """Images x [B, 3, S, S] and labels y [B] -> images [B, 3, S, S]; f is not asked."""
        return self.pushed()(self.source, x, y)

    def pushed(self) -> Any:
        """The attack as it is made: nothing leaves early."""
        if any(field.name == "early_stop" for field in dataclasses.fields(self.attack)):
            return dataclasses.replace(self.attack, early_stop=False)
        return self.attack
