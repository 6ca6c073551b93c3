"""MaPLe: deep prompts in both towers, the image's a map of the text's."""

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
class MaPLe:
    """MaPLe (arXiv:2210.03117): deep text prompts and a linear map of them in the image tower; clean training.

    L = CE(f(x), y)
    """

    prompt_length: int = option(2, "prompt tokens in each tower", low=1)
    depth: int = option(9, "layers with prompts; cut to the shallower tower", low=1)

    paper: ClassVar[str] = "arXiv:2210.03117"
    trains: ClassVar[str] = "prompts in both towers"
    recipe: ClassVar[Recipe] = Recipe(lr=0.0035, warmup_epochs=1, epochs=5, batch_size=4, augment=True)
    attack: ClassVar[PGD] = PGD(eps=0)  # clean training

    def __post_init__(self) -> None:
        check(self, "method maple")

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        n = self.prompt_length
        return {"student": frozen.with_prompts(task.template, n, n, self.depth, "text-to-image", seed)}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        f = models["student"].classifier(batch.tokens["student"])
        return {"ce": cross_entropy(f(batch.x), batch.y).mean()}
