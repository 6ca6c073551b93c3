"""The one training loop."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advtune import determinism, distributed, runs
from advtune.attacks import Attack, Free
from advtune.averaging import averaged, follow, result, with_average
from advtune.checkpoint import Log, claim, comparable, finish, finished
from advtune.data import Images, Split, Task, load_images, load_task
from advtune.draws import seeded
from advtune.errors import UserError
from advtune.methods import Method, configure
from advtune.options import as_options, describe
from advtune.progress import progress
from advtune.recipe import Recipe
from advtune.rows import attack_facts
from advtune.step import NoRoom, Portions, own_share, prepare, recomputing, update
from advtune.tensorboard import board
from advtune.vlm import VLM

Options = Sequence[str] | Mapping[str, Any]


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
        notes += determinism.said()
        if distributed.world() > 1:
            notes.append(f"tuned by {distributed.world()} processes")
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
    micro_batch: int | None = None,
    checkpoint_activations: bool = False,
    show: bool = True,
) -> VLM:
    """Tune a backbone with a method on labelled images; the tuned model, which `evaluate` takes.

    options and attack: `key=value` texts or a mapping, for the method's and recipe's fields and for the
    training attack's, whose `name` is pgd, n-fgsm or free. shots: images a class, none for all. With `out`, a run
    folder is written; while it is being made it is called OUT.partial, and `resume` goes on from there to the same
    bits. tensorboard: a folder for the run's curves. micro_batch: images that go through the models at once, for the
    same gradient in less memory; halved where memory runs out. checkpoint_activations: compute them twice, keep few.
    Raises UserError on bad input, before anything is written, and on a loss or result that is not finite.
    """
    check_seed(seed)
    chosen, recipe, made = configure(method, with_epochs(options, epochs), attack)
    if method == "zero-shot":
        raise UserError("zero-shot trains nothing; use: advtune evaluate zero-shot")
    portions = portioned(method, chosen, micro_batch)
    out, writes = None if out is None else Path(out), distributed.leader()
    partial = claim(out, resume, overwrite) if out is not None and writes else None
    curves = board(tensorboard, resume, overwrite) if tensorboard is not None and writes else None
    model = runs.load(backbone) if isinstance(backbone, str) else backbone
    check_backbone(model, out, checkpoint_activations)
    task = load_task(data) if isinstance(data, str) else data
    side = model.side if resolution is None else resolution
    split = Split(part=part, shots=shots, seed=seed, limit=limit, resolution=side, on_bad=on_bad)
    with distributed.in_turn():
        images = load_images(task, split, progress=show and writes)
    plan = Plan(method, chosen, recipe, made, model.requires_grad_(False), task, split, seed)
    models = with_average(chosen.setup(model, task, seed), recipe)
    config = plan.config(images, models, out)
    distributed.agree(comparable(config), "what is tuned")
    tokens = {name: vlm.tokens(task.classes, task.template) for name, vlm in models.items()}
    done = out is not None and writes and finished(out, config, resume, overwrite)
    if out is not None and distributed.told(done):
        return runs.load(str(out), str(model.device), model.precision, bool(model.compiled))
    with Log(partial, config, resume, curves) as log, recomputing(models.values(), checkpoint_activations):
        student = fit(plan, models, tokens, images, log, show and writes, portions)
        config["notes"] += portions.notes
        return kept(runs.settle(student, model, config, images.hashes, out), images, partial, out)


def kept(tuned: VLM, images: Images, partial: Path | None, out: Path | None) -> VLM:
    """The tuned model, with its run folder written, which is there for all processes when this returns."""
    distributed.agree(tuned.origin.sha256, "what was learned")
    if out is not None and partial is not None:
        config = {name: value for name, value in tuned.run.items() if name != "folder"}
        runs.write_run(partial, tuned, config, images.hashes)
        finish(partial, out)
    distributed.told(None)
    return tuned


def with_epochs(options: Options, epochs: int | None) -> Options:
    """The options with `epochs` among them, if it is given."""
    options = [options] if isinstance(options, str) else options
    if epochs is None:
        return options
    return {**options, "epochs": epochs} if isinstance(options, Mapping) else [*options, f"epochs={epochs}"]


def portioned(name: str, method: Method, size: int | None) -> Portions:
    """How batches go through. Raises UserError for a method whose batches cannot be cut, where they are to be."""
    uncut = getattr(method, "uncut", "")
    if size is not None and size < 1:
        raise UserError(f"micro-batch {size}: at least 1 image is needed")
    if uncut and (size is not None or distributed.world() > 1):
        raise UserError(f"method {name}: {uncut}: its batches go through whole, without --micro-batch, in one process")
    notes = [] if size is None else [f"batches went through {size} images at a time, with the same gradient"]
    return Portions(size, uncut, notes)


def check_backbone(model: VLM, out: Path | None, recompute: bool) -> None:
    """Raises UserError for a model that cannot be tuned into the run folder `out`, or not in this way."""
    if out is not None and model.run and not model.run.get("folder"):
        raise UserError("the backbone was tuned in memory; tune it with out=DIR, so that this run can find it again")
    if out is not None and str(out.resolve()) in model.folders:
        raise UserError(f"{out} is (part of) the backbone; choose another --out")
    if recompute and model.compiled:
        raise UserError("--checkpoint-activations and --compile do not go together; give one")


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that a generator cannot take."""
    if not 0 <= seed < 2**31:
        raise UserError(f"seed {seed} is not in 0 .. {2**31 - 1}")


def fit(
    plan: Plan, models: Mapping[str, VLM], tokens: Mapping[str, Tensor], images: Images, log: Log, show: bool,
    portions: Portions | None = None,
) -> VLM:  # fmt: skip
    """Run the plan; the student. Deterministic in the plan, whether resumed or not."""
    parameters = {f"{m}.{n}": p for m, vlm in models.items() for n, p in vlm.named_parameters() if p.requires_grad}
    optimiser = plan.recipe.optimiser(parameters.values())
    size, per_epoch, cycle = plan.steps(len(images.y))
    steps = cycle * getattr(plan.method, "cycles", 1)
    learning, m, d = dict[str, Tensor](parameters), replays(plan.attack), torch.empty(0)
    pairs = averaged(models)
    learning |= {f"average.{name}": average for name, (average, _) in pairs.items()}
    if isinstance(plan.attack, Free):
        d = plan.attack.start((size, *images.x.shape[1:]), plan.seed).to(plan.backbone.device)
        learning["attack.d"] = d  # kept from batch to batch, so in the checkpoint
    first = restored(log, learning, optimiser)
    device = plan.backbone.device
    images, portions = images.on(device), portions or Portions()
    try:
        prepared = prepare(plan, models, tokens, images, show, portions) if first < steps else {}
        bar = progress(f"{plan.name} on {plan.task.name}", steps - first, show=show)
        with log.held(), bar as advance, seeded(plan.seed, device):
            for step in range(first, steps):
                number = step // m  # of the batch; the replays of one see the same images, augmented alike
                order = epoch_order(len(images.y), plan.seed, number // per_epoch)
                rows = order[(number % per_epoch) * size :][:size]
                torch.manual_seed(mix(plan.seed, number * m))
                batch = own_share(plan, images, rows, tokens, prepared, step // cycle)
                rate = plan.recipe.rate(step % cycle, cycle, per_epoch)
                terms = update(plan, models, batch, optimiser, rate, step, d[: len(rows)], portions)
                follow(pairs.values(), plan.recipe.average, step % cycle)
                if step == steps - 1:
                    check_finite(plan, learning, rate)
                log.step({"step": step, "epoch": number // per_epoch, "lr": rate, **terms}, learning, optimiser)
                advance(note=" ".join(f"{name} {value:.3f}" for name, value in terms.items()))
    except UserError as error:
        log.close(drop=not isinstance(error, NoRoom))  # with more room the run can go on
        raise
    log.close()
    return result(models, plan.backbone, plan.recipe)


def restored(log: Log, learning: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> int:
    """Load the checkpoint, if there is one, which the leader alone reads; the step to go on with."""
    first = distributed.told(log.restore(learning, optimiser))
    if first and distributed.world() > 1:
        buffer = io.BytesIO()
        if distributed.leader():
            torch.save([{name: value.detach() for name, value in learning.items()}, optimiser.state_dict()], buffer)
        content = io.BytesIO(distributed.told(buffer.getvalue()))
        values, state = torch.load(content, map_location="cpu", weights_only=True)
        for name, value in learning.items():
            value.data.copy_(values[name])
        optimiser.load_state_dict(state)
    return first


def check_finite(plan: Plan, learning: Mapping[str, Tensor], rate: float) -> None:
    """Raises UserError when the last step left something that is not a number."""
    for name, value in learning.items():
        if not bool(value.isfinite().all()):
            raise UserError(f"{plan.name}: {name} is not finite after the last step; lower lr (now {rate:g})")


def replays(attack: Attack) -> int:
    """How often each batch is gone through."""
    return attack.replay if isinstance(attack, Free) else 1


def mix(seed: int, step: int) -> int:
    """One generator seed for (seed, step)."""
    return seed * 1_000_003 + step


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of n images in an epoch, the same on every machine."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, epoch)))
