"""Learning rates of every method on the embedded backbone, chosen before any table is made.

Command:  ADVTUNE_DATA=../shared/data python recipes/rates.py --out runs/rates
Hardware: one CPU core, half an hour; minutes on an accelerator. Resumable: call it again.
Reads:    cifar10, 16 images a class of the `fit` part of the training images, 200 of their `val` part to score; test
          images are not touched. The papers' rates are for CLIP's logit scale of 100 and tens of epochs.
Obtained: docs/log.md; the rates chosen stand in recipes/offline-*.toml.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from advtune.attacks import PGD
from advtune.grid import work
from advtune.methods import METHODS, configure
from advtune.protocols import Run, Slice, attacks_in_training

ATTACK = PGD(eps=1 / 255, steps=10)
PROMPTS = {"batch_size": 8, "augment": False}
TOWER = {"batch_size": 16}
RATES = {"tower": (3e-4, 1e-3, 3e-3), "adamw": (1e-4, 3e-4, 1e-3), "frame": (1.0, 10.0, 40.0), "": (0.02, 0.1, 0.5)}


def kind(method: str) -> str:
    """Which rates a method is tried with: of a tower, of a tower under AdamW, of a frame of pixels, of prompts."""
    if "frame" in METHODS[method].trains:
        return "frame"
    if METHODS[method].trains != "image tower":
        return ""
    return "adamw" if configure(method)[1].optimizer == "adamw" else "tower"


def tries(method: str, epochs: int) -> list[Run]:
    group, found = kind(method), []
    for rate in RATES[group]:
        options: dict[str, Any] = {**(TOWER if group in ("tower", "adamw") else PROMPTS), "lr": rate}
        found.append(
            Run(
                method, "cifar10", (Slice("cifar10", part="val", limit=200),), (ATTACK,), part="fit", shots=16,
                epochs=epochs, options=options, label=f"{method} lr={rate:g}",
                train_attack={"eps": 1 / 255} if attacks_in_training(method) else {},
            )
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=[m for m in METHODS if m != "zero-shot"])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/rates"))
    args = parser.parse_args()
    outcome = work([run for method in args.methods for run in tries(method, args.epochs)], args.out)
    for row in outcome.rows:
        clean, robust = row.clean["accuracy"], (row.robust or row.clean)["accuracy"]
        print(f"{row.method:9} lr={row.recipe['lr']:<7g} clean {100 * clean:5.1f} robust {100 * robust:5.1f}")
    sys.exit(1 if outcome.failed else 0)


if __name__ == "__main__":
    main()
