"""What a result row says of an evaluation."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from advtune import determinism, runs
from advtune.attacks import Defended, Transfer
from advtune.attacks.gradients import Function
from advtune.data import Images, Split, Task
from advtune.options import as_options
from advtune.results import Row, accuracy, flag_text
from advtune.vlm import VLM
from advtune.withstand import Outcome

WHITE_BOX = "white-box: the attacked function is the scored one"


@dataclass(frozen=True)
class Setting:
    """What the rows of one call of `evaluate` share."""

    model: VLM
    task: Task
    split: Split
    images: Images
    size: int
    seed: int
    show: bool
    threat: str = WHITE_BOX
    source: VLM | None = None
    defence: Function | None = None

    @cached_property
    def f(self) -> Function:
        """The function that is attacked and scored, made once."""
        return self.function(self.model)

    def function(self, model: VLM) -> Function:
        """Images -> logits over this task's classes, behind the defence if there is one."""
        with torch.no_grad():
            f = model.classifier(model.tokens(self.task.classes, self.task.template))
        return f if self.defence is None else Defended(self.defence, f)


def threat_model(source: VLM | None, defence: Function | None, attack: Any) -> str:
    """What the attack knows, in words; without an attack, what stands before the model."""
    behind = "" if defence is None else f"behind the defence {getattr(defence, '__name__', 'given')}"
    if attack is None:
        return behind
    if behind:
        own = "its gradient replaced (BPDA)" if getattr(attack, "bpda", False) else "with its own gradient"
        behind = f", {behind}, {own}"
    if source is not None:
        return f"transfer: images made on {source.origin.name}, scored on this model{behind}"
    return WHITE_BOX + behind


def row(
    s: Setting, attack: Any, clean: Tensor, outcome: Outcome | None, zero: dict[str, float] | None,
    checks: list[dict[str, Any]], seconds: float, carried: bool = False,
) -> Row:  # fmt: skip
    """Everything a table needs of one evaluation."""
    model, task, images, run = s.model, s.task, s.images, s.model.run
    texts = hashlib.sha256("\n".join(task.texts()).encode()).hexdigest()
    train = {k: v for k, v in run.get("train", {}).items() if k not in ("source_classes", "all_classes")}
    if train:
        train |= {"classes": len(train["classes"]), "attack": run["attack"]}
    origin = {} if s.source is None else {"source": s.source.origin.name, "source_sha256": s.source.origin.sha256}
    flags = {"clean": flag_text(clean.tolist())}
    if outcome is not None:
        flags |= {f"after {name}": flag_text(stood.tolist()) for name, stood in outcome.after.items()}
        flags["robust"] = flag_text(outcome.stands.tolist())
    return Row(
        run=run.get("folder", ""),
        model=model.origin.sha256,
        method=run.get("method", "zero-shot"),
        options=run.get("options", {}),
        reconstructed=run.get("reconstructed", []),
        recipe=run.get("recipe", {}),
        train=train or None,
        backbone=run["backbone"] if run else runs.backbone_facts(model),
        data={
            "spec": task.spec,
            "name": task.name,
            "subset": task.subset,
            "split": task.split,
            **asdict(s.split),
            "n": len(images.y),
            "sha256": images.sha256,
            "classes": len(task.classes),
            "template": task.template,
            "texts_sha256": texts,
            "skipped": images.skipped,
        },
        attack=None if attack is None else {**attack_facts(attack), **origin, "seed": s.seed},
        threat=s.threat,
        clean=accuracy(clean.tolist()),
        robust=None if outcome is None else accuracy(outcome.stands.tolist()),
        zero_gradient=zero,
        stages=[] if outcome is None else outcome.stages,
        checks=checks,
        precision=model.precision,
        device=runs.device_name(model.device),
        batch_size=s.size,
        seconds=round(seconds, 2),
        versions=runs.versions(),
        notes=noted(s, attack, carried) + guessing(s, clean),
        flags=flags,
    )


def noted(s: Setting, attack: Any, carried: bool) -> list[str]:
    """What a reader of the row should know of the run and of this evaluation."""
    notes = list(s.model.run.get("notes", []))
    known = sum(sha in s.model.seen for sha in runs.short(s.images.hashes))
    if known:
        notes.append(f"{known} of the {len(s.images.y)} images were tuned on")
    notes += [note for note in determinism.said() if note not in notes]
    if s.model.compiled:
        notes.append("the image tower ran through torch.compile")
    if carried:
        notes.append("images that fell at a smaller eps were not attacked again")
    if attack is not None and hasattr(attack, "notes"):
        notes += attack.notes(len(s.task.classes))
    return notes


def guessing(s: Setting, clean: Tensor) -> list[str]:
    """A sentence if a tuned model's clean accuracy is not told from guessing: then its tuning may have fallen apart."""
    found, classes = accuracy(clean.tolist()), len(s.task.classes)
    if not s.model.run or found["low"] > 1 / classes:
        return []
    told = f"clean accuracy is not told from a guess among {classes} classes by {found['n']} images"
    own = s.task.name == s.model.run["train"]["name"]
    return [f"{told}: the tuning may have fallen apart; look at train.jsonl, tune with a smaller lr" if own else told]


def attack_facts(attack: Any) -> dict[str, Any]:
    """The attack's name and budget, with the step length that was really used and, of an ensemble, its stages."""
    if isinstance(attack, Transfer):
        return attack_facts(attack.pushed())
    facts = {"name": attack.name, **as_options(attack), "norm": attack.norm}
    facts |= {"step_size": attack.step} if hasattr(attack, "step") else {}
    return facts | ({"stages": [attack_facts(each) for each in attack.stages()]} if hasattr(attack, "stages") else {})
