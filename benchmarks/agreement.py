"""Our attacks beside pyautoattack's, on one model and the same images: robust accuracy, images decided otherwise,
seconds and images that went through the model.

Command:  ADVTUNE_DATA=../shared/data python benchmarks/agreement.py runs/tecoa --data caltech101 --eps 4/255
Hardware: hours on two cores for a robust model, minutes on an accelerator. Adds a line to
          benchmarks/results/agreement.jsonl for each attack. Needs pyautoattack 0.2 (`make setup` installs it).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import advtune
from advtune import runs
from advtune.attacks import ATTACKS
from advtune.data import Split, load_images
from advtune.evaluation import task_for
from advtune.options import parse_eps
from advtune.results import accuracy, now
from advtune.withstand import withstand

NAMES = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "autoattack")
OUT = Path(__file__).parent / "results" / "agreement.jsonl"


class Counted(nn.Module):
    """f, with the images counted that it is asked about."""

    def __init__(self, f: Callable[[Tensor], Tensor]):
        super().__init__()
        self.f, self.images = f, 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.f(x)


def theirs(f: Counted, x: Tensor, y: Tensor, name: str, eps: float, norm: str, size: int) -> Tensor:
    """Which images stand under pyautoattack, over the whole set at once, as it is meant to be called."""
    from pyautoattack import AutoAttack

    logging.getLogger("auto-attack").setLevel(logging.CRITICAL)
    how = {"version": "standard"} if name == "autoattack" else {"version": "custom", "attacks": [name]}
    attack = AutoAttack(f, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0, device=x.device, **how)
    attack.apgd.n_restarts = attack.fab.n_restarts = 1
    x_adv = attack.run_standard_evaluation(x, y, batch_size=size)[0]
    with torch.no_grad():
        return torch.cat([f.f(z).argmax(1) == t for z, t in zip(x_adv.split(size), y.split(size), strict=True)]).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder or backbone")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eps", default="1/255")
    parser.add_argument("--norm", default="linf", choices=("linf", "l2"))
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--attacks", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    args = parser.parse_args()
    eps = parse_eps(args.eps)
    model = runs.load(args.model, "auto", args.precision)
    task = task_for(model, args.data)
    images = load_images(task, Split(limit=args.limit, resolution=model.side))
    with torch.no_grad():
        f = Counted(model.classifier(model.tokens(task.classes, task.template)))
        x, y = images.x.to(model.device).float() / 255, images.y.to(model.device)
        clean = torch.cat([f(z).argmax(1) for z in x.split(args.batch_size)]).cpu() == images.y
    for name in args.attacks:
        attack = dataclasses.replace(ATTACKS[name], eps=eps, norm=args.norm)
        begin, f.images = time.monotonic(), 0
        ours = withstand(f, images, clean, attack, args.batch_size, model.device, 0, True).stands
        our_cost = {"seconds": round(time.monotonic() - begin, 1), "images": f.images}
        begin, f.images = time.monotonic(), 0
        other = theirs(f, x, y, name, eps, args.norm, args.batch_size) & clean
        line = {
            "time": now(), "model": Path(args.model).name, "method": model.run.get("method", "zero-shot"),
            "backbone_sha256": model.origin.sha256, "data": args.data, "data_sha256": images.sha256,
            "attack": name, "norm": args.norm, "eps": eps, "batch_size": args.batch_size,
            "clean": accuracy(clean.tolist()), "ours": accuracy(ours.tolist()) | our_cost,
            "pyautoattack": accuracy(other.tolist())
            | {"seconds": round(time.monotonic() - begin, 1), "images": f.images},
            "decided_otherwise": int((ours != other).sum()), "precision": model.precision,
            "device": runs.device_name(model.device),
            "versions": runs.versions() | {"pyautoattack": version("pyautoattack")},
            "advtune": advtune.__version__,
        }  # fmt: skip
        OUT.parent.mkdir(exist_ok=True)
        with OUT.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"{name} eps {args.eps}: ours {line['ours']['accuracy']:.3f} in {line['ours']['seconds']} s, pyautoattack "
            f"{line['pyautoattack']['accuracy']:.3f} in {line['pyautoattack']['seconds']} s, "
            f"{line['decided_otherwise']} decided otherwise",
            flush=True,
        )


if __name__ == "__main__":
    main()
