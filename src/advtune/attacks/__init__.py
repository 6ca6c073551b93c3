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
from advtune.attacks.free import Free, Replay
from advtune.attacks.gradients import Defended
from advtune.attacks.n_fgsm import NFGSM
from advtune.attacks.noise import Noise
from advtune.attacks.pgd import PGD, PGD2
from advtune.attacks.square import Square
from advtune.attacks.transfer import Transfer
from advtune.errors import UserError

__all__ = [
    "APGD",
    "ATTACKS",
    "CWL2",
    "FAB",
    "FGSM",
    "NFGSM",
    "PGD",
    "PGD2",
    "TRAINING",
    "Attack",
    "AutoAttack",
    "Defended",
    "Free",
    "Noise",
    "Replay",
    "Square",
    "Transfer",
    "check_measures",
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
# What `-a name=NAME` of `advtune train` takes; the others than pgd are only to tune on.
TRAINING: dict[str, Any] = {"pgd": PGD, "n-fgsm": NFGSM, "free": Free}


def check_measures(name: str) -> None:
    """Raises UserError for the name of an attack that is only to tune on: what it leaves standing means nothing."""
    if name in TRAINING and name not in ATTACKS:
        raise UserError(f"{name} is only to tune on, with -a name={name}; measure with --attack pgd or autoattack")
