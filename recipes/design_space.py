"""The design space of guided tuning, a stage at a time, on validation images alone.

Command:  ADVTUNE_DATA=../shared/data python recipes/design_space.py --stage trainable --out runs/design-space
          then --stage baselines, guide, adversary, weights; each stage begins from what CHOSEN says of those before it;
          --stage transfer, and further laid over it, stand apart from these.
Hardware: two CPU cores, about an hour a stage; minutes on an accelerator. Resumable: call it again.
Reads:    cifar10 and fashion-mnist, 16 images a class of the `fit` part of their training images; 200 of the `val` part
          to score, clean and PGD-20 at 1/255. transfer and further tune on the first half of tinyimagenet's classes
          and score 400 images of each half. Test images are not touched.
Budget:   every candidate sees the images as often as CAPT and APD do here: 5 epochs; in transfer 4,000 images once.
          docs/scale.md counts a step.
Obtained: docs/log.md, every candidate, those that failed too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from advtune.attacks import PGD
from advtune.grid import work
from advtune.protocols import ZERO_SHOT, Run, Slice
from advtune.results import Row, mean_and_spread

DATA = ("cifar10", "fashion-mnist")
TRANSFER, HALVES, IMAGES = "tinyimagenet", ("base", "new"), 4000
ATTACK = PGD(eps=1 / 255, steps=20)
EPOCHS = 5
AWAY = ("transfer", "further")  # stages tuned on one half of a set's classes, scored on both
SHORT = {"batch_size": 8, "augment": False}
PLAIN = {"guide": "none", "consistency": 0.0}  # adversarial cross-entropy alone
FRAME = {
    "trainable": "low-rank",
    "guide": "frozen",
    "sees": "clean",
    "lam": 1.0,
    "consistency": 1.0,
}  # named: defaults may move
Options = Mapping[str, Any]

# What stages before decided, from the log; a stage's candidates are laid over it.
CHOSEN: dict[str, Options] = {
    "guide": {"trainable": "low-rank", "lr": 3e-3},
    "adversary": {"trainable": "low-rank", "lr": 3e-3, "guide": "none"},
    "weights": {"trainable": "low-rank", "lr": 3e-3, "guide": "none"},
    "further": {"trainable": "low-rank", "lr": 3e-3, "sees": "adversarial", "batch_size": 32},
}
RATES = {
    "text-prompts": ("sgd", (0.02, 0.1)), "image-prompts": ("sgd", (0.02, 0.1)), "prompts": ("sgd", (0.02, 0.1)),
    "low-rank": ("adamw", (3e-4, 1e-3, 3e-3, 1e-2)), "image-tower": ("adamw", (1e-5, 3e-5, 1e-4)),
}  # fmt: skip


def trainable() -> dict[str, Options]:
    return {
        f"{what} lr={rate:g}": {**PLAIN, "trainable": what, "optimizer": optimizer, "lr": rate}
        for what, (optimizer, rates) in RATES.items()
        for rate in rates
    }


def guide() -> dict[str, Options]:
    found: dict[str, Options] = {"none": PLAIN, "none, consistency": {"guide": "none"}}
    found["none, consistency 3"] = {"guide": "none", "consistency": 3.0}
    for (g, more), sees in product(
        (("frozen", {}), ("online", {}), ("average", {"average": 0.9})), ("clean", "adversarial")
    ):
        found[f"{g} sees {sees}"] = {"guide": g, "sees": sees, **more}
    for match in ("features", "relations"):
        found[f"frozen, {match}"] = {"match": match}
    found["frozen, confidence"] = {"weight": "confidence", "lam": 2.0, "consistency": 2.0}
    found["frozen, adversarial-first"] = {"direction": "adversarial-first"}
    found["frozen, temperature 2"] = {"temperature": 2.0}
    found["frozen, ce both"] = {"ce": "both"}
    found["frozen, ce clean"] = {"ce": "clean", "consistency": 3.0}
    return found


def adversary() -> dict[str, Options]:
    found: dict[str, Options] = {who: {"adversary": who} for who in ("ce", "kl", "features")}
    found["guide"] = {"adversary": "guide", "guide": "frozen"}
    found["single-step"] = {"attack": {"name": "n-fgsm"}}
    found["eps 1.5"] = {"attack": {"eps": 1.5 / 255}}
    found["eps 2"] = {"attack": {"eps": 2 / 255}}
    return found


def weights() -> dict[str, Options]:
    found: dict[str, Options] = {f"ema {decay:g}": {"average": decay} for decay in (0.9, 0.99)}
    found |= {f"interpolate {share:g}": {"interpolate": share} for share in (0.6, 0.8)}
    return found | {f"rank {rank}": {"rank": rank} for rank in (2, 32)}


def baselines() -> dict[str, Options]:
    """What is to be beaten, at the rates of docs/log.md and as many epochs."""
    prompts = {name: {"method": name, "lr": 0.1} for name in ("capt", "apd", "fap", "advmaple", "advvlp")}
    towers = {"tecoa": 1e-3, "pmg-aft": 1e-3, "tga-zsr": 3e-3}
    return prompts | {name: {"method": name, "lr": rate, "batch_size": 16} for name, rate in towers.items()}


def transfer() -> dict[str, Options]:
    """Towers tuned on one set, for others: the untuned one, what is to be beaten, and what is ours."""
    usual = {"sgd": (3e-3,), "adamw": (1e-5, 3e-5, 1e-4, 3e-4)}
    rivals = dict.fromkeys(("tecoa", "pmg-aft", "tga-zsr"), usual)
    rivals |= {
        "agft": {"sgd": (3e-4, 1e-3), "adamw": (3e-6, 1e-5, 3e-5, 1e-4)},
        "fare": {"adamw": (3e-5, 1e-4, 3e-4)},
    }  # AGFT falls apart at the others' rates: docs/log.md
    found: dict[str, Options] = {ZERO_SHOT: {"method": ZERO_SHOT}}
    for name, of_it in rivals.items():
        for optimizer, lr in ((optimizer, lr) for optimizer, each in of_it.items() for lr in each):
            own = {"method": name, "optimizer": optimizer, "lr": lr, "batch_size": 32}
            found[f"{name} {optimizer} lr={lr:g}"] = own
    guides = {
        "plain": PLAIN,
        "consistency": {"guide": "none"},
        "clean guide": {},
        "guide sees x'": {"sees": "adversarial"},
    }
    for what, lr in (("low-rank", 1e-3), ("low-rank", 3e-3), ("image-tower", 1e-4)):
        for name, guide in guides.items():
            found[f"{what} lr={lr:g}, {name}"] = {"trainable": what, "lr": lr, "batch_size": 32, **guide}
    return found


def further() -> dict[str, Options]:
    """Laid over one of transfer's best: how much guidance and of what, weights between, a larger eps."""
    alone = {"consistency": 0.0, "sees": "clean"}
    found: dict[str, Options] = {
        "guide 3": {"lam": 3.0},
        "guide 3, no consistency": {"lam": 3.0, "consistency": 0.0},
        "guide 3, sees clean": {"lam": 3.0, "sees": "clean"},
        "guide 3, sees clean, no consistency": {**alone, "lam": 3.0},
        "guide 10, no consistency": {"lam": 10.0, "consistency": 0.0},
        "features 10, no consistency": {**alone, "match": "features", "lam": 10.0},
        "features alone": {**alone, "match": "features", "ce": "none", "adversary": "guide"},
        "logits alone": {**alone, "ce": "none", "adversary": "guide"},
        "tower": {"trainable": "image-tower", "lr": 1e-4, "lam": 3.0},
        "ema 0.98": {"average": 0.98},
        "interpolate 0.8": {"interpolate": 0.8},
        "eps 1.5": {"attack": {"eps": 1.5 / 255}},
        "eps 2, interpolate 0.7": {"attack": {"eps": 2 / 255}, "interpolate": 0.7},
        "eps 2, guide 3": {"attack": {"eps": 2 / 255}, "lam": 3.0},
    }
    features = found["features alone"]
    found |= {f"features alone, eps {eps:g}": {**features, "attack": {"eps": eps / 255}} for eps in (1.5, 2)}
    found["features alone, 4 steps"] = {**features, "attack": {"steps": 4}}
    found["features alone, tower"] = {**features, "trainable": "image-tower", "lr": 3e-4}
    found["features alone, rank 32"] = {**features, "rank": 32}
    found["features 30, adversary guide"] = {**features, "ce": "adversarial", "lam": 30.0}
    return found


STAGES = {"baselines": baselines, "trainable": trainable, "guide": guide, "adversary": adversary, "weights": weights,
          "transfer": transfer, "further": further}  # fmt: skip


def sets_of(stage: str) -> tuple[str, ...]:
    """What a stage's candidates are scored on: sets, in transfer the halves of one set's classes."""
    return HALVES if stage in AWAY else DATA


def scored(row: Row) -> str:
    """Which of them a row is of."""
    return row.data["name"] if row.data["subset"] == "all" else row.data["subset"]


def run(stage: str, label: str, options: Options, data: str, seed: int) -> Run:
    own = {**SHORT, **CHOSEN.get(stage, {}), **options}
    method = own.pop("method", "guided")
    if method == "guided":
        own = {**FRAME, **own}
    attack = {"eps": 1 / 255, **own.pop("attack", {})}
    if stage in AWAY:
        slices = tuple(Slice(TRANSFER, half, part="val", limit=400) for half in HALVES)
        return Run(
            method, TRANSFER, slices, (ATTACK,), subset="base", part="fit", limit=IMAGES, seed=seed, epochs=1,
            options=own, train_attack=attack, label=f"{stage} {label}",
        )  # fmt: skip
    return Run(
        method, data, (Slice(data, part="val", limit=200),), (ATTACK,), part="fit", shots=16, seed=seed,
        epochs=EPOCHS, options=own, train_attack=attack, label=f"{stage} {label}",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(STAGES), default="trainable")
    parser.add_argument("--only", nargs="+", help="only these candidates")
    parser.add_argument("--data", nargs="+", choices=DATA, help="only these sets (not in transfer and further)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/design-space"))
    args = parser.parse_args()
    candidates = {n: o for n, o in STAGES[args.stage]().items() if not args.only or n in args.only}
    failed = 0
    if args.stage in AWAY and args.data:
        parser.error(f"stage {args.stage} has its own sets: {', '.join(sets_of(args.stage))}")
    tested = args.data or sets_of(args.stage)
    tuned = (TRANSFER,) if args.stage in AWAY else tested
    for label, options in candidates.items():
        wanted = [run(args.stage, label, options, data, seed) for data in tuned for seed in range(args.seeds)]
        outcome = work(wanted, args.out)
        failed += len(outcome.failed)
        for data in tested:
            of = [row for row in outcome.rows if scored(row) == data and row.robust]
            if of:
                clean, robust = (
                    mean_and_spread([100 * counts["accuracy"] for counts in side])[0]
                    for side in ([row.clean for row in of], [row.robust for row in of if row.robust])
                )
                print(f"| {label} | {data} | {clean:.1f} / {robust:.1f} |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
