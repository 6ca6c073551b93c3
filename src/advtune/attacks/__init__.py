"""Attacks, one file each, and the dict that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from advtune.attacks.apgd import APGD
from advtune.attacks.autoattack import AutoAttack
from advtune.attacks.cw_l2 import CWL2
from advtune.attacks.fab import FAB
from advtune.attacks.fgsm import FGSM
from advtune.attacks.gradients import Defended
from advtune.attacks.noise import Noise
from advtune.attacks.pgd import PGD, PGD2
from advtune.attacks.square import Square
from advtune.attacks.transfer import Transfer

__all__ = [
    "APGD",
    "ATTACKS",
    "CWL2",
    "FAB",
    "FGSM",
    "PGD",
    "PGD2",
    "Attack",
    "AutoAttack",
    "Defended",
    "Noise",
    "Square",
    "Transfer",
]


class Attack(Protocol):
    """A frozen dataclass whose fields are the budget. It sees a function, never a model, prompt or tokenizer.

    Optional: `stages()`, the attacks that an ensemble runs in turn; `notes(classes)`, what few classes change.
    """

    @property
    def name(self) -> str: ...

    @property
    def eps(self) -> float: ...

    @property
    def norm(self) -> str: ...

    def __call__(self, f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [0, 1] and labels [B] -> adversarial images inside the budget.

        Attacks that follow a gradient also take loss=, one number an image, to be raised.
        """
        ...


# The attack of each name with its defaults: `fill` lays the user's options over them.
ATTACKS: dict[str, Any] = {
    "pgd": PGD(),
    "cw-pgd": PGD(loss="margin"),
    "apgd-ce": APGD(),
    "apgd-dlr": APGD(loss="dlr"),
    "apgd-t": APGD(loss="dlr-targeted"),
    "fab-t": FAB(),
    "square": Square(),
    "cw-l2": CWL2(),
    "fgsm": FGSM(),
    "noise": Noise(),
    "autoattack": AutoAttack(),
}
