"""The audit: its rows are measured once and are the page's numbers, its words follow from them, its commands run."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import advtune
from advtune import audit as auditing
from advtune.arguments import build
from advtune.attacks import APGD, AutoAttack, Square
from advtune.audit import CURVE, Audit, Side, audit, command, write
from advtune.cli import main
from advtune.errors import UserError
from advtune.parsing import parse
from advtune.report.audit import rendered
from advtune.report.verdict import columns, following, fragile, paired, percent, title, verdict
from advtune.results import accuracy, read
from conftest import write_images
from test_html import SCRIPT, Read, _self_contained
from test_report import make


@pytest.fixture(autouse=True)
def short_attack(monkeypatch):
    """AutoAttack as two stages of a few steps; its checks without the embedded backbone."""
    monkeypatch.setattr("advtune.evaluation.other_model", lambda s: None)
    monkeypatch.setattr(AutoAttack, "stages", lambda self: [APGD(eps=self.eps, steps=3), Square(self.eps, queries=5)])


def refuse(*_, **__):
    raise AssertionError("measured again")


def fake(clean="1" * 6 + "0" * 4, robust="1" * 3 + "0" * 7, method="zero-shot", scale=20, trained=0, **changes):
    """A side whose AutoAttack row has these flags, each `scale` times; its curve falls to nothing at 2/255."""

    def rowed(attack, robust, **more):
        flags = {"clean": clean * scale, "robust": robust * scale}
        counts = {key: accuracy(value) for key, value in flags.items()}
        seed = None if method == "zero-shot" else trained
        return replace(make(method, seed=seed, attack=attack, **more), flags=flags, **counts)

    curve = [rowed({"name": "pgd", "steps": 20, "eps": eps}, robust if eps == 0 else "0" * len(clean))
             for eps in (0.0, 2 / 255)]  # fmt: skip
    auto = rowed({"name": "autoattack", "eps": 1 / 255, "norm": "linf"}, robust, **changes)
    model = SimpleNamespace(origin=SimpleNamespace(name="net" if method == "zero-shot" else f"out/{method}"))
    return Side(model, curve, auto)


def found_of(*sides, classes=("a", "b"), labels=None, total=1000):
    n = sides[0].auto.clean["n"]
    labels = labels or [0] * n
    task = SimpleNamespace(classes=classes, name="pets", spec="pets", template="a photo of a {}.")
    images = SimpleNamespace(y=torch.tensor(labels))
    again = ["advtune", "audit", "--data", "pets", "--backbone", "net"]
    return Audit(list(sides), task, images, total, Path("out"), "tecoa" if len(sides) > 1 else "", again)


# --- measuring -----------------------------------------------------------------------------------------


def test_what_is_measured_is_on_the_page_and_is_not_measured_twice(vlm, task, tmp_path, monkeypatch, capsys):
    found = audit(vlm, task, tmp_path / "out", limit=9, show=False)
    (side,) = found.sides
    assert [row.attack["eps"] for row in side.curve] == list(CURVE) and side.auto.attack["name"] == "autoattack"
    assert all((row.clean["n"], row.attack["steps"]) == (9, 20) for row in side.curve) and found.total == 12
    assert side.auto.checks and side.auto.attack["eps"] == 1 / 255
    for small, large in zip(side.curve, side.curve[1:], strict=False):
        assert small.robust["correct"] >= large.robust["correct"]
    assert [row.to_json() for row in read(tmp_path / "out/before/results.jsonl")] == [r.to_json() for r in found.rows]
    text = write(found).read_text()
    page = Read(text)
    _self_contained(page, text)
    assert {"verdict", "fragile", "classes", "gallery", "next"} < set(page.sections)
    assert "training" not in page.sections
    for row in side.rows:
        assert percent(row.robust) in page.cells
    assert percent(side.auto.clean) in " ".join(page.sections["verdict"].split()).replace("\u00a0", " ")
    assert len(page.pictures("adversarial image for zero-shot")) == 5
    for name in ("evaluate", "evaluate_curve"):
        monkeypatch.setattr(auditing, name, refuse)
    assert audit(vlm, task, tmp_path / "out", limit=9).rows == found.rows
    assert "6 of 6 rows are there" in capsys.readouterr().err
    for changed in ({"limit": 6}, {"eps": 2 / 255}, {"seed": 1}, {"overwrite": True}, {"resolution": 8}):
        with pytest.raises(AssertionError, match="measured again"):
            audit(vlm, task, tmp_path / "out", **{"limit": 9, "show": False, **changed})


def test_a_killed_audit_goes_on(vlm, task, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(auditing, "evaluate", killed)
        audit(vlm, task, tmp_path / "out", show=False)
    monkeypatch.setattr(auditing, "evaluate_curve", refuse)
    assert len(audit(vlm, task, tmp_path / "out", show=False).rows) == len(CURVE) + 1


def test_who_interrupts_is_told_what_goes_on(tmp_path, monkeypatch, capsys):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(auditing, "audit", killed)
    words = ["audit", "--data", "fashion-mnist-mini", "--out", str(tmp_path / "out")]
    for more, said in (([], "the same command goes on"), (["--overwrite"], "same command, without --overwrite, goes")):
        assert main([*words, *more]) == 130
        assert said in capsys.readouterr().err


def test_a_fix_is_a_run_measured_on_the_same_images(clip_folder, tmp_path, capsys):
    classes = (SCRIPT, "a & b", '"><img src=x>')
    data = f"folder:{write_images(tmp_path / 'set', classes=classes)}"
    words = ["audit", "--backbone", str(clip_folder), "--data", data, "--out", str(tmp_path / "out"), "--fix",
             "--shots", "2", "--epochs", "1", "-o", "lr=0.01", "--device", "cpu"]  # fmt: skip
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert f"written: {tmp_path}/out/audit.html" in printed and "The fix (tecoa)" in printed
    before, after = (read(tmp_path / "out" / name / "results.jsonl") for name in ("before", "tecoa"))
    assert len(before) == len(after) == len(CURVE) + 1
    assert {row.method for row in before} == {"zero-shot"} and {row.method for row in after} == {"tecoa"}
    assert {(row.data["sha256"], row.clean["n"]) for row in before + after} == {(before[0].data["sha256"], 12)}
    assert (after[0].train["shots"], after[0].recipe["lr"], after[0].train["part"]) == (2, 0.01, "train")
    text = (tmp_path / "out/audit.html").read_text()
    page = Read(text)
    _self_contained(page, text)
    assert len(page.pictures("adversarial image for after (tecoa)")) == 5
    assert len(page.pictures("Loss terms")) == len(page.pictures("Clean against")) == 1
    assert {percent(row.robust) for row in before + after} < set(page.cells)
    assert SCRIPT in page.sections["classes"] or SCRIPT in page.sections["gallery"]
    assert main([*words[:-6], "--epochs", "2", "--device", "cpu"]) == 2
    assert "was started with other settings (recipe)" in capsys.readouterr().err


# --- words ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clean", "robust", "scale", "said"),
    [
        ("1111111000", "0000000000", 20, "almost every right answer can be turned"),
        ("1111111000", "1100000000", 40, "Not robust: most right answers can"),
        ("1111111100", "1111000000", 20, "Undecided"),
        ("1111111100", "1111111000", 20, "Partly robust"),
        ("1111111100", "1111111100", 20, "almost every right answer stands"),
        ("1111111100", "1111111100", 1, "Not shown to be better than guessing"),
        ("0000000000", "0000000000", 20, "Not shown to be better than guessing"),
    ],
)  # fmt: skip
def test_a_verdict_follows_from_the_interval(clean, robust, scale, said):
    assert said in title(fake(clean, robust, scale=scale), 2)


def test_a_verdict_has_its_numbers():
    noise = {"name": "noise", "alarm": False, "value": 1.0, "limit": 0.0, "n": 40, "text": "noise breaks as many"}
    ((about, text),) = verdict(found_of(fake(checks=[noise])))
    assert about.startswith("Undecided")
    for part in ("200 of the 1000", "60.0 % [53.1, 66.5]", "30.0 % [24.1, 36.7]", "60 of its 120 right", "n = 200",
                 "at most 1/255, 1 step of", "Under PGD less",
                 "from eps 2/255 on", "1 check for", "raised no alarm"):  # fmt: skip
        assert part in text
    bad = verdict(found_of(fake(checks=[noise | {"alarm": True}])))
    assert "no alarm" not in bad[0][1]
    assert bad[1] == (
        "Alarm: a robust accuracy may be too high", "noise: noise breaks as many (n = 40).",
    )  # fmt: skip
    blind = fake(zero_gradient={"share": 0.5, "n": 128})
    text = "50 % of the input gradients are exactly zero: the attack may have seen nothing."
    assert verdict(found_of(blind))[1][1] == text
    assert verdict(found_of(fake(), blind))[2] == ("Alarm: a robust accuracy after the fix may be too high", text)


@pytest.mark.parametrize(
    ("clean", "robust", "said"),
    [
        ("1111110000", "1111110000", "helps, at no clean price that shows"),
        ("1111000000", "1111000000", "helps, at a clean price"),
        ("1111111111", "1111110000", "helps, with clean images, too"),
        ("1111110000", "1110000000", "is not told from no fix"),
        ("1111000000", "1110000000", "is not shown to help, and costs clean accuracy"),
        ("1111111100", "1110000000", "helps on clean images alone"),
        ("1111110000", "1000000000", "makes it less robust"),
    ],
)
def test_a_fix_is_judged_on_pairs(clean, robust, said):
    found = found_of(fake(), fake(clean, robust, "tecoa"))
    head, text = verdict(found)[1]
    assert said in head
    difference = 10 * (robust.count("1") - 3)
    assert paired(found)["robust"]["difference"] == pytest.approx(difference / 100)
    assert f"{difference:+.1f} points" in text


def test_a_fix_of_a_model_tuned_with_another_seed_is_paired():
    before, after = fake(method="tecoa", trained=3), fake("1111110000", "1111110000", "capt")
    assert paired(found_of(before, after))["robust"]["difference"] == pytest.approx(0.3)


def test_names_are_text_at_head_and_foot():
    found = replace(found_of(fake(), classes=(SCRIPT, "b"), total=1000), out=Path(SCRIPT), again=["advtune", SCRIPT])
    for half in ("head", "foot"):
        text = str(rendered(found, half))
        assert "<script" not in text and SCRIPT in Read(text).text


def test_fragile_classes_by_hand():
    side = fake("111101", "100100", scale=1)
    other = fake("111111", "111101", "tecoa", scale=1)
    labels = [0, 0, 1, 1, 1, 2]
    found = found_of(side, other, classes=("a", "b", "c", "no image"), labels=labels)
    lines = [(each.name, each.n, each.right, each.lost) for each in fragile(found)]
    assert lines == [("c", 1, [(1, 0), (1, 1)], 1), ("b", 3, [(2, 1), (3, 2)], 2), ("a", 2, [(2, 1), (2, 2)], 1)]
    assert [name for name, _ in columns(found, ["before", "after"])] == ["before", "after"]


# --- commands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sides",
    [
        [fake()],
        [fake("1" + "0" * 9, "0" * 10, zero_gradient={"share": 0.5, "n": 9})],
        [fake(), fake("1111110000", "1111110000", "tecoa")],
        [fake(), fake("1111110000", "1110000000", "tecoa")],
        [fake(), fake("1111110000", "1111110000", "tecoa", zero_gradient={"share": 0.5, "n": 9})],
    ],
)
def test_what_to_do_next_are_commands_that_parse(sides):
    found = found_of(*sides)
    steps = [command for _, command in following(found)]
    assert 2 <= len(steps) <= 5
    for step in steps:
        assert parse(build(), shlex.split(step)[1:]).verb in ("audit", "evaluate", "export")
    assert any(step.startswith("advtune export out/tecoa --to huggingface") for step in steps) == (
        len(sides) == 2 and "1111" in sides[1].auto.flags["robust"][:4]
    )
    assert steps[-1].endswith("--limit all") and not any("--limit all" in each for each in steps[:-1])
    assert not any("--limit all" in step for _, step in following(found_of(*sides, total=sides[0].auto.clean["n"])))


def test_the_command_is_the_one_that_was_given():
    words = ["audit", "--data", "folder:a b", "--fix", "--epochs", "3", "-o", "lr=1", "-o", "epochs=2", "--eps",
             "2/255", "--compile", "--template", "a {}", "--seed", "1"]  # fmt: skip
    args = parse(build(), words)
    assert parse(build(), command(args)[1:]) == args
    more = parse(build(), [*words, "--limit", "9", "--json", "--overwrite"])
    assert command(more) == command(args)


DATA = ["--data", "fashion-mnist-mini"]
BAD = {
    "eps of 1": ([*DATA, "--eps", "1"], "1/255"),
    "no eps": ([*DATA, "--eps", "0"], "--eps 0 attacks nothing"),
    "method": ([*DATA, "--fix", "teco"], "did you mean tecoa?"),
    "no method": ([*DATA, "--fix", "zero-shot"], "trains nothing"),
    "option": ([*DATA, "--fix", "-o", "lt=1"], "method tecoa: no option lt; known"),
    "shots alone": ([*DATA, "--shots", "4"], "--shots says how to tune; add --fix METHOD"),
    "no shots": ([*DATA, "--fix", "--shots", "0"], "--shots"),
    "limit": ([*DATA, "--limit", "0"], "--limit 0: at least 1 image"),
    "limit of words": ([*DATA, "--limit", "some"], "'some' is neither a number of images nor all"),
    "data": (["--data", "fashion-mnist-min"], "did you mean fashion-mnist-mini"),
    "backbone": ([*DATA, "--backbone", "./none"], "none"),
    "file": ([*DATA, "--out", "FILE"], "is a file; give --out a folder"),
    "run": ([*DATA, "--out", "RUN"], "is a run folder; give --out another"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    for each in ("config.json", "delta.safetensors"):
        (tmp_path / "run" / each).touch()
    words, said = BAD[name]
    words = [str(tmp_path / each.lower()) if each in ("FILE", "RUN") else each for each in words]
    there = sorted(tmp_path.rglob("*"))
    try:
        code = main(["audit", "--out", str(tmp_path / "out"), *words])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    assert said in line
    assert sorted(tmp_path.rglob("*")) == there


def test_what_is_chosen_on_val_was_not_tuned_on(vlm, task, tmp_path):
    found = audit(vlm, task, tmp_path / "out", part="val", fix="tecoa", shots=None, epochs=1, show=False)
    after = found.sides[1].auto
    assert (after.data["part"], after.train["part"]) == ("val", "fit")
    assert not any("were tuned on" in note for note in after.notes)


def test_a_tuned_model_can_be_audited(clip_folder, task, tmp_path):
    run = tmp_path / "run"
    advtune.tune("tecoa", str(clip_folder), task, shots=1, epochs=1, out=run, show=False)
    found = audit(str(run), task.spec, tmp_path / "out", show=False)
    assert found.sides[0].auto.method == "tecoa" and found.sides[0].auto.run == str(run)
    assert all(parse(build(), shlex.split(step)[1:]) for _, step in following(found))
    with pytest.raises(UserError, match="is a run folder"):
        audit(str(run), task.spec, run)
