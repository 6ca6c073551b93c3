"""The loop: schedules, run folders, resuming to the same bits, refusing bad input before writing."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import advtune
from advtune import checkpoint, runs, train
from advtune.augment import crop_and_flip
from advtune.errors import UserError
from advtune.recipe import Recipe
from conftest import killed_at

FAST = {"lr": 0.02, "warmup_epochs": 0, "batch_size": 4}


def test_six_lines(clip_folder, image_folder):
    clip = advtune.load(str(clip_folder))
    data = advtune.load_task(f"folder:{image_folder}")
    robust = advtune.tune("capt", clip, data, shots=2, epochs=1)
    row = advtune.evaluate(robust, data, advtune.PGD(eps=64 / 255, steps=9))
    assert row.method == "capt"
    assert row.clean["accuracy"] > 0.1
    assert row.robust["accuracy"] == 0  # nothing stands at 64/255


@pytest.mark.parametrize(("method", "limit"), [("capt", 8_000), ("apd", 8_000), ("tecoa", 1_000_000)])
def test_a_run_folder_holds_only_what_was_learned(method, limit, vlm, task, tmp_path):
    model = train.tune(method, vlm, task, shots=2, epochs=1, out=tmp_path / "run", show=False)
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["SHA256SUMS", "config.json", "delta.safetensors", "images.json", "train.jsonl"]
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
    monkeypatch.setattr(checkpoint, "SECONDS", 0)
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


def test_the_first_step_is_saved_on_a_machine_that_has_just_started(vlm, task, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: 1.0))
    calls = killed_at(3, monkeypatch)
    how = dict(shots=4, epochs=3, options=FAST, out=tmp_path / "run", show=False)
    with pytest.raises(KeyboardInterrupt):
        train.tune("capt", vlm, task, **how)
    train.tune("capt", vlm, task, resume=True, **how)
    assert len(calls) == 3 + 8  # nine steps in all, the first of them not repeated


def test_resuming_a_finished_run_loads_it(vlm, task, tmp_path, monkeypatch):
    how = dict(shots=2, epochs=1, out=tmp_path / "run", show=False)
    first = train.tune("capt", vlm, task, **how)
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("trained again"))
    again = train.tune("capt", vlm, task, resume=True, **how)
    assert all(torch.equal(v, again.delta()[k]) for k, v in first.delta().items())
    older = json.loads((tmp_path / "run" / "config.json").read_text())
    for key in ("subset", "all_classes", "split"):
        del older["train"][key]
    del older["prompt_classes"], older["prompt_template"], older["recipe"]["warmup_share"]
    older["notes"] = ["worded otherwise"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(older))
    (tmp_path / "run" / "SHA256SUMS").unlink()
    train.tune("capt", vlm, task, resume=True, **how)
    with pytest.raises(UserError, match="other settings"):
        train.tune("capt", vlm, dataclasses.replace(task, subset="base"), resume=True, **how)
    for other in (dict(shots=1), dict(options={"lam": 2}), dict(seed=1)):
        with pytest.raises(UserError, match="other settings"):
            train.tune("capt", vlm, task, resume=True, **{**how, **other})
    with pytest.raises(UserError, match="other settings"):
        train.tune("apd", vlm, task, resume=True, **how)


def test_a_checkpoint_of_another_version_is_refused(vlm, task, tmp_path, monkeypatch):
    how = dict(shots=2, epochs=2, options=FAST, out=tmp_path / "run", show=False)
    killed_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train.tune("capt", vlm, task, **how)
    path = tmp_path / "run.partial" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["format"]
    torch.save(state, path)
    with pytest.raises(UserError, match="by a version whose parameters"):
        train.tune("capt", vlm, task, resume=True, **how)


def test_what_fails_while_preparing_leaves_nothing(vlm, task, tmp_path):
    how = dict(shots=2, epochs=1, options={"augment": False}, out=tmp_path / "run", show=False)
    for name in ("advpt", "agft"):
        with pytest.raises(UserError, match="early_stop=false"):
            train.tune(name, vlm, task, attack={"early_stop": True}, **how)
        assert not list(tmp_path.glob("run*"))


def test_an_interrupted_overwrite_goes_on(vlm, task, tmp_path, monkeypatch):
    how = dict(shots=2, epochs=2, options=FAST, out=tmp_path / "run", show=False)
    train.tune("capt", vlm, task, **how)
    killed_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train.tune("capt", vlm, task, seed=1, overwrite=True, **how)
    assert runs.read_config(tmp_path / "run")["train"]["seed"] == 0  # the old run stands until the new is done
    train.tune("capt", vlm, task, seed=1, resume=True, **how)
    assert runs.read_config(tmp_path / "run")["train"]["seed"] == 1
    assert not (tmp_path / "run.partial").exists()


def test_a_backbone_is_not_overwritten(vlm, task, tmp_path):
    how = dict(shots=1, epochs=1, show=False)
    train.tune("tecoa", vlm, task, out=tmp_path / "t", **how)
    train.tune("tecoa", str(tmp_path / "t"), task, out=tmp_path / "u", **how)
    for base in ("t", "u"):
        model = runs.load(str(tmp_path / base), "cpu", "fp32")
        with pytest.raises(UserError, match="backbone"):
            train.tune("apd", model, task, out=tmp_path / "t", overwrite=True, **how)
    assert runs.load(str(tmp_path / "u"), "cpu", "fp32")


def test_a_folder_named_like_the_embedded_backbone(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()
    train.tune("capt", "mini", task, shots=1, epochs=1, out="run", show=False)
    assert runs.load("run", "cpu", "fp32").run["backbone"]["name"] == "mini"


def test_existing_folders_are_safe(vlm, task, tmp_path):
    out, how = tmp_path / "run", dict(shots=1, epochs=1, show=False)
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(UserError, match="exists"):
        train.tune("capt", vlm, task, out=out, **how)
    with pytest.raises(UserError, match="not of a run"):
        train.tune("capt", vlm, task, out=out, overwrite=True, **how)
    assert (out / "precious").exists()
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "precious").write_text("x")
    with pytest.raises(UserError, match="not of a run"):
        train.tune("capt", vlm, task, out=tmp_path / "new", resume=True, **how)
    (out / "precious").unlink()
    train.tune("capt", vlm, task, out=out, overwrite=True, **how)
    before = (out / "delta.safetensors").read_bytes()
    train.tune("capt", vlm, task, out=out, overwrite=True, **{**how, "seed": 1})
    assert (out / "delta.safetensors").read_bytes() != before
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        train.tune("capt", vlm, task, out=tmp_path / "file", overwrite=True, show=False)
    with pytest.raises(UserError, match="name"):
        train.tune("capt", vlm, task, out=".", show=False)


def test_bad_input_writes_nothing(vlm, task, tmp_path):
    for wrong in (
        dict(shots=99),
        dict(options={"lam": -1}),
        dict(attack={"eps": 1}),
        dict(epochs=0),
        dict(seed=-1),
        dict(options="prompt_length=90"),
    ):
        with pytest.raises(UserError):
            train.tune("capt", vlm, task, out=tmp_path / "run", show=False, **wrong)
    assert list(tmp_path.glob("run*")) == []


def test_a_loss_that_is_not_finite_stops_with_step_and_term(vlm, task, tmp_path):
    how = dict(options={"lr": 1e30, "warmup": 0}, out=tmp_path / "run", show=False)
    with pytest.raises(UserError, match=r"loss term '\w+' is (nan|inf) at step [1-9]"):
        train.tune("tecoa", vlm, task, epochs=50, **how)
    assert list(tmp_path.glob("run*")) == []


def test_a_last_step_that_is_not_finite_is_no_result(vlm, task, tmp_path, monkeypatch):
    real = train.update

    def poisoned(plan, models, *rest):
        values = real(plan, models, *rest)
        models["student"].clip.image.position.data[0, 0] = torch.nan
        return values

    monkeypatch.setattr(train, "update", poisoned)
    with pytest.raises(UserError, match=r"clip.image.position is not finite after the last step"):
        train.tune("tecoa", vlm, task, shots=1, epochs=1, out=tmp_path / "run", show=False)
    assert list(tmp_path.glob("run*")) == []


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


def test_a_tuned_model_in_memory_is_as_frozen_as_a_loaded_one(vlm, task, tmp_path):
    """Tuning on top of what tune returned is tuning on top of the run folder, bit for bit."""
    options = {"lr": 0.1, "warmup": 0}
    tower = train.tune("tecoa", vlm, task, shots=2, epochs=1, options=options, out=tmp_path / "t", show=False)
    assert not any(p.requires_grad for p in tower.parameters())
    how = dict(shots=2, epochs=1, show=False)
    one = train.tune("capt", tower, task, **how)
    two = train.tune("capt", str(tmp_path / "t"), task, **how)
    assert one.delta().keys() == {"prompts.text", "prompts.image"}
    assert one.run["backbone"]["sha256"] == two.run["backbone"]["sha256"] == tower.origin.sha256
    assert one.run["backbone"]["sha256"] != vlm.origin.sha256
    facts = one.run["backbone"]["tuned"]
    assert (facts["method"], facts["part"], facts["root"]) == ("tecoa", "train", vlm.origin.name)
    again = train.tune("tecoa", tower, task, **how)
    assert runs.backbone_facts(again)["tuned"]["root"] == vlm.origin.name
    loaded = train.tune("capt", runs.load(str(tmp_path / "t"), "cpu", "fp32"), task, **how)
    assert all(torch.equal(value, loaded.delta()[name]) for name, value in one.delta().items())
    in_memory = train.tune("tecoa", vlm, task, **how)
    with pytest.raises(UserError, match="tuned in memory"):
        train.tune("capt", in_memory, task, out=tmp_path / "c", **how)


def test_a_run_moves_with_its_backbone(clip_folder, task, tmp_path, monkeypatch):
    import shutil

    (tmp_path / "here").mkdir()
    shutil.copytree(clip_folder, tmp_path / "here" / "clip")
    monkeypatch.chdir(tmp_path / "here")
    train.tune("capt", "clip", task, shots=1, epochs=1, out="run", show=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").rename(tmp_path / "there")
    assert runs.load("there/run", "cpu", "fp32").run["method"] == "capt"


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
    assert runs.read_config(tmp_path / "c")["notes"] == [
        "warm-up of 1 steps cut to 0 of 1",
        "prompt depth 9 cut to 3/3 (text/image layers)",
    ]
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
