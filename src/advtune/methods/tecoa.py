"""TeCoA: text-guided contrastive adversarial training of the image tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from advtune.attacks import PGD, PGD2, Attack
from advtune.data import Task
from advtune.losses import cross_entropy
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch


@dataclass(frozen=True)
class TeCoA:
    """TeCoA (arXiv:2212.07016): the image tower is tuned on adversarial images, the text tower is frozen.

    L = CE(f(x'), y)
    """

    paper: ClassVar[str] = "arXiv:2212.07016"
    trains: ClassVar[str] = "image tower"
    recipe: ClassVar[Recipe] = Recipe(lr=1e-5, warmup=1000, epochs=10, batch_size=256)
    attack: ClassVar[PGD] = PGD2

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        return {"student": frozen.with_image_tower()}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        x, y = batch.x, batch.y
        f = models["student"].classifier(batch.tokens["student"])
        x_adv = attack(f, x, y)
        return {"ce": cross_entropy(f(x_adv), y).mean()}
