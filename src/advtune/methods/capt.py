"""CAPT: consistency-guided adversarial prompt tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advtune.attacks import PGD, Attack
from advtune.data import Task
from advtune.losses import confidence, cross_entropy, kl
from advtune.options import check, option
from advtune.prompts import COUPLINGS
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch

TINY = 1e-12  # both cross-entropies can be exactly zero


@dataclass(frozen=True)
class CAPT:
    """CAPT (arXiv:2405.11154): deep prompts in both towers; consistency with the tuned and the frozen model.

    L = CE(f(x), y) + lam * [(1 - a) * KL(f(x'), f(x)) + a * KL(f(x'), f0(x))],  a adaptive

    f0 is prompt-free and sees the clean image with the hand-written template. The paper gives neither the
    formula of a, nor the prompts' shape, nor lam; those fields are reconstructed.
    """

    lam: float = option(6.0, "weight of the consistency terms (lambda)", reconstructed=True, low=0)
    weight: str = option(
        "confidence",
        "a: constant; confidence: p_f0(y|x) / (p_f0(y|x) + p_f(y|x)) of each image; loss: CE_f / (CE_f + CE_f0) "
        "of the batch (clean images, detached)",
        choices=("constant", "confidence", "loss"),
        reconstructed=True,
    )
    a: float = option(0.5, "a when weight=constant, in [0, 1]", reconstructed=True, low=0, high=1)
    ce: str = option(
        "clean", "images of the cross-entropy; printed: clean; both: the mean of the two",
        choices=("clean", "adversarial", "both"), reconstructed=True,
    )  # fmt: skip
    direction: str = option(
        "target-first", "KL(f(x) || f(x')), or as printed KL(f(x') || f(x))",
        choices=("target-first", "adversarial-first"), reconstructed=True,
    )  # fmt: skip
    detach_clean: bool = option(False, "treat f(x) as a constant in the consistency", reconstructed=True)
    prompt_length: int = option(2, "prompt tokens in each tower", reconstructed=True, low=1)
    depth: int = option(9, "layers with prompts; cut to the shallower tower", reconstructed=True, low=1)
    coupling: str = option(
        "text-to-image", "how the towers' prompts depend on each other", choices=COUPLINGS, reconstructed=True
    )

    paper: ClassVar[str] = "arXiv:2405.11154"
    trains: ClassVar[str] = "prompts in both towers"
    recipe: ClassVar[Recipe] = Recipe(lr=0.002, warmup_epochs=1, epochs=50, batch_size=32, augment=True)
    attack: ClassVar[PGD] = PGD(eps=1 / 255, steps=3, keep="last", early_stop=False)  # step 2 eps / 3

    def __post_init__(self) -> None:
        check(self, "method capt")

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        n = self.prompt_length
        student = frozen.with_prompts(task.template, n, n, self.depth, self.coupling, seed)
        return {"student": student, "frozen": frozen}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        x, y = batch.x, batch.y
        f = models["student"].classifier(batch.tokens["student"])
        x_adv = attack(f, x, y)
        adversarial = f(x_adv)
        if self.ce == "adversarial" and not self.lam:
            return {"ce": cross_entropy(adversarial, y).mean()}
        clean = f(x)
        seen = {"clean": [clean], "adversarial": [adversarial], "both": [clean, adversarial]}[self.ce]
        terms = {"ce": torch.stack([cross_entropy(logits, y).mean() for logits in seen]).mean()}
        if self.lam:
            frozen = (batch.kept or self.prepare(models, batch, attack))["f0"]
            a = self._adaptive(clean.detach(), frozen, batch)
            target = clean.detach() if self.detach_clean else clean
            terms["train"] = self.lam * ((1 - a) * self._kl(target, adversarial)).mean()
            terms["frozen"] = self.lam * (a * self._kl(frozen, adversarial)).mean()
        return terms

    def prepare(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        """`f0`: the frozen model's answers [B, C] on the clean images."""
        return {"f0": models["frozen"].classifier(batch.tokens["frozen"])(batch.x).detach()}

    def means(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        """What a is made of when it is the batch's: both cross-entropies."""
        if self.weight != "loss" or not self.lam:
            return {}
        frozen = (batch.kept or self.prepare(models, batch, attack))["f0"]
        clean = models["student"].classifier(batch.tokens["student"])(batch.x)
        return {"ce": cross_entropy(clean, batch.y).mean(), "ce0": cross_entropy(frozen, batch.y).mean()}

    def _adaptive(self, clean: Tensor, frozen: Tensor, batch: Batch) -> Tensor:
        if self.weight == "confidence":
            return confidence(clean, frozen, batch.y)
        ce, ce0 = cross_entropy(clean, batch.y), cross_entropy(frozen, batch.y)  # [B]
        if self.weight == "loss":
            mean, mean0 = (batch.means[name] for name in ("ce", "ce0")) if batch.means else (ce.mean(), ce0.mean())
            return (mean + TINY) / (mean + mean0 + 2 * TINY)
        return torch.full_like(ce, self.a)

    def _kl(self, target: Tensor, adversarial: Tensor) -> Tensor:
        return kl(target, adversarial) if self.direction == "target-first" else kl(adversarial, target)
