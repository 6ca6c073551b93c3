"""PMG-AFT: adversarial fine-tuning of the image tower, guided by the original model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from advtune.attacks import PGD, PGD2, Attack
from advtune.data import Task
from advtune.losses import cross_entropy, kl
from advtune.options import check, option
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch, Classifier

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PMGAFT:
    """PMG-AFT (arXiv:2401.04350): the image tower is tuned; the original model f0 sees the adversarial image.

    L = CE(f(x'), y) + alpha * KL(f0(x') || f(x')) + beta * KL(f(x) || f(x'))

    Preset `paper` is the equation with CLIP's logit scale (its template: --template "This is a photo of a {}").
    Preset `released` follows the published code: raw cosines as logits, ImageNet statistics for both models, KL summed
    over the batch beside a mean cross-entropy. Two releases differ in the KLs' direction: the preset takes the
    paper's, direction=adversarial-first is the other's.
    """

    alpha: float = option(1.0, "weight of the guidance by the original model", low=0)
    beta: float = option(1.0, "weight of the clean branch", low=0)
    scale: str = option("clip", "logits: CLIP's logit scale, or raw cosines", choices=("clip", "cosine"))
    statistics: str = option("backbone", "image mean and std", choices=("backbone", "imagenet"))
    reduction: str = option("mean", "KL over the batch", choices=("mean", "sum"))
    direction: str = option(
        "target-first",
        "KL(target || f(x')), or KL(f(x') || target)",
        choices=("target-first", "adversarial-first"),
    )
    detach_clean: bool = option(False, "treat f(x) as a constant in its KL")

    paper: ClassVar[str] = "arXiv:2401.04350"
    trains: ClassVar[str] = "image tower"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "released": {"scale": "cosine", "statistics": "imagenet", "reduction": "sum"},
    }
    recipe: ClassVar[Recipe] = Recipe(lr=5e-5, warmup=1000, epochs=10, batch_size=256)
    attack: ClassVar[PGD] = PGD2

    def __post_init__(self) -> None:
        check(self, "method pmg-aft")

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        if self.statistics == "imagenet":
            own = frozen.clip.config.preprocess
            frozen = frozen.with_preprocess(replace(own, mean=IMAGENET_MEAN, std=IMAGENET_STD))
        return {"student": frozen.with_image_tower(), "frozen": frozen}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        x, y = batch.x, batch.y
        f, f0 = (self._classifier(models[name], batch.tokens[name]) for name in ("student", "frozen"))
        x_adv = attack(f, x, y)
        adversarial, terms = f(x_adv), {}
        over = batch.share if self.reduction == "sum" else 1  # a portion's terms are weighted as means are
        if self.alpha:
            terms["guide"] = self.alpha * self._kl(f0(x_adv).detach(), adversarial) / over
        if self.beta:
            clean = f(x).detach() if self.detach_clean else f(x)
            terms["clean"] = self.beta * self._kl(clean, adversarial) / over
        return {"ce": cross_entropy(adversarial, y).mean(), **terms}

    def _kl(self, target: Tensor, adversarial: Tensor) -> Tensor:
        each = kl(target, adversarial) if self.direction == "target-first" else kl(adversarial, target)
        return each.sum() if self.reduction == "sum" else each.mean()

    def _classifier(self, model: VLM, tokens: Tensor) -> Classifier:
        f = model.classifier(tokens)
        return f if self.scale == "clip" else lambda x: f(x) / model.logit_scale
