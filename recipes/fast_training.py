"""Cheaper training attacks beside each paper's, on the embedded backbone: what they cost and what accuracy they lose.

Command:  ADVTUNE_DATA=../shared/data python recipes/fast_training.py --out runs/fast-training
          ... --dry-run says what it would take; ... --stage cost measures seconds and image gradients of tuning;
          ... --stage lines adds both to benchmarks/results/bench.jsonl, of which docs/performance.md is made
Hardware: two CPU cores; minutes on an accelerator. Resumable: call it again.
Hours:    see --dry-run
Reads:    cifar10, 16 shots; scored on 500 test images by PGD-20 at 1/255 and 4/255. Nothing is chosen here: rates
          and batches are those of recipes/offline-few-shot.toml.
Obtained: docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from advtune import runs
from advtune.attacks import PGD
from advtune.clip import ImageTower
from advtune.cost import estimate
from advtune.data import load_task
from advtune.grid import work
from advtune.options import parse_eps
from advtune.protocols import Run, Slice
from advtune.report import render
from advtune.results import mean_and_spread, now, read, wilson, write_atomic
from advtune.train import tune

LINES, COST = Path(__file__).parents[1] / "benchmarks" / "results" / "bench.jsonl", "cost.jsonl"
DATA, SHOTS, EPOCHS, IMAGES = "cifar10", 16, 5, 500
ATTACKS = (PGD(eps=1 / 255, steps=20), PGD(eps=4 / 255, steps=20))
METHODS = {  # whose attack climbs a loss of labels, so that it can stop early
    "tecoa": {"lr": 0.001, "batch_size": 16},
    "capt": {"lr": 0.1, "batch_size": 8, "augment": False},
}
# label: the training attack's fields, and how many times the epochs
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "paper": ({}, 1),
    "early stop": ({"early_stop": True}, 1),
    "n-fgsm": ({"name": "n-fgsm"}, 1),
    "fgsm-rs": ({"steps": 1}, 1),  # with step 1.25 eps (arXiv:2001.03994)
    "free": ({"name": "free", "replay": 4}, 1),
    "free, 3 times the updates": ({"name": "free", "replay": 4}, 3),
}


def choice(method: str, label: str, eps: float, seed: int, backbone: str) -> Run:
    fields, times = VARIANTS[label]
    fields = {"eps": eps, **fields} | ({"step_size": 1.25 * eps} if label == "fgsm-rs" else {})
    return Run(
        method, DATA, (Slice(DATA, limit=IMAGES),), ATTACKS, shots=SHOTS, seed=seed, epochs=times * EPOCHS,
        options=METHODS[method], train_attack=fields, backbone=backbone, label=f"{method} {label}",
    )  # fmt: skip


def measure(wanted: list[Run], rounds: int, device: str, precision: str) -> list[dict[str, Any]]:
    """Processor seconds of tuning, the least of several rounds in turns, and the images whose gradient was taken."""
    count = 0

    def add(module: torch.nn.Module, _: Any, features: Any) -> None:
        nonlocal count
        count += len(features) if isinstance(module, ImageTower) and features.requires_grad else 0

    model, task = runs.load(wanted[0].backbone, device, precision), load_task(DATA)
    found = [{"run": run.label, "seconds": float("inf")} for run in wanted]
    torch.nn.modules.module.register_module_forward_hook(add)
    for _ in range(rounds):
        for run, facts in zip(wanted, found, strict=True):
            count, begin = 0, time.process_time()
            tune(run.method, model, task, shots=run.shots, seed=run.seed, epochs=run.epochs, options=run.options,
                 attack=run.train_attack, show=False)  # fmt: skip
            facts["seconds"] = min(facts["seconds"], round(time.process_time() - begin, 2))
            facts["gradients"] = count
    threads = torch.get_num_threads()
    here = {"device": runs.device_name(model.device), "precision": model.precision, "threads": threads}
    return [{**facts, **here, "versions": runs.versions()} for facts in found]


def lines(out: Path, methods: list[str]) -> list[dict[str, Any]]:
    """What was measured of each variant: means over the seeds and their spread, seconds and gradients of tuning."""
    costs = {cost["run"]: cost for cost in map(json.loads, (out / COST).read_text().splitlines())}
    found = []
    for method in methods:
        for label in VARIANTS:
            case = f"{method} {label}"
            rows = read(*sorted((out / DATA / case.replace(",", "").replace(" ", "-")).glob("*/results.jsonl")))
            by_eps = {eps: [row for row in rows if row.attack["eps"] == eps] for eps in (a.eps for a in ATTACKS)}
            line = {"part": "fast", "case": case, "method": method, "variant": label, "time": now(), **costs[case]}
            line |= {"seeds": len(by_eps[ATTACKS[0].eps]), "n": rows[0].clean["n"], "data": DATA, "shots": SHOTS}
            line["clean"] = over_seeds([row.clean for row in by_eps[ATTACKS[0].eps]])
            line["robust"] = [over_seeds([row.robust for row in own]) for own in by_eps.values()]
            found.append(line)
    return found


def over_seeds(found: list[dict[str, Any]]) -> dict[str, float | None]:
    """Mean and sample standard deviation of accuracies, and the 95 % Wilson interval over the images at the mean."""
    mean, deviation = mean_and_spread([each["accuracy"] for each in found])
    n = found[0]["n"]
    low, high = wilson(round(mean * n), n)
    return {"mean": mean, "deviation": deviation, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("accuracy", "cost", "lines"), default="accuracy")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--eps", default="1/255", help="of the training attack")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="of the stage `cost`")
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--out", type=Path, default=Path("runs/fast-training"))
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    eps, seeds = parse_eps(args.eps), range(1 if args.stage == "cost" else args.seeds)
    wanted = [choice(m, label, eps, s, args.backbone) for m in args.methods for label in VARIANTS for s in seeds]
    if args.dry_run:
        print(estimate(wanted, args.out, args.device, args.precision, False))
    elif args.stage == "cost":
        texts = [json.dumps(facts) for facts in measure(wanted, args.rounds, args.device, args.precision)]
        write_atomic(args.out / COST, "\n".join(texts) + "\n")
        print("\n".join(texts))
    elif args.stage == "lines":
        with LINES.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines(args.out, args.methods))
    else:
        outcome = work(wanted, args.out, device=args.device, precision=args.precision)
        print(render(outcome.rows, "markdown"))
        sys.exit(1 if outcome.failed else 0)


if __name__ == "__main__":
    main()
