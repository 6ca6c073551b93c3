"""What one accelerator gives: its own peak, the speed and memory of every method at CLIP's sizes as a share of it, bf16
against fp32, scaling with classes and images, syncs, torch.compile, and a tuning run under AutoAttack.

Command:  python benchmarks/gpu.py --out benchmarks/results/NAME [--parts peak speed ...] [--minutes 8]
          [--data folder:IMAGES] [--tune METHOD --backbone FOLDER] [--runs runs/a ...]
Hardware: one GPU; `--device cpu --small` tries every part anywhere in a minute. Needs torch, numpy, safetensors,
          tokenizers and pillow; advtune comes from the checkout that this file lies in. Weights are random, images and
          texts made, but in the parts precision, runs and autoattack: these take the embedded backbone and images, and
          `datasets` to read the images. Where that is missing, give --data folder:FOLDER, written before by --pack.
Writes:   OUT/gpu.json after every result (gpu_page.py makes a page of it), result rows to OUT/results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import Tensor, nn

import advtune
from advtune import results, runs
from advtune.attacks import PGD, AutoAttack
from advtune.checks import zero_share
from advtune.data import Split, load_images, load_task
from advtune.data.catalog import entry
from advtune.errors import UserError
from advtune.evaluation import evaluate_curve, task_for
from advtune.methods import METHODS, configure
from advtune.train import tune
from advtune.vlm import VLM
from gpu_measure import (
    GB,
    SHAPES,
    STEPS,
    Bench,
    Row,
    evaluating,
    inference,
    matrix_products,
    steps_of,
    timed,
    training,
)
from operations import TASK

FIRST = ("pmg-aft", "tecoa", "fap", "apt", "capt", "apd")  # of the methods, should the time not do for all
TARGET = ("pmg-aft", "vit-b/16")  # over 40 % of the peak, at TOWER_BATCH
TOWER_BATCH = 256  # images a step where a tower learns; other methods take their paper's batch
CLASSES, SIZES = (10, 100, 1000, 10_000), (1, 4, 16, 64, 256, 1024)


def batch_of(bench: Bench, method: str) -> int:
    size = TOWER_BATCH if METHODS[method].trains == "image tower" else METHODS[method].recipe.batch_size
    return min(4, size) if bench.small else size


def peak(bench: Bench) -> None:
    """The best of some square matrix products, and a copy, on random numbers."""
    for kind in ("bf16", "tf32", "fp32") if bench.cuda else ("bf16", "fp32"):
        best, size = 0.0, 0
        for n in (64, 128) if bench.small else (4096, 8192, 16384):
            with matrix_products(kind) as dtype:
                a, b = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
                found = 2 * n**3 / 1e12 / timed(bench, partial(torch.mm, a, b))
            best, size = (found, n) if found > best else (best, size)
        bench.peaks[kind] = best
        bench.keep("peak", {"what": f"{kind} matrix product", "n": size, "rate": best, "unit": "TFLOP/s"})
    source = torch.randn(2**20 if bench.small else 2**28, device=bench.device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / timed(bench, lambda: target.copy_(source)) / GB
    bench.keep("peak", {"what": "copy, read + written", "n": len(source), "rate": rate, "unit": "GB/s"})


def speed(bench: Bench) -> None:
    """Every method's training step, an attack step and a forward at the three shapes."""
    for shape in SHAPES:
        for what in ("attack step", "forward"):
            bench.keep("speed", inference(bench, what, shape, 4 if bench.small else 256))
        for name in [*FIRST, *(name for name in METHODS if name not in (*FIRST, "zero-shot"))]:
            bench.keep("speed", training(bench, name, shape, 100, batch_of(bench, name)))
            if (name, shape) == TARGET:
                row = training(bench, name, shape, 100, batch_of(bench, name), compile=True)
                bench.keep("speed", {**row, "what": f"{name}, compiled"})


def memory(bench: Bench) -> None:
    """Training steps at ImageNet's 1000 classes, as a device of 8 GB would take them, and as this one does."""
    for limit in (2 * 2**30, None):
        bench.text_memory = limit
        memory_of(bench, limit)


def memory_of(bench: Bench, limit: float | None) -> None:
    for shape in ("vit-b/32",) if bench.small else ("vit-b/32", "vit-b/16"):
        for name in ("apt", "fap", "capt", "apd", "tecoa", "pmg-aft"):
            row = training(bench, name, shape, 20 if bench.small else 1000, batch_of(bench, name))
            bench.keep("memory", {**row, "text_gib": limit and limit / 2**30})


def pictures(bench: Bench, model: VLM) -> tuple[Tensor, Tensor, Sequence[str], str, str]:
    """Images, labels, class names, template and where they are from; without `datasets` made ones, labelled by what
    the model says of them."""
    n = 16 if bench.small else bench.args.limit
    try:
        task = task_for(model, bench.args.data[0])
        images = load_images(task, Split(limit=n, resolution=model.side), progress=False)
        return images.x.float() / 255, images.y, task.classes, task.template, bench.args.data[0]
    except ModuleNotFoundError:
        facts = entry("fashion-mnist-mini")
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = nn.functional.interpolate(coarse, (model.side, model.side), mode="bilinear")
    with torch.no_grad():
        y = model.classifier(model.tokens(facts["classes"], facts["template"]))(x).argmax(1)
    return x, y, facts["classes"], facts["template"], "made, labelled by the model"


def precision(bench: Bench) -> None:
    """A tuned or the embedded model in each precision: images that stand, dead gradients, logits beside those that the
    processor gives in fp32."""
    name, here = (bench.args.runs or ["mini"])[0], str(bench.device)
    x, y, classes, template, source = pictures(bench, runs.load(name, "cpu", "fp32"))
    logits, stands = {}, {}
    places = [("fp32", "cpu"), *((kind, here) for kind in ("fp32", "tf32", "bf16"))]
    for kind, where in places if bench.cuda else [("fp32", "cpu"), ("bf16", "cpu")]:
        model = runs.load(name, where, "bf16" if kind == "bf16" else "fp32")
        row: Row = {"model": name, "images": source, "n": len(y), "precision": kind, "device": where}
        with matrix_products(kind):
            f, z, t = model.classifier(model.tokens(classes, template)), x.to(where), y.to(where)
            with torch.no_grad():
                logits[kind, where] = f(z).cpu()
            row["logits_moved"] = float((logits[kind, where] - logits["fp32", "cpu"]).abs().max())
            row["clean"] = int((logits[kind, where].argmax(1) == y).sum())
            if where == here:
                torch.manual_seed(0)
                z_adv = PGD(eps=1 / 255, steps=2 if bench.small else 20)(f, z, t)
                with torch.no_grad():
                    stands[kind] = ((f(z).argmax(1) == t) & (f(z_adv).argmax(1) == t)).cpu()
                row["robust"] = int(stands[kind].sum())
                row["decided_otherwise"] = int((stands[kind] != stands["fp32"]).sum())
                row["zero_gradients"] = zero_share(f, z, t)
        bench.keep("precision", row)


def over_classes(bench: Bench) -> None:
    """How a step's time and memory grow with the classes: of a frozen text tower and of one that learns."""
    for count in CLASSES[:2] if bench.small else CLASSES:
        for name in ("tecoa", "fap"):
            bench.keep("classes", training(bench, name, "vit-b/32", count, batch_of(bench, name)))


def over_images(bench: Bench) -> None:
    """How throughput grows with the images of a batch."""
    for size in SIZES[:3] if bench.small else SIZES:
        for what in ("forward", "attack step"):
            bench.keep("images", inference(bench, what, "vit-b/16", size))
        bench.keep("images", training(bench, "tecoa", "vit-b/16", 100, size))


@contextmanager
def syncs_are_errors(cuda: bool) -> Iterator[None]:
    if cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode("default")


def syncs(bench: Bench) -> None:
    """Whether attacks and losses make the processor wait for the device, as far as torch tells; where first."""
    size, model = 4 if bench.small else 64, bench.backbone("vit-b/32", 100)
    x = torch.rand(size, 3, model.side, model.side, device=model.device)
    y = torch.zeros(size, dtype=torch.long, device=model.device)
    with torch.no_grad():
        f = model.classifier(model.tokens(TASK.classes, TASK.template))
    calls: dict[str, Callable[[], Any]] = {
        "training attack, pgd-2": partial(PGD(steps=2, keep="last", early_stop=False), f, x, y),
        "evaluation, pgd-10, no image leaves": evaluating(model, size)[f"pgd-{STEPS}"],
        "evaluation, pgd-10": partial(PGD(steps=10), f, x, y),
    }
    for name in ("tecoa", "fap"):
        models = configure(name)[0].setup(model, TASK, 0)
        calls[f"attack, loss and backward of {name}"] = steps_of(name, models, size, 100)[0]
    for what, call in calls.items():
        call()
        row: Row = {"what": what, "synchronises": False if bench.cuda else None, "where": ""}
        try:
            with syncs_are_errors(bench.cuda):
                call()
        except RuntimeError as error:
            frames = [each for each in traceback.extract_tb(error.__traceback__) if "advtune" in each.filename]
            place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
            row |= {"synchronises": True, "where": f"{place}: {first_line(error)[:60]}"}
        bench.keep("syncs", row)


def compiling(bench: Bench) -> None:
    """An evaluation's PGD and TeCoA's training step as they are and with the image tower compiled; `first_s` holds the
    compilation."""
    for size in (4,) if bench.small else (16, 256):
        for compile in (False, True):
            row = inference(bench, f"pgd-{STEPS}", "vit-b/16", size, compile=compile)
            bench.keep("compile", {"compile": compile, **row})
            row = training(bench, "tecoa", "vit-b/16", 100, size, compile)
            bench.keep("compile", {"compile": compile, **row})


def tuning(bench: Bench) -> None:
    """Tune on images and evaluate before and after, as a user does."""
    args, data, base = bench.args, bench.args.data[0], runs.load(bench.args.backbone, str(bench.device))
    few: Row = {"limit": 32, "epochs": 1} if bench.small else {"limit": args.train_limit, "epochs": args.epochs}
    begin = time.monotonic()
    bench.tuned = tune(args.tune, base, data, show=False, **few)
    after = {"tuned_on": bench.tuned.run["train"]["n"], "tuning_s": time.monotonic() - begin}
    attack, limit = PGD(1 / 255, 2 if bench.small else 20), 16 if bench.small else args.limit
    for name, model, more in (("before", base, {}), (args.tune, bench.tuned, after)):
        row = evaluate_curve(model, data, attack, [attack.eps], limit=limit, out=args.out, show=False)[0]
        bench.keep("runs", {"model": name, "backbone": args.backbone, "data": data, **more, **scored(row)})


def autoattack(bench: Bench) -> None:
    """AutoAttack on tuned runs, else on what was tuned in this run, else on the embedded backbone."""
    args = bench.args
    models: dict[str, Any] = {name: name for name in args.runs or ["mini"]}
    if bench.tuned is not None and not args.runs:
        models = {f"{args.tune} on {args.backbone}, in this run": bench.tuned}
    curve = [32 / 255] if bench.small else [n / 255 for n in args.eps]  # 32: all fall at once
    how = {"limit": 8 if bench.small else args.limit, "batch_size": args.batch, "out": args.out, "show": False}
    for name, model in models.items():
        model = runs.load(model, str(bench.device)) if isinstance(model, str) else model
        for data in args.data:
            for row in evaluate_curve(model, data, AutoAttack(), curve, **how):
                bench.keep("autoattack", {"model": name, "data": data, **scored(row)})


def scored(row: results.Row) -> Row:
    attack, robust = row.attack or {}, row.robust or {}
    return {"attack": attack.get("name"), "eps_255": 255 * attack.get("eps", 0), "n": row.clean["n"],
            "clean": row.clean["accuracy"], "robust": robust.get("accuracy"), "s": row.seconds}  # fmt: skip


PARTS: dict[str, Callable[[Bench], None]] = {  # most important first
    "peak": peak, "speed": speed, "memory": memory, "precision": precision, "classes": over_classes,
    "images": over_images, "syncs": syncs, "compile": compiling, "runs": tuning, "autoattack": autoattack,
}  # fmt: skip


class TimeUp(BaseException):
    """A part's minutes are over; no `except Exception` keeps it."""


@contextmanager
def at_most(minutes: float) -> Iterator[None]:
    """Raises TimeUp in what it holds when the minutes are over."""

    def ring(*_: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(bench: Bench, part: str) -> str:
    """One part; how it ended: done, time, left out or failed, and why."""
    try:
        with at_most(bench.args.minutes):
            PARTS[part](bench)
    except TimeUp:
        return f"time: stopped after {bench.args.minutes:g} minutes"
    except ModuleNotFoundError as error:
        return f"left out: needs {error.name}; see --pack"
    except Exception as error:  # the parts after it are worth having
        if not isinstance(error, UserError):
            traceback.print_exc()
        return f"failed: {type(error).__name__}: {first_line(error)}"
    finally:
        bench.free()
    return "done"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def drawn(rows: Sequence[Row]) -> str:
    """Rows as text columns."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    lines = [names, *([text_of(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def text_of(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def targets(found: Row) -> list[Row]:
    """What the project wants of an H200, beside what was measured."""
    lines = []
    for row in found.get("speed", []):
        if (row["what"].partition(",")[0], row["shape"]) == TARGET:
            name = f"{row['what']}, {row['shape']}, batch {row['batch']}: share of the peak"
            lines.append({"target": name, "wanted": "over 0.4 at 256", "measured": row.get("share_of_peak")})
    for row in found.get("memory", []):
        if row["what"] in ("apt", "fap") and row["shape"] == "vit-b/32" and row["text_gib"]:
            name = f"{row['what']}, vit-b/32, {row['classes']} classes: GB"
            lines.append({"target": name, "wanted": "under 8 at 1000", "measured": row.get("peak_gb")})
    return lines


def facts(args: argparse.Namespace, device: torch.device) -> Row:
    """Who measured what, where, with what."""
    commit = f"advtune {advtune.__version__}"
    try:
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.check_output(command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        pass
    versions: Row = {**runs.versions(), "cuda": torch.version.cuda}
    for name in ("numpy", "safetensors", "tokenizers", "pillow", "triton"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    hardware: Row = {"device": runs.device_name(device), "machine": platform.machine(), "cores": os.cpu_count()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        hardware |= {"memory_gb": round(card.total_memory / GB, 1), "multiprocessors": card.multi_processor_count,
                     "capability": f"{card.major}.{card.minor}"}  # fmt: skip
    asked = {key: value for key, value in vars(args).items() if key not in ("out", "pack")}
    return {"time": results.now(), "commit": commit.strip(), "small": args.small, "versions": versions,
            "hardware": hardware, "arguments": asked, "ended": {}}  # fmt: skip


def pack(data: str, folder: Path) -> None:
    """Write a set's images as FOLDER/PART/CLASS/NUMBER.png, which no library is needed to read."""
    task = load_task(data)
    for part, records in task.parts.items():
        for i, label in enumerate(records.labels):
            place = folder / part / task.classes[label].replace("/", " or ")
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i:06d}.png").write_bytes(records.read(i))
    print(f"written; give --data folder:{folder}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=tuple(PARTS))
    parser.add_argument("--minutes", type=float, default=8, help="for each part")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="tiny shapes, one timing of each: a trial of the script")
    parser.add_argument("--data", nargs="+", default=["fashion-mnist-mini"])
    parser.add_argument("--limit", type=int, default=500, help="images to evaluate")
    parser.add_argument("--backbone", default="mini", help="what --tune starts from")
    parser.add_argument("--tune", default="pmg-aft", metavar="METHOD", choices=tuple(METHODS))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--train-limit", type=int, default=None)
    parser.add_argument("--runs", nargs="*", default=[], help="run folders to attack")
    parser.add_argument("--eps", nargs="+", type=float, default=[1, 4], help="n of n/255, for AutoAttack")
    parser.add_argument("--batch", type=int, default=256, help="images a batch under AutoAttack")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="only write the first of --data as a folder")
    args = parser.parse_args()
    if args.out is None and args.pack is None:
        parser.error("give --out OUT")
    return args


def main() -> int:
    args = arguments()
    if args.pack is not None:
        pack(args.data[0], args.pack)
        return 0
    device = torch.device(runs.check_device(args.device))
    warnings.filterwarnings("ignore", category=UserWarning)
    args.out.mkdir(parents=True, exist_ok=True)
    found = facts(args, device)

    def write() -> None:
        results.write_atomic(args.out / "gpu.json", json.dumps(found, indent=1) + "\n")

    def keep(part: str, row: Row) -> None:
        found[part].append({key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in row.items()})
        write()

    bench = Bench(args, device, keep)
    for part in [part for part in PARTS if part in {*args.parts, "peak"}]:  # a share needs this run's own peak
        found[part], begin = [], time.monotonic()
        ended = run(bench, part)
        found["ended"][part] = {"how": ended, "seconds": round(time.monotonic() - begin, 1)}
        found["targets"] = targets(found)
        write()
        print(f"\n{part}: {ended}\n{drawn(found[part])}", flush=True)
    print(f"\n{found['hardware']['device']}, {found['commit']}: {args.out / 'gpu.json'}")
    print(drawn([{"part": part, **end} for part, end in found["ended"].items()]))
    print(drawn(found["targets"]) if found["targets"] else "")
    return int(any(end["how"].startswith("failed") for end in found["ended"].values()))


if __name__ == "__main__":
    sys.exit(main())
