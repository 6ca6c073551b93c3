"""TGA-ZSR: fine-tuning of the image tower, its text-guided attention held to the original's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from advtune.attacks import PGD, PGD2, Attack
from advtune.data import Task
from advtune.losses import cross_entropy
from advtune.options import check, option
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch

TINY = 1e-12  # patches that are all alike


@dataclass(frozen=True)
class TGAZSR:
    """TGA-ZSR (arXiv:2410.21802): where the patches resemble the label's text stays where it was on clean images.

    L = CE(f(x'), y) + alpha * mean ||A(x') - A0(x)|| + beta * mean ||A(x) - A0(x)||

    A: cosines of the patches with the text of y, brought to [0, 1], resized to the image. A0: of the original.
    The released code divides patches by their norm over the patches, not over the features: norm=patches.
    """

    alpha: float = option(0.08, "weight of the attention refinement", low=0)
    beta: float = option(0.05, "weight of the attention constraint on clean images", low=0)
    norm: str = option("features", "what a patch is divided by: its own length, or as released",
                       choices=("features", "patches"))  # fmt: skip

    paper: ClassVar[str] = "arXiv:2410.21802"
    trains: ClassVar[str] = "image tower"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": {"norm": "patches"}}
    recipe: ClassVar[Recipe] = Recipe(lr=1e-4, warmup=1000, epochs=10, batch_size=128)
    attack: ClassVar[PGD] = PGD2

    def __post_init__(self) -> None:
        check(self, "method tga-zsr")

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        return {"student": frozen.with_image_tower(), "frozen": frozen}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        x, y, student, frozen = batch.x, batch.y, models["student"], models["frozen"]
        f = student.classifier(batch.tokens["student"])
        x_adv = attack(f, x, y)
        terms = {"ce": cross_entropy(f(x_adv), y).mean()}
        text = frozen.text_features(batch.tokens["frozen"])[y]  # [B, D]
        original = self._attention(frozen, x, text).detach()
        for name, weight, images in (("refine", self.alpha, x_adv), ("constrain", self.beta, x)):
            if weight:
                moved = self._attention(student, images, text) - original
                terms[name] = weight * moved.flatten(1).norm(dim=1).mean()
        return terms

    def _attention(self, model: VLM, x: Tensor, text: Tensor) -> Tensor:
        """A [B, 1, S, S]; text [B, D] is of each image's label."""
        patches = model.patch_embeddings(x)  # [B, N, D]
        patches = F.normalize(patches, dim=-1 if self.norm == "features" else 1)
        a = (patches @ text[:, :, None]).squeeze(-1)
        low, high = a.amin(1, keepdim=True), a.amax(1, keepdim=True)
        side = round(a.shape[1] ** 0.5)
        a = ((a - low) / (high - low + TINY)).unflatten(1, (1, side, side))
        return F.interpolate(a, model.clip.config.image_size, mode="bilinear")
