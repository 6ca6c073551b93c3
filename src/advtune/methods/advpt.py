"""AdvPT: a text context learned on adversarial embeddings that were made once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from advtune.attacks import PGD
from advtune.data import Task
from advtune.losses import cross_entropy, kl
from advtune.options import check, option
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch


@dataclass(frozen=True)
class AdvPT:
    """AdvPT (arXiv:2311.11261): a learned text context on adversarial image embeddings, made once (augmented images:
    each time), before tuning.

    L = CE(f(e), y), e the frozen model's embedding of x'

    As released, x' maximises KL(e0(x) || e0(x')) of the softmax of embeddings; raised=ce takes the frozen model's
    cross-entropy with the hand-written template. The adversary does not follow the prompt: robust accuracy must be
    measured by an attack on the tuned model, as everywhere here.
    """

    tokens: int = option(16, "words of the context (M)", low=1)
    context: str = option("unified", "one for all classes, or each its own", choices=("unified", "class-specific"))
    raised: str = option("embedding", "what the attack on the frozen model raises", choices=("embedding", "ce"))

    paper: ClassVar[str] = "arXiv:2311.11261"
    trains: ClassVar[str] = "text context"
    recipe: ClassVar[Recipe] = Recipe(lr=0.002, warmup_epochs=1, epochs=100, batch_size=32)
    attack: ClassVar[PGD] = PGD(eps=8 / 255, steps=10, step_size=1 / 255, keep="last", early_stop=False)  # as released

    def __post_init__(self) -> None:
        check(self, "method advpt")

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        own = task.classes if self.context == "class-specific" else ()
        return {"student": frozen.with_context(self.tokens, own, seed), "frozen": frozen}

    def prepare(self, models: Mapping[str, VLM], batch: Batch, attack: PGD) -> dict[str, Tensor]:
        """`e`: the unit embeddings [B, D] of the adversarial images."""
        frozen, x = models["frozen"], batch.x
        if self.raised == "ce":
            x_adv = attack(frozen.classifier(batch.tokens["frozen"]), x, batch.y)
        else:
            target = frozen.image_embeddings(x).detach()
            x_adv = attack(frozen.image_embeddings, x, target, loss=lambda e, e0: kl(e0, e))
        return {"e": frozen.image_features(x_adv)}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: PGD) -> dict[str, Tensor]:
        _, compare = models["student"].towers(batch.tokens["student"])
        e = (batch.kept or self.prepare(models, batch, attack))["e"].detach()
        return {"ce": cross_entropy(compare(e), batch.y).mean()}
