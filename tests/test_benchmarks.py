"""The GPU script, tried on the processor as on a machine that has torch and little else, and the page made of it."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
MISSING = ("datasets", "huggingface_hub", "rich", "matplotlib", "pyarrow")


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )


def bare(folder):
    """A folder of modules that stand before the installed ones and cannot be imported."""
    folder.mkdir()
    for name in MISSING:
        (folder / f"{name}.py").write_text("raise ModuleNotFoundError('not on this machine', name=__name__)\n")
    return str(folder)


def trial(folder, *parts):
    out = folder / "out"
    options = ["--device", "cpu", "--small", "--out", out, "--parts", *parts]
    done = run("benchmarks/gpu.py", *options, PYTHONPATH=bare(folder / "bare"), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "gpu.json", done.stdout


def module(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    return trial(tmp_path_factory.mktemp("gpu"), "classes", "runs")


def test_a_trial_needs_torch_and_little_else(tried):
    found = json.loads(tried[0].read_text())
    assert [found["ended"][part]["how"] for part in ("peak", "classes")] == ["done", "done"]
    assert found["ended"]["runs"]["how"].startswith("left out: needs datasets")
    assert found["small"] and found["versions"]["torch"] == torch.__version__ and found["commit"]
    assert tried[1].splitlines()[-5].startswith("part")  # the short table comes last
    peak = {row["what"].split()[0]: row["rate"] for row in found["peak"]}
    cost = {(row["what"], row["classes"]): row["tflop"] for row in found["classes"]}
    for row in found["classes"]:
        assert row["share_of_peak"] == pytest.approx(row["tflops"] / peak[row["precision"]], rel=1e-2)
        assert row["tflops"] == pytest.approx(row["tflop"] / row["ms"] * 1e3, rel=1e-2)
    # a frozen text tower costs a class's logits and no more; one that learns is paid for with every class
    assert cost["tecoa", 100] < 1.01 * cost["tecoa", 10]
    assert cost["fap", 100] > 1.5 * cost["fap", 10]


def test_the_page_holds_the_numbers_and_the_plots(tried, tmp_path):
    again = json.loads(tried[0].read_text())
    again["commit"], again["classes"][0]["images_per_s"] = "later", 1234567.0
    (tmp_path / "later.json").write_text(json.dumps(again))
    page = tmp_path / "page.md"
    done = run("benchmarks/gpu_page.py", tried[0], tmp_path / "later.json", "--out", page)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "the numbers mean nothing" in text  # a trial's
    assert "commit later" in text and "| 1234567 |" in text and text.count("### Classes") == 1
    pictures = list((tmp_path / "figures").glob("*.png"))
    assert [f"(figures/{each.name})" in text and each.stat().st_size > 5000 for each in pictures] == [True]


def test_half_the_images_where_the_memory_does_not_do(monkeypatch):
    measure = module("gpu_measure", monkeypatch)
    bench = measure.Bench(None, torch.device("cpu"), None)

    def small_memory(size):
        if size > limit:
            raise torch.OutOfMemoryError
        return {"batch": size}

    limit = 100
    assert measure.fitting(bench, 256, small_memory) == {"batch": 64, "asked": 256}
    assert measure.fitting(bench, 64, small_memory) == {"batch": 64}
    limit = 0
    assert measure.fitting(bench, 4, small_memory)["note"].startswith("out of memory")


def test_a_part_ends_with_its_minutes_and_keeps_what_it_has(monkeypatch, tmp_path):
    gpu = module("gpu", monkeypatch)
    kept, clock = [], []
    monkeypatch.setattr(gpu.signal, "setitimer", lambda *how: clock.append(how))  # it rings when it is told to

    def endless(bench):
        for number in range(20):
            bench.keep("endless", {"number": number})
            try:
                signal.raise_signal(signal.SIGALRM)
            except Exception:
                kept.append("the clock was not heard")

    arguments = gpu.argparse.Namespace(minutes=0.5, small=True)
    bench = gpu.Bench(arguments, torch.device("cpu"), lambda part, row: kept.append((part, row)))
    monkeypatch.setitem(gpu.PARTS, "endless", endless)
    assert gpu.run(bench, "endless") == "time: stopped after 0.5 minutes"
    assert kept == [("endless", {"number": 0})]
    assert clock == [(signal.ITIMER_REAL, 30), (signal.ITIMER_REAL, 0)]


@pytest.mark.slow
def test_every_part_can_be_tried(tmp_path):
    found = json.loads(
        trial(tmp_path, "memory", "precision", "images", "syncs", "compile", "autoattack")[0].read_text()
    )
    ends = {part: end["how"] for part, end in found["ended"].items()}
    assert ends.pop("autoattack").startswith("left out")
    assert set(ends.values()) == {"done"}
    assert {row["images"] for row in found["precision"]} == {"made, labelled by the model"}


@pytest.mark.slow
def test_a_packed_set_is_read_without_a_library(tmp_path):
    folder = tmp_path / "images"
    done = run("benchmarks/gpu.py", "--pack", folder)
    assert done.returncode == 0, done.stderr
    parts = ("precision", "runs", "autoattack", "--data", f"folder:{folder}")
    found = json.loads(trial(tmp_path, *parts)[0].read_text())
    assert {end["how"] for end in found["ended"].values()} == {"done"}
    assert [row["model"] for row in found["runs"]] == ["before", "pmg-aft"]
    assert found["autoattack"][0]["robust"] == 0
