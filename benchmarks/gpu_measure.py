"""What gpu.py measures with: backbones of random weights at CLIP's shapes, training and attack steps on them, the time,
operations and memory these take. No downloads, no data."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from advtune.attacks import PGD
from advtune.attacks.gradients import gradient
from advtune.clip import CLIP, ClipConfig, TowerConfig
from advtune.losses import cross_entropy
from advtune.methods import configure
from advtune.preprocess import Preprocess
from advtune.train import update
from advtune.vlm import VLM, Batch, Origin, native_bf16
from operations import CONTEXT, END, START, TASK, Words, operations

Row = dict[str, Any]

SHAPES = {  # patch, image tower and text tower (width, layers, heads), embedding; most important first
    "vit-b/16": (16, (768, 12, 12), (512, 12, 8), 512),
    "vit-b/32": (32, (768, 12, 12), (512, 12, 8), 512),
    "vit-l/14": (14, (1024, 24, 16), (768, 12, 12), 768),
}
TINY = ((48, 2, 2), (32, 2, 2), 32)  # towers and embedding of a trial
VOCABULARY = 49408  # CLIP's
STEPS = 10  # of an evaluation's PGD here
PIECES = {  # what a call of `evaluating` is made of, to count its operations
    "forward": {"forward": 1},
    "attack step": {"attack step": 1},
    f"pgd-{STEPS}": {"attack step": STEPS, "forward": 1},
}
GB = 1e9


@dataclass
class Bench:
    """What all parts share: arguments, device, where results go, and the last backbone that was made."""

    args: Namespace
    device: torch.device
    keep: Callable[[str, Row], None]  # adds a row to a part's results, on disk at once
    clip: tuple[str, CLIP] | None = None
    tuned: Any = None
    peaks: dict[str, float] = field(default_factory=dict)  # TFLOP/s of matrix products, by precision
    text_memory: float | None = None  # bytes of text graph; none: the device's quarter

    @property
    def small(self) -> bool:
        return bool(self.args.small)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precision(self) -> str:
        return "bf16" if native_bf16(self.device) else "fp32"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what nobody holds, and look for the peak of memory from here."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def backbone(self, shape: str, classes: int) -> VLM:
        """A frozen dual encoder of random weights in one of the SHAPES, with texts of so many classes."""
        if self.clip is None or self.clip[0] != shape:
            self.clip = None
            self.free()
            self.clip = (shape, made_clip(shape, self.small, self.device))
        model = VLM(self.clip[1], Words(classes), Origin(shape, ""))
        model.precision, model.text_memory = self.precision, self.text_memory
        return model


def made_clip(shape: str, small: bool, device: torch.device) -> CLIP:
    """CLIP's two towers with random weights; small: two narrow layers each and few patches."""
    patch, seeing, reading, embed = SHAPES[shape]
    side = 4 * patch if small else 224
    if small:
        seeing, reading, embed = TINY
    image, text = (TowerConfig(width, layers, heads, 4 * width) for width, layers, heads in (seeing, reading))
    pixels = Preprocess(resize=side, crop=side)
    torch.manual_seed(0)
    with torch.device(device):
        config = ClipConfig(image, text, embed, side, patch, VOCABULARY, CONTEXT, START, END, pixels)
        return CLIP(config).requires_grad_(False)


@contextmanager
def matrix_products(kind: str) -> Iterator[torch.dtype]:
    """fp32 products in full or, for tf32, in the matrix units' short form; yields the type to make them of."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        yield torch.bfloat16 if kind == "bf16" else torch.float32
    finally:
        torch.set_float32_matmul_precision(before)


def timed(bench: Bench, call: Callable[[], Any]) -> float:
    """Seconds of a call: the median of groups of calls between two waits, after some that warm up."""
    for _ in range(1 if bench.small else 3):
        call()

    def group(calls: int) -> float:
        bench.wait()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        bench.wait()
        return time.perf_counter() - begin

    once = group(1)
    if bench.small:
        return once
    seconds, taken = 1.5, []
    calls = max(1, int(seconds / 7 / once))
    while len(taken) < 3 or sum(taken) < seconds:
        taken.append(group(calls))
    return statistics.median(taken) / calls


def tflop(call: Callable[[], Any]) -> float:
    """TFLOP of the second call of two: in the first, texts that never change are encoded and kept."""
    call()
    return operations(call) / 1e12


def rates(bench: Bench, batch: int, call: Callable[[], Any], tflop: float) -> Row:
    """What a call takes and gives, beside the peak that was measured in this run."""
    bench.free()
    begin = time.perf_counter()
    call()
    bench.wait()
    first = time.perf_counter() - begin
    seconds = timed(bench, call)
    peak = bench.peaks.get(bench.precision)
    return {
        "batch": batch, "first_s": first, "ms": 1e3 * seconds, "per_s": 1 / seconds, "images_per_s": batch / seconds,
        "tflop": tflop, "tflops": tflop / seconds, "share_of_peak": tflop / seconds / peak if peak else None,
        "peak_gb": torch.cuda.max_memory_allocated() / GB if bench.cuda else None,
    }  # fmt: skip


def fitting(bench: Bench, batch: int, measure: Callable[[int], Row]) -> Row:
    """measure(batch), with half the images as often as the memory does not do; `asked` says what was wanted."""
    size = batch
    while size:
        try:
            return measure(size) | ({} if size == batch else {"asked": batch})
        except torch.OutOfMemoryError:
            size //= 2
        bench.free()
    return {"batch": 0, "asked": batch, "note": "out of memory at one image"}


def compile_towers(bench: Bench, *models: VLM) -> None:
    """Image towers behind torch.compile, as --compile does it; on a processor only traced."""
    for model in models:
        model.compiled = "inductor" if bench.cuda else "eager"


def steps_of(
    name: str, models: Mapping[str, VLM], size: int, classes: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A method's attack, loss and backward, and with the optimiser the loop's whole step, which asks once for the loss;
    at a rate of 0, so that the model stays what it is. What a method prepares once for all epochs is prepared."""
    method, recipe, attack = configure(name)
    student = models["student"]
    x = torch.rand(size, 3, student.side, student.side, device=student.device)
    y = torch.arange(size, device=student.device) % classes
    batch = Batch(x, y, {key: model.tokens(TASK.classes, TASK.template) for key, model in models.items()})
    if hasattr(method, "prepare") and not recipe.augment:
        batch.kept = {key: value.detach() for key, value in method.prepare(models, batch, attack).items()}
    learning = dict.fromkeys(p for model in models.values() for p in model.parameters() if p.requires_grad)
    plan = SimpleNamespace(name=name, method=method, attack=attack)
    whole = partial(update, plan, models, batch, recipe.optimiser(learning), 0.0, 0, torch.empty(0))
    return lambda: torch.stack(list(method.loss(models, batch, attack).values())).sum().backward(), whole


def training(bench: Bench, name: str, shape: str, classes: int, batch: int, compile: bool = False) -> Row:
    """A row of a method's training step, batch images and so many classes."""

    def measure(size: int) -> Row:
        models = configure(name)[0].setup(bench.backbone(shape, classes), TASK, 0)
        counted = {key: model.to("meta") for key, model in copy.deepcopy(models).items()}
        for model in counted.values():
            model.text_memory = None  # what memory makes it compute again is no work of the step's
        counted_tflop = tflop(steps_of(name, counted, size, classes)[0])
        if compile:
            compile_towers(bench, *models.values())
        return rates(bench, size, steps_of(name, models, size, classes)[1], counted_tflop)

    row = fitting(bench, batch, measure)
    return {"what": name, "shape": shape, "classes": classes, "precision": bench.precision, **row}


def evaluating(model: VLM, size: int) -> dict[str, Callable[[], Any]]:
    """What an evaluation does with a batch of images, by the names of PIECES; an attack step is an input's gradient."""
    with torch.no_grad():
        f = model.classifier(model.tokens(TASK.classes, TASK.template))
    x = torch.rand(size, 3, model.side, model.side, device=model.device)
    y = torch.zeros(size, dtype=torch.long, device=model.device)
    return {
        "forward": torch.no_grad()(lambda: f(x)),
        "attack step": lambda: gradient(f, x, y, cross_entropy),
        f"pgd-{STEPS}": partial(PGD(steps=STEPS, early_stop=False), f, x, y),
    }


def inference(bench: Bench, what: str, shape: str, batch: int, classes: int = 100, compile: bool = False) -> Row:
    """A row of one of PIECES, of the frozen model."""

    def measure(size: int) -> Row:
        model = bench.backbone(shape, classes)
        counted = evaluating(copy.deepcopy(model).to("meta"), size)
        counted_tflop = sum(times * tflop(counted[piece]) for piece, times in PIECES[what].items())
        if compile:
            compile_towers(bench, model)
        return rates(bench, size, evaluating(model, size)[what], counted_tflop)

    row = fitting(bench, batch, measure)
    return {"what": what, "shape": shape, "classes": classes, "precision": bench.precision, **row}
