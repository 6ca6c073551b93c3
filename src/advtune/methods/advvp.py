"""AdvVP: visual prompts, tokens and a frame of pixels, on adversarial images."""

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
class AdvVP:
    """AdvVP (visual prompting of TeCoA, arXiv:2212.07016, as FAP compares with it): image tokens before the first
    layer and a learned frame around the normalised image, tuned on adversarial images.

    L = CE(f(x'), y)

    Without one of the two: tokens=0 or pad=0. The attack goes through both.
    """

    tokens: int = option(5, "image prompt tokens, before the first layer; 0: none", low=0)
    pad: int = option(30, "width of the frame in pixels of a 224-pixel image; 0: none", low=0)

    paper: ClassVar[str] = "arXiv:2212.07016"
    trains: ClassVar[str] = "image prompts, a frame of pixels"
    recipe: ClassVar[Recipe] = Recipe(lr=40.0, epochs=10, batch_size=4)
    attack: ClassVar[PGD] = PGD2

    def __post_init__(self) -> None:
        check(self, "method advvp")

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        return {"student": frozen.with_prompts(task.template, 0, self.tokens, 1, seed=seed, pad=self.pad)}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        f = models["student"].classifier(batch.tokens["student"])
        x_adv = attack(f, batch.x, batch.y)
        return {"ce": cross_entropy(f(x_adv), batch.y).mean()}
