"""AdvVLP: independent deep prompts in both towers, on adversarial images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from advtune.attacks import PGD, PGD2, Attack
from advtune.data import Task
from advtune.losses import cross_entropy
from advtune.options import check, option
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch


@dataclass(frozen=True)
class AdvVLP:
    """AdvVLP (baseline of FAP, arXiv:2403.14774): independent deep prompts, tuned on adversarial images.

    L = CE(f(x'), y)
    """

    text_tokens: int = option(2, "text prompt tokens", low=0)
    image_tokens: int = option(2, "image prompt tokens", low=0)
    depth: int = option(9, "layers with prompts; cut to each tower's depth", low=1)

    paper: ClassVar[str] = "arXiv:2403.14774"
    trains: ClassVar[str] = "prompts in both towers"
    recipe: ClassVar[Recipe] = Recipe(lr=0.0035, warmup_epochs=1, epochs=10, batch_size=4)
    attack: ClassVar[PGD] = PGD2

    def __post_init__(self) -> None:
        check(self, "method advvlp")

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        words, patches = self.text_tokens, self.image_tokens
        return {"student": frozen.with_prompts(task.template, words, patches, self.depth, seed=seed)}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        f = models["student"].classifier(batch.tokens["student"])
        x_adv = attack(f, batch.x, batch.y)
        return {"ce": cross_entropy(f(x_adv), batch.y).mean()}
