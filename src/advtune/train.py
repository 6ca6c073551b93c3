"""The one training loop."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advtune import runs
from advtune.attacks import PGD
from advtune.augment import crop_and_flip
from advtune.data import Images, Split, Task, load_images, load_task
from advtune.errors import UserError
from advtune.methods import Method, configure
from advtune.options import as_options, describe
from advtune.progress import progress
from advtune.recipe import Recipe
from advtune.results import write_atomic
from advtune.vlm import VLM, Batch

Options = Sequence[str] | Mapping[str, Any]
CHECKPOINT_SECONDS = 60


@dataclass(frozen=True)
class Plan:
    """A training run, fully specified: what is trained, how, on what."""

    name: str
    method: Method
    recipe: Recipe
    attack: PGD
    backbone: VLM
    task: Task
    template: str
    split: Split
    seed: int

    def config(self, images: Images, notes: list[str]) -> dict[str, Any]:
        """What config.json and every result row say of the run."""
        facts = describe(self.method)
        return {
            "method": self.name,
            "options": as_options(self.method),
            "reconstructed": [fact["name"] for fact in facts if fact["reconstructed"]],
            "recipe": as_options(self.recipe),
            "attack": {"name": "pgd", **as_options(self.attack), "step_size": self.attack.step},
            "train": {
                "spec": self.task.spec,
                "name": self.task.name,
                **asdict(self.split),
                "seed": self.seed,
                "n": len(images.y),
                "sha256": images.sha256,
                "classes": list(self.task.classes),
                "template": self.template,
                "skipped": images.skipped,
            },
            "backbone": runs.backbone_facts(self.backbone),
            "preprocess": {},
            "precision": self.backbone.precision,
            "device": runs.device_name(self.backbone.device),
            "versions": runs.versions(),
            "notes": notes,
        }


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
    show: bool = True,
) -> VLM:
    """Tune a backbone with a method on labelled images; the tuned model, which `evaluate` takes.

    options and attack: `key=value` texts or a mapping, for the method's and recipe's fields and for the
    training attack's. shots: images a class, none for all. With `out`, a run folder is written; while it is
    being made it is called OUT.partial, and `resume` goes on from there to the same bits. Raises UserError on
    bad input, before anything is written, and on a loss that is not finite.
    """
    chosen, recipe, pgd = configure(method, options, attack)
    if method == "zero-shot":
        raise UserError("zero-shot trains nothing; use: advtune evaluate zero-shot")
    if epochs is not None:
        _, recipe, _ = configure(method, {**as_options(recipe), "epochs": epochs})
    folder = None if out is None else claim(Path(out), resume, overwrite)
    model = runs.load(backbone) if isinstance(backbone, str) else backbone
    task = load_task(data) if isinstance(data, str) else data
    side = model.side if resolution is None else resolution
    split = Split(part=part, shots=shots, seed=seed, limit=limit, resolution=side, on_bad=on_bad)
    plan = Plan(method, chosen, recipe, pgd, model, task, task.template, split, seed)
    if out is not None and folder is None:  # finished before, and asked to resume
        return runs.load(str(out), str(model.device), model.precision)
    images = load_images(task, split, progress=show)
    student, config = fit(plan, images, folder, resume, show)
    if out is not None and folder is not None:
        finish(folder, Path(out), student, config)
        config["folder"] = Path(out).name
    student.run = config
    return student


def claim(out: Path, resume: bool, overwrite: bool) -> Path | None:
    """The folder to work in, OUT.partial; none if a resumed run is finished. Nothing is made or removed yet.

    Raises UserError when OUT or OUT.partial is there and neither resume nor overwrite was asked for.
    """
    partial = out.with_name(out.name + ".partial")
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other; give one")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give --out a folder")
    if out.exists() and resume and runs.is_run(out):
        return None
    for taken in (out, partial):
        if taken.exists() and not (overwrite or (resume and taken is partial)):
            raise UserError(
                f"{taken} exists; go on with --resume, replace it with --overwrite, or choose another --out"
            )
    return partial


def finish(partial: Path, out: Path, student: VLM, config: dict[str, Any]) -> None:
    """Write the result, drop the checkpoint, and give the folder its name."""
    runs.write_run(partial, student, config)
    (partial / "checkpoint.pt").unlink(missing_ok=True)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


def fit(plan: Plan, images: Images, folder: Path | None, resume: bool, show: bool) -> tuple[VLM, dict[str, Any]]:
    """Run the plan; the student in eval mode and its config. Deterministic in the plan, whether resumed or not."""
    models = plan.method.setup(plan.backbone, plan.template, plan.seed)
    learning = {f"{m}.{n}": p for m, vlm in models.items() for n, p in vlm.named_parameters() if p.requires_grad}
    optimiser = plan.recipe.optimiser(learning.values())
    size, recipe = min(plan.recipe.batch_size, len(images.y)), plan.recipe
    per_epoch = math.ceil(len(images.y) / size)
    cycle = per_epoch * recipe.epochs
    steps = cycle * plan.method.cycles
    tokens = {name: vlm.tokens(plan.task.classes, plan.template) for name, vlm in models.items()}
    config = plan.config(images, notes_on(plan, models, cycle))
    config["preprocess"] = asdict(models["student"].clip.config.preprocess)
    log = Log(folder, config, resume)
    first = log.restore(learning, optimiser)
    x = images.x.to(plan.backbone.device)
    y = images.y.to(plan.backbone.device)
    with (
        progress(f"{plan.name} on {plan.task.name}", steps - first, show=show) as advance,
        torch.random.fork_rng(),
    ):
        for step in range(first, steps):
            rows = epoch_order(len(y), plan.seed, step // per_epoch)[(step % per_epoch) * size :][:size].to(y.device)
            torch.manual_seed(mix(plan.seed, step))
            pixels = x[rows].float() / 255
            if recipe.augment:
                pixels = crop_and_flip(pixels)
            batch = Batch(pixels, y[rows], tokens, cycle=step // cycle)
            rate = recipe.rate(step % cycle, cycle, per_epoch)
            terms = update(plan, models, batch, optimiser, rate, step)
            log.step({"step": step, "epoch": step // per_epoch, "lr": rate, **terms}, learning, optimiser)
            advance(note=" ".join(f"{name} {value:.3f}" for name, value in terms.items()))
    log.close()
    return models["student"].eval(), config


def update(
    plan: Plan,
    models: Mapping[str, VLM],
    batch: Batch,
    optimiser: torch.optim.Optimizer,
    rate: float,
    step: int,
) -> dict[str, float]:
    """One optimiser step; the loss terms as numbers. Raises UserError naming the term that is not finite."""
    terms = plan.method.loss(models, batch, plan.attack)
    values = {name: float(term.detach()) for name, term in terms.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{plan.name}: the loss term {name!r} is {value} at step {step}; lower lr (now {rate:g})")
    optimiser.zero_grad(set_to_none=True)
    torch.stack(list(terms.values())).sum().backward()
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    return values


def mix(seed: int, step: int) -> int:
    """One generator seed for (seed, step)."""
    return seed * 1_000_003 + step


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of n images in an epoch, the same on every machine."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, epoch)))


def notes_on(plan: Plan, models: Mapping[str, VLM], steps: int) -> list[str]:
    """What a reader of the row should know about this run."""
    notes = []
    if plan.recipe.warmup > steps // 10:
        notes.append(f"warm-up of {plan.recipe.warmup} steps cut to {steps // 10} of {steps}")
    prompts = models["student"].prompts
    wanted = as_options(plan.method).get("depth")
    if prompts is not None and wanted:
        depths = [len(p) for p in prompts() if p is not None]
        if min(depths) < wanted:
            notes.append(f"prompt depth {wanted} cut to {'/'.join(map(str, depths))} (text/image layers)")
    return notes


class Log:
    """train.jsonl and the checkpoint of a run being made; does nothing without a folder."""

    def __init__(self, folder: Path | None, config: dict[str, Any], resume: bool):
        self.folder, self.resume = folder, resume
        self.saved = 0.0
        if folder is None:
            return
        before = folder / runs.CONFIG
        if resume and before.is_file() and comparable(json.loads(before.read_text())) != comparable(config):
            raise UserError(f"{folder}: was started with other settings; resume with the same, or --overwrite")
        if not resume and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(before, json.dumps(config, indent=1) + "\n")

    def restore(self, learning: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> int:
        """Load the checkpoint, if there is one; the step to go on with."""
        first = 0
        if self.folder is None:
            return first
        path = self.folder / "checkpoint.pt"
        lines: list[str] = []
        if self.resume and path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, value in learning.items():
                value.data.copy_(state["learning"][name])
            optimiser.load_state_dict(state["optimiser"])
            first = state["step"]
            lines = (self.folder / runs.LOG).read_text().splitlines(keepends=True)[:first]
        write_atomic(self.folder / runs.LOG, "".join(lines))
        self.stream = (self.folder / runs.LOG).open("a")
        return first

    def step(self, line: dict[str, Any], learning: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
        """Append one line; every CHECKPOINT_SECONDS, save what is needed to go on."""
        if self.folder is None:
            return
        self.stream.write(json.dumps(line) + "\n")
        now = time.monotonic()
        if now - self.saved < CHECKPOINT_SECONDS:
            return
        self.saved = now
        self.stream.flush()
        state = {"step": line["step"] + 1, "learning": {k: v.detach() for k, v in learning.items()}}
        beside = self.folder / "checkpoint.tmp"
        torch.save({**state, "optimiser": optimiser.state_dict()}, beside)
        beside.replace(self.folder / "checkpoint.pt")

    def close(self) -> None:
        if self.folder is not None:
            self.stream.close()


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what may differ between two sittings of one run."""
    return {k: v for k, v in json.loads(json.dumps(config)).items() if k not in ("versions", "device")}
