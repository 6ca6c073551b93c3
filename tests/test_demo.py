"""The demo's path on tiny stand-ins, and, slowly, that the embedded backbone can be made robust."""

import json

import pytest

import advtune
from advtune import demo
from advtune.cli import main
from advtune.results import read


def test_demo_writes_what_it_promises(clip_folder, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "BACKBONE", str(clip_folder))
    monkeypatch.setattr(demo, "DATA", f"folder:{image_folder}")
    monkeypatch.setattr(demo, "SHOTS", 2)
    monkeypatch.setattr(demo, "ENTRIES", tuple(demo.Entry(e.method, 1, e.options) for e in demo.ENTRIES))
    for _ in range(2):  # a second demo replaces the first
        assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    table = capsys.readouterr().out
    report = (tmp_path / "demo" / "report.md").read_text()
    for method in ("zero-shot", "tecoa", "pmg-aft", "capt", "apd"):
        assert method in table
        assert method in report
        assert len(read(tmp_path / "demo" / method / "results.jsonl")) == 1
    assert "clean-robust.png" in report
    assert (tmp_path / "demo" / "clean-robust.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_options_are_known():
    from advtune.methods import configure

    for entry in demo.ENTRIES:
        method, recipe, _ = configure(entry.method, entry.options)
        assert all(getattr(method, k, getattr(recipe, k, None)) == v for k, v in entry.options.items())


def test_the_card_of_the_embedded_backbone():
    from advtune.pretrained import EMBEDDED, read_pretrained

    folder = EMBEDDED["mini"]
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 16_000_000
    assert "not OpenAI CLIP" in json.loads((folder / "card.json").read_text())["notice"]
    assert "not OpenAI CLIP" in read_pretrained("mini").notice
    card = (folder / "README.md").read_text()
    for name in ("TinyImageNet", "CIFAR-10", "Caltech-101", "chance"):
        assert name in card


@pytest.mark.slow
def test_the_embedded_backbone_can_be_made_robust():
    clip, data = advtune.load("mini"), advtune.load_task(demo.DATA)
    entry = demo.ENTRIES[0]
    robust = advtune.tune(entry.method, clip, data, shots=16, epochs=6, options=entry.options, show=False)
    attack = advtune.PGD(eps=1 / 255, steps=10)
    before, after = (advtune.evaluate(m, data, attack, limit=200, show=False) for m in (clip, robust))
    assert after.robust["low"] > before.robust["high"]
    assert after.robust["accuracy"] > 0.2
