"""Attacks, one file each, and the dict that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from advtune.attacks.pgd import PGD
from advtune.losses import cross_entropy


class Attack(Protocol):
    """A frozen dataclass whose fields are the budget. It sees a function, never a model, prompt or tokenizer."""

    @property
    def eps(self) -> float: ...

    def __call__(
        self,
        f: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    ) -> Tensor:
        """Images [B, 3, S, S] in [0, 1] and labels [B] -> adversarial images inside the budget."""
        ...


ATTACKS: dict[str, type[Any]] = {"pgd": PGD}
