"""The loop: schedules, run folders, resuming to the same bits, refusing bad input before writing."""

import json

import pytest
import torch
from safetensors.torch import load_file

import advtune
from advtune import runs, train
from advtune.augment import crop_and_flip
from advtune.errors import UserError
from advtune.recipe import Recipe

FAST = {"lr": 0.02, "warmup_epochs": 0, "batch_size": 4}


def test_six_lines(clip_folder, image_folder):
    clip = advtune.load(str(clip_folder))
    data = advtune.load_task(f"folder:{image_folder}")
    robust = advtune.tune("capt", clip, data, shots=2, epochs=1)
    row = advtune.evaluate(robust, data, advtune.PGD(eps=1 / 255, steps=3))
    assert row.method == "capt"
    assert row.robust["accuracy"] <= row.clean["accuracy"]


@pytest.mark.parametrize(("method", "limit"), [("capt", 8_000), ("apd", 8_000), ("tecoa", 1_000_000)])
def test_a_run_folder_holds_only_what_was_learned(method, limit, vlm, task, tmp_path):
    model = train.tune(method, vlm, task, shots=2, epochs=1, out=tmp_path / "run", show=False)
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["config.json", "delta.safetensors", "train.jsonl"]
    assert not (tmp_path / "run.partial").exists()
    delta = load_file(tmp_path / "run" / "delta.safetensors")
    kinds = {name.split(".")[0] for name in delta}
    assert kinds == ({"clip"} if method == "tecoa" else {"prompts"})
    assert (tmp_path / "run" / "delta.safetensors").stat().st_size < limit
    again = runs.load(str(tmp_path / "run"), "cpu", "fp32")
    tokens, x = model.tokens(task.classes, task.template), torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(again.classifier(tokens)(x), model.classifier(tokens)(x))
    lines = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))


@pytest.mark.parametrize("method", ["capt", "apd", "pmg-aft"])
def test_resume_equals_uninterrupted_bit_for_bit(method, vlm, task, tmp_path, monkeypatch):
    how = dict(shots=4, epochs=3, options=FAST, show=False)
    train.tune(method, vlm, task, out=tmp_path / "whole", **how)
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    real, calls = train.update, []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        train.tune(method, vlm, task, out=tmp_path / "cut", **how)
    assert not (tmp_path / "cut").exists()
    with (tmp_path / "cut.partial" / "train.jsonl").open("a") as log:
        log.write('{"step": 4, "ce"')  # a line that was being written
    with pytest.raises(UserError, match="--resume"):
        train.tune(method, vlm, task, out=tmp_path / "cut", **how)
    with pytest.raises(UserError, match="other settings"):
        train.tune(method, vlm, task, out=tmp_path / "cut", resume=True, **{**how, "epochs": 4})
    train.tune(method, vlm, task, out=tmp_path / "cut", resume=True, **how)
    assert len(calls) == 5 + 5  # nine steps in all, four of them not repeated
    for name in ("delta.safetensors", "train.jsonl", "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_resuming_a_finished_run_loads_it(vlm, task, tmp_path, monkeypatch):
    how = dict(shots=2, epochs=1, out=tmp_path / "run", show=False)
    first = train.tune("capt", vlm, task, **how)
    folder = tmp_path / "run"
    config = json.loads((folder / "config.json").read_text())
    assert config["train"]["shots"] == 2
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("trained again"))
    again = train.tune("capt", vlm, task, resume=True, **how)
    assert all(torch.equal(v, again.delta()[k]) for k, v in first.delta().items())


def test_existing_folders_are_safe(vlm, task, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(UserError, match="--overwrite"):
        train.tune("capt", vlm, task, shots=1, epochs=1, out=out, show=False)
    assert (out / "precious").exists()
    train.tune("capt", vlm, task, shots=1, epochs=1, out=out, overwrite=True, show=False)
    assert not (out / "precious").exists()
    assert runs.is_run(out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        train.tune("capt", vlm, task, out=tmp_path / "file", overwrite=True, show=False)


def test_bad_input_writes_nothing(vlm, task, tmp_path):
    for wrong in (dict(shots=99), dict(options={"lam": -1}), dict(attack={"eps": 1}), dict(epochs=0)):
        with pytest.raises(UserError):
            train.tune("capt", vlm, task, out=tmp_path / "run", show=False, **wrong)
    assert list(tmp_path.glob("run*")) == []


def test_a_loss_that_is_not_finite_stops_with_step_and_term(vlm, task, tmp_path):
    with pytest.raises(UserError, match=r"loss term '\w+' is (nan|inf) at step [1-9]"):
        train.tune("tecoa", vlm, task, epochs=50, options={"lr": 1e30, "warmup": 0}, out=tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()


def test_tuning_on_top_of_a_robust_tower(vlm, task, tmp_path):
    train.tune(
        "tecoa",
        vlm,
        task,
        shots=2,
        epochs=1,
        options={"lr": 0.1, "warmup": 0},
        out=tmp_path / "t",
        show=False,
    )
    base = runs.load(str(tmp_path / "t"), "cpu", "fp32")
    train.tune("capt", str(tmp_path / "t"), task, shots=2, epochs=1, out=tmp_path / "c", show=False)
    model = runs.load(str(tmp_path / "c"), "cpu", "fp32")
    assert torch.equal(model.clip.image.position, base.clip.image.position)
    assert not torch.equal(model.clip.image.position, vlm.clip.image.position)
    assert set(load_file(tmp_path / "c" / "delta.safetensors")) == {"prompts.text", "prompts.image"}
    train.tune("tecoa", vlm, task, shots=1, epochs=1, out=tmp_path / "t", overwrite=True, show=False)
    with pytest.raises(UserError, match="other content"):
        runs.load(str(tmp_path / "c"), "cpu", "fp32")


def test_a_damaged_delta_is_one_line(vlm, task, tmp_path):
    train.tune("capt", vlm, task, shots=1, epochs=1, out=tmp_path / "run", show=False)
    path = tmp_path / "run" / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="damaged"):
        runs.load(str(tmp_path / "run"), "cpu", "fp32")


def test_the_seed_decides_everything(vlm, task):
    def delta(seed):
        return train.tune("capt", vlm, task, shots=2, epochs=2, seed=seed, options=FAST, show=False).delta()

    state = torch.random.get_rng_state()
    one, two, other = delta(0), delta(0), delta(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # the user's generator is left alone
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not any(torch.equal(one[k], other[k]) for k in one)


def test_cosine_and_warm_up():
    recipe = Recipe(lr=1.0, warmup=4)
    rates = [recipe.rate(step, 100, 10) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[52] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3
    assert Recipe(lr=1.0, warmup=1000).rate(9, 100, 10) < 1 == Recipe(lr=1.0, warmup=1000).rate(10, 100, 10)
    flat = Recipe(lr=1.0, warmup_epochs=1, schedule="constant")
    assert [flat.rate(s, 100, 7) for s in (0, 6, 7, 99)] == [1e-5, 1e-5, 1.0, 1.0]
    assert flat.rate(1, 10, 10) == 1.0  # one epoch of one is no warm-up


def test_a_cut_warm_up_and_depth_are_noted(vlm, task, tmp_path):
    train.tune("capt", vlm, task, shots=1, epochs=1, out=tmp_path / "c", show=False)
    assert runs.read_config(tmp_path / "c")["notes"] == ["prompt depth 9 cut to 3/3 (text/image layers)"]
    train.tune("tecoa", vlm, task, shots=1, epochs=1, out=tmp_path / "t", show=False)
    assert runs.read_config(tmp_path / "t")["notes"] == ["warm-up of 1000 steps cut to 0 of 1"]


def test_epochs_visit_every_image_once_in_new_orders():
    one, two = (train.epoch_order(10, 0, epoch) for epoch in (0, 1))
    assert sorted(one.tolist()) == list(range(10))
    assert not torch.equal(one, two)
    assert torch.equal(one, train.epoch_order(10, 0, 0))
    assert not torch.equal(one, train.epoch_order(10, 1, 0))


def test_augmentation():
    x = torch.rand(64, 3, 16, 16)
    torch.manual_seed(0)
    one = crop_and_flip(x)
    torch.manual_seed(0)
    assert torch.equal(crop_and_flip(x), one)
    assert not torch.equal(crop_and_flip(x), one)
    assert one.shape == x.shape
    assert 0 <= float(one.min()) <= float(one.max()) <= 1
    ramp = torch.linspace(0, 1, 16).expand(400, 3, 16, 16)
    torch.manual_seed(0)
    flipped = crop_and_flip(ramp)[:, 0, 8, -1] < crop_and_flip(ramp)[:, 0, 8, 0]
    assert 0.3 < float(flipped.float().mean()) < 0.7
    whole = crop_and_flip(ramp[:, :, :, :], smallest=0.999999)
    assert float((whole.amax((1, 2, 3)) - whole.amin((1, 2, 3))).mean()) > 0.8


def test_apd_offline_teaches_first(vlm, task, tmp_path):
    train.tune(
        "apd",
        vlm,
        task,
        shots=2,
        epochs=2,
        options={**FAST, "teacher": "offline"},
        out=tmp_path / "r",
        show=False,
    )
    lines = [json.loads(line) for line in (tmp_path / "r" / "train.jsonl").read_text().splitlines()]
    half = len(lines) // 2
    assert all("teacher_ce" in line for line in lines[:half])
    assert all("distil" in line and "teacher_ce" not in line for line in lines[half:])
    assert lines[half]["lr"] == lines[0]["lr"]  # each phase has the whole schedule
