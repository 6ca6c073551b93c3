"""Zero-shot CLIP: nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from advtune.attacks import PGD, Attack
from advtune.data import Task
from advtune.errors import UserError
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch


@dataclass(frozen=True)
class ZeroShot:
    """The pre-trained model as it is, with a hand-written template (CLIP, arXiv:2103.00020)."""

    paper: ClassVar[str] = "arXiv:2103.00020"
    trains: ClassVar[str] = "nothing"
    recipe: ClassVar[Recipe] = Recipe()
    attack: ClassVar[PGD] = PGD()

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        return {"student": frozen}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        raise UserError("zero-shot trains nothing; use: advtune evaluate zero-shot")
