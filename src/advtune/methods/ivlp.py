"""IVLP: independent deep prompts in both towers."""

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
class IVLP:
    """IVLP, independent vision-language prompting (baseline of MaPLe, arXiv:2210.03117); clean training.

    L = CE(f(x), y)

    The depth and the recipe are those of MaPLe's released baseline.
    """

    text_tokens: int = option(2, "text prompt tokens", low=0)
    image_tokens: int = option(2, "image prompt tokens", low=0)
    depth: int = option(12, "layers with prompts; cut to each tower's depth", low=1)

    paper: ClassVar[str] = "arXiv:2210.03117"
    trains: ClassVar[str] = "prompts in both towers"
    recipe: ClassVar[Recipe] = Recipe(lr=0.0035, warmup_epochs=1, epochs=5, batch_size=4, augment=True)
    attack: ClassVar[PGD] = PGD(eps=0)  # clean training

    def __post_init__(self) -> None:
        check(self, "method ivlp")

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        words, patches = self.text_tokens, self.image_tokens
        return {"student": frozen.with_prompts(task.template, words, patches, self.depth, seed=seed)}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        f = models["student"].classifier(batch.tokens["student"])
        return {"ce": cross_entropy(f(batch.x), batch.y).mean()}
