"""FARE: unsupervised adversarial fine-tuning of the image tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from advtune.attacks import PGD
from advtune.data import Task
from advtune.losses import squared_l2
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch


@dataclass(frozen=True)
class FARE:
    """FARE (arXiv:2402.12336): the tuned tower's embedding of x' stays at the original's of x. No label is used.

    L = mean ||phi(x') - phi0(x)||^2,  x' maximises the same; embeddings are not normalised
    """

    paper: ClassVar[str] = "arXiv:2402.12336"
    trains: ClassVar[str] = "image tower"
    recipe: ClassVar[Recipe] = Recipe(
        optimizer="adamw", lr=1e-5, weight_decay=1e-4, warmup_share=0.07, epochs=2, batch_size=128
    )
    attack: ClassVar[PGD] = PGD(eps=2 / 255, steps=10, step_size=1 / 255, keep="last", early_stop=False)

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        return {"student": frozen.with_image_tower(), "frozen": frozen}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: PGD) -> dict[str, Tensor]:
        phi = models["student"].image_embeddings
        target = (batch.kept or self.prepare(models, batch, attack))["e0"]
        x_adv = attack(phi, batch.x, target, loss=squared_l2)
        return {"embedding": squared_l2(phi(x_adv), target).mean()}

    def prepare(self, models: Mapping[str, VLM], batch: Batch, attack: PGD) -> dict[str, Tensor]:
        """`e0`: the original's embeddings [B, D] of the clean images."""
        return {"e0": models["frozen"].image_embeddings(batch.x).detach()}
