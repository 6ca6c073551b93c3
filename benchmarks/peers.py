"""bench.py's attacks beside torchattacks' and pyautoattack's: one tuned model, the same images, in turns."""

from __future__ import annotations

import importlib
import io
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import advtune
from advtune import runs
from advtune.attacks import PGD, AutoAttack
from advtune.data import Images, Split, load_images, load_task
from advtune.demo import BACKBONE, DATA, ENTRIES, SHOTS
from advtune.evaluation import task_for
from advtune.export import export
from advtune.results import accuracy
from advtune.vlm import VLM
from advtune.withstand import withstand
from agreement import Counted, theirs

PEERS = {"torchattacks": "--no-deps torchattacks==3.5.1 scipy", "pyautoattack": "pyautoattack==0.2"}
HARD, GENTLE = 4 / 255, 1 / 255
SIZE = 64  # images of an evaluation batch
Line = dict[str, Any]


def in_turn(calls: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """The least processor seconds of each call, which take turns, there and back, and what each gives."""
    seconds, given = {name: float("inf") for name in calls}, {}
    for number in range(repeats):
        for name in list(calls)[:: -1 if number % 2 else 1]:  # who comes second in a pair is slower by 2 or 3 %
            begin = time.process_time()
            given[name] = calls[name]()
            seconds[name] = min(seconds[name], time.process_time() - begin)
    return seconds, given


def tuned(folder: Path) -> VLM:
    """The model that is attacked: the demo's TeCoA, tuned here in a minute when it is not in the folder yet."""
    place = folder / "tecoa"
    if not runs.is_run(place):
        entry = next(entry for entry in ENTRIES if entry.method == "tecoa")
        how: Any = {"shots": SHOTS, "seed": 0, "epochs": entry.epochs, "options": entry.options}
        advtune.tune(entry.method, runs.load(BACKBONE, "cpu"), load_task(DATA), out=place, overwrite=True, **how)
    return runs.load(str(place), "cpu")


def pictures(model: VLM, limit: int) -> tuple[Counted, Images, Tensor, Tensor]:
    """The function that is attacked, counted; images, as pixels [N, 3, S, S]; which are classified correctly."""
    task = task_for(model, DATA)
    images = load_images(task, Split(limit=limit, resolution=model.side), progress=False)
    with torch.no_grad():
        f = Counted(model.classifier(model.tokens(task.classes, task.template)))
        x = images.x.float() / 255
        clean = torch.cat([f(z).argmax(1) for z in x.split(SIZE)]) == images.y
    return f, images, x, clean


def pgd(sizes: Any, folder: Path) -> list[Line]:
    """PGD beside torchattacks' PGD: at equal steps where nothing leaves, and as `advtune evaluate` runs it."""
    peer = needed("torchattacks")
    model = tuned(folder)
    f, images, x, clean = pictures(model, sizes.pgd)
    x, y = x[clean], images.y[clean]

    def other(eps: float, rows: Tensor) -> Tensor:
        with redirect_stdout(io.StringIO()):
            attack = peer.PGD(f, eps=eps, alpha=eps / 4, steps=sizes.steps, random_start=True)
            attack.set_device(x.device)
            return torch.cat([attack(x[some], y[some]) for some in rows.split(SIZE)])

    def ours(attack: PGD, rows: Tensor) -> Tensor:
        return torch.cat([attack(f, x[some], y[some]) for some in rows.split(SIZE)])

    everything = torch.arange(len(y))
    standing = everything[stand(f, ours(PGD(GENTLE, 2 * sizes.steps), everything), y)]
    equal = PGD(HARD, sizes.steps, HARD / 4, keep="last", early_stop=False)
    lines = []
    for case, attack, rows in (
        ("equal steps", equal, everything),
        ("defaults, none falls", PGD(GENTLE, sizes.steps, GENTLE / 4), standing),
        ("defaults, some fall", PGD(GENTLE, sizes.steps, GENTLE / 4), everything),
        ("defaults, most fall", PGD(HARD, sizes.steps, HARD / 4), everything),
    ):
        calls = {"torchattacks": lambda: other(attack.eps, rows), "ours": lambda: ours(attack, rows)}  # noqa: B023
        f.images = 0
        seconds, found = in_turn(calls, sizes.repeats + 1)  # as often first as second
        shares = {name: int(stand(f, z, y[rows]).sum()) for name, z in found.items()}
        lines.append(
            {"case": case, "eps": attack.eps, "steps": attack.steps, "n": len(rows), "stand": shares,
             "seconds": seconds, "ratio": seconds["torchattacks"] / seconds["ours"], "precision": model.precision}
        )  # fmt: skip
    return lines


def stand(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Which images are classified correctly, [N]."""
    with torch.no_grad():
        return torch.cat([f(z).argmax(1) for z in x.split(SIZE)]) == y


def autoattack(sizes: Any, folder: Path) -> list[Line]:
    """AutoAttack standard beside pyautoattack's, each over the whole set at once: on one function, and as each is run
    (here in bf16; there, on the same weights in transformers' CLIPModel, in fp32)."""
    needed("pyautoattack")
    model = tuned(folder)
    f, images, x, clean = pictures(model, sizes.autoattack)
    stages: list[Line] = []

    def ours() -> Tensor:
        outcome = withstand(f, images, clean, AutoAttack(HARD), SIZE, model.device, 0, False)
        stages[:] = outcome.stages
        return outcome.stands

    def other(g: Counted) -> Tensor:
        with redirect_stdout(io.StringIO()):
            return theirs(g, x, images.y, "autoattack", HARD, "linf", SIZE) & clean

    def counted(g: Counted, call: Callable[[], Tensor]) -> tuple[Tensor, Line]:
        g.images = 0
        seconds, given = in_turn({"": call}, 1)
        return given[""], accuracy(given[""].tolist()) | {"seconds": seconds[""], "images": g.images}

    stand, mine = counted(f, ours)
    lines = []
    for case, g in (("one function, bf16", f), ("as each is run", in_transformers(model, folder))):
        theirs_stand, line = counted(g, partial(other, g))
        lines.append({
            "case": case, "n": len(images.y), "eps": HARD, "clean": int(clean.sum()),
            "ours": mine, "pyautoattack": line, "decided_otherwise": int((stand != theirs_stand).sum()),
            "stages": stages, "ratio": line["seconds"] / mine["seconds"], "precision": model.precision,
        })  # fmt: skip
    return lines


def in_transformers(model: VLM, folder: Path) -> Counted:
    """The tuned model as its users have it elsewhere: transformers' CLIPModel in fp32, texts encoded once."""
    from transformers import CLIPModel

    place, task = folder / "transformers", task_for(model, DATA)
    if not place.exists():
        export(folder / "tecoa", "huggingface", place)
    clip = CLIPModel.from_pretrained(place, dtype=torch.float32).eval().requires_grad_(False)
    with torch.no_grad():
        text = model.text_features(model.tokens(task.classes, task.template)) * model.logit_scale

    def f(x: Tensor) -> Tensor:
        found = clip.get_image_features(pixel_values=model.clip.config.preprocess(x))
        features = found if isinstance(found, Tensor) else found.pooler_output
        return torch.nn.functional.normalize(features, dim=-1) @ text.T

    return Counted(f)


def needed(name: str) -> Any:
    """A peer's module. Raises SystemExit, with the line that installs it, when it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        how = f"{sys.executable} -m pip install {PEERS[name]}"
        raise SystemExit(f"{name} is not installed ({error}); install it with: {how}") from None
