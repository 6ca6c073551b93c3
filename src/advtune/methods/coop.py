"""CoOp: a learned text context."""

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
class CoOp:
    """CoOp (arXiv:2109.01134): learned words take the template's place, "[v1] ... [vM] name."; clean training.

    L = CE(f(x), y)
    """

    tokens: int = option(16, "words of the context (M)", low=1)
    context: str = option("unified", "one for all classes, or each its own", choices=("unified", "class-specific"))

    paper: ClassVar[str] = "arXiv:2109.01134"
    trains: ClassVar[str] = "text context"
    recipe: ClassVar[Recipe] = Recipe(lr=0.002, warmup_epochs=1, epochs=200, batch_size=32, augment=True)
    attack: ClassVar[PGD] = PGD(eps=0)  # clean training

    def __post_init__(self) -> None:
        check(self, "method coop")

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        own = task.classes if self.context == "class-specific" else ()
        return {"student": frozen.with_context(self.tokens, own, seed)}

    def prepare(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        """`e`: the image features [B, D]; nothing of the image tower learns."""
        return {"e": models["student"].image_features(batch.x).detach()}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        _, compare = models["student"].towers(batch.tokens["student"])
        e = (batch.kept or self.prepare(models, batch, attack))["e"]
        return {"ce": cross_entropy(compare(e), batch.y).mean()}
