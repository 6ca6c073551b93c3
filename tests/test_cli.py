"""The command line as a user meets it."""

import csv
import io
import json
import subprocess
import sys

import pytest

from advtune.cli import main
from conftest import write_images

PGD = ["--attack", "pgd", "-a", "eps=2/255", "-a", "steps=3"]


@pytest.fixture
def base(clip_folder, image_folder):
    return ["--backbone", str(clip_folder), "--data", f"folder:{image_folder}", "--precision", "fp32"]


@pytest.fixture
def run(base, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "capt", *base, "--shots", "2", "--epochs", "1", "--out", str(out)]) == 0
    capsys.readouterr()
    return out


def failure(arguments, capsys):
    """The one line of a refused call."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    return printed.err.strip().splitlines()[-1]


@pytest.mark.parametrize("arguments", [[], ["train"], ["evaluate"], ["report"], ["list"], ["demo"]], ids=str)
def test_help_does_not_import_torch(arguments):
    code = f"""
import sys, advtune, advtune.cli
try: advtune.cli.main({[*arguments, "--help"]!r})
except SystemExit as stop: assert stop.code == 0
assert "torch" not in sys.modules and "datasets" not in sys.modules and "numpy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: advtune")


def test_train_evaluate_report(run, base, capsys, tmp_path):
    data = base[2:]
    assert main(["evaluate", str(run), *data, *PGD, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["method"] == "capt"
    assert row["data"]["n"] == 12
    assert main(["evaluate", "zero-shot", *base, *PGD, "--out", str(tmp_path / "zero")]) == 0
    printed = capsys.readouterr().out
    assert "clean" in printed
    assert "robust under pgd linf eps=2/255 steps=3" in printed
    assert "n=12" in printed
    for kind in ("markdown", "csv", "latex", "json"):
        assert main(["report", str(tmp_path), "--format", kind]) == 0
        text = capsys.readouterr().out
        assert "capt" in text
        assert "zero-shot" in text
    assert main(["report", str(run), "--format", "csv", "--out", str(tmp_path / "t.csv")]) == 0
    assert len(list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))) == 1


def test_cross_dataset_and_other_words(run, tmp_path, capsys):
    other = write_images(tmp_path / "other", classes=("one", "two"), side=20)
    words = tmp_path / "words.json"
    words.write_text(json.dumps({"one": "crimson", "two": "azure"}))
    assert (
        main(
            [
                "evaluate",
                str(run),
                "--data",
                f"folder:{other}",
                "--classes",
                str(words),
                "--template",
                "a {}",
                "--json",
            ]
        )
        == 0
    )
    row = json.loads(capsys.readouterr().out)
    assert (row["data"]["classes"], row["data"]["template"]) == (2, "a {}")
    assert (run / "results.jsonl").read_text().count("\n") == 1


def test_backbone_may_be_a_run(base, tmp_path, capsys):
    tower = tmp_path / "tower"
    assert main(["train", "tecoa", *base, "--shots", "1", "--epochs", "1", "--out", str(tower)]) == 0
    arguments = ["train", "capt", "--backbone", str(tower), *base[2:], "--shots", "1", "--epochs", "1"]
    assert main([*arguments, "--out", str(tmp_path / "top")]) == 0
    assert main(["evaluate", str(tmp_path / "top"), *base[2:]]) == 0


@pytest.mark.parametrize("what", ["methods", "attacks", "data", "backbones"])
def test_list(what, capsys):
    assert main(["list", what]) == 0
    shown = capsys.readouterr().out
    assert main(["list", what, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts
    assert all(fact["name"] in shown for fact in facts)
    if what == "methods":
        assert "weight†=" in shown
        options = {o["name"]: o for o in next(f for f in facts if f["name"] == "capt")["options"]}
        assert options["weight"]["reconstructed"] is True


REFUSED = {
    "unknown method": (["train", "cpat", "--out", "OUT"], "unknown method 'cpat'; known: zero-shot, tecoa"),
    "nothing to train": (["train", "zero-shot", "--out", "OUT"], "zero-shot trains nothing"),
    "unknown key": (["train", "capt", "-o", "lambda=1", "--out", "OUT"], "lam"),
    "wrong type": (["train", "capt", "-o", "depth=deep", "--out", "OUT"], "depth"),
    "wrong choice": (["train", "capt", "-o", "ce=dirty", "--out", "OUT"], "adversarial"),
    "integer eps": (["train", "capt", "-a", "eps=4", "--out", "OUT"], "4/255"),
    "eps one": (["evaluate", "zero-shot", "--attack", "pgd", "-a", "eps=1"], "1/255"),
    "unknown attack": (["evaluate", "zero-shot", "--attack", "pgdd"], "known: pgd"),
    "attack key": (["evaluate", "zero-shot", "--attack", "pgd", "-a", "epsilon=1/255"], "eps"),
    "attack options alone": (["evaluate", "zero-shot", "-a", "eps=1/255"], "--attack"),
    "too many shots": (["train", "capt", "--shots", "7", "--out", "OUT"], "7"),
    "no shots": (["train", "capt", "--shots", "0", "--out", "OUT"], "shots"),
    "two places": (["evaluate", "zero-shot", "--template", "a {} and {}"], "exactly one {}"),
    "no place": (["train", "capt", "--template", "a photo", "--out", "OUT"], "exactly one {}"),
    "no epochs": (["train", "capt", "--epochs", "0", "--out", "OUT"], "epochs"),
    "no limit": (["evaluate", "zero-shot", "--limit", "0"], "--limit 0"),
    "no run": (["evaluate", "nowhere"], "nowhere"),
    "not tuned": (["evaluate", "capt"], "advtune train capt"),
    "resolution": (["evaluate", "zero-shot", "--resolution", "big"], "--resolution"),
    "duplicate classes": (["evaluate", "zero-shot", "--classes", "a,b,A"], "one text"),
    "no batch": (["evaluate", "zero-shot", "--batch-size", "0", "--out", "OUT"], "batch size 0"),
    "text too long": (["train", "capt", "-o", "prompt_length=90", "--out", "OUT"], "longer than the context"),
    "device": (["evaluate", "zero-shot", "--device", "foo", "--out", "OUT"], "--device cpu"),
    "seed": (["train", "capt", "--seed", "99999999999", "--out", "OUT"], "seed"),
    "no name": (["train", "capt", "--out", "."], "name"),
    "unknown flag": (["evaluate", "zero-shot", "--nonsense"], "--nonsense"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_writes_nothing(name, base, tmp_path, capsys):
    arguments, expected = REFUSED[name]
    use = base if arguments[1] not in ("nowhere", "capt") or arguments[0] == "train" else base[2:]
    arguments = [str(tmp_path / "run") if a == "OUT" else a for a in arguments]
    line = failure([*arguments[:2], *use, *arguments[2:]], capsys)
    assert line.startswith("advtune")
    assert expected in line
    assert list(tmp_path.glob("run*")) == []


def test_bad_backbones_and_data(base, clip_folder, tmp_path, capsys):
    import shutil

    broken = shutil.copytree(clip_folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    out = ["--out", tmp_path / "run"]
    assert "truncated" in failure(["train", "capt", "--backbone", broken, *base[2:], *out], capsys)
    weights.unlink()
    assert "no weights" in failure(["train", "capt", "--backbone", broken, *base[2:], *out], capsys)
    lonely = write_images(tmp_path / "lonely", classes=("one",))
    assert "1 class" in failure(["train", "capt", *base[:2], "--data", f"folder:{lonely}", *out], capsys)
    missing = failure(["train", "capt", *base[:2], "--data", f"folder:{tmp_path / 'no'}", *out], capsys)
    assert "no such path" in missing
    assert "did you mean" in failure(["train", "capt", *base[:2], "--data", "caltech10", *out], capsys)
    assert "no results.jsonl" in failure(["report", lonely], capsys)
    assert list(tmp_path.glob("run*")) == []


def test_a_corrupt_image_is_named(base, image_folder, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(image_folder, tmp_path / "images")
    (folder / "test" / "red" / "0.png").write_bytes(b"not a picture")
    arguments = ["evaluate", "zero-shot", *base[:2], "--data", f"folder:{folder}"]
    line = failure(arguments, capsys)
    assert "red" in line
    assert "0.png" in line
    assert main([*arguments, "--on-bad-image", "skip", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["data"]["n"] == 11
    assert len(row["data"]["skipped"]) == 1


def test_an_existing_out_is_kept(run, base, capsys):
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    arguments = ["train", "capt", *base, "--shots", "1", "--epochs", "1", "--out", run]
    assert "--overwrite" in failure(arguments, capsys)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_not_finite(base, tmp_path, capsys):
    arguments = [
        "train",
        "tecoa",
        *base,
        "--epochs",
        "20",
        "-o",
        "lr=1e30",
        "-o",
        "warmup=0",
        "--out",
        tmp_path / "run",
    ]
    line = failure(arguments, capsys)
    assert "at step" in line
    assert "'ce'" in line
    assert list(tmp_path.glob("run*")) == []


def test_out_in_a_wrong_place_is_one_line(base, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    train = ["train", "capt", *base, "--shots", "1", "--epochs", "1", "--out", tmp_path / "file" / "run"]
    assert "Not a directory" in failure(train, capsys)
    assert "is a file" in failure(["evaluate", "zero-shot", *base, "--out", tmp_path / "file"], capsys)


def test_progress_lines_do_not_touch_stdout(run, base, capsys):
    assert main(["evaluate", str(run), *base[2:], *PGD, "--json"]) == 0
    printed = capsys.readouterr()
    json.loads(printed.out)
    assert "12/12 images" in printed.err
