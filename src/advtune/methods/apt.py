"""APT: adversarial tuning of the text context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advtune import draws
from advtune.attacks import PGD
from advtune.attacks.ball import ascent, project, random_point
from advtune.data import Task
from advtune.errors import UserError
from advtune.losses import cross_entropy
from advtune.options import check, option
from advtune.prompts import Learned
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch


@dataclass(frozen=True)
class APT:
    """APT (arXiv:2403.01849): a learned text context, "[v1] ... [vM] name.", tuned on adversarial images.

    L = CE(f(x'), y)

    The attacker's prompt while tuning is the context itself (on-the-fly), the hand-written template (constant), or
    the context moved along: with every step on x' it climbs the same loss, at the rate `ascent` (perturbed).
    The paper tunes on an adversarially trained image tower: --backbone a TeCoA run.
    """

    tokens: int = option(16, "words of the context (M): 1, 4 or 16 in the paper", low=1)
    context: str = option("unified", "one for all classes, or each its own", choices=("unified", "class-specific"))
    attacker: str = option(
        "on-the-fly", "the attacker's prompt while tuning", choices=("on-the-fly", "constant", "perturbed")
    )
    ascent: float = option(0.01, "rate of the perturbed attacker's context", reconstructed=True, low=0)

    paper: ClassVar[str] = "arXiv:2403.01849"
    trains: ClassVar[str] = "text context"
    recipe: ClassVar[Recipe] = Recipe(lr=0.002, warmup_epochs=1, epochs=50, batch_size=32, augment=True)
    attack: ClassVar[PGD] = PGD(eps=4 / 255, steps=3, keep="last", early_stop=False)  # step 2 eps / 3

    def __post_init__(self) -> None:
        check(self, "method apt")

    @property
    def uncut(self) -> str:
        return "attacker=perturbed moves one context by all images" if self.attacker == "perturbed" else ""

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        own = task.classes if self.context == "class-specific" else ()
        student = frozen.with_context(self.tokens, own, seed)
        return {"student": student} | ({"attacker": frozen} if self.attacker == "constant" else {})

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: PGD) -> dict[str, Tensor]:
        x, y = batch.x, batch.y
        f = models["student"].classifier(batch.tokens["student"])
        if self.attacker == "perturbed":
            x_adv = self._joint(models["student"], batch, attack)
        else:
            g = f if self.attacker == "on-the-fly" else models["attacker"].classifier(batch.tokens["attacker"])
            x_adv = attack(g, x, y)
        return {"ce": cross_entropy(f(x_adv), y).mean()}

    def _joint(self, model: VLM, batch: Batch, attack: PGD) -> Tensor:
        """x' [B, 3, S, S] by steps on the pixels and on the attacker's context, both uphill."""
        if attack.loss != "ce" or not attack.random_start or attack.restarts * attack.eot > 1:
            raise UserError(
                "method apt: attacker=perturbed climbs cross-entropy, from one random start; set eps and steps"
            )
        x, context = batch.x, model.delta()["prompts.text"].to(batch.x.device)
        z = random_point(x, attack.eps, attack.norm, draws.like(x))
        for _ in range(attack.steps):
            z, context = z.detach().requires_grad_(True), context.detach().requires_grad_(True)
            g = model.with_fixed(Learned(context)).classifier(batch.tokens["student"])
            slope, rise = torch.autograd.grad(cross_entropy(g(z), batch.y).sum(), (z, context))
            z = project(z.detach() + attack.step * ascent(slope, attack.norm), x, attack.eps, attack.norm)
            context = context + self.ascent * rise / len(x)  # of the mean, as released
        return z
