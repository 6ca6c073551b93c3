"""Guided: one frame for what CAPT, APD and PMG-AFT each found, and what lies between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from advtune.attacks import PGD, PGD2, Attack
from advtune.averaging import AVERAGE
from advtune.data import Task
from advtune.errors import UserError
from advtune.guidance import GUIDES, IMAGES, PRESETS, RAISED, RAISES, SEEN, TRAINABLE, answers, distance, learner
from advtune.losses import confidence, cross_entropy
from advtune.options import check, option
from advtune.prompts import COUPLINGS
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch


@dataclass(frozen=True)
class Guided:
    """Guided (advtune's own, no paper): adversarial tuning with a guide g, all of whose parts are options.

    L = CE + lam * w * D(g(v), f(x')) + consistency * (1 - w) * D(f(x), f(x')),  v = x or x'; constant weight: no w

    D: KL of logits, squared distance of unit features, or 1 - correlation of logits over the classes; g is a constant
    in it, f(x) is not. An online g learns by CE(g(x), y). Presets: the losses of TeCoA, PMG-AFT, CAPT, APD,
    and the choices of docs/guided.md.
    """

    trainable: str = option("low-rank", "what learns (image-tower: lr=2e-5; prompts: optimizer=sgd)", choices=TRAINABLE)
    rank: int = option(8, "trainable=low-rank: rank of every update", low=1)
    guide: str = option("frozen", "g: backbone, prompts that learn online, the weights' average", choices=GUIDES)
    sees: str = option("clean", "images that the guide sees (v)", choices=("clean", "adversarial"))
    match: str = option("logits", "what D compares", choices=("logits", "features", "relations"))
    direction: str = option("target-first", "KL(g || f), or KL(f || g)", choices=("target-first", "adversarial-first"))
    temperature: float = option(1.0, "of the KL", low=1e-6)
    lam: float = option(1.0, "weight of the guidance (lambda)", low=0)
    consistency: float = option(1.0, "weight of the student's own consistency", low=0)
    weight: str = option(
        "constant", "w: 1, or CAPT's p_g(y|x) / (p_g(y|x) + p_f(y|x))", choices=("constant", "confidence")
    )
    ce: str = option("adversarial", "images of the cross-entropy; both: the mean of the two", choices=IMAGES)
    adversary: str = option("ce", "x' raises CE, KL(f(x) || f(x')), |e(x) - e(x')|^2, D(g(x), f(x'))", choices=RAISES)
    prompt_length: int = option(2, "prompt tokens in a tower, the online guide's too", low=1)
    depth: int = option(9, "layers with prompts; cut to each tower's depth", low=1)
    coupling: str = option("independent", "how prompts of both towers depend on each other", choices=COUPLINGS)

    paper: ClassVar[str] = ""
    trains: ClassVar[str] = "low-rank updates of the image tower, or what trainable=... names"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    recipe: ClassVar[Recipe] = Recipe(optimizer="adamw", lr=1e-3, epochs=10, batch_size=32)
    attack: ClassVar[PGD] = PGD2

    def __post_init__(self) -> None:
        check(self, "method guided")
        if self.ce in ("none", "clean") and not self.consistency and (self.guide == "none" or not self.lam):
            raise UserError(f"method guided: ce={self.ce} alone learns nothing from x'; raise lam or consistency")
        for name, value in (("adversary", "guide"), ("weight", "confidence")):
            if self.guide == "none" and getattr(self, name) == value:
                raise UserError(f"method guided: {name}={value} needs a guide, and guide=none")
        if self.match == "features" and self.trainable == "text-prompts":
            raise UserError("method guided: text prompts do not change the image features; take match=logits")

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        how = (task.template, seed, self.rank, self.prompt_length, self.depth, self.coupling)
        models = {"student": learner(frozen, self.trainable, *how)}
        if self.guide in ("frozen", "online"):
            models["guide"] = frozen if self.guide == "frozen" else learner(frozen, "prompts", *how)
        return models

    def prepare(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        """`features` [B, D] and `logits` [B, C] of a frozen guide on the clean images."""
        found = answers(models, batch, "guide")(batch.x) if self.guide == "frozen" else {}
        return {name: value.detach() for name, value in found.items()}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: PGD) -> dict[str, Tensor]:
        x, y, seen, d = batch.x, batch.y, SEEN[self.match], distance(self.match, self.direction, self.temperature)
        f = answers(models, batch, "student")
        g = f if self.guide == "none" else answers(models, batch, AVERAGE if self.guide == "average" else "guide")
        clean, guide = cache(lambda: f(x)), cache(lambda: batch.kept or g(x))  # at most once each, when asked for
        of, apart = RAISED[self.adversary] or (seen, d)
        target = {"ce": lambda: y, "guide": lambda: guide()[of]}.get(self.adversary, lambda: clean()[of])().detach()
        how: dict[str, Any] = {} if apart is None else {"loss": lambda answer, to: apart(to, answer)}
        x_adv = attack(lambda v: f(v)[of], x, target, **how)
        adversarial, terms = f(x_adv), dict[str, Tensor]()
        if self.ce != "none":
            shown = ([clean()] if self.ce != "adversarial" else []) + ([adversarial] if self.ce != "clean" else [])
            terms["ce"] = torch.stack([cross_entropy(each["logits"], y).mean() for each in shown]).mean()
        w = own = torch.ones_like(y, dtype=torch.float32)
        if self.weight == "confidence":
            w = confidence(clean()["logits"].detach(), guide()["logits"].detach(), y)
            own = 1 - w
        if self.lam and self.guide != "none":
            target = (guide() if self.sees == "clean" else g(x_adv))[seen].detach()
            terms["guide"] = self.lam * (w * d(target, adversarial[seen])).mean()
        if self.consistency:
            terms["consistency"] = self.consistency * (own * d(clean()[seen], adversarial[seen])).mean()
        if self.guide == "online":
            terms["guide_ce"] = cross_entropy(guide()["logits"], y).mean()
        return terms
