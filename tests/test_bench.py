"""benchmarks/bench.py at sizes that say nothing about speed: what it holds side by side is the same, and the page is
made of its lines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import advtune
import bench
import performance_page

ROOT = Path(__file__).parents[1]


def gradients(vlm, task, name, whole):
    """The loss of one step in fp32 and the gradient of all that learns."""
    method, models, batch, attack = bench.setting(vlm, task, name, 3, whole)
    torch.manual_seed(0)
    loss = sum(method.loss(models, batch, attack).values())
    loss.backward()
    slopes = {n: p.grad for n, p in models["student"].named_parameters() if p.requires_grad and "clip.text" not in n}
    return float(loss.detach()), slopes


@pytest.mark.parametrize("name", ["tecoa", "pmg-aft", "apt", "fap", "capt", "apd"])
def test_the_plain_formulation_is_the_same_step(name, clip_folder, task):
    (loss, ours), (other, theirs) = (
        gradients(advtune.load(str(clip_folder), precision="fp32").requires_grad_(False), task, name, whole)
        for whole in (False, True)
    )
    assert loss == pytest.approx(other, rel=1e-4)
    assert ours.keys() == theirs.keys() and any(slope.abs().max() > 0 for slope in ours.values())
    for key, slope in ours.items():
        assert torch.allclose(slope, theirs[key], atol=1e-3 * float(slope.abs().max())), key


def test_a_part_gives_lines_and_lines_a_page(tmp_path, monkeypatch, capsys):
    """A second measurement takes the place of the first; what was written before stays in the file."""
    out = tmp_path / "bench.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench.py", "--small", "--parts", "training", "--out", str(out)])
    bench.main()
    first = json.loads(out.read_text().splitlines()[0])
    bench.append(out, [first | {"seconds": first["seconds"] | {"ours": 1234}}])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["case"] for line in lines] == ["tecoa mini", "fap mini", "tecoa mini"]
    for line in lines[:2]:
        assert line["loss"]["ours"] == pytest.approx(line["loss"]["plain"], rel=1e-2)
        assert line["ratio"] == line["seconds"]["plain"] / line["seconds"]["ours"] > 0
    text = "words\n<!-- bench training -->\nold\n<!-- end -->\nmore"
    page = performance_page.page(text, lines)
    assert page.count("| tecoa | mini | 10 | 2 |") == 1 and " 1234 " in page and "old" not in page
    assert page.startswith("words\n") and page.endswith("<!-- end -->\nmore")
    assert f"torch {torch.__version__}" in page and "1 thread;" in page
    assert "| fap | mini | 10 | 2 |" in capsys.readouterr().out


def test_steps_that_differ_are_no_comparison(monkeypatch):
    monkeypatch.setattr(bench, "one_step", lambda method, models, *_: 1.0 + ("Plain" in str(models)))
    with pytest.raises(SystemExit, match="differ"):
        bench.training(bench.SMALL, None)


def test_a_peer_that_is_missing_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(SystemExit, match=r"--no-deps torchattacks==3\.5\.1 scipy"):
        bench.needed("torchattacks")


PEAK = """
import torch
import bench
before = bench.peak()
torch.ones(100_000_000).sum()
print(bench.peak() - before)
"""


def test_the_peak_is_the_most_memory_held_so_far():
    """In a process of its own: in this one a test before may have held more."""
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.3 < float(done.stdout) < 0.6
