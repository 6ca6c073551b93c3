"""What an accelerator gives: correctness in bf16, speed and memory at CLIP's sizes, and AutoAttack on tuned runs.

Command:  python benchmarks/gpu.py --out OUT [--runs runs/demo/tecoa ...] [--data fashion-mnist-mini] [--minutes 8]
Hardware: one GPU; `--device cpu --small` tries it anywhere. Writes OUT/gpu.json, and rows for each run to
          OUT/results.jsonl as they are done; stops starting runs after --minutes. Weights are random where speed alone
          is asked for: ViT-B/32, B/16 and L/14 shapes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import advtune
from advtune import results, runs
from advtune.attacks import PGD, AutoAttack
from advtune.clip import CLIP, ClipConfig, TowerConfig
from advtune.data import Split, load_images
from advtune.evaluation import evaluate_curve, task_for
from advtune.losses import cross_entropy

SHAPES = {  # patch, side, image width, layers, heads
    "vit-b/32": (32, 224, 768, 12, 12),
    "vit-b/16": (16, 224, 768, 12, 12),
    "vit-l/14": (14, 224, 1024, 24, 16),
}


def shape(name: str, small: bool) -> CLIP:
    """A dual encoder of random weights with CLIP's image tower; the text tower is not used."""
    patch, side, width, layers, heads = SHAPES[name]
    image = TowerConfig(width=width, layers=2 if small else layers, heads=heads, mlp=4 * width, activation="quick_gelu")
    text = TowerConfig(width=64, layers=1, heads=1, mlp=64, activation="quick_gelu")
    return CLIP(ClipConfig(image, text, 512, side, patch, 100, 77, 98, 99))


def timed(step: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds a call takes, after three that warm up."""
    for _ in range(3):
        step()
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    begin, calls = time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        step()
        wait()
        calls += 1
    return (time.monotonic() - begin) / calls


def speed(name: str, device: torch.device, small: bool, batch: int, seconds: float) -> dict[str, Any]:
    """Images a second of a forward, a PGD-10 evaluation and a PGD-2 training step of the image tower, in bf16."""
    clip = shape(name, small).to(device)
    x = torch.rand(batch, 3, 224, 224, device=device)
    y = torch.randint(0, 100, (batch,), device=device)
    text = torch.nn.functional.normalize(torch.randn(100, 512, device=device), dim=-1)

    def f(z: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            features = clip.encode_image(z)
        return 100 * torch.nn.functional.normalize(features.float(), dim=-1) @ text.T

    def train() -> None:
        x_adv = PGD(steps=2, keep="last", early_stop=False)(f, x, y)
        cross_entropy(f(x_adv), y).mean().backward()
        clip.zero_grad()

    found: dict[str, Any] = {"batch": batch}
    clip.requires_grad_(False)
    attack = PGD(steps=10, early_stop=False)
    with torch.no_grad():
        found["forward_per_second"] = batch / timed(lambda: f(x), device, seconds)
    found["pgd10_per_second"] = batch / timed(lambda: attack(f, x, y), device, seconds)
    clip.image.requires_grad_(True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found["pgd2_training_per_second"] = batch / timed(train, device, seconds)
    found["training_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {key: round(value, 2) if value else value for key, value in found.items()}


def correctness(name: str, data: str, device: str, limit: int) -> dict[str, Any]:
    """fp32 here beside bf16 here and fp32 on the processor: logits, and which images stand under PGD-20."""
    task = task_for(runs.load(name, "cpu"), data)
    logits, stands = {}, {}
    for key, where, precision in (("cpu", "cpu", "fp32"), ("fp32", device, "fp32"), ("bf16", device, "bf16")):
        model = runs.load(name, where, precision)
        images = load_images(task, Split(limit=limit, resolution=model.side), progress=False)
        x, y = images.x.to(model.device).float() / 255, images.y.to(model.device)
        with torch.no_grad():
            f = model.classifier(model.tokens(task.classes, task.template))
            logits[key] = f(x).cpu()
        torch.manual_seed(0)
        x_adv = PGD(1 / 255, 20)(f, x, y)
        with torch.no_grad():
            stands[key] = ((f(x).argmax(1) == y) & (f(x_adv).argmax(1) == y)).cpu()
    return {
        "n": limit,
        "logits_fp32_minus_cpu": float((logits["fp32"] - logits["cpu"]).abs().max()),
        "logits_bf16_minus_fp32": float((logits["bf16"] - logits["fp32"]).abs().max()),
        "robust": {key: int(value.sum()) for key, value in stands.items()},
        "decided_otherwise_bf16_fp32": int((stands["bf16"] != stands["fp32"]).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", nargs="*", default=[])
    parser.add_argument("--data", nargs="+", default=["fashion-mnist-mini"])
    parser.add_argument("--eps", nargs="+", type=float, default=[1, 4], help="n of n/255")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="two layers, short timings: a trial of the script")
    args = parser.parse_args()
    begin = time.monotonic()
    device = torch.device(runs.check_device(args.device))
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"device": runs.device_name(device), "versions": runs.versions(), "speed": {}}
    found["correctness"] = correctness((args.runs or ["mini"])[0], args.data[0], str(device), min(200, args.limit))
    for name in SHAPES:
        found["speed"][name] = speed(name, device, args.small, args.batch, 0.1 if args.small else 3)
        results.write_atomic(args.out / "gpu.json", json.dumps(found, indent=1) + "\n")
    for name in args.runs:
        for data in args.data:
            if time.monotonic() - begin > 60 * args.minutes:
                print(f"left for another time: {name} on {data}", flush=True)
                continue
            attack = replace(AutoAttack(), eps=args.eps[0] / 255)
            curve = [n / 255 for n in args.eps]
            model = advtune.load(name, str(device))
            how = {"limit": args.limit, "batch_size": args.batch, "out": args.out}  # a row is written as it is done
            for row in evaluate_curve(model, data, attack, curve, **how):
                print(name, data, row.attack["eps"], row.clean["accuracy"], row.robust["accuracy"], flush=True)


if __name__ == "__main__":
    main()
