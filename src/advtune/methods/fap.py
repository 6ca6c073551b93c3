"""FAP: few-shot adversarial prompt learning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from advtune.attacks import PGD, PGD2
from advtune.data import Task
from advtune.losses import cross_entropy, kl
from advtune.options import check, option
from advtune.prompts import COUPLINGS
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch


@dataclass(frozen=True)
class FAP:
    """FAP (arXiv:2403.14774): deep prompts in both towers, a consistency that sees how far the features moved.

    L = CE(f(x), y) + lam * mean[(cos(e(x), e(x')) + 1) * KL(f(x) || f(x'))],  x' maximises KL(f(x) || f(x'))

    e are the image features. Nothing is detached in the loss, as released.
    """

    lam: float = option(1.5, "weight of the consistency (lambda)", low=0)
    prompt_length: int = option(2, "prompt tokens in each tower", low=1)
    depth: int = option(9, "layers with prompts; cut to the shallower tower", low=1)
    coupling: str = option("image-to-text", "how the towers' prompts depend on each other", choices=COUPLINGS)

    paper: ClassVar[str] = "arXiv:2403.14774"
    trains: ClassVar[str] = "prompts in both towers"
    recipe: ClassVar[Recipe] = Recipe(lr=0.0035, warmup_epochs=1, epochs=10, batch_size=4)
    attack: ClassVar[PGD] = PGD2

    def __post_init__(self) -> None:
        check(self, "method fap")

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        n = self.prompt_length
        return {"student": frozen.with_prompts(task.template, n, n, self.depth, self.coupling, seed)}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: PGD) -> dict[str, Tensor]:
        x, y = batch.x, batch.y
        encode, compare = models["student"].towers(batch.tokens["student"])
        e = encode(x)
        clean = compare(e)
        terms = {"ce": cross_entropy(clean, y).mean()}
        if self.lam:
            x_adv = attack(lambda z: compare(encode(z)), x, clean.detach(), loss=lambda z, target: kl(target, z))
            e_adv = encode(x_adv)
            closeness = (e * e_adv).sum(-1) + 1  # [B]
            terms["consistency"] = self.lam * (closeness * kl(clean, compare(e_adv))).mean()
        return terms
