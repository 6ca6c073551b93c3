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


def test_base_and_new_classes(clip_folder, tmp_path, capsys):
    folder = write_images(tmp_path / "set", classes=("ant", "bee", "cat", "dog"), train=2, test=2)
    data, run = ["--data", f"folder:{folder}", "--precision", "fp32"], str(tmp_path / "run")
    tune = ["train", "capt", *data, "--backbone", str(clip_folder), "--epochs", "1", "--subset", "base", "--out", run]
    assert main(tune) == 0
    assert capsys.readouterr().out.strip().endswith("--subset base")
    assert main(["evaluate", run, *data, "--subset", "new"]) == 0
    assert "(new classes, test): clean" in capsys.readouterr().out
    assert main(["evaluate", run, *data]) == 0
    assert "(test): clean" in capsys.readouterr().out
    assert main(["report", run]) == 0
    printed = capsys.readouterr().out
    assert "set new test" in printed
    assert "set base train" in printed


def failure(arguments, capsys):
    """The one line of a refused call; argparse puts the usage above it."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 or lines[0].startswith("usage: ")
    return lines[-1]


@pytest.mark.parametrize("arguments", [[], ["train"], ["evaluate"], ["study"], ["report"], ["list"], ["demo"]], ids=str)
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
    if what == "data":
        lines = {line.split()[0]: line for line in shown.splitlines()}
        assert lines["dtd"].endswith("47 classes, from tanganke/dtd, or CoOp's split file with its images *")
        assert lines["grocery"].endswith("from your own copy (ADVTUNE_DATA)")
    if what == "methods":
        assert "weight†=" in shown
        options = {o["name"]: o for o in next(f for f in facts if f["name"] == "capt")["options"]}
        assert options["weight"]["reconstructed"] is True


REFUSED = {
    "unknown method": (
        ["train", "cpat", "--out", "OUT"],
        "unknown method 'cpat'; did you mean capt? known: zero-shot, tecoa",
    ),
    "nothing to train": (["train", "zero-shot", "--out", "OUT"], "zero-shot trains nothing"),
    "unknown key": (["train", "capt", "-o", "lambda=1", "--out", "OUT"], "lam"),
    "wrong type": (["train", "capt", "-o", "depth=deep", "--out", "OUT"], "depth"),
    "wrong choice": (["train", "capt", "-o", "ce=dirty", "--out", "OUT"], "adversarial"),
    "integer eps": (["train", "capt", "-a", "eps=4", "--out", "OUT"], "4/255"),
    "eps one": (["evaluate", "zero-shot", "--attack", "pgd", "-a", "eps=1"], "1/255"),
    "unknown attack": (["evaluate", "zero-shot", "--attack", "pgdd"], "known: pgd"),
    "attack key": (["evaluate", "zero-shot", "--attack", "pgd", "-a", "epsilon=1/255"], "eps"),
    "attack options alone": (["evaluate", "zero-shot", "-a", "eps=1/255"], "-a goes with an attack"),
    "source alone": (["evaluate", "zero-shot", "--source", "mini"], "--source goes with an attack"),
    "checks alone": (["evaluate", "zero-shot", "--attack", "none", "--checks"], "--checks goes with an attack"),
    "eps twice": (["evaluate", "zero-shot", "--attack", "pgd", "-a", "eps=1/255,1/255"], "names a radius twice"),
    "same eps": (["evaluate", "zero-shot", "--attack", "pgd", "-a", "eps=1/255,2/510"], "names a radius twice"),
    "eps option twice": (["evaluate", "zero-shot", "--attack", "pgd", "-a", "eps=0", "-a", "eps=1/255"], "given twice"),
    "half a curve": (["evaluate", "zero-shot", "--attack", "pgd", "-a", "eps=1/255,"], "eps"),
    "curve of whole pixels": (["evaluate", "zero-shot", "--attack", "pgd", "-a", "eps=0,4"], "4/255"),
    "eps in l2": (["evaluate", "zero-shot", "--attack", "pgd", "-a", "norm=l2", "-a", "eps=128"], "128/255"),
    "norm": (["evaluate", "zero-shot", "--attack", "apgd-ce", "-a", "norm=l1"], "linf, l2"),
    "ensemble's key": (
        ["evaluate", "zero-shot", "--attack", "autoattack", "-a", "steps=5"],
        "known: eps, norm, version",
    ),
    "version": (["evaluate", "zero-shot", "--attack", "autoattack", "-a", "version=fast"], "standard, rand"),
    "transfer": (["evaluate", "zero-shot", "--attack", "transfer"], "with --source DIR the model"),
    "no source": (["evaluate", "zero-shot", "--attack", "pgd", "--source", "./nowhere", "--out", "OUT"], "nowhere"),
    "defence": (["evaluate", "zero-shot", "--attack", "pgd", "--defence", "blur"], "'blur'; known: jpeg, noise"),
    "stand-in for nothing": (
        ["evaluate", "zero-shot", "--attack", "pgd", "-a", "bpda=true", "--out", "OUT"],
        "--defence",
    ),
    "stand-in of another": (["evaluate", "zero-shot", "--attack", "square", "-a", "bpda=true"], "no option bpda"),
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


# --- attacks, curves, defences, comparisons -----------------------------------------------------------------


@pytest.fixture
def zero(base):
    return ["evaluate", "zero-shot", *base]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_curve_is_a_block_and_a_row_for_each_eps(zero, tmp_path, capsys):
    out, arguments = tmp_path / "out", [*zero, "--attack", "pgd", "-a", "eps=4/255, 0,1/255", "-a", "steps=3"]
    assert main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    shown = [line for line in printed if line.startswith("robust under")]
    assert [line.partition(":")[0] for line in shown] == [
        f"robust under pgd linf eps={eps} steps=3" for eps in ("0", "1/255", "4/255")
    ]
    assert len([line for line in printed if "clean " in line]) == 3
    assert printed.count("note: images that fell at a smaller eps were not attacked again") == 1  # said once
    rows = rows_of(out)
    assert [row["attack"]["eps"] for row in rows] == [0, 1 / 255, 4 / 255]
    assert rows[0]["flags"]["robust"] == rows[0]["flags"]["clean"]
    assert main([*arguments, "--json"]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["flags"] for row in again] == [row["flags"] for row in rows]
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out.count("### colours test") == 3


def test_autoattack_from_end_to_end(zero, tmp_path, capsys, short_square):
    out = tmp_path / "out"
    assert main([*zero, "--attack", "autoattack", "-a", "eps=6/255", "--part", "all", "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    (row,) = rows_of(out)
    assert "robust under autoattack linf eps=6/255: " in printed[1]
    stages = ", ".join(f"{each['attack']}: {each['fell']} of {each['attacked']} fell" for each in row["stages"])
    assert printed[2] == f"  {stages}"
    assert [each["attack"] for each in row["stages"]] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    alarms = [each for each in row["checks"] if each["alarm"]]
    words = {0: "no alarms", 1: "1 alarm"}.get(len(alarms), f"{len(alarms)} alarms")
    assert printed[3] == f"checks: {len(row['checks'])} made, {words}"
    assert [line for line in printed if line.startswith("  ALARM")] == [
        f"  ALARM {each['name']}: {each['text']}" for each in alarms
    ]
    assert "note: apgd-t: with 3 classes the margin stands in for DLR" in printed
    for kind in ("markdown", "csv", "latex", "json"):
        assert main(["report", str(out), "--format", kind]) == 0
        assert "apgd-ce" in capsys.readouterr().out


def test_an_alarm_is_said(zero, tmp_path, capsys):
    """JPEG attacked without its stand-in looks robust; with it, the threat says so."""
    attack = ["--attack", "pgd", "-a", "eps=8/255", "-a", "steps=4", "--defence", "jpeg"]
    assert main([*zero, *attack, "--checks", "--limit", "6", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "  ALARM zero-gradient: 100.0 % of the input gradients are exactly zero" in printed
    assert "behind the defence jpeg, with its own gradient" in printed
    assert main([*zero, *attack, "-a", "bpda=true", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "behind the defence jpeg, its gradient replaced (BPDA)" in printed
    assert "checks" not in printed
    rows = rows_of(tmp_path / "out")
    assert [row["attack"]["bpda"] for row in rows] == [False, True]
    assert [row["checks"] != [] for row in rows] == [True, False]


@pytest.mark.parametrize(
    "attack",
    [
        ["apgd-ce", "steps=5"], ["apgd-t", "steps=2", "targets=1"], ["cw-pgd", "steps=2", "norm=l2", "eps=0.5"],
        ["fab-t", "steps=2"], ["square", "queries=5"], ["cw-l2", "steps=2", "searches=1"], ["fgsm"], ["noise"],
        ["autoattack", "version=rand", "eps=0"],
    ],
    ids=lambda attack: attack[0],
)  # fmt: skip
def test_every_attack_by_its_name(attack, zero, capsys):
    from advtune.attacks import ATTACKS

    name, *options = attack
    given = [part for option in options for part in ("-a", option)]
    assert main([*zero, "--attack", name, *given, "--limit", "4"]) == 0
    printed = capsys.readouterr().out
    assert f"robust under {name} {'l2' if 'l2' in str(attack) else 'linf'} eps=" in printed
    assert set(ATTACKS) == {
        "pgd", "cw-pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "cw-l2", "fgsm", "noise", "autoattack",
    }  # fmt: skip


def test_transfer_is_said(zero, run, capsys):
    arguments = [*zero, *PGD, "--source", str(run)]
    assert main(arguments) == 0
    assert f"\n  transfer: images made on {run}, scored on this model\n" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["attack"]["name"], row["stages"][0]["attack"]) == ("pgd", "transfer")
    assert main([*zero, *PGD]) == 0
    assert "white-box" not in capsys.readouterr().out  # the rule needs no words


def test_bad_input_costs_no_evaluation(zero, capsys, monkeypatch):
    """What can be known beforehand is refused before images are classified."""
    from advtune import evaluation

    monkeypatch.setattr(evaluation, "predict", lambda s: pytest.fail("images were classified"))
    for arguments in (["pgd", "-a", "bpda=true"], ["pgd", "--source", "./nowhere"], ["pgd", "-a", "eps=0,0"]):
        failure([*zero, "--attack", *arguments], capsys)


def test_compare(zero, run, base, tmp_path, capsys):
    attack = [*PGD, "--part", "all"]
    assert main([*zero, *attack, "--out", str(tmp_path / "zero")]) == 0
    assert main(["evaluate", str(run), *base[2:], *attack]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "zero"), str(run)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("A: zero-shot. B: capt.\n")
    assert "| colours all, 16 px | pgd eps 2/255, 3 steps | 30 | robust |" in text
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert main(["compare", str(tmp_path / "zero" / "results.jsonl"), str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["which"] for each in found] == ["clean", "robust"]


def test_compare_without_a_pair_is_one_line(zero, run, base, tmp_path, capsys):
    assert main([*zero, *PGD, "--out", str(tmp_path / "zero")]) == 0
    assert main(["evaluate", str(run), *base[2:], "--attack", "pgd", "-a", "eps=4/255", "-a", "steps=3"]) == 0
    capsys.readouterr()
    line = failure(["compare", tmp_path / "zero", run], capsys)
    assert "nothing to compare: not the same attack" in line
    assert "pgd eps 2/255" in line and "pgd eps 4/255" in line
    assert "nothing: there is no such file or folder" in failure(
        ["compare", tmp_path / "zero", tmp_path / "zero" / "nothing"], capsys
    )
    assert "missing: DIR; for example" in failure(["compare", tmp_path / "zero"], capsys)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "results.jsonl").write_text("{}\n")
    assert "line 1" in failure(["compare", tmp_path / "zero", tmp_path / "odd"], capsys)


def test_list_attacks_shows_all_with_their_options(capsys):
    from advtune.attacks import ATTACKS
    from advtune.edits import TEXTUAL

    assert main(["list", "attacks"]) == 0
    shown = capsys.readouterr().out
    names = [line for line in shown.splitlines() if line and not line.startswith(" ")]
    assert names[:-1] == [*ATTACKS, *TEXTUAL]
    assert names[-1].startswith("transfer: ")
    for line in ("eps=1/255", "version=standard (standard | rand)", "queries=5000", "loss=dlr-targeted", "bpda=false"):
        assert f"    {line}" in shown
