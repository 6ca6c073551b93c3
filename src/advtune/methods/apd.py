"""APD: adversarial prompt distillation from a clean teacher that learns along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advtune.attacks import PGD, PGD2, Attack
from advtune.data import Task
from advtune.errors import UserError
from advtune.losses import cross_entropy, kl
from advtune.options import check, option
from advtune.prompts import COUPLINGS
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch


@dataclass(frozen=True)
class APD:
    """APD (arXiv:2411.15244): prompts in both towers of a student s, taught by a clean, prompted CLIP t.

    student: distil * KL(t(x) || s(x')) + ce * CE(s(x'), y), t constant
    teacher: CE(t(x), y) + feedback * KL(s(x') || t(x)), s constant

    x' maximises CE(s(x'), y). The paper says that the teacher is non-robust and learns online; the losses'
    form and weights are reconstructed. teacher=offline learns its prompts first, for one whole schedule;
    teacher=frozen is the backbone with its hand-written template.
    """

    teacher: str = option(
        "online", "how the teacher learns", choices=("online", "offline", "frozen"), reconstructed=True
    )
    distil: float = option(1.0, "weight of the distillation", reconstructed=True, low=0)
    ce: float = option(0.0, "weight of the student's own cross-entropy on x'", reconstructed=True, low=0)
    feedback: float = option(0.0, "weight of the student's answer in the online teacher", reconstructed=True, low=0)
    temperature: float = option(1.0, "of both KLs, on CLIP-scaled logits", reconstructed=True, low=1e-6)
    text_tokens: int = option(2, "text prompt tokens of student and teacher", low=0)
    image_tokens: int = option(2, "image prompt tokens of student and teacher", low=0)
    depth: int = option(9, "layers with prompts; cut to each tower's depth", low=1)
    coupling: str = option("independent", "how the towers' prompts depend on each other", choices=COUPLINGS)

    paper: ClassVar[str] = "arXiv:2411.15244"
    trains: ClassVar[str] = "prompts in both towers, and the teacher's"
    recipe: ClassVar[Recipe] = Recipe(lr=0.0035, warmup_epochs=1, epochs=10, batch_size=32, augment=True)
    attack: ClassVar[PGD] = PGD2

    def __post_init__(self) -> None:
        check(self, "method apd")
        if not self.distil and not self.ce:
            raise UserError("method apd: distil=0 and ce=0 leave the student nothing to learn from")

    @property
    def cycles(self) -> int:
        return 2 if self.teacher == "offline" else 1

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        def prompted(seed: int) -> VLM:
            return frozen.with_prompts(
                task.template, self.text_tokens, self.image_tokens, self.depth, self.coupling, seed
            )

        return {"student": prompted(seed), "teacher": frozen if self.teacher == "frozen" else prompted(seed)}

    def prepare(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        """`t`: the answers [B, C] of a teacher that does not learn."""
        if self.teacher != "frozen":
            return {}
        return {"t": models["teacher"].classifier(batch.tokens["teacher"])(batch.x).detach()}

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        x, y = batch.x, batch.y
        t = models["teacher"].classifier(batch.tokens["teacher"])
        if self.teacher == "offline" and batch.cycle == 0:
            return {"teacher_ce": cross_entropy(t(x), y).mean()}
        s = models["student"].classifier(batch.tokens["student"])
        x_adv = attack(s, x, y)
        student = s(x_adv)
        with torch.set_grad_enabled(self.teacher == "online"):
            teacher = batch.kept["t"] if batch.kept else t(x)
        terms = {}
        if self.distil:
            terms["distil"] = self.distil * kl(teacher.detach(), student, self.temperature).mean()
        if self.ce:
            terms["ce"] = self.ce * cross_entropy(student, y).mean()
        if self.teacher == "online":
            terms["teacher_ce"] = cross_entropy(teacher, y).mean()
            if self.feedback:
                terms["feedback"] = self.feedback * kl(student.detach(), teacher, self.temperature).mean()
        return terms
