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
    The released code divides each feature by its norm over all tokens, not each token by its own: norm=tokens.
    """

    alpha: float = option(0.08, "weight of the attention refinement", low=0)
    beta: float = option(0.05, "weight of the attention constraint on clean images", low=0)
    norm: str = option("features", "over what embeddings have norm 1; released: tokens", choices=("features", "tokens"))

    paper: ClassVar[str] = "arXiv:2410.21802"
    trains: ClassVar[str] = "image tower"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": {"norm": "tokens"}}
    recipe: ClassVar[Recipe] = Recipe(lr=1e-4, warmup=1000, epochs=10, batch_size=128)
    attack: ClassVar[PGD] = PGD2

    def __post_init__(self) -> None:
        check(self, "method tga-zsr")

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        return {"student": frozen.with_image_tower(), "frozen": frozen}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        x, y, student = batch.x, batch.y, models["student"]
        encode, compare = student.towers(batch.tokens["student"])
        x_adv = attack(lambda z: compare(encode(z)), x, y)
        embeddings = student.dense_embeddings(x_adv)  # [B, 1 + N, D]
        terms = {"ce": cross_entropy(compare(F.normalize(embeddings[:, 0], dim=-1)), y).mean()}
        text = models["frozen"].text_features(batch.tokens["frozen"])[y]  # [B, D], of each image's label
        original = (batch.kept or self.prepare(models, batch, attack))["a0"]
        if self.alpha:
            terms["refine"] = self.alpha * self._distance(self._attention(embeddings, text), original, student)
        if self.beta:
            clean = self._attention(student.dense_embeddings(x), text)
            terms["constrain"] = self.beta * self._distance(clean, original, student)
        return terms

    def prepare(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        """`a0`: the original's attention [B, N] on clean images."""
        frozen = models["frozen"]
        text = frozen.text_features(batch.tokens["frozen"])[batch.y]
        return {"a0": self._attention(frozen.dense_embeddings(batch.x), text).detach()}

    def _attention(self, embeddings: Tensor, text: Tensor) -> Tensor:
        """A before it is resized, [B, N], from embeddings [B, 1 + N, D]."""
        tokens = F.normalize(embeddings, dim=-1 if self.norm == "features" else 1)
        a = (tokens[:, 1:] @ text[:, :, None]).squeeze(-1)
        low, high = a.amin(1, keepdim=True), a.amax(1, keepdim=True)
        return (a - low) / (high - low + TINY)

    def _distance(self, a: Tensor, a0: Tensor, model: VLM) -> Tensor:
        """mean ||A - A0|| of two maps [B, N], resized to the image."""
        side = round(a.shape[1] ** 0.5)
        moved = (a - a0).unflatten(1, (1, side, side))  # resizing is linear
        return F.interpolate(moved, model.clip.config.image_size, mode="bilinear").flatten(1).norm(dim=1).mean()
