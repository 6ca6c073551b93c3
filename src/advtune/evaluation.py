"""Clean and robust accuracy, image by image."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from advtune import runs
from advtune.attacks import ATTACKS, Attack
from advtune.attacks.pgd import gradient
from advtune.data import Images, Split, Task, load_images, load_task
from advtune.errors import UserError
from advtune.losses import cross_entropy
from advtune.options import as_options
from advtune.progress import progress
from advtune.results import Row, accuracy, flag_text
from advtune.train import check_seed
from advtune.vlm import VLM

WHITE_BOX = "white-box: the attacked function is the scored one"
GRADIENT_SAMPLE = 128  # images whose input gradients are looked at for exact zeros


def evaluate(
    model: VLM | str,
    data: Task | str,
    attack: Attack | None = None,
    *,
    part: str = "test",
    limit: int | None = None,
    resolution: int | str | None = None,
    on_bad: str = "fail",
    batch_size: int = 64,
    seed: int = 0,
    show: bool = True,
) -> Row:
    """Clean accuracy and, with an attack, robust accuracy of a model on a data set; one result row.

    An image counts as robust when it is classified correctly both clean and attacked. Class names and template
    come from the data set, so a tuned model on another set is a cross-dataset evaluation. Raises UserError on
    bad input.
    """
    begin = time.monotonic()
    check_seed(seed)
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: at least 1 image is needed")
    model = runs.load(model) if isinstance(model, str) else model
    task = task_for(model, data) if isinstance(data, str) else data
    side = model.side if resolution is None else resolution
    split = Split(part=part, limit=limit, resolution=side, on_bad=on_bad)
    images = load_images(task, split, progress=show)
    tokens = model.tokens(task.classes, task.template)
    with torch.no_grad():
        f = model.classifier(tokens)
    clean = predict(f, images, batch_size, model.device, show) == images.y
    robust, zero = None, None
    if attack is not None:
        robust = withstand(f, images, clean, attack, batch_size, model.device, seed, show)
        zero = zero_gradients(f, images, model.device, batch_size)
    facts = None if attack is None else {**attack_facts(attack), "seed": seed}
    return row(model, task, split, images, facts, clean, robust, zero, batch_size, time.monotonic() - begin)


def task_for(
    model: VLM, data: str, classes: str | Mapping[str, str] | None = None, template: str | None = None
) -> Task:
    """The task of a data spec, with the words that the model was tuned with when it was tuned on this data and
    no others are given."""
    task, train = load_task(data, classes=classes, template=template), model.run.get("train", {})
    if train.get("spec") != data or train["source_classes"] != list(task.source):
        return task
    words = classes or dict(zip(train["source_classes"], train["classes"], strict=True))
    return load_task(data, classes=words, template=template or train["template"])


def predict(f: Callable[[Tensor], Tensor], images: Images, size: int, device: torch.device, show: bool) -> Tensor:
    """Predicted labels [N] of clean images."""
    found = []
    with progress("clean", len(images.y), "image", show) as advance, torch.no_grad():
        for x in images.x.split(size):
            logits = f(x.to(device).float() / 255)
            if not bool(logits.isfinite().all()):
                raise UserError("the model's logits are not finite; it diverged in tuning, or its weights are damaged")
            found.append(logits.argmax(1).cpu())
            advance(len(x))
    return torch.cat(found)


def withstand(
    f: Callable[[Tensor], Tensor], images: Images, clean: Tensor, attack: Attack, size: int,
    device: torch.device, seed: int, show: bool,
) -> Tensor:  # fmt: skip
    """Which images [N] stand: correct clean and correct under the attack. Those wrong clean are not attacked."""
    stands = clean.clone()
    rows = clean.nonzero().squeeze(1)
    with progress("attack", len(rows), "image", show) as advance, torch.random.fork_rng():
        for some in rows.split(size):
            torch.manual_seed(seed * 1_000_003 + int(some[0]))
            x, y = images.x[some].to(device).float() / 255, images.y[some].to(device)
            x_adv = attack(f, x, y)
            check_budget(x, x_adv, attack)
            with torch.no_grad():
                stands[some] = (f(x_adv).argmax(1) == y).cpu()
            advance(len(some), note=f"{int(stands[rows[rows <= some[-1]]].sum())} stand")
    return stands


def check_budget(x: Tensor, x_adv: Tensor, attack: Attack) -> None:
    """Raises RuntimeError when an attack left its ball or [0, 1]: such a number would mean nothing."""
    far = float((x_adv - x).abs().max())
    if not (far <= attack.eps + 1e-6 and float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1):  # nan is out, too
        raise RuntimeError(f"attack {type(attack).__name__} left its budget: moved {far:.6f}, eps {attack.eps:.6f}")


def zero_gradients(f: Callable[[Tensor], Tensor], images: Images, device: torch.device, size: int) -> dict[str, float]:
    """The share of input gradients that are exactly zero, over the first images: a high share means that the
    attack is blind, not that the model is robust."""
    zeros, total, n = 0, 0, min(GRADIENT_SAMPLE, len(images.y))
    for x, y in zip(images.x[:n].split(size), images.y[:n].split(size), strict=True):
        slope = gradient(f, x.to(device).float() / 255, y.to(device), cross_entropy)[0]
        zeros, total = zeros + int((slope == 0).sum()), total + slope.numel()
    return {"share": zeros / total, "n": n}


def row(
    model: VLM, task: Task, split: Split, images: Images, attack: dict[str, Any] | None,
    clean: Tensor, robust: Tensor | None, zero: dict[str, float] | None, size: int, seconds: float,
) -> Row:  # fmt: skip
    """Everything a table needs of one evaluation."""
    run = model.run
    texts = hashlib.sha256("\n".join(task.texts()).encode()).hexdigest()
    train = {k: v for k, v in run.get("train", {}).items() if k != "source_classes"}
    if train:
        train |= {"classes": len(train["classes"]), "attack": run["attack"]}
    notes = list(run.get("notes", []))
    known = sum(sha in model.seen for sha in runs.short(images.hashes))
    if known:
        notes.append(f"{known} of the {len(images.y)} images were tuned on")
    return Row(
        run=run.get("folder", ""),
        method=run.get("method", "zero-shot"),
        options=run.get("options", {}),
        reconstructed=run.get("reconstructed", []),
        recipe=run.get("recipe", {}),
        train=train or None,
        backbone=run["backbone"] if run else runs.backbone_facts(model),
        data={
            "spec": task.spec,
            "name": task.name,
            **asdict(split),
            "n": len(images.y),
            "sha256": images.sha256,
            "classes": len(task.classes),
            "template": task.template,
            "texts_sha256": texts,
            "skipped": images.skipped,
        },
        attack=attack,
        threat=WHITE_BOX if attack else "",
        clean=accuracy(clean.tolist()),
        robust=None if robust is None else accuracy(robust.tolist()),
        zero_gradient=zero,
        precision=model.precision,
        device=runs.device_name(model.device),
        batch_size=size,
        seconds=round(seconds, 2),
        versions=runs.versions(),
        notes=notes,
        flags={"clean": flag_text(clean.tolist())} | ({} if robust is None else {"robust": flag_text(robust.tolist())}),
    )


def attack_facts(attack: Attack) -> dict[str, Any]:
    """The attack's name and budget, with the step length that was really used."""
    name = next((name for name, kind in ATTACKS.items() if type(attack) is kind), type(attack).__name__)
    facts = {"name": name, **as_options(attack)}
    return facts | ({"step_size": attack.step} if hasattr(attack, "step") else {})
