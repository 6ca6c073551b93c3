"""Protocols as lists of runs, and studies that are planned, run, skipped, resumed and refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from dataclasses import replace

import pytest

import advtune
from advtune import answers, cost, disk, grid, runs
from advtune.attacks import PGD, AutoAttack
from advtune.cli import main
from advtune.data.catalog import catalog
from advtune.edits import TextEdits
from advtune.errors import UserError
from advtune.protocols import PROTOCOLS, Run, Slice, slug
from advtune.report import render
from advtune.report.harmonic import harmonic, harmonic_means
from advtune.results import accuracy, read
from advtune.study import Study, from_facts, from_flags, plan, run_study, write
from advtune.study import read as read_toml
from conftest import write_clip, write_images

COUNTS = {  # methods zero-shot and tecoa, 2 sets, the default shots, seeds 0 and 1
    "few-shot": 2 * (1 + 6 * 2),
    "base-to-new": 2 * (1 + 2),
    "cross-dataset": 1 + 2,
    "domain-shift": 1 + 2,
    "transfer": 1 + 2,
    "eps-curve": 2 * (1 + 2),
}
QUICK = {"name": "pgd", "eps": "2/255", "steps": 2}


def small(protocol="few-shot", **changes):
    facts = {"methods": ["zero-shot", "tecoa"], "data": ["cifar10", "caltech101"], "seeds": [0, 1]}
    return Study(protocol, **(facts | changes))


@pytest.fixture
def images(tmp_path):
    return f"folder:{write_images(tmp_path / 'four', ('red', 'green', 'blue', 'grey'), train=3, test=2)}"


@pytest.fixture
def study(clip_folder, images):
    """Zero-shot and a short TeCoA on tiny images: two runs."""
    return Study(
        "few-shot", ("zero-shot", "tecoa"), (images,), shots=(1,), backbone=str(clip_folder), epochs=1,
        options={"batch_size": 4}, attacks=(QUICK,),
    )  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """What the runs really do: trainings, attacks, and what is loaded."""
    found = []

    def counted(name):
        before = getattr(grid, name)

        def call(*args, **how):
            found.append(name)
            return before(*args, **how)

        monkeypatch.setattr(grid, name, call)

    for name in ("tune", "evaluate_all", "load_task"):
        counted(name)
    load = runs.load
    monkeypatch.setattr(runs, "load", lambda *args, **how: (found.append("load"), load(*args, **how))[1])
    return found


def files(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plans_have_the_right_runs(protocol):
    found = plan(small(protocol))
    assert len(found) == COUNTS[protocol]
    assert len({run.key for run in found}) == len(found)
    zero = [run for run in found if run.method == "zero-shot"]
    assert len(zero) == (2 if protocol in ("few-shot", "base-to-new", "eps-curve") else 1)
    assert all(run.shots is None and run.epochs is None for run in zero)


def test_what_each_protocol_tunes_and_tests_on():
    few = [run for run in plan(small()) if run.method == "tecoa"]
    assert [run.shots for run in few[::2][:6]] == [1, 2, 4, 8, 16, None]
    assert all(run.tests == (Slice(run.data),) for run in few)
    base = plan(small("base-to-new", limit=9))[-1]
    assert (base.data, base.subset, base.shots, base.seed) == ("caltech101", "base", 16, 1)
    assert base.tests == (Slice("caltech101", "base", limit=9), Slice("caltech101", "new", limit=9))
    cross = plan(small("cross-dataset"))[-1]
    assert (cross.data, cross.shots) == ("imagenet", 16)
    assert [test.data for test in cross.tests] == ["imagenet", "cifar10", "caltech101"]
    shift = plan(small("domain-shift", data=[]))[-1]
    names = ["imagenet", "imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch"]
    assert [test.data for test in shift.tests] == names
    moved = plan(small("transfer", train_on="cifar10", train_limit=50))[-1]
    assert (moved.data, moved.shots, moved.limit) == ("cifar10", None, 50)
    assert [test.data for test in moved.tests] == ["cifar10", "caltech101"]
    curve = plan(small("eps-curve"))[-1]
    assert curve.curve
    assert [attack.eps * 255 for attack in curve.attacks] == [1, 2, 4, 8]


def test_a_key_changes_with_all_that_decides_the_model():
    run = Run("capt", "cifar10", (Slice("cifar10"),), (PGD(),), shots=4)
    changes = {
        "method": "apd", "data": "caltech101", "subset": "base", "part": "fit", "shots": 8, "seed": 1, "epochs": 3,
        "limit": 7, "options": {"lam": 7.0}, "train_attack": {"eps": "8/255"}, "backbone": "other", "template": "a {}",
    }  # fmt: skip
    keys = [run.key, *(replace(run, **{name: value}).key for name, value in changes.items())]
    assert keys[0] == "cifar10/capt/4shots-seed0-55c52d7a7f"  # folders that are there are found again
    assert len({key.rpartition("-")[2] for key in keys}) == len(changes) + 1  # the hashes, not the words
    assert run.key.startswith("cifar10/capt/4shots-seed0-")
    same = replace(run, tests=(Slice("caltech101"),), attacks=(PGD(eps=4 / 255),), options={"prompt_length": "4"})
    written = replace(run, options={"prompt_length": 4})
    assert same.key == written.key  # what is evaluated, and how a value is written, do not tune again
    other = replace(run, data="folder:a/photos").key, replace(run, data="folder:b/photos").key
    assert other[0].startswith("photos/")
    assert other[0] != other[1]


def test_a_path_has_one_spelling_and_a_label_a_folder():
    run = Run("tecoa", "folder:a/photos", (Slice("csv:a/x.csv"),), backbone="runs/t")
    assert replace(run, data="folder:./a//photos/", tests=(Slice("csv:./a/x.csv"),), backbone="./runs/t/") == run
    for same in ("cifar10", "hf:owner/name:config", "folder:/a", "folder:", "openai/clip-vit-base-patch32", "mini", ""):
        assert Run("tecoa", same, (), backbone=same) == replace(run, data=same, tests=(), backbone=same)
        assert Run("tecoa", same, ()).data == same
    with pytest.raises(UserError, match="twice"):
        small(data=["folder:a", "folder:./a"])
    labelled = replace(run, label="x")
    assert labelled.settings() == run.settings()
    assert labelled.key != run.key


def test_what_could_only_fail_later_is_refused_at_once(tmp_path):
    own = {"coop": {"context": "class-specific"}}
    with pytest.raises(UserError, match="context=unified"):
        plan(small(protocol="base-to-new", methods=["coop"], method=own))
    assert plan(small(methods=["coop"], method=own))
    with pytest.raises(UserError, match="none of the methods tunes on adversarial"):
        plan(small(methods=["coop"], train_attack={"eps": "4/255"}))
    with pytest.raises(UserError, match="give it once"):
        small(epochs=2, options={"epochs": 3})
    with pytest.raises(UserError, match="at least 1 image"):
        run_study(small(), tmp_path / "out", batch_size=0)
    assert not (tmp_path / "out").exists()


def test_slugs_are_folders():
    assert [slug(text) for text in ("folder:/x/my photos", "hf:owner/name", "a/../..", "..", "tecoa lr=0.1")] == [
        "my-photos", "name", "run", "run", "tecoa-lr=0.1",
    ]  # fmt: skip


def test_options_go_to_every_method_and_to_one():
    study = small(
        methods=["tecoa", "capt"], options={"lr": 0.5}, epochs=9, method={"capt": {"lam": 3.0, "epochs": 2}},
        train_attack={"eps": "8/255"},
    )  # fmt: skip
    tecoa, capt = (next(run for run in plan(study) if run.method == name).settings() for name in ("tecoa", "capt"))
    assert (tecoa["recipe"]["lr"], capt["recipe"]["lr"], capt["options"]["lam"]) == (0.5, 0.5, 3.0)
    assert (tecoa["recipe"]["epochs"], capt["recipe"]["epochs"]) == (9, 2)
    assert tecoa["attack"]["eps"] == capt["attack"]["eps"] == 8 / 255


def test_a_study_runs_and_is_skipped_when_done(study, calls, tmp_path, capsys):
    out = tmp_path / "out"
    outcome = run_study(study, out)
    assert calls.count("tune") == 1
    assert calls.count("evaluate_all") == 2
    assert [row.method for row in outcome.rows] == ["zero-shot", "tecoa"]
    assert not outcome.failed
    assert "[2/2]" in capsys.readouterr().err
    before = files(out)
    calls.clear()
    again = run_study(study, out)
    assert calls == []
    assert again.skipped == 2
    assert [row.to_json() for row in again.rows] == [row.to_json() for row in outcome.rows]
    assert files(out) == before
    table = render(again.rows, "markdown")
    assert "tecoa" in table
    assert "Harmonic" not in table


def test_more_attacks_do_not_tune_again(study, calls, tmp_path):
    out = tmp_path / "out"
    run_study(study, out)
    more = replace(study, attacks=({**QUICK, "eps": ["2/255", "4/255"]},))
    with pytest.raises(UserError, match="holds another study"):
        run_study(more, out)
    calls.clear()
    outcome = run_study(more, out, extend=True)
    assert calls.count("evaluate_all") == 2  # the new eps, for each run
    assert [round(row.attack["eps"] * 255) for row in outcome.rows] == [2, 4, 2, 4]
    assert len(read(*out.rglob("results.jsonl"))) == 4
    for changed in ({"steps": 3}, {"loss": "margin"}, {"step_size": "1/255"}):
        run = plan(replace(study, attacks=({**QUICK, **changed},)))[1]
        assert answers.missing(run, answers.rows_of(run, out / run.key)), changed
    for changed in (replace(study, limit=3), replace(study, attack_seed=1)):
        run = plan(changed)[1]
        assert answers.missing(run, answers.rows_of(run, out / run.key))


def test_a_failed_run_does_not_stop_the_rest(study, tmp_path, monkeypatch, capsys):
    out, tune = tmp_path / "out", grid.tune

    def broken(method, *args, **how):
        if how["seed"] == 0:
            raise RuntimeError("out of\nmemory")
        return tune(method, *args, **how)

    monkeypatch.setattr(grid, "tune", broken)
    study = replace(study, methods=("tecoa",), seeds=(0, 1))
    outcome = run_study(study, out)
    assert [each.error for each in outcome.failed] == ["RuntimeError: out of memory"]
    assert [row.train["seed"] for row in outcome.rows] == [1]
    line = json.loads((out / "failed.jsonl").read_text())
    assert line["key"] == plan(study)[0].key
    assert "Traceback" in (out / line["traceback"]).read_text()
    assert "failed: four/tecoa/1shots-seed0" in capsys.readouterr().err
    monkeypatch.setattr(grid, "tune", tune)
    assert not run_study(study, out).failed
    assert not (out / "failed.jsonl").exists()


def test_a_set_that_cannot_be_had_does_not_stop_the_others(study, images, tmp_path):
    study = replace(study, protocol="transfer", train_on=images, data=("folder:nowhere", images), methods=("tecoa",))
    outcome = run_study(study, tmp_path / "out")
    assert [each.test for each in outcome.failed] == ["folder:nowhere"]
    assert [row.data["spec"] for row in outcome.rows] == [images]


def test_a_half_done_run_goes_on(study, calls, tmp_path, monkeypatch):
    out, evaluate_all = tmp_path / "out", grid.evaluate_all
    study = replace(study, methods=("tecoa",), attacks=({**QUICK, "eps": ["1/255", "2/255"]},))
    whole = run_study(study, tmp_path / "whole").rows

    def killed(model, task, attacks, **how):
        if attacks[0].eps > 1.5 / 255:
            raise KeyboardInterrupt
        return evaluate_all(model, task, attacks, **how)

    monkeypatch.setattr(grid, "evaluate_all", killed)
    with pytest.raises(KeyboardInterrupt, match="at run 1 of 1"):
        run_study(study, out)
    monkeypatch.setattr(grid, "evaluate_all", evaluate_all)
    weights = (out / plan(study)[0].key / runs.DELTA).stat().st_mtime_ns
    calls.clear()
    rows = run_study(study, out).rows
    assert calls.count("evaluate_all") == 1
    assert (out / plan(study)[0].key / runs.DELTA).stat().st_mtime_ns == weights
    assert [row.flags for row in rows] == [row.flags for row in whole]
    assert len(read(*out.rglob("results.jsonl"))) == 2


def test_a_curve_is_one_evaluation(study, calls, tmp_path):
    study = replace(
        study, protocol="eps-curve", methods=("zero-shot",), attacks=({**QUICK, "eps": ["8/255", 0, "2/255"]},)
    )
    out = tmp_path / "out"
    rows = run_study(study, out).rows
    assert calls.count("evaluate_all") == 1
    robust = [row.robust["accuracy"] for row in rows]
    assert robust == sorted(robust, reverse=True)
    path = out / plan(study)[0].key / runs.RESULTS
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    again = run_study(study, out).rows
    assert [(row.attack, row.flags) for row in again] == [(row.attack, row.flags) for row in rows]
    assert len(read(path)) == 3


def test_rows_of_other_settings_are_refused(study, clip_folder, tmp_path):
    out = tmp_path / "out"
    rows = run_study(replace(study, methods=("tecoa",)), out).rows
    run = plan(replace(study, methods=("tecoa",)))[0]
    for changes in (
        {"options": {"x": 1}},
        {"recipe": {**rows[0].recipe, "lr": 9.0}},
        {"train": {**rows[0].train, "attack": {**rows[0].train["attack"], "steps": 9}}},
        {"train": {**rows[0].train, "seed": 5}},
        {"method": "capt"},
    ):
        assert not answers.tuned_as(replace(rows[0], **changes), run), changes
    assert answers.tuned_as(rows[0], run)
    (out / run.key / runs.RESULTS).write_text(replace(rows[0], method="capt").to_json() + "\n")
    assert "made with other settings" in run_study(replace(study, methods=("tecoa",)), out).failed[0].error
    (out / run.key / runs.RESULTS).write_text(
        replace(rows[0], backbone={**rows[0].backbone, "sha256": "0"}).to_json() + "\n"
    )
    wider = replace(study, methods=("tecoa",), attacks=({**QUICK, "eps": ["2/255", "4/255"]},))
    failed = run_study(wider, out, extend=True).failed
    assert [each.error.startswith("backbone") for each in failed] == [True]


def test_rows_that_a_study_would_not_have_made_are_no_answer(study, calls, images, tmp_path):
    out = tmp_path / "out"
    study = replace(study, methods=("tecoa",))
    own = run_study(study, out).rows
    (run,) = plan(study)
    folder = out / run.key
    for how in ({"resolution": 28}, {"template": "junk {}"}):
        (folder / runs.RESULTS).unlink()
        task = advtune.load_task(images, template=how.pop("template", None))
        advtune.evaluate(str(folder), task, run.attacks[0], out=folder, show=False, **how)
        calls.clear()
        again = run_study(study, out, extend=True, show=False)
        assert calls.count("evaluate_all") == 1
        assert [row.flags for row in again.rows] == [row.flags for row in own]
        assert len(read(folder / runs.RESULTS)) == 2
    for changes in ({"skipped": ["x"]}, {"subset": "base"}, {"shots": 1}, {"limit": 3}, {"spec": "cifar10"}):
        assert not answers.answers(replace(own[0], data={**own[0].data, **changes}), run, run.tests[0], run.attacks[0])
        if "spec" not in changes:
            other = replace(own[0], train={**own[0].train, "shots": 1, **changes})
            assert answers.tuned_as(other, run) == (changes == {"shots": 1})


def test_an_evaluation_by_hand_beside_the_study_s_own_is_left_alone(study, images, tmp_path):
    study, out = replace(study, methods=("tecoa",)), tmp_path / "out"
    (own,) = run_study(study, out, precision="fp32", show=False).rows
    (run,) = plan(study)
    advtune.evaluate(advtune.load(str(out / run.key), precision="bf16"), images, run.attacks[0], out=out / run.key)
    assert len(read(out / run.key / runs.RESULTS)) == 2
    again = run_study(study, out, show=False)
    assert ([row.to_json() for row in again.rows], again.failed) == ([own.to_json()], [])


def test_all_of_a_study_is_of_the_same_weights_images_and_words(study, images, tmp_path):
    out = tmp_path / "out"
    rows = run_study(study, out, show=False).rows
    tuned = plan(study)[1]
    path = out / tuned.key / runs.RESULTS
    (row,) = read(path)
    for name, changes in {
        "images of": {"data": {**row.data, "sha256": "0"}},
        "class texts": {"data": {**row.data, "texts_sha256": "0"}},
        "backbone": {"backbone": {**row.backbone, "sha256": "0"}},
        "precision": {"precision": "bf16" if row.precision == "fp32" else "fp32"},
    }.items():
        path.write_text(replace(row, **changes).to_json() + "\n")
        outcome = run_study(study, out, show=False)
        assert [each.error.startswith(name) for each in outcome.failed] == [True], name
        assert str(out / rows[0].data["name"]) in outcome.failed[0].error
        assert [each.method for each in outcome.rows] == ["zero-shot"]
    wider = replace(study, methods=("tecoa",), seeds=(0, 1), attacks=({**QUICK, "eps": ["2/255", "4/255"]},))
    path.write_text(replace(row, model="0").to_json() + "\n")
    failed = run_study(wider, out, extend=True, show=False).failed
    assert [(each.key, each.error.split()[0]) for each in failed] == [(tuned.key, "model")]
    path.write_text(replace(row, train={**row.train, "sha256": "0"}).to_json() + "\n")
    other = replace(study, methods=("tecoa", "vpt"), epochs=None, options={"batch_size": 4, "epochs": 1})
    failed = run_study(other, out, extend=True, show=False).failed
    assert [each.error.startswith("images of") and "1 shots" in each.error for each in failed] == [True]


def test_precision_that_is_asked_for_is_had(study, calls, tmp_path):
    study = replace(study, methods=("zero-shot",))
    run_study(study, tmp_path, precision="fp32", show=False)
    calls.clear()
    assert not run_study(study, tmp_path, precision="fp32", show=False).failed
    failed = run_study(study, tmp_path, precision="bf16", show=False).failed
    assert [each.error.startswith("precision: not the same as in --precision bf16") for each in failed] == [True]
    assert calls == []


def test_a_tower_that_was_tuned_again_is_another(study, images, clip_folder, tmp_path):
    tower, out = tmp_path / "tower", tmp_path / "out"

    def retune(lr):
        advtune.tune(
            "tecoa", str(clip_folder), images, epochs=1, options={"lr": lr}, out=tower, overwrite=True, show=False
        )

    retune(1e-3)
    zero = replace(study, methods=("zero-shot",), backbone=str(tower))
    run_study(zero, out, show=False)
    retune(0.1)
    wider = replace(zero, attacks=({**QUICK, "eps": ["2/255", "4/255"]},))
    outcome = run_study(wider, out, extend=True, show=False)
    assert [each.error.split(":")[0] for each in outcome.failed] == [f"backbone {tower}"]
    assert len(outcome.rows) == len(read(*out.rglob("results.jsonl"))) == 1


def test_images_that_changed_under_their_name_are_told(study, images, tmp_path):
    zero, out = replace(study, methods=("zero-shot",)), tmp_path / "out"
    run_study(zero, out, show=False)
    shutil.rmtree(tmp_path / "four")
    write_images(tmp_path / "four", ("red", "green", "blue", "grey"), train=3, test=3)
    outcome = run_study(replace(zero, attacks=({**QUICK, "eps": ["2/255", "4/255"]},)), out, extend=True, show=False)
    assert [each.error.startswith(f"images of {images}") for each in outcome.failed] == [True]
    assert len(outcome.rows) == len(read(*out.rglob("results.jsonl"))) == 1


def test_a_backbone_that_changed_under_its_name_is_told(study, tmp_path, clip_folder):
    out, towers = tmp_path / "out", tmp_path / "clip"
    shutil.copytree(clip_folder, towers)
    zero = replace(study, methods=("zero-shot",), backbone=str(towers))
    run_study(zero, out)
    write_clip(towers, seed=5)  # other weights, the same name
    assert not run_study(zero, out).failed  # nothing to do: the backbone is not read
    outcome = run_study(replace(zero, methods=("zero-shot", "tecoa")), out, extend=True)
    (failed,) = outcome.failed
    assert "tecoa" in failed.key
    assert failed.error.startswith(f"backbone {towers}: not the same as in {out / plan(zero)[0].key}; remove one")
    assert not list(out.rglob(runs.DELTA))  # told before anything is tuned


def test_two_processes_do_not_work_in_one_folder(study, tmp_path, monkeypatch, capsys):
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    path = tmp_path / "study.toml"
    path.write_text(write(study), encoding="utf-8")
    with disk.alone(out):
        assert main(["study", str(path), "--out", str(out), "--extend"]) == 2
        assert "another process works here; wait for it, or choose another --out\n" in capsys.readouterr().err
        with pytest.raises(UserError, match="another process works here"):
            grid.work(plan(study), out)
    assert [each.name for each in out.iterdir()] == [disk.LOCK]
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with disk.alone(out), disk.alone(out):
        assert len(run_study(study, out, show=False).rows) == 2


def test_harmonic_means_by_hand(study, images, tmp_path):
    assert harmonic(0.5, 0.25) == pytest.approx(1 / 3)
    assert harmonic(0.0, 0.0) == 0.0
    study = replace(study, protocol="base-to-new", methods=("tecoa",), seeds=(0, 1))
    rows = run_study(study, tmp_path / "out").rows
    assert [(row.train["subset"], row.data["subset"]) for row in rows] == [("base", "base"), ("base", "new")] * 2
    flags = [("1100", "1000"), ("1111", "1000"), ("1100", "0000"), ("1000", "1000")]
    rows = [
        replace(row, flags={"clean": clean, "robust": robust, "after pgd": robust},
                clean=accuracy(clean), robust=accuracy(robust))
        for row, (clean, robust) in zip(rows, flags, strict=True)
    ]  # fmt: skip
    (line,) = harmonic_means(rows)
    # clean: 2 * .5 * 1 / 1.5 = 2/3 and 2 * .5 * .25 / .75 = 1/3; robust: .25 and 0
    assert line["clean"]["h"] == pytest.approx(0.5)
    assert line["clean"]["h_sd"] == pytest.approx((2 / 3 - 1 / 3) / 2**0.5)
    assert (line["clean"]["base"], line["clean"]["new"]) == (0.5, 0.625)
    assert line["robust"]["h"] == pytest.approx(0.125)
    assert line["seeds"] == [0, 1]
    for kind in ("markdown", "latex"):
        text = render(rows, kind)
        assert "Harmonic means" in text
        assert "50.0 ± 23.6" in text or r"50.0 $\pm$ 23.6" in text
    assert harmonic_means(rows[:1]) == []
    assert len(harmonic_means([rows[0], rows[3]])) == 0  # base and new of different runs are no pair
    assert render(rows, "json").startswith("[")


REFUSED = {
    "protocol": ({"protocol": "fewshot"}, "did you mean few-shot?"),
    "unknown key": ({"method_s": 1}, "did you mean methods?"),
    "missing": ({"methods": None}, "missing; write"),
    "method": ({"methods": ["tecoaa"]}, "did you mean tecoa?"),
    "not a list": ({"methods": "tecoa"}, 'methods = ["tecoa"]'),
    "twice": ({"data": ["cifar10", "cifar10"]}, "data names cifar10 twice"),
    "shots": ({"shots": [0]}, "write 1 or more"),
    "shots word": ({"shots": ["many"]}, 'a number from 1, or "all"'),
    "seed": ({"seeds": [-1]}, "write 0 or more"),
    "seed word": ({"seeds": ["a"]}, "not a whole number"),
    "no data": ({"data": []}, "needs data"),
    "limit": ({"limit": 0}, "write 1 or more"),
    "train_on": ({"train_on": "cifar10"}, "leave train_on out"),
    "idle": ({"method": {"capt": {"lam": 1.0}}}, "options for capt"),
    "option": ({"options": {"lrr": 1}}, "did you mean lr?"),
    "table": ({"options": 3}, "options is a table"),
    "nested list": ({"methods": [["tecoa"]]}, "is not a text"),
    "method table": ({"method": {"tecoa": 3}}, "[method.tecoa]"),
    "attacks": ({"attacks": 3}, "attacks is a list"),
    "attack": ({"attacks": [{"name": "pdg"}]}, "did you mean pgd?"),
    "attack name": ({"attacks": [{"eps": 1}]}, "a table with a name"),
    "attack eps": ({"attacks": [{"name": "pgd", "eps": 4}]}, "write 4/255"),
    "attack twice": ({"attacks": [QUICK, QUICK]}, "name the same thing twice"),
    "none with eps": ({"attacks": [{"name": "none", "eps": 0}]}, "clean accuracy alone"),
    "protocol list": ({"protocol": ["few-shot"]}, "is not a text"),
    "attack name list": ({"attacks": [{"name": ["pgd"]}]}, "a table with a name"),
    "attack text": ({"attacks": ["pgd"]}, "a table with a name"),
    "options text": ({"options": "lr=1"}, "options is a table"),
    "train_attack text": ({"train_attack": "eps=1/255"}, "train_attack is a table"),
    "method text": ({"method": "x"}, "method is a table"),
    "set": ({"data": ["cifar11"]}, "did you mean cifar10?"),
    "set trained on": ({"protocol": "transfer", "train_on": "tiny-imagenet"}, "did you mean tinyimagenet?"),
    "kind of set": ({"data": ["folders:photos"]}, "of your own: folder:PATH"),
    "paper": ({"paper": "fapp"}, "no published numbers of 'fapp'; did you mean fap?"),
    "paper's table": ({"paper": "fap", "table": "few-shots"}, "fap has no table 'few-shots'; did you mean few-shot?"),
    "table of no paper": ({"table": "few-shot"}, "is of no paper"),
    "curve in l2": ({"protocol": "eps-curve", "attacks": [{"name": "cw-l2"}]}, "a curve in l2 has no usual eps"),
    "curve": ({"protocol": "eps-curve", "attacks": [{"name": "none"}]}, "needs an attack"),
    "curve over texts": ({"protocol": "eps-curve", "attacks": [{"name": "text"}]}, "needs an attack"),
    "template": ({"template": ["a photo"]}, "exactly one {}"),
    "template text": ({"template": "ensemble"}, 'template = ["ensemble"]'),
    "template twice": ({"template": ["a {}", "a {}"]}, "given twice"),
    "template file": ({"template": ["none.txt"]}, "cannot read none.txt"),
    "no template": ({"template": [""]}, "exactly one {}"),
    "ensemble of a learned text": ({"methods": ["tecoa", "coop"], "template": ["ensemble"]}, "coop learns a text"),
    "ensemble of learned prompts": ({"methods": ["tecoa", "capt"], "template": ["ensemble"]}, "capt learns a text"),
    "text eps": ({"attacks": [{"name": "text", "eps": "1/255"}]}, "attack text: no option eps"),
    "text distance": ({"attacks": [{"name": "text", "distance": 0}]}, "write 1 or more"),
    "text twice": ({"attacks": [{"name": "text"}, {"name": "text", "distance": 1}]}, "name the same thing twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_study_gets_one_line(name):
    changes, message = REFUSED[name]
    facts = {"protocol": "few-shot", "methods": ["tecoa"], "data": ["cifar10"]} | changes
    facts = {key: value for key, value in facts.items() if value is not None}
    with pytest.raises(UserError, match=re.escape(message)) as told:
        plan(from_facts(facts))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_study_gets_one_line_whatever_flags_lie_over_it(name, monkeypatch):
    changes, message = REFUSED[name]
    facts = {"protocol": "few-shot", "methods": ["tecoa"], "data": ["cifar10"]} | changes
    monkeypatch.setattr("advtune.study.read", lambda path: {k: v for k, v in facts.items() if v is not None})
    flags = {"study": "s.toml", "options": ["lr=1", "tecoa.warmup=1"], "train_attack": ["eps=1/255"]}
    with pytest.raises(UserError, match=re.escape(message)) as told:
        plan(from_flags(flags))
    assert "\n" not in str(told.value)


def test_toml_reads_back(tmp_path):
    study = small(
        "transfer", train_on="imagenet", shots=[1, "all"], backbone='a "quoted" \\ näme', limit=5, epochs=2,
        options={"lr": 0.01, "augment": False}, method={"tecoa": {"warmup": 3}}, train_attack={"eps": "1/255"},
        attacks=[{"name": "pgd", "eps": ["1/255", 0.5], "steps": 3}, {"name": "none"}], paper="fap", table="few-shot",
        template=["a {}", "the {}"],
    )  # fmt: skip
    path = tmp_path / "study.toml"
    path.write_text(write(study), encoding="utf-8")
    assert from_facts(read_toml(path)) == study
    path.write_text("methods = [")
    with pytest.raises(UserError, match="not TOML") as told:
        read_toml(path)
    assert "\n" not in str(told.value)


def test_flags_lie_over_the_file(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(
        'protocol = "few-shot"\nmethods = ["tecoa"]\ndata = ["cifar10"]\noptions = { lr = 0.5 }\n'
        '[[attacks]]\nname = "pgd"\neps = "4/255"\nsteps = 7\n[[attacks]]\nname = "autoattack"\n'
    )
    flags = {
        "study": str(path), "shots": ["2", "all"], "options": ["lr=0.1", "tecoa.warmup=5"],
        "train_attack": ["steps=4"], "attack_options": ["steps=9"], "eps": ["2/255"],
    }  # fmt: skip
    study = from_flags(flags)
    assert study.shots == (2, "all")
    assert study.options == {"lr": "0.1"}
    assert study.method == {"tecoa": {"warmup": "5"}}
    assert study.evaluation() == (PGD(eps=2 / 255, steps=9), AutoAttack(eps=2 / 255))
    assert plan(study)[0].settings()["attack"]["steps"] == 4
    with pytest.raises(UserError, match="no attack of pgd, autoattack has it"):
        from_flags(flags | {"attack_options": ["queries=1"]})
    with pytest.raises(UserError, match="--eps goes with an attack"):
        from_flags(flags | {"attack": ["none"], "attack_options": None})
    assert from_flags(flags | {"attack": ["none"], "eps": None, "attack_options": None}).evaluation() == (None,)
    named = from_flags(flags | {"attack": ["pgd"], "eps": None, "attack_options": None})
    assert named.evaluation() == (PGD(eps=4 / 255, steps=7),)  # the file's attack of that name
    both = from_flags(flags | {"attack": ["fgsm", "pgd"], "eps": None, "attack_options": ["steps=3"]})
    assert [each.name for each in both.evaluation()] == ["fgsm", "pgd"]
    assert both.evaluation()[1].steps == 3


def test_flags_take_the_place_of_what_the_file_says_in_any_table(monkeypatch):
    facts = {"protocol": "few-shot", "methods": ["tecoa", "vpt"], "data": ["cifar10"], "shots": [1]}
    facts |= {"options": {"epochs": 50, "lr": 0.3}, "method": {"tecoa": {"lr": 0.5, "epochs": 9}, "vpt": {"depth": 3}}}
    monkeypatch.setattr("advtune.study.read", lambda path: dict(facts))
    flags = {"study": "s.toml", "epochs": 1, "options": ["lr=0.01", "vpt.lr=0.02"]}
    tecoa, vpt = (run.settings() for run in plan(from_flags(flags)))
    assert [(run["recipe"]["epochs"], run["recipe"]["lr"]) for run in (tecoa, vpt)] == [(1, 0.01), (1, 0.02)]
    assert vpt["options"]["depth"] == 3
    tecoa, vpt = (run.settings() for run in plan(from_flags(flags | {"epochs": None, "options": ["epochs=2"]})))
    assert [run["recipe"]["epochs"] for run in (tecoa, vpt)] == [2, 2]
    with pytest.raises(UserError, match="--epochs and -o epochs say the same; give one"):
        from_flags(flags | {"options": ["epochs=2"]})


def test_a_curve_keeps_its_eps_under_flags():
    flags = {"study": "eps-curve", "methods": ["zero-shot"], "data": ["cifar10"]}
    for more in ({}, {"attack_options": ["steps=7"]}, {"attack": ["pgd"]}, {"attack": ["autoattack"]}):
        (run,) = plan(from_flags(flags | more))
        assert [round(attack.eps * 255) for attack in run.attacks] == [1, 2, 4, 8], more
    (run,) = plan(from_flags(flags | {"attack": ["pgd"], "eps": ["2/255", "3/255"]}))
    assert [(round(attack.eps * 255), attack.steps) for attack in run.attacks] == [(2, 100), (3, 100)]
    (run,) = plan(from_flags(flags | {"study": "few-shot", "attack": ["pgd", "autoattack"]}))
    assert run.attacks == (PGD(eps=1 / 255, steps=100), AutoAttack(eps=1 / 255))


def test_clean_alone_may_be_none_in_python(study, tmp_path):
    study = replace(study, methods=("zero-shot",), attacks=({"name": None},))
    assert study.attacks == ({"name": "none"},)
    assert from_facts(tomllib.loads(write(study))) == study
    for _ in range(2):
        assert len(run_study(study, tmp_path, show=False).rows) == 1


def test_class_names_are_attacked_in_a_study_too(study, calls, tmp_path, capsys):
    """Beside images or alone, at two distances, once, and as by hand."""
    words = [{"name": "text", "alphabet": "ab", "distance": k} for k in (1, 2)]
    asked = replace(study, attacks=(QUICK, *words))
    outcome = run_study(asked, tmp_path / "out", show=False)
    assert not outcome.failed
    assert [row.attack.get("distance") for row in outcome.rows] == [None, 1, 2] * 2
    assert [attack.name for attack in plan(from_facts(read_toml(tmp_path / "out" / "study.toml")))[0].attacks] == [
        "pgd", "text", "text",
    ]  # fmt: skip
    calls.clear()
    again = run_study(asked, tmp_path / "out", show=False)
    assert (calls, again.skipped, again.rows) == ([], 2, outcome.rows)
    for row in outcome.rows[1::3]:
        model = advtune.load(row.run or study.backbone, "cpu", row.precision)
        by_hand = advtune.evaluate(model, row.data["spec"], TextEdits(alphabet="ab"), show=False)
        assert (by_hand.flags, by_hand.stages[0]["edits"]) == (row.flags, row.stages[0]["edits"])
    images = cost.evaluation([(Slice(study.data[0]), [TextEdits()])], {})
    assert images == cost.evaluation([(Slice(study.data[0]), [None])], {}) != (0, 0)  # its texts are not counted
    given = ["--methods", "zero-shot", "--data", *study.data, "--backbone", study.backbone, "--attack", "pgd", "text"]
    given += ["-a", "distance=2", "-a", "steps=3", "--eps", "1/255"]
    found = from_flags({"study": "few-shot", "methods": ["zero-shot"], "data": study.data, "attack": ["pgd", "text"],
                        "attack_options": ["distance=2", "steps=3"], "eps": ["1/255"]}).evaluation()  # fmt: skip
    assert [(type(each), getattr(each, "steps", None)) for each in found] == [(PGD, 3), (TextEdits, None)]
    assert found[1] == TextEdits(distance=2)
    assert main(["study", "few-shot", *given, "--dry-run"]) == 0
    assert "the texts\nthat the attack text tries" in capsys.readouterr().out
    assert main(["study", "few-shot", *given[:-2], "--attack", "text", "--eps", "1/255", "--dry-run"]) == 2
    assert "--eps goes with an attack on images" in capsys.readouterr().err


def test_templates_of_a_study_stand_for_those_of_the_sets(study, calls, tmp_path):
    """One or several, tuned and tested with; other templates are other runs; the study keeps what a file said."""
    file = tmp_path / "texts.txt"
    file.write_text("a {} thing\nthe {}\n")
    asked = replace(study, template=(str(file),))
    outcome = run_study(asked, tmp_path / "out", show=False)
    assert not outcome.failed
    assert {row.data["template"] for row in outcome.rows} == {"a {} thing | the {}"}
    assert {row.train["template"] for row in outcome.rows if row.train} == {"a {} thing | the {}"}
    file.write_text("another {}\n")
    calls.clear()
    kept = from_facts(read_toml(tmp_path / "out" / "study.toml"))
    assert kept.template == ("a {} thing", "the {}")
    assert (run_study(kept, tmp_path / "out", show=False).rows, calls) == (outcome.rows, [])
    keys = [{run.key for run in plan(replace(study, template=t))} for t in ((), ("the {}",), ("a {}", "the {}"))]
    assert len(set.union(*keys)) == 6
    assert keys[0] == {run.key for run in plan(study)}  # a folder that was made before stays known
    image_side = {"methods": ["ivlp"], "options": {"text_tokens": 0}, "template": ("a {}", "the {}")}
    assert plan(small(**image_side))


def test_methods_left_out_take_their_tables_along(monkeypatch):
    facts = {"protocol": "few-shot", "methods": ["tecoa", "vpt"], "data": ["cifar10"], "shots": [1]}
    facts |= {"method": {"tecoa": {"lr": 0.5}, "vpt": {"depth": 3}}}
    monkeypatch.setattr("advtune.study.read", lambda path: dict(facts))
    (run,) = plan(from_flags({"study": "s.toml", "methods": ["tecoa"]}))
    assert run.settings()["recipe"]["lr"] == 0.5
    with pytest.raises(UserError, match="options for vpt, which is not among the methods"):
        from_flags({"study": "s.toml", "methods": ["tecoa"], "options": ["vpt.lr=0.1"]})
    facts["method"]["coop"] = {"lr": 0.1}
    with pytest.raises(UserError, match="options for coop, which is not among the methods"):
        from_flags({"study": "s.toml", "methods": ["tecoa"]})


def test_methods_left_out_take_the_training_attack_along(monkeypatch):
    facts = {"protocol": "few-shot", "methods": ["tecoa", "coop"], "data": ["cifar10"], "shots": [1]}
    monkeypatch.setattr("advtune.study.read", lambda path: facts | {"train_attack": {"eps": "4/255"}})
    both = plan(from_flags({"study": "s.toml"}))
    apart = [plan(from_flags({"study": "s.toml", "methods": [name]}))[0] for name in ("tecoa", "coop")]
    assert [run.key for run in apart] == [run.key for run in both]
    with pytest.raises(UserError, match="none of the methods tunes on adversarial"):
        plan(from_flags({"study": "s.toml", "methods": ["coop"], "train_attack": ["eps=1/255"]}))
    facts["methods"] = ["coop", "maple"]  # never had a use for it
    with pytest.raises(UserError, match="none of the methods tunes on adversarial"):
        plan(from_flags({"study": "s.toml", "methods": ["coop"]}))
    with pytest.raises(UserError, match="unknown method 'tecoo'"):
        from_flags({"study": "s.toml", "methods": ["tecoo"]})


def test_flags_of_words_and_side():
    flags = {"study": "few-shot", "methods": ["zero-shot"], "data": ["cifar10"], "template": ["a {}", "the {}"]}
    found = from_flags(flags | {"image_size": 96})
    assert (found.template, found.backbone) == (("a {}", "the {}"), "mini@96")
    assert from_flags(flags | {"image_size": 96, "backbone": "openai/clip-vit-base-patch32"}).backbone.endswith("32@96")
    with pytest.raises(UserError, match="a side of 0 pixels"):
        from_flags(flags | {"image_size": 0})


def test_the_verb(images, clip_folder, tmp_path, capsys, calls):
    out = tmp_path / "out"
    arguments = ["study", "base-to-new", "--methods", "zero-shot", "tecoa", "--data", images, "--shots", "1"]
    arguments += ["--backbone", str(clip_folder), "--epochs", "1", "--eps", "2/255", "-a", "steps=2", "--out", str(out)]
    assert main([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "2 runs, 0 done" in printed
    assert "worst case" in printed
    assert "unknown" not in printed
    assert not out.exists()
    assert "tune" not in calls
    assert main([*arguments, "--json"]) == 0
    assert [json.loads(line)["method"] for line in capsys.readouterr().out.splitlines()] == ["zero-shot"] * 2 + [
        "tecoa"
    ] * 2
    calls.clear()
    assert main(["study", str(out / "study.toml"), "--out", str(out)]) == 0
    assert calls == []
    printed = capsys.readouterr().out
    assert "Harmonic means" in printed
    assert "--against" not in printed
    (out / "study.toml").write_text((out / "study.toml").read_text() + 'paper = "fap"\n')
    assert main(["study", str(out / "study.toml"), "--out", str(out)]) == 0
    assert f"Beside the paper's: advtune report --against fap {out}\n" in capsys.readouterr().out
    assert main([*arguments, "--dry-run", "--json"]) == 0
    assert [run["done"] for run in json.loads(capsys.readouterr().out)] == [True, True]
    assert main([*arguments[:-2], "--dry-run", "--json"]) == 0  # without a folder nothing is done
    assert [run["done"] for run in json.loads(capsys.readouterr().out)] == [False, False]
    assert main(arguments[:-2]) == 2
    assert "--out DIR is missing" in capsys.readouterr().err
    assert main(["study", "few-shott", "--out", str(out)]) == 2
    assert "did you mean few-shot" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(study, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "evaluate_all", stop)
    path = tmp_path / "study.toml"
    path.write_text(write(study), encoding="utf-8")
    assert main(["study", str(path), "--out", str(tmp_path / "out")]) == 130
    again = f"advtune study {path} --out {tmp_path / 'out'}"
    assert capsys.readouterr().err.endswith(f"advtune: interrupted at run 1 of 2; go on with: {again}\n")


def test_a_reason_for_people_is_kept_to_its_end(tmp_path):
    advice = f"no such set; {'take this way, ' * 40}then that one"
    run = Run("tecoa", "cifar10", (Slice("cifar10"),))
    assert grid.failure(run, "", UserError(advice), tmp_path).error == advice
    strange = grid.failure(run, "", ValueError(advice), tmp_path).error
    assert strange.startswith("ValueError: no such set") and len(strange) < 400 < len(advice)


def test_the_verb_says_what_failed(clip_folder, tmp_path, capsys):
    arguments = ["study", "few-shot", "--methods", "zero-shot", "--data", "folder:nowhere"]
    arguments += ["--out", str(tmp_path / "out")]
    assert main([*arguments, "--backbone", str(clip_folder)]) == 1
    assert "1 failed; mend what is wrong" in capsys.readouterr().err


def test_costs_by_hand(images, tmp_path):
    attack = PGD(eps=1 / 255, steps=10)
    run = Run("tecoa", images, (Slice(images),), (attack, None), shots=2, epochs=3)
    (one,) = cost.costs([run], tmp_path)
    # 4 classes x 2 shots x 3 epochs, 2 attack steps + the adversarial image; 4 x 2 test images, 10 steps
    assert one.train == (0, 24 * 3)
    assert one.evaluate == (8 + 8 + 8, 80)
    assert one.hours((3600.0, 0.0)) == 24
    assert one.hours((0.0, 3600.0), typical=True) == pytest.approx(72 + 80 / 3)
    assert cost.attacked(AutoAttack()) == (3 + 5000, 100 + 900 + 900)
    (known,) = cost.costs([Run("tecoa", "cifar10", (Slice("cifar10", limit=100),), (None,), subset="base")], tmp_path)
    assert known.train[1] == 25000 * 10 * 3
    assert known.evaluate == (100, 0)
    (few,) = cost.costs([Run("tecoa", "caltech101", (Slice("caltech101"),), (None,), shots=2)], tmp_path)
    assert few.train[1] == 2 * len(catalog()["caltech101"]["classes"]) * 10 * 3
    assert few.evaluate == (1648, 0)  # no split is official, and the data is not here: a fifth of all
    (scarce,) = cost.costs([Run("tecoa", "flowers102", (Slice("ucf101"),), (None,), shots=16)], tmp_path)
    assert scarce.train is None  # 10 a class
    assert scarce.evaluate == (3783, 0)  # CoOp's split alone
    (unknown,) = cost.costs([replace(run, data="hf:owner/name")], tmp_path)
    assert unknown.train is None
    assert unknown.hours((1.0, 1.0)) is None


def test_costs_of_the_users_own_copies(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVTUNE_DATA", str(tmp_path / "own"))
    write_images(tmp_path / "own" / "cifar10", catalog()["cifar10"]["classes"], train=3, test=2)
    run = Run("tecoa", "cifar10", (Slice("cifar10"),), (None,))
    (own,) = cost.costs([run], tmp_path)
    assert own.train[1] == 30 * 10 * 3
    assert own.evaluate == (20, 0)
    (tmp_path / "own" / "oxford_flowers" / "jpg").mkdir(parents=True)
    split = {part: [[f"{part}{i}.jpg", i, f"flower {i}"] for i in range(102)] for part in ("train", "val", "test")}
    for image, _, _ in [*split["train"], *split["val"], *split["test"]]:
        (tmp_path / "own" / "oxford_flowers" / "jpg" / image).write_bytes(b"not opened")
    (tmp_path / "own" / "oxford_flowers" / "split_zhou_OxfordFlowers.json").write_text(json.dumps(split))
    with pytest.warns(UserWarning, match="has 102 (train|val|test) images, not "):
        (coop,) = cost.costs([replace(run, data="flowers102")], tmp_path)
    assert coop.train[1] == 102 * 10 * 3


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        ({"train": 80, "test": 20}, {"train": 80, "fit": 60, "val": 20, "test": 20, "all": 100}),
        ({"train": 80, "val": 9, "test": 20}, {"train": 80, "fit": 80, "val": 9, "test": 20, "all": 109}),
        ({"all": 100}, {"train": 80, "fit": 60, "val": 20, "test": 20, "all": 100}),
        ({"test": 20}, {"train": None, "fit": None, "val": None, "test": 20}),
        ({}, {"train": None, "test": None, "all": None}),
    ],
)
def test_sizes_of_parts_are_cut_as_the_images_are(parts, sizes):
    assert {part: cost.of_part(parts, part) for part in sizes} == sizes


@pytest.mark.parametrize(
    ("method", "options", "forwards", "gradients"),
    [  # of one image in 5 epochs; s: steps of the attack
        ("tecoa", {}, 0, 5 * (2 + 1)),  # s, x'
        ("fare", {}, 1, 5 * (10 + 1)),  # once: phi0(x)
        ("pmg-aft", {}, 5 * 1, 5 * (2 + 2)),  # f0(x'); s, x', x
        ("coop", {}, 5, 0),  # x, through a tower that nothing learns in
        ("vpt", {}, 0, 5),
        ("apt", {}, 5, 5 * 3),  # x' through the frozen tower; s
        ("advpt", {}, 2, 10),  # once: e0(x), e(x') and s; the towers see no image while tuning
        ("capt", {}, 5, 5 * (3 + 2)),  # f0(x), augmented; s, x', x
        ("capt", {"augment": False}, 1, 5 * (3 + 2)),
        ("capt", {"augment": False, "lam": 0.0, "ce": "adversarial"}, 1, 5 * (3 + 1)),
        ("apd", {"teacher": "online"}, 0, 5 * (2 + 2)),
        ("apd", {"teacher": "offline"}, 5, 5 * (1 + 2 + 1)),  # teacher's cycle: x; then t(x), s, x'
        ("fap", {"lam": 0.0}, 0, 5),
    ],
)
def test_training_costs_by_hand(method, options, forwards, gradients):
    run = Run(method, "cifar10", (), options=options, epochs=5)
    assert cost.training(run, 1) == pytest.approx((forwards, gradients))
    assert cost.training(run, 7) == pytest.approx((7 * forwards, 7 * gradients))


def test_training_costs_of_the_attack_s_own_fields():
    way = {"steps": 4, "keep": "best", "early_stop": True, "restarts": 2}
    run = Run("tecoa", "cifar10", (), epochs=1, train_attack=way)
    assert cost.training(run, 1) == (2, 2 * 4 + 1)  # a look at each last iterate; no image leaves
    augmented = Run("advpt", "cifar10", (), options={"augment": True}, epochs=3)
    assert cost.training(augmented, 1) == (3 * 2, 3 * 10)  # embeddings of other images in every epoch


def test_python_can_do_what_the_recipes_do(images, clip_folder, tmp_path):
    run = Run(
        "zero-shot", images, (Slice(images, part="train", limit=5),), (None,), backbone=str(clip_folder), label="mine"
    )
    outcome = grid.work([run], tmp_path, show=False)
    assert outcome.rows[0].clean["n"] == 5
    assert run.key.startswith("four/mine/")
    assert advtune.load_task(images).classes == ("blue", "green", "grey", "red")
