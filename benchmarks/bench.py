"""Speed, memory and operation counts on this machine, as ratios in one run: ours beside the plain formulation, beside
pyautoattack and beside torchattacks.

Command:  make bench   (python benchmarks/bench.py --parts training pgd --work runs/bench; --model: a tuned run)
Hardware: about 20 minutes on one free core; --threads for more, --small for a trial. Adds a line for each measurement
          to benchmarks/results/bench.jsonl; benchmarks/performance_page.py makes docs/performance.md from them.

Times are processor seconds, so that other programs on the machine matter less. What is compared takes turns.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import operations as counts
from advtune import runs
from advtune.attacks import PGD
from advtune.data import load_task
from advtune.demo import BACKBONE, DATA
from advtune.evaluation import evaluate, task_for
from advtune.losses import cross_entropy
from advtune.methods import configure
from advtune.results import now, write_atomic
from advtune.vlm import VLM, Batch
from peers import GENTLE, PEERS, SIZE, Line, autoattack, in_turn, needed, pgd, tuned
from performance_page import latest, table
from plain import plain, plain_attack

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "bench.jsonl"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    repeats: int = 3
    batch: int = 8  # of a training step
    classes: int = 20  # at ViT-B/32's shape: of 1000, the plain step takes an hour
    shapes: tuple[str, ...] = ("mini", "B/32")
    counted: tuple[tuple[str, int], ...] = (("B/32", 1000), ("B/32", 200), ("B/16", 1000), ("B/16", 200))
    pgd: int = 128  # images
    steps: int = 20
    autoattack: int = 40
    accuracy: int = 500
    memory: tuple[tuple[str, str, int, int], ...] = (
        ("ours", "apt", 1000, 32), ("ours", "apt", 200, 32), ("plain", "apt", 200, 32), ("ours", "fap", 1000, 4),
        ("ours, of 8 GB", "fap", 1000, 4), ("ours, of 8 GB", "capt", 1000, 32), ("ours, of 8 GB", "apd", 1000, 32),
    )  # fmt: skip


SMALL = Sizes(1, 2, 3, ("mini",), (("B/32", 10),), 8, 3, 2, 16, (("ours", "fap", 4, 2), ("plain", "apt", 4, 2)))


# --- operations and speed of training ------------------------------------------------------------------------


def operation_counts(sizes: Sizes, folder: Path) -> list[Line]:
    """TFLOP of a training step: the plain formulation, what released code takes, what is needed, and ours."""
    lines = []
    for patch, classes in sizes.counted:
        vlm = counts.shape(int(patch[2:]), classes)
        for name, batch in counts.BATCH.items():
            ours, whole = (counts.step(vlm, name, batch, way) / 1e12 for way in (False, True))
            lines.append(
                {"case": f"{name} {patch} {classes}", "method": name, "shape": patch, "classes": classes,
                 "batch": batch, "ours": ours, "plain": whole, "ratio": whole / ours,
                 "equation": counts.by_hand(name, vlm.clip.config, classes, batch) / 1e12,
                 "released": counts.RELEASED.get(name, {}).get(patch, {}).get(classes),
                 "needed": counts.NEEDED.get(name, {}).get(patch) if classes == 1000 else None}
            )  # fmt: skip
    return lines


def training(sizes: Sizes, folder: Path) -> list[Line]:
    """Seconds of a training step of TeCoA and FAP: the plain formulation, ours, and ours in bf16."""
    lines = []
    for shape in sizes.shapes:
        for name in ("tecoa", "fap"):
            vlm, task = example(shape, sizes.classes)
            ours = setting(vlm, task, name, sizes.batch)
            whole = setting(copy.deepcopy(vlm), task, name, sizes.batch, whole=True)
            calls = {
                "plain": lambda: one_step(*whole),  # noqa: B023
                "ours": lambda: one_step(*ours),  # noqa: B023
                "ours_bf16": lambda: in_bf16(*ours),  # noqa: B023
            }
            seconds, loss = in_turn(calls, sizes.repeats)
            if abs(loss["ours"] - loss["plain"]) > 1e-2 * abs(loss["plain"]):
                raise SystemExit(f"{name}, {shape}: ours and the plain formulation differ: {loss}")
            classes = len(task.classes) if shape == BACKBONE else sizes.classes
            counted = None
            if shape != BACKBONE:
                bare = counts.shape(int(shape[2:]), classes)
                counted = counts.step(bare, name, sizes.batch, True) / counts.step(bare, name, sizes.batch)
            lines.append(
                {"case": f"{name} {shape}", "method": name, "shape": shape, "classes": classes, "batch": sizes.batch,
                 "seconds": seconds, "loss": loss, "ratio": seconds["plain"] / seconds["ours"],
                 "ratio_bf16": seconds["plain"] / seconds["ours_bf16"], "counted": counted}
            )  # fmt: skip
    return lines


def example(shape: str, classes: int) -> tuple[VLM, Any]:
    """A frozen fp32 model and a task: the embedded one and its data, or random weights of CLIP's shape."""
    if shape == BACKBONE:
        return runs.load(BACKBONE, "cpu", "fp32").requires_grad_(False), load_task(DATA)
    torch.manual_seed(0)
    return counts.shape(int(shape[2:]), classes, meta=False), counts.TASK


def setting(vlm: VLM, task: Any, name: str, batch: int, whole: bool = False) -> tuple[Any, dict[str, VLM], Batch, Any]:
    """Method, models, batch and attack of one training step."""
    method, _, attack = configure(name)
    models = method.setup(vlm, task, 0)
    models = {key: plain(model) for key, model in models.items()} if whole else models
    x = torch.rand(batch, 3, vlm.side, vlm.side, generator=torch.Generator().manual_seed(0))
    tokens = {key: model.tokens(task.classes, task.template) for key, model in models.items()}
    y = torch.arange(batch) % len(next(iter(tokens.values())))
    return method, models, Batch(x, y, tokens), plain_attack(attack, models) if whole else attack


def one_step(method: Any, models: dict[str, VLM], batch: Batch, attack: Any) -> float:
    """The loss, after its gradients were taken."""
    torch.manual_seed(0)
    loss = torch.stack(list(method.loss(models, batch, attack).values())).sum()
    loss.backward()
    for model in models.values():
        model.zero_grad()
    return float(loss.detach())


def in_bf16(method: Any, models: dict[str, VLM], batch: Batch, attack: Any) -> float:
    for model in models.values():
        model.precision = "bf16"
    try:
        return one_step(method, models, batch, attack)
    finally:
        for model in models.values():
            model.precision = "fp32"


# --- memory and precision ------------------------------------------------------------------------------------


def memory(sizes: Sizes, folder: Path) -> list[Line]:
    """Peak memory of one step at ViT-B/32's shape in bf16, each in a process of its own."""
    lines = []
    for kind, method, classes, batch in sizes.memory:
        code = f"import bench; bench.print_peak({kind!r}, {method!r}, {classes}, {batch}, {torch.get_num_threads()})"
        paths = os.pathsep.join([str(HERE), *filter(None, sys.path)])
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
        )
        if done.returncode:
            raise SystemExit(f"memory, {kind}, {method}, {classes} classes: {done.stderr.strip() or 'killed'}")
        found = json.loads(done.stdout.splitlines()[-1])
        case = f"{kind} {classes} {method}"
        lines.append({"case": case, "kind": kind, "method": method, "classes": classes, "batch": batch, **found})
    return lines


def print_peak(kind: str, method: str, classes: int, batch: int, threads: int) -> None:
    """Gigabytes at the peak of one step, and before it, as JSON; "of 8 GB": a graph of texts may take a quarter."""
    torch.set_num_threads(threads)
    vlm, task = example("B/32", classes)
    vlm.precision = "bf16"
    vlm.text_memory = 2e9 if kind.endswith("8 GB") else 1e18
    made = setting(vlm, task, method, batch, whole=kind == "plain")
    before, begin = peak(), time.process_time()
    one_step(*made)
    print(json.dumps({"before": before, "peak": peak(), "seconds": time.process_time() - begin}))


def peak() -> float:
    """The most gigabytes (10^9 bytes) that this process has held so far."""
    status = Path("/proc/self/status")  # a child's getrusage starts from its parent's peak
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9


def precision(sizes: Sizes, folder: Path) -> list[Line]:
    """bf16 beside fp32: forwards and gradients a second; robust accuracy and exactly-zero gradients."""
    lines = []
    for shape in sizes.shapes:
        vlm, task = example(shape, sizes.classes)
        f = vlm.classifier(vlm.tokens(task.classes, task.template))
        x = torch.rand(sizes.batch, 3, vlm.side, vlm.side)

        def forward(name: str) -> None:
            vlm.precision = name  # noqa: B023
            with torch.no_grad():
                f(x)  # noqa: B023

        def gradient(name: str) -> None:
            vlm.precision = name  # noqa: B023
            z = x.clone().requires_grad_(True)  # noqa: B023
            torch.autograd.grad(cross_entropy(f(z), torch.zeros(len(z), dtype=torch.long)).sum(), z)  # noqa: B023

        calls = {f"{way.__name__} {name}": (way, name) for way in (forward, gradient) for name in ("fp32", "bf16")}
        seconds, _ = in_turn({key: lambda c=c: c[0](c[1]) for key, c in calls.items()}, 3 * sizes.repeats)
        rates = {key: sizes.batch / value for key, value in seconds.items()}
        ratios = {way: rates[f"{way} bf16"] / rates[f"{way} fp32"] for way in ("forward", "gradient")}
        lines.append({"case": f"speed {shape}", "shape": shape, "batch": sizes.batch, "rates": rates, "ratio": ratios})
    model = tuned(folder)
    for name in ("fp32", "bf16"):
        model.precision = name
        attack = PGD(GENTLE, sizes.steps)
        row = evaluate(model, task_for(model, DATA), attack, limit=sizes.accuracy, batch_size=SIZE, show=False)
        lines.append(
            {"case": f"accuracy {name}", "precision": name, "eps": attack.eps, "steps": attack.steps,
             "clean": row.clean, "robust": row.robust, "zero_gradient": row.zero_gradient}
        )  # fmt: skip
    return lines


PARTS: dict[str, Callable[[Sizes, Path], list[Line]]] = {
    "operations": operation_counts,
    "training": training,
    "pgd": pgd,
    "autoattack": autoattack,
    "memory": memory,
    "precision": precision,
}


# --- lines ---------------------------------------------------------------------------------------------------


def facts() -> Line:
    """What every line says of this machine and of the software."""
    return {
        "time": now(), "commit": commit(), "hardware": processor(), "threads": torch.get_num_threads(),
        "versions": runs.versions() | {name: found for name in PEERS if (found := version_of(name))},
    }  # fmt: skip


def commit() -> str:
    """The commit of what is measured; -dirty when src or benchmarks differ from it; empty outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE.parent, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def processor() -> str:
    """The processor's name and what it has for bf16."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    low = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    return f"{name}, {os.cpu_count()} cores, {low} bf16 instructions"


def version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def append(path: Path, lines: Sequence[Line]) -> None:
    """Adds lines of JSON; the file is whole at any moment."""
    old = path.read_text() if path.exists() else ""
    write_atomic(path, old + "".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=tuple(PARTS))
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="where the attacked model is tuned")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a trial of the script; its numbers say nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = SMALL if args.small else Sizes()
    for part, peers in (("pgd", "torchattacks"), ("autoattack", "pyautoattack")):
        if part in args.parts:
            needed(peers)  # now, not after ten minutes
    found = []
    for part in args.parts:
        begin = time.monotonic()
        lines = [{"part": part, **facts(), **line} for line in PARTS[part](sizes, args.work)]
        append(args.out, lines)
        found += lines
        print(f"{part}: {time.monotonic() - begin:.0f} s", flush=True)
    for part in args.parts:
        print(f"\n{part}\n\n{table(part, latest(found, part))}")


if __name__ == "__main__":
    main()
