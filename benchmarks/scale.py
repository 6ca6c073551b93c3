"""What tuning costs by method, backbone, classes and images: operations, memory and bytes between devices, counted on
tensors without content; and what ImageNet and 400 million images take on many devices.

Command:  python benchmarks/scale.py   counts into benchmarks/results/scale.json (minutes), tables into docs/scale.md;
          --tables: the tables alone; --check: does the page agree with the counts?
A step of B images and C classes costs `image` B + `class` C. Rates and prices are assumptions, named in the page.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import operations
from advtune import clip
from advtune.clip import ClipConfig, TowerConfig
from advtune.methods import METHODS, configure
from advtune.results import write_atomic
from advtune.vlm import Batch

ROOT = Path(__file__).resolve().parents[1]
COUNTS, PAGE = ROOT / "benchmarks" / "results" / "scale.json", ROOT / "docs" / "scale.md"
BENCH = ROOT / "benchmarks" / "results" / "bench.jsonl"
MARK = re.compile(r"(<!-- scale (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
SHAPES = {"B/32": (32, 768, 512), "B/16": (16, 768, 512), "L/14": (14, 1024, 768)}  # patch, image width, text width
METHODS_TUNED = [name for name in METHODS if name != "zero-shot"]
# Assumptions of the plan, not measurements: no accelerator has run this yet.
PEAK, SHARE = 989e12, 0.4  # bf16 operations a second of an H100 or H200 by its data sheet, and the share reached
WIRE = 50e9  # bytes a second of a device to others, both ways at once
PRICE = 2.5  # an hour of a device, in dollars
IMAGENET, LAION = 1_281_167, 400_000_000
OPTIMISER = {"sgd": 4, "adamw": 8}  # bytes of state for a weight
LOW = 0.62  # bytes held in bf16 for one in fp32: matrix products' inputs halve, sums and norms do not; see the check
Count = dict[str, float]


# --- counting ------------------------------------------------------------------------------------------------


def config(name: str) -> ClipConfig:
    """CLIP's ViT of this name, with few words."""
    patch, wide, narrow = SHAPES[name]
    layers = 24 if wide == 1024 else 12
    image = TowerConfig(wide, layers, wide // 64, 4 * wide)
    text = TowerConfig(narrow, 12, narrow // 64, 4 * narrow)
    return ClipConfig(image, text, narrow, 224, patch, 2000, 77, operations.START, operations.END)


def count(name: str, shape: str) -> Count:
    """`image` and `class`: operations; `held image` and `held class`: bytes of the largest graph, in fp32; `learned`:
    weights that learn. Of one step of the method with its paper's attack."""
    found: dict[tuple[int, int], tuple[float, float]] = {}
    learned = 0.0
    for batch, classes in ((2, 8), (4, 8), (2, 16)):
        vlm = operations.bare(config(shape), classes)
        found[batch, classes] = operations.step(vlm, name, batch), held(vlm, name, batch)
        method = configure(name, (), ())[0]
        models = method.setup(operations.light_copy(vlm), operations.TASK, 0)
        learned = sum(p.numel() for m in models.values() for p in m.parameters() if p.requires_grad)
    (a, a_held), (b, b_held), (c, c_held) = found.values()
    return {
        "image": (b - a) / 2, "class": max(0.0, c - a) / 8, "held image": (b_held - a_held) / 2,
        "held class": max(0.0, c_held - a_held) / 8, "learned": learned,
    }  # fmt: skip


def held(vlm: Any, name: str, batch: int) -> float:
    """The most bytes that autograd keeps at a time during a step."""
    method, _, attack = configure(name, (), ())
    models = {
        key: model.to("meta") for key, model in method.setup(operations.light_copy(vlm), operations.TASK, 0).items()
    }
    tokens = {key: model.tokens(["a"], operations.TASK.template) for key, model in models.items()}
    x, y = torch.rand(batch, 3, 224, 224, device="meta"), torch.zeros(batch, dtype=torch.long, device="meta")
    for key, model in models.items():
        model.text_features(tokens[key])
    with fused(), watched() as most:
        sum(method.loss(models, Batch(x, y, tokens), attack).values()).backward()  # type: ignore[union-attr]
    return most[0]


@contextmanager
def watched() -> Any:
    """The most bytes kept for backward at a time, in a list of one."""
    live, most, uses = [0], [0], Counter[int]()

    def drop(key: int, size: int) -> None:
        uses[key] -= 1
        if not uses[key]:
            live[0] -= size

    def keep(t: Tensor) -> list[Tensor]:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not uses[key]:
            live[0] += size
            most[0] = max(most[0], live[0])
        uses[key] += 1
        box = Box([t])
        weakref.finalize(box, drop, key, size)
        return box

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box[0]):
        yield most


class Box(list[Tensor]):
    """A list that can be watched as it goes."""


class Fused(torch.autograd.Function):
    """Attention as a fused kernel keeps it: inputs and output, no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


@contextmanager
def fused() -> Any:
    before = clip.attend
    clip.attend = lambda q, k, v, mask=None: Fused.apply(q, k, v)
    try:
        yield
    finally:
        clip.attend = before


# --- the page ----------------------------------------------------------------------------------------------------

Row = Sequence[str]


def table(head: Row, rows: Sequence[Row]) -> str:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, marks, *rows))


def short(value: float) -> str:
    return "0" if value < 0.005 else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def model(counts: dict[str, dict[str, Count]]) -> str:
    """Per method and backbone: GFLOP and MB an image and a class."""
    head = ["Method", *(f"{shape}: {what}" for shape in SHAPES for what in ("GFLOP image + class", "MB image + class"))]
    rows = []
    for name in METHODS_TUNED:
        cells = [name]
        for shape in SHAPES:
            c = counts[shape][name]
            cells.append(f"{short(c['image'] / 1e9)} + {short(c['class'] / 1e9)}")
            cells.append(f"{short(LOW * c['held image'] / 1e6)} + {short(LOW * c['held class'] / 1e6)}")
        rows.append(cells)
    return table(head, rows)


def checked(counts: dict[str, dict[str, Count]]) -> str:
    """Predicted beside measured: memory of a class and of steps, seconds of steps, from bench.jsonl's last lines."""
    lines = {}
    for text in BENCH.read_text().splitlines():
        line = json.loads(text)
        lines[line["part"], line["case"]] = line
    b32, rows = counts["B/32"], []
    one, many = lines["memory", "ours 200 apt"], lines["memory", "ours 1000 apt"]
    seen = (many["peak"] - one["peak"]) / 800 * 1e3
    rows.append(
        ["memory of a class, APT, B/32, bf16", f"{LOW * b32['apt']['held class'] / 1e6:.2f} MB", f"{seen:.2f} MB"]
    )
    fap = lines["memory", "ours 1000 fap"]
    expected = LOW * (1000 * b32["fap"]["held class"] + 4 * b32["fap"]["held image"]) / 1e9
    rows.append(
        [
            "memory of a step beyond the model, FAP, 4 images, 1000 classes",
            f"{expected:.2f} GB",
            f"{fap['peak'] - fap['before']:.2f} GB",
        ]
    )
    rates = {}
    for name in ("tecoa", "fap"):
        line = lines["training", f"{name} B/32"]
        work = line["batch"] * b32[name]["image"] + line["classes"] * b32[name]["class"]
        rates[name] = [work / line["seconds"][way] / 1e9 for way in ("ours", "ours_bf16")]
    for i, way in enumerate(("fp32", "bf16")):
        rows.append([
            f"GFLOP/s of a step of TeCoA and of FAP, {way}, one thread", "the same, if operations are what counts",
            f"{rates['tecoa'][i]:.0f}, {rates['fap'][i]:.0f}",
        ])  # fmt: skip
    return table(["What", "Model", "Measured"], rows)


def hours(c: Count, images: float, classes: int, passes: float, batch: int, devices: int) -> tuple[float, float]:
    """Hours, and the share of one device's speed that each of many keeps. Images are shared out, class texts are
    not: every device encodes all of them; gradients are summed over the devices once a step."""
    each = batch / devices
    work = each * c["image"] + classes * c["class"]
    talk = 8 * c["learned"] * (devices - 1) / devices / WIRE if devices > 1 else 0.0  # fp32, there and back
    step = work / (PEAK * SHARE) + talk
    alone = (batch * c["image"] + classes * c["class"]) / (PEAK * SHARE) / devices
    return images * passes / batch * step / 3600, alone / step


def plan(counts: dict[str, dict[str, Count]], names: Sequence[str], images: int, classes: int, least: int) -> str:
    """Hours, price and efficiency of the recipe's epochs on 8, 64 and 512 devices. least: images on a device."""
    head = ["Method, backbone", "Epochs", *(f"{k} devices: batch, hours, $, efficiency" for k in (8, 64, 512))]
    rows = []
    for name in names:
        recipe = configure(name, (), ())[1]
        passes = recipe.epochs if images == IMAGENET else 1
        for shape in SHAPES:
            cells = [f"{name}, {shape}", str(passes)]
            for devices in (8, 64, 512):
                batch = max(recipe.batch_size, least * devices)
                time, share = hours(counts[shape][name], images, classes, passes, batch, devices)
                cells.append(f"{batch:,}, {short(time)} h, ${short(time * devices * PRICE)}, {100 * share:.0f} %")
            rows.append(cells)
    return table(head, rows)


def stored(counts: dict[str, dict[str, Count]]) -> str:
    """Bytes: of what learns, of its optimiser's state, between devices in a step."""
    rows = []
    for name in METHODS_TUNED:
        state = OPTIMISER[configure(name, (), ())[1].optimizer]
        cells = []
        for shape in SHAPES:
            n = counts[shape][name]["learned"] / 1e6
            cells.append(f"{short(4 * n)} + {short(state * n)}, {short(8 * n)}")
        rows.append([name, *cells])
    return table(["Method", *(f"{s}: MB learned + state, between devices" for s in SHAPES)], rows)


TABLES: dict[str, Callable[[dict[str, dict[str, Count]]], str]] = {
    "model": model,
    "check": checked,
    "bytes": stored,
    "imagenet": lambda c: plan(c, ("tecoa", "fare", "pmg-aft", "fap", "capt", "apd"), IMAGENET, 1000, 32),
    "laion": lambda c: plan(c, ("fare",), LAION, 0, 64),
}


def written(page: str, counts: dict[str, dict[str, Count]]) -> str:
    return MARK.sub(lambda m: f"{m[1]}\n{TABLES[m[2]](counts)}\n\n{m[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="write the tables from the counts that are there")
    parser.add_argument("--check", action="store_true", help="only say whether the page agrees with the counts")
    args = parser.parse_args()
    if not (args.tables or args.check):
        counted: dict[str, dict[str, Count]] = {}
        for shape in SHAPES:
            for name in METHODS_TUNED:
                counted.setdefault(shape, {})[name] = count(name, shape)
                print(f"{shape} {name} {counted[shape][name]}", file=sys.stderr, flush=True)
        write_atomic(COUNTS, json.dumps(counted, indent=1) + "\n")
    page, counts = PAGE.read_text(), json.loads(COUNTS.read_text())
    new = written(page, counts)
    if args.check and new != page:
        raise SystemExit("docs/scale.md does not agree with its counts: python benchmarks/scale.py --tables")
    if not args.check:
        write_atomic(PAGE, new)


if __name__ == "__main__":
    main()
