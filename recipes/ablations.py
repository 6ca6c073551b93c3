"""Ablation of the reconstructed choices of CAPT and APD on the embedded backbone.

Command:  ADVTUNE_DATA=../shared/data python recipes/ablations.py --out runs/ablations
Hardware: two CPU cores, about an hour; minutes on an accelerator. Resumable: call it again.
Reads:    cifar10 and caltech101. Tunes on the `fit` part of the training images (16 shots; caltech101 has 12 a
          class there) and scores on their `val` part: test images are not touched, defaults are chosen here.
Obtained: docs/log.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from grid import Cell, work

from advtune.attacks import PGD

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


def cell(method: str, label: str, options: dict, data: str, seed: int, rate: float) -> Cell:
    slug = label.replace(":", "").replace(" ", "_")
    return Cell(
        f"choices/{data}/{method}/{slug}/lr{rate:g}/seed{seed}", method, data, (data,), SHOTS[data], seed, EPOCHS[data],
        {**SHORT, **options, "lr": rate}, attacks=(ATTACK,), part="fit", eval_part="val", limit=200,
    )  # fmt: skip


def tower(rate: float) -> Cell:
    return Cell(
        f"towers/tecoa/lr{rate:g}", "tecoa", "tinyimagenet", ("tinyimagenet",), epochs=1,
        options={"lr": rate, "batch_size": 64}, attacks=(ATTACK,), part="fit", eval_part="val",
        limit=200, train_limit=2000,
    )  # fmt: skip


def cells(stage: str, rate: float, data: list[str], seeds: int, only: list[str] | None = None) -> list[Cell]:
    """Learning rates first, one seed; then, at the rate chosen, each choice with its alternatives."""
    if stage == "towers":
        return [tower(rate) for rate in TOWER_RATES]
    if stage == "rates":
        return [cell(m, "base", {}, d, 0, r) for d in data for m in ("capt", "apd") for r in RATES]
    return [
        cell(method, label, options, d, seed, rate)
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
    work(
        cells(args.stage, args.rate, args.data, args.seeds, args.only),
        args.backbone,
        args.out / Path(args.backbone).name,
    )


if __name__ == "__main__":
    main()
