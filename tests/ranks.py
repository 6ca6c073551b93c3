"""What one of several processes does in test_distributed.py, and what one process does to compare with."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

import advtune
from advtune import checkpoint, cli, distributed, evaluation, train
from advtune.attacks import PGD
from advtune.edits import TextEdits
from advtune.errors import UserError
from advtune.methods import METHODS

EPS = 16 / 255
PLAIN = {"lr": 0.002, "warmup": 0, "warmup_epochs": 0, "epochs": 4}
AVERAGE = {"trainable": "image-tower", "optimizer": "sgd", "guide": "average", "average": 0.5}
# 9 images: batches of 4, 4 and 1, which has fewer images than there are processes; of 5 and 4; of 6 and 3, whose
# shares do not begin at the same place
TUNED = {
    "tower": ("tecoa", {**PLAIN, "batch_size": 4}, {"eps": EPS}),
    "prompts, a of the batch": ("capt", {**PLAIN, "batch_size": 5, "weight": "loss"}, {"eps": EPS}),
    "two models": ("apd", {**PLAIN, "batch_size": 4, "feedback": 0.5}, {"eps": EPS}),
    "teacher first": ("apd", {**PLAIN, "batch_size": 5, "teacher": "offline", "weight_decay": 0.1}, {"eps": EPS}),
    "replay": ("tecoa", {**PLAIN, "batch_size": 6}, {"name": "free", "replay": 2, "eps": EPS}),
    "average that guides": ("guided", {**PLAIN, **AVERAGE, "batch_size": 4}, {"eps": EPS}),
    "made once": ("advpt", {**PLAIN, "batch_size": 4, "tokens": 4}, {"eps": EPS}),
}
EVALUATED = {
    "best": (PGD(EPS, 3), {}),
    "random start of the batch": (PGD(EPS, 2, keep="last", early_stop=False), {}),
    "behind noise": (PGD(EPS, 2), {"defence": "noise"}),
    "class names": (TextEdits(alphabet="ab"), {}),
    "none": (None, {}),
}


def tune(name, vlm, task, out, **how):
    method, options, attack = TUNED[name]
    return train.tune(method, vlm, task, shots=3, options=options, attack=attack, out=out, show=False, **how)


def interrupted(name, vlm, task, out):
    """What is said when the last process alone gets a Ctrl-C in its sixth step, and what is learned when all go on."""
    real, calls, said = train.update, [], ""

    def stopped(*args):
        calls.append(1)
        if len(calls) == 6 and distributed.rank() == distributed.world() - 1:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    train.update, seconds, checkpoint.SECONDS = stopped, checkpoint.SECONDS, 1000
    try:
        tune(name, vlm, task, out)
    except KeyboardInterrupt as stop:
        said = f"{len(calls)} steps: {stop}"
    train.update, checkpoint.SECONDS = real, seconds
    return said, tune(name, vlm, task, out, resume=True).delta()


def flags(vlm, task, out, names=EVALUATED):
    """The flags of every image by evaluation; batches of 5 of 12 images: three for two processes."""
    from advtune.defences import DEFENCES

    found = {}
    for name in names:
        attack, how = EVALUATED[name]
        defence = DEFENCES.get(how.get("defence"))
        row = evaluation.evaluate(
            vlm, task, attack, batch_size=5, checks=False, defence=defence, out=out, resume=True, show=False
        )
        found[name] = row.flags | {stage["attack"]: json.dumps(stage | {"seconds": 0}) for stage in row.stages}
    return found


def main(clip, images, out):
    """All of it, in the process that the environment says; the end is an error, in one process only."""
    distributed.start("cpu")
    rank, out = distributed.rank(), Path(out)
    vlm, task = advtune.load(clip, device="cpu", precision="fp32"), advtune.load_task(f"folder:{images}")
    deltas = {name: tune(name, vlm, task, out / name).delta() for name in TUNED}
    parted = tune("tower", vlm, task, out / "parted", micro_batch=1).delta()
    again = tune("tower", vlm, task, out / "tower", resume=True).delta()
    said, cut = interrupted("replay", vlm, task, out / "cut")
    seen = flags(vlm, task, out / "rows")
    differ = ""
    try:
        distributed.agree(rank, "numbers")
    except UserError as error:
        differ = str(error)
    shares = [distributed.gather([*range(n)][distributed.share(n)]) for n in range(6)]
    facts = {
        "deltas": deltas,
        "parted": parted,
        "again": again,
        "cut": cut,
        "said": said,
        "flags": seen,
        "differ": differ,
        "shares": shares,
    }
    torch.save(facts, out / f"{rank}.pt")
    real = METHODS["tecoa"].loss

    def loss(self, models, batch, attack):
        if rank == 1:
            raise UserError("only the second process knows why")
        return real(self, models, batch, attack)

    METHODS["tecoa"].loss = loss
    command = ["train", "tecoa", "--backbone", clip, "--data", f"folder:{images}", "--device", "cpu", "--out"]
    status = [cli.main([*command, str(out / "failed")])]
    METHODS["tecoa"].loss = real
    distributed.gather(None)
    if rank == 0:
        distributed._here.store.delete_key("ended")
    distributed.gather(None)
    if rank == 1:
        os._exit(9)
    status.append(cli.main([*command, str(out / "lost")]))  # the other one has gone without a word
    (out / "status.json").write_text(json.dumps(status))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
