"""The one training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advtune import runs
from advtune.attacks import Attack, Free, Replay
from advtune.augment import crop_and_flip
from advtune.checkpoint import Log, claim, finish, finished
from advtune.data import Images, Split, Task, load_images, load_task
from advtune.errors import UserError
from advtune.methods import Method, configure
from advtune.options import as_options, describe
from advtune.progress import progress
from advtune.recipe import Recipe
from advtune.rows import attack_facts
from advtune.tensorboard import board
from advtune.vlm import VLM, Batch

Options = Sequence[str] | Mapping[str, Any]
KEEP = 2**31  # bytes of prepared answers that are kept


@dataclass(frozen=True)
class Plan:
    """A training run, fully specified: what is trained, how, on what."""

    name: str
    method: Method
    recipe: Recipe
    attack: Attack
    backbone: VLM
    task: Task
    split: Split
    seed: int

    def steps(self, n: int) -> tuple[int, int, int]:
        """Batch size, steps an epoch and steps a cycle, with n images."""
        size = min(self.recipe.batch_size, n)
        per_epoch = math.ceil(n / size)
        return size, per_epoch, per_epoch * self.recipe.epochs

    def config(self, images: Images, models: Mapping[str, VLM], out: Path | None) -> dict[str, Any]:
        """What config.json and every result row say of the run."""
        return {
            "method": self.name,
            "options": as_options(self.method),
            "reconstructed": [fact["name"] for fact in describe(self.method) if fact["reconstructed"]],
            "recipe": as_options(self.recipe),
            "attack": attack_facts(self.attack),
            "train": {
                "spec": self.task.spec,
                "name": self.task.name,
                "subset": self.task.subset,
                "split": self.task.split,
                **asdict(self.split),
                "n": len(images.y),
                "sha256": images.sha256,
                "classes": list(self.task.classes),
                "all_classes": list(self.task.all_classes or self.task.classes),
                "source_classes": list(self.task.source),
                "template": self.task.template,
                "skipped": images.skipped,
            },
            "backbone": runs.backbone_facts(self.backbone, out),
            "preprocess": asdict(models["student"].clip.config.preprocess),
            "prompt_template": models["student"].template,
            "prompt_classes": list(models["student"].classes),
            "precision": self.backbone.precision,
            "compiled": bool(self.backbone.compiled),
            "device": runs.device_name(self.backbone.device),
            "versions": runs.versions(),
            "notes": self.notes(len(images.y), models["student"]),
        }

    def notes(self, n: int, student: VLM) -> list[str]:
        """What a reader of the row should know about this run."""
        _, per_epoch, steps = self.steps(n)
        notes, m = [], replays(self.attack)
        if m > 1:
            notes.append(f"each batch is gone through {m} times: {self.recipe.epochs / m:g} times over the images")
        for wanted in (self.recipe.warmup, self.recipe.warmup_epochs * per_epoch):
            if wanted > steps // 10:
                notes.append(f"warm-up of {wanted} steps cut to {steps // 10} of {steps}")
        depth = as_options(self.method).get("depth")
        if student.prompts is not None and depth:
            depths = [len(p) for p in student.prompts()[:2] if p is not None]
            if depths and min(depths) < depth:
                notes.append(f"prompt depth {depth} cut to {'/'.join(map(str, depths))} (text/image layers)")
        if self.backbone.compiled:
            notes.append("tuned with the image tower through torch.compile")
        if student.template:
            notes.append(f"the learned context stands for the template: {student.template!r} follows it")
        return notes


def tune(
    method: str,
    backbone: VLM | str,
    data: Task | str,
    *,
    shots: int | None = None,
    seed: int = 0,
    epochs: int | None = None,
    options: Options = (),
    attack: Options = (),
    out: str | Path | None = None,
    part: str = "train",
    limit: int | None = None,
    resolution: int | str | None = None,
    on_bad: str = "fail",
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: str | Path | None = None,
    show: bool = True,
) -> VLM:
    """Tune a backbone with a method on labelled images; the tuned model, which `evaluate` takes.

    options and attack: `key=value` texts or a mapping, for the method's and recipe's fields and for the
    training attack's, whose `name` is pgd, n-fgsm or free. shots: images a class, none for all. With `out`, a run
    folder is written; while it is being made it is called OUT.partial, and `resume` goes on from there to the same
    bits. tensorboard: a folder for the run's curves. Raises UserError on bad input, before anything is written, and
    on a loss or result that is not finite.
    """
    check_seed(seed)
    options = [options] if isinstance(options, str) else options
    if epochs is not None:
        options = {**options, "epochs": epochs} if isinstance(options, Mapping) else [*options, f"epochs={epochs}"]
    chosen, recipe, made = configure(method, options, attack)
    if method == "zero-shot":
        raise UserError("zero-shot trains nothing; use: advtune evaluate zero-shot")
    out = None if out is None else Path(out)
    partial = None if out is None else claim(out, resume, overwrite)
    curves = None if tensorboard is None else board(tensorboard, resume, overwrite)
    model = runs.load(backbone) if isinstance(backbone, str) else backbone
    if out is not None and model.run and not model.run.get("folder"):
        raise UserError("the backbone was tuned in memory; tune it with out=DIR, so that this run can find it again")
    if out is not None and str(out.resolve()) in model.folders:
        raise UserError(f"{out} is (part of) the backbone; choose another --out")
    task = load_task(data) if isinstance(data, str) else data
    side = model.side if resolution is None else resolution
    split = Split(part=part, shots=shots, seed=seed, limit=limit, resolution=side, on_bad=on_bad)
    images = load_images(task, split, progress=show)
    plan = Plan(method, chosen, recipe, made, model.requires_grad_(False), task, split, seed)
    models = chosen.setup(model, task, seed)
    config = plan.config(images, models, out)
    tokens = {name: vlm.tokens(task.classes, task.template) for name, vlm in models.items()}
    if out is not None and finished(out, config, resume, overwrite):
        return runs.load(str(out), str(model.device), model.precision, bool(model.compiled))
    with Log(partial, config, resume, curves) as log:
        student = fit(plan, models, tokens, images, log, show)
        if out is not None and partial is not None:
            runs.write_run(partial, student, config, images.hashes)
            finish(partial, out)
    return runs.settle(student, model, config, images.hashes, out)


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that a generator cannot take."""
    if not 0 <= seed < 2**31:
        raise UserError(f"seed {seed} is not in 0 .. {2**31 - 1}")


def fit(
    plan: Plan, models: Mapping[str, VLM], tokens: Mapping[str, Tensor], images: Images, log: Log, show: bool
) -> VLM:
    """Run the plan; the student. Deterministic in the plan, whether resumed or not."""
    parameters = {f"{m}.{n}": p for m, vlm in models.items() for n, p in vlm.named_parameters() if p.requires_grad}
    optimiser = plan.recipe.optimiser(parameters.values())
    size, per_epoch, cycle = plan.steps(len(images.y))
    steps = cycle * getattr(plan.method, "cycles", 1)
    learning, m, d = dict[str, Tensor](parameters), replays(plan.attack), torch.empty(0)
    if isinstance(plan.attack, Free):
        d = plan.attack.start((size, *images.x.shape[1:]), plan.seed).to(plan.backbone.device)
        learning["attack.d"] = d  # kept from batch to batch, so in the checkpoint
    first = log.restore(learning, optimiser)
    device = plan.backbone.device
    images = images.on(device)
    try:
        kept = prepare(plan, models, tokens, images, show) if first < steps else {}
    except UserError:
        log.close(drop=True)
        raise
    bar = progress(f"{plan.name} on {plan.task.name}", steps - first, show=show)
    with log.held(), bar as advance, torch.random.fork_rng():
        for step in range(first, steps):
            number = step // m  # of the batch; the replays of one see the same images, augmented alike
            order = epoch_order(len(images.y), plan.seed, number // per_epoch)
            rows = order[(number % per_epoch) * size :][:size]
            torch.manual_seed(mix(plan.seed, number * m))
            pixels, y = images.batch(rows, device)
            if plan.recipe.augment:
                pixels = crop_and_flip(pixels)
            rows = rows.to(device)
            batch = Batch(pixels, y, tokens, step // cycle, {name: t[rows] for name, t in kept.items()})
            rate = plan.recipe.rate(step % cycle, cycle, per_epoch)
            try:
                terms = update(plan, models, batch, optimiser, rate, step, d[: len(rows)])
                if step == steps - 1:
                    check_finite(plan, learning, rate)
            except UserError:
                log.close(drop=True)
                raise
            log.step({"step": step, "epoch": number // per_epoch, "lr": rate, **terms}, learning, optimiser)
            advance(note=" ".join(f"{name} {value:.3f}" for name, value in terms.items()))
    log.close()
    return models["student"]


def prepare(
    plan: Plan, models: Mapping[str, VLM], tokens: Mapping[str, Tensor], images: Images, show: bool
) -> dict[str, Tensor]:
    """What the method computes once for every training image, [N, ...] by name; the same bits in every sitting.

    Nothing when images are augmented, so that they differ from epoch to epoch, or when it would fill KEEP bytes.
    """
    make = getattr(plan.method, "prepare", None)
    if make is None or plan.recipe.augment:
        return {}
    found: dict[str, list[Tensor]] = {}
    with progress(f"{plan.name}: preparing", len(images.y), "image", show) as advance, torch.random.fork_rng():
        torch.manual_seed(plan.seed)
        for rows in torch.arange(len(images.y)).split(plan.recipe.batch_size):
            x, y = images.batch(rows, plan.backbone.device)
            made = make(models, Batch(x, y, tokens), plan.attack)
            if not 0 < sum(value.nbytes for value in made.values()) / len(rows) * len(images.y) <= KEEP:
                return {}
            for name, value in made.items():
                found.setdefault(name, []).append(value.detach())
            advance(len(rows))
    return {name: torch.cat(parts) for name, parts in found.items()}


def check_finite(plan: Plan, learning: Mapping[str, Tensor], rate: float) -> None:
    """Raises UserError when the last step left something that is not a number."""
    for name, value in learning.items():
        if not bool(value.isfinite().all()):
            raise UserError(f"{plan.name}: {name} is not finite after the last step; lower lr (now {rate:g})")


def update(
    plan: Plan,
    models: Mapping[str, VLM],
    batch: Batch,
    optimiser: torch.optim.Optimizer,
    rate: float,
    step: int,
    d: Tensor,
) -> dict[str, float]:
    """One optimiser step; the loss terms as numbers. d [B, 3, S, S]: the perturbation that free replay keeps, moved in
    place. Raises UserError naming the term that is not finite."""
    attack = Replay(plan.attack, d) if isinstance(plan.attack, Free) else plan.attack
    terms = plan.method.loss(models, batch, attack)
    heights = torch.stack(list(terms.values()))
    optimiser.zero_grad(set_to_none=True)
    heights.sum().backward()
    if isinstance(attack, Replay):
        attack.climb()
    values = dict(zip(terms, heights.tolist(), strict=True))  # asked for once, with all else of the step under way
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{plan.name}: the loss term {name!r} is {value} at step {step}; lower lr (now {rate:g})")
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    return values


def replays(attack: Attack) -> int:
    """How often each batch is gone through."""
    return attack.replay if isinstance(attack, Free) else 1


def mix(seed: int, step: int) -> int:
    """One generator seed for (seed, step)."""
    return seed * 1_000_003 + step


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of n images in an epoch, the same on every machine."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, epoch)))
