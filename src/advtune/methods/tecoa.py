"""TeCoA: text-guided contrastive adversarial training of the image tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from advtune.attacks import PGD, Attack
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
    cycles: ClassVar[int] = 1
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    recipe: ClassVar[Recipe] = Recipe(lr=1e-5, warmup=1000, epochs=10, batch_size=256)
    attack: ClassVar[PGD] = PGD(eps=1 / 255, steps=2, keep="last", early_stop=False)  # step = eps

    def setup(self, frozen: VLM, template: str, seed: int) -> dict[str, VLM]:
        return {"student": frozen.with_image_tower()}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        x, y = batch.x, batch.y
        f = models["student"].classifier(batch.tokens["student"])
        x_adv = attack(f, x, y)
        return {"ce": cross_entropy(f(x_adv), y).mean()}
