"""AGFT: adversarial fine-tuning on the original model's soft answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from advtune.attacks import PGD, PGD2
from advtune.data import Task
from advtune.losses import soft_cross_entropy
from advtune.options import check, option
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch


@dataclass(frozen=True)
class AGFT:
    """AGFT (arXiv:2603.29410): the image tower answers on x' what the original model answers on x, softened.

    L = mean[-sum_c p_c log softmax(cos(x') / tau)_c],  p = softmax(gamma * f0(x)),  x' maximises the same

    No hard label is used. The paper's 1 / tau is 180 beside CLIP's logit scale of 100.
    """

    gamma: float = option(0.4, "softens the original model's logits", low=1e-6)
    sharpness: float = option(1.8, "1 / tau in units of the backbone's logit scale", low=1e-6)

    paper: ClassVar[str] = "arXiv:2603.29410"
    trains: ClassVar[str] = "image tower"
    recipe: ClassVar[Recipe] = Recipe(lr=4e-4, epochs=10, batch_size=128)
    attack: ClassVar[PGD] = PGD2

    def __post_init__(self) -> None:
        check(self, "method agft")

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        return {"student": frozen.with_image_tower(), "frozen": frozen}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: PGD) -> dict[str, Tensor]:
        student = models["student"].classifier(batch.tokens["student"])
        p = (batch.kept or self.prepare(models, batch, attack))["p"]

        def f(x: Tensor) -> Tensor:
            return self.sharpness * student(x)

        x_adv = attack(f, batch.x, p, loss=soft_cross_entropy)
        return {"soft_ce": soft_cross_entropy(f(x_adv), p).mean()}

    def prepare(self, models: Mapping[str, VLM], batch: Batch, attack: PGD) -> dict[str, Tensor]:
        """`p`: the original's softened answers [B, C] on the clean images."""
        f0 = models["frozen"].classifier(batch.tokens["frozen"])
        return {"p": (self.gamma * f0(batch.x).detach()).softmax(-1)}
