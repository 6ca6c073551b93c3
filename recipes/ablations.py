"""Ablation of the reconstructed choices of CAPT and APD on the embedded backbone.

Command:  ADVTUNE_DATA=../shared/data python recipes/ablations.py --out runs/ablations
Hardware: two CPU cores, about an hour; minutes on an accelerator. Resumable: call it again.
Reads:    cifar10 and caltech101. Tunes on the `fit` part of the training images (16 shots; caltech101 has 12 a
          class there) and scores on their `val` part: test images are not touched, defaults are chosen here.
Obtained: docs/log.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from advtune.attacks import PGD
from advtune.grid import work
from advtune.protocols import Run, Slice

ATTACK = PGD(eps=1 / 255, steps=10)
SHOTS, EPOCHS = {"cifar10": 16, "caltech101": 12}, {"cifar10": 3, "caltech101": 1}
# The papers' recipes take tens of epochs at batch 32: small batches and no augmentation move the prompts in few.
SHORT = {"batch_size": 8, "augment": False}
CAPT = {
    "base": {},
    "lam=1": {"lam": 1.0},
    "direction=adversarial-first": {"direction": "adversarial-first"},
    "weight=constant": {"weight": "constant"},
    "weight=loss": {"weight": "loss"},
    "ce=adversarial": {"ce": "adversarial"},
    "ce=both": {"ce": "both"},
    "plain: lam=0 ce=adversarial": {"lam": 0.0, "ce": "adversarial"},
    "depth=1": {"depth": 1},
    "length=4": {"prompt_length": 4},
}
APD = {
    "base": {},
    "teacher=offline": {"teacher": "offline"},
    "teacher=frozen": {"teacher": "frozen"},
    "plain: distil=0 ce=1": {"teacher": "frozen", "distil": 0.0, "ce": 1.0},
}

RATES = (0.02, 0.1, 0.5)
TOWER_RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def choice(method: str, label: str, options: dict, data: str, seed: int, rate: float, backbone: str) -> Run:
    return Run(
        method, data, (Slice(data, part="val", limit=200),), (ATTACK,), part="fit", shots=SHOTS[data], seed=seed,
        epochs=EPOCHS[data], options={**SHORT, **options, "lr": rate}, backbone=backbone,
        label=f"{method} {label} lr={rate:g}",
    )  # fmt: skip


def tower(rate: float, backbone: str) -> Run:
    return Run(
        "tecoa", "tinyimagenet", (Slice("tinyimagenet", part="val", limit=200),), (ATTACK,), part="fit", epochs=1,
        limit=2000, options={"lr": rate, "batch_size": 64}, backbone=backbone, label=f"tecoa lr={rate:g}",
    )  # fmt: skip


def runs(stage: str, rate: float, data: list[str], seeds: int, backbone: str, only: list[str] | None) -> list[Run]:
    """Learning rates first, one seed; then, at the rate chosen, each choice with its alternatives."""
    if stage == "towers":
        return [tower(rate, backbone) for rate in TOWER_RATES]
    if stage == "rates":
        return [choice(m, "base", {}, d, 0, r, backbone) for d in data for m in ("capt", "apd") for r in RATES]
    return [
        choice(method, label, options, d, seed, rate, backbone)
        for d in data
        for seed in range(seeds)
        for method, table in (("capt", CAPT), ("apd", APD))
        for label, options in table.items()
        if not only or label in only
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("towers", "rates", "choices"), default="choices")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate of the stage `choices`")
    parser.add_argument("--only", nargs="+", help="only these labels")
    parser.add_argument("--data", nargs="+", default=["cifar10", "caltech101"], choices=list(SHOTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    args = parser.parse_args()
    wanted = runs(args.stage, args.rate, args.data, args.seeds, args.backbone, args.only)
    outcome = work(wanted, args.out / Path(args.backbone).name)
    sys.exit(1 if outcome.failed else 0)


if __name__ == "__main__":
    main()
