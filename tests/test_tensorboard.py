"""Curves for TensorBoard: what train.jsonl says, once, whatever was killed and resumed."""

import importlib.util
import json

import pytest
import torch

from advtune import checkpoint, train
from advtune.cli import main
from advtune.errors import UserError
from advtune.tensorboard import Board
from conftest import killed_at
from test_train import FAST

EVENTS = "events.out.tfevents.*"


@pytest.fixture
def how(tmp_path, monkeypatch):
    from tensorboard.summary.writer import event_file_writer

    # Files of one second are read in the order of their numbers as text: 10 would come before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    return dict(shots=2, epochs=3, options=FAST, out=tmp_path / "run", tensorboard=tmp_path / "curves", show=False)


def curves(folder):
    """Tag -> [(step, value)], as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def logged(folder):
    """The same from train.jsonl."""
    found = {}
    for line in map(json.loads, (folder / "train.jsonl").read_text().splitlines()):
        terms = {name: value for name, value in line.items() if name not in ("step", "epoch", "lr")}
        told = {f"loss/{name}": value for name, value in terms.items()} | {"loss/sum": sum(terms.values())}
        for tag, value in (told | {"lr": line["lr"]}).items():
            found.setdefault(tag, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_terms_by_name_sum_and_learning_rate(vlm, task, how):
    train.tune("capt", vlm, task, **how)
    found = curves(how["tensorboard"])
    assert found == logged(how["out"])
    assert {"loss/sum", "lr"} < set(found) and len(found) > 3
    assert [step for step, _ in found["lr"]] == list(range(len(found["lr"]))) and len(found["lr"]) > 2


@pytest.mark.parametrize("since", ["the start", "the resumption"])
@pytest.mark.parametrize("every", [0, 1000], ids=["checkpoint each step", "no checkpoint after the first"])
def test_a_resumed_run_has_every_step_once(since, every, vlm, task, how, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", every)
    with monkeypatch.context() as patch:
        killed_at(2, patch)
        first = how if since == "the start" else how | {"tensorboard": None}
        with pytest.raises(KeyboardInterrupt):
            train.tune("capt", vlm, task, **first)
    if since == "the start":
        lost = {"step": 2, "epoch": 0, "lr": 9.0, "ce": 9.0}  # told, but after the checkpoint
        board = train.board(how["tensorboard"], resume=True)
        board.open(1)
        board.step(lost)
        board.close()
    train.tune("capt", vlm, task, resume=True, **how)
    assert curves(how["tensorboard"]) == logged(how["out"])


def test_a_checkpoint_comes_after_the_curves_are_on_disk(vlm, task, how, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0)
    seen = []
    for name, place, method in (("curves", Board, "flush"), ("checkpoint", torch, "save")):
        real = getattr(place, method)
        monkeypatch.setattr(place, method, lambda *given, real=real, name=name: (seen.append(name), real(*given)))
    train.tune("capt", vlm, task, **how)
    assert len(seen) > 4 and seen == ["curves", "checkpoint"] * (len(seen) // 2)


def test_another_run_s_curves_are_kept_unless_overwritten(vlm, task, how, tmp_path):
    train.tune("capt", vlm, task, **how)
    with pytest.raises(UserError, match="holds the curves of another run"):
        train.tune("capt", vlm, task, **how | {"out": tmp_path / "other"})
    assert not (tmp_path / "other").exists()
    train.tune("capt", vlm, task, **how | {"epochs": 1, "overwrite": True})
    assert curves(how["tensorboard"]) == logged(how["out"])


def test_without_a_run_folder(vlm, task, how):
    train.tune("capt", vlm, task, **how | {"out": None})
    assert len(curves(how["tensorboard"])["loss/sum"]) > 2


def test_a_run_that_came_to_nothing_leaves_no_curves(vlm, task, how):
    with pytest.raises(UserError, match=r"not finite|is nan|is inf"):
        train.tune("tecoa", vlm, task, **how | {"options": {"lr": 1e30, "warmup": 0, "epochs": 20}, "epochs": None})
    assert list(how["tensorboard"].glob(EVENTS)) == []
    train.tune("capt", vlm, task, **how)


def test_the_flag_and_its_missing_package(clip_folder, image_folder, tmp_path, capsys, monkeypatch):
    out, curves_ = tmp_path / "run", tmp_path / "curves"
    arguments = ["train", "tecoa", "--backbone", str(clip_folder), "--data", f"folder:{image_folder}", "--shots", "1"]
    arguments += ["--epochs", "1", "--out", str(out), "--tensorboard"]
    with monkeypatch.context() as patch:
        real = importlib.util.find_spec
        patch.setattr("advtune.tensorboard.find_spec", lambda name: None if name == "tensorboard" else real(name))
        assert main([*arguments, str(curves_)]) == 2
        assert capsys.readouterr().err == (
            "advtune: error: --tensorboard needs its package: pip install 'advtune[tensorboard]'\n"
        )
    (tmp_path / "file").touch()
    assert main([*arguments, str(tmp_path / "file")]) == 2
    assert "is a file; give --tensorboard a folder" in capsys.readouterr().err
    assert not out.exists()
    assert main([*arguments, str(curves_)]) == 0
    assert curves(curves_) == logged(out)
