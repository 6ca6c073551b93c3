"""VPT: learned tokens in the image tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from advtune.attacks import PGD, Attack
from advtune.data import Task
from advtune.losses import cross_entropy
from advtune.options import check, option
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch


@dataclass(frozen=True)
class VPT:
    """VPT, deep (arXiv:2203.12119), on CLIP: learned tokens in every layer of the image tower; clean training.

    L = CE(f(x), y)

    The sizes and the recipe are those of MaPLe's released baseline (arXiv:2210.03117).
    """

    tokens: int = option(8, "image prompt tokens a layer", low=1)
    depth: int = option(12, "layers with prompts; cut to the tower's depth", low=1)

    paper: ClassVar[str] = "arXiv:2203.12119"
    trains: ClassVar[str] = "image prompts"
    recipe: ClassVar[Recipe] = Recipe(lr=0.0025, warmup_epochs=1, epochs=5, batch_size=4, augment=True)
    attack: ClassVar[PGD] = PGD(eps=0)  # clean training

    def __post_init__(self) -> None:
        check(self, "method vpt")

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        return {"student": frozen.with_prompts(task.template, 0, self.tokens, self.depth, seed=seed)}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        f = models["student"].classifier(batch.tokens["student"])
        return {"ce": cross_entropy(f(batch.x), batch.y).mean()}
