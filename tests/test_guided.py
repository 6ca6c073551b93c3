"""The frame of all guided methods: its equation in numpy, the methods that it holds, what averages and interpolates."""

import json
import shutil
from pathlib import Path

import design_space
import numpy as np
import pytest
import torch

from advtune import checkpoint, cost, results, runs, train
from advtune.averaging import follow, interpolate, with_average
from advtune.cli import main
from advtune.errors import UserError
from advtune.losses import relations
from advtune.low_rank import attach, merge
from advtune.methods import configure
from advtune.protocols import Run
from advtune.study import from_facts, plan, read
from advtune.train import tune
from backbones import write_openai
from conftest import killed_at
from test_equations import SCALE, B, C, Y, ce, check, gradients, kl, softmax
from test_equations_baselines import Spy, Towers, numbers, run, unit

LEARN = {"lr": 0.02, "warmup": 0, "warmup_epochs": 0, "batch_size": 4, "augment": False}


class Model:
    """Features and logits of clean and of adversarial images, from free embeddings, in numpy."""

    def __init__(self, towers):
        clean, adversarial, text = numbers(towers.clean, towers.adversarial, towers.text)
        self.e, self.e_adv = unit(clean), unit(adversarial)
        self.z, self.z_adv = (SCALE * e @ unit(text).T for e in (self.e, self.e_adv))


def correlation(p, q):
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])


def apart(match, direction, temperature):
    """D of two (features, logits)."""
    if match == "features":
        return lambda g, f: ((g[0] - f[0]) ** 2).sum(1)
    if match == "relations":
        return lambda g, f: 1 - correlation(g[1], f[1])
    pair = (lambda g, f: (g, f)) if direction == "target-first" else (lambda g, f: (f, g))
    return lambda g, f: kl(*(z / temperature for z in pair(g[1], f[1])))


@pytest.mark.parametrize("images", ["none", "clean", "adversarial", "both"])
@pytest.mark.parametrize("sees", ["clean", "adversarial"])
@pytest.mark.parametrize("weight", ["constant", "confidence"])
@pytest.mark.parametrize(
    ("match", "direction"),
    [("logits", "target-first"), ("logits", "adversarial-first"), ("features", "target-first"),
     ("relations", "target-first")],
)  # fmt: skip
def test_the_equation(match, direction, weight, sees, images):
    s, g = Towers(0), Towers(1)
    how = {"lam": 0.7, "consistency": 1.3, "temperature": 1.5}
    how |= {"match": match, "direction": direction, "weight": weight, "sees": sees, "ce": images}
    found, live = run("guided", {"student": s, "guide": g}, options=how)
    f, f0, d = Model(s), Model(g), apart(match, direction, 1.5)
    p, p0 = softmax(f.z)[np.arange(B), Y], softmax(f0.z)[np.arange(B), Y]
    w, own = (1, 1) if weight == "constant" else (p0 / (p0 + p), p / (p0 + p))
    target = (f0.e, f0.z) if sees == "clean" else (f0.e_adv, f0.z_adv)
    crosses = {"clean": ce(f.z), "adversarial": ce(f.z_adv), "both": (ce(f.z) + ce(f.z_adv)) / 2}
    expected = {
        "guide": 0.7 * (w * d(target, (f.e_adv, f.z_adv))).mean(),
        "consistency": 1.3 * (own * d((f.e, f.z), (f.e_adv, f.z_adv))).mean(),
    }
    check(found, expected | ({"ce": crosses[images].mean()} if images != "none" else {}))
    assert gradients(live["guide"], s.adversarial, s.clean, g.clean, g.adversarial) == [True, False, False, False]
    assert gradients(live["consistency"], s.adversarial, s.clean) == [True, True]


def test_an_online_guide_learns_from_clean_images_alone():
    s, g = Towers(0), Towers(1)
    found, live = run("guided", {"student": s, "guide": g}, options={"guide": "online", "consistency": 0})
    check(found, {
        "ce": ce(Model(s).z_adv).mean(), "guide": kl(Model(g).z, Model(s).z_adv).mean(),
        "guide_ce": ce(Model(g).z).mean(),
    })  # fmt: skip
    assert gradients(live["guide"], s.adversarial, g.clean) == [True, False]
    assert gradients(live["guide_ce"], s.adversarial, g.clean, g.adversarial) == [False, True, False]


@pytest.mark.parametrize("match", ["logits", "features"])
def test_what_the_adversary_raises(match):
    s, g = Towers(0), Towers(1)
    parts = {"logits": ("z", "z_adv"), "features": ("e", "e_adv")}
    for adversary, model, of in (("kl", s, "logits"), ("features", s, "features"), ("guide", g, match)):
        spy = Spy()
        run("guided", {"student": s, "guide": g}, spy, {"adversary": adversary, "match": match})
        target, answer = getattr(Model(model), parts[of][0]), getattr(Model(s), parts[of][1])
        np.testing.assert_allclose(spy.target.numpy(), target, rtol=1e-5)
        d = kl(target, answer) if of == "logits" else ((target - answer) ** 2).sum(1)
        np.testing.assert_allclose(spy.loss(spy.answers, spy.target).numpy(), d, rtol=1e-4)
    spy = Spy()
    run("guided", {"student": s, "guide": g}, spy)
    assert spy.loss is None and spy.target.tolist() == Y.tolist()


def test_without_a_use_no_forward(monkeypatch):
    """As TeCoA it asks the student for adversarial images alone."""
    s, seen = Towers(0), []
    honest = Towers.image_features
    monkeypatch.setattr(Towers, "image_features", lambda self, x: seen.append(bool(x.any())) or honest(self, x))
    run("guided", {"student": s}, options={"preset": "tecoa"})
    assert set(seen) == {True}


@pytest.mark.parametrize(
    ("other", "options"),
    [("tecoa", {}), ("pmg-aft", {}), ("capt", {}), ("apd", {}), ("capt", {"detach": True})],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_presets_are_the_methods(other, options, vlm, task):
    """The same weights after the same steps; but for what the frame does not have."""
    how = dict(shots=4, epochs=2, show=False, attack={"steps": 2, "eps": 8 / 255, "step_size": 4 / 255})
    recipe = {**LEARN, "optimizer": "sgd"}
    own = {"detach_clean": True} if options else {}
    one = tune(other, vlm, task, options={**recipe, **own}, **how).delta()
    same = tune("guided", vlm, task, options={"preset": other, **recipe}, **how).delta()
    assert one.keys() == same.keys()
    close = [torch.allclose(value, same[name], rtol=1e-4, atol=1e-6) for name, value in one.items()]
    assert not all(close) if options else all(close), close


@pytest.mark.parametrize(
    ("preset", "stage", "candidate", "data"),
    [("few-shot", "guide", "none", "cifar10"), ("transfer", "further", "features 30, adversary guide", "tinyimagenet")],
)
def test_what_was_searched_is_what_is_claimed_and_shipped(preset, stage, candidate, data):
    searched = design_space.run(stage, candidate, design_space.STAGES[stage]()[candidate], data, 0).configured()
    study = from_facts(read(Path(__file__).parents[1] / "recipes" / f"claims-{preset}.toml"), preset)
    claimed = next(run for run in plan(study) if run.method == "guided").configured()
    shipped = configure("guided", {"preset": preset}, {"eps": 1 / 255})
    assert searched == claimed == shipped


def test_what_learns(vlm, task):
    def learning(**options):
        models = configure("guided", options)[0].setup(vlm, task, 0)
        return {
            m: sorted({n.rpartition(".")[2] for n, p in v.named_parameters() if p.requires_grad})
            for m, v in models.items()
        }

    assert learning() == {"student": ["a", "b"], "guide": []}
    assert learning(trainable="text-prompts", guide="none") == {"student": ["text"]}
    assert learning(trainable="image-prompts", guide="none") == {"student": ["image"]}
    assert learning(trainable="prompts", guide="online") == {"student": ["image", "text"], "guide": ["image", "text"]}
    whole = learning(trainable="image-tower", guide="none")["student"]
    assert "a" not in whole and {"weight", "bias", "position"} <= set(whole)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ce": "none", "lam": 0, "consistency": 0}, "ce=none alone learns nothing from x'"),
        ({"ce": "none", "guide": "none", "consistency": 0}, "ce=none alone learns nothing from x'"),
        ({"ce": "clean", "guide": "none", "consistency": 0}, "ce=clean alone learns nothing from x'"),
        ({"guide": "none", "adversary": "guide"}, "adversary=guide needs a guide"),
        ({"guide": "none", "weight": "confidence"}, "weight=confidence needs a guide"),
        ({"match": "features", "trainable": "text-prompts"}, "do not change the image features"),
        ({"guide": "average"}, "-o average=0.99"),
        ({"average": 1}, "average"),
        ({"interpolate": 1.5}, "interpolate"),
        ({"rank": 0}, "rank"),
    ],
)
def test_what_does_not_go_together_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        configure("guided", options)


@pytest.mark.parametrize(
    ("adversary", "attack", "said"),
    [
        ("kl", {"random_start": False}, "no slope"),
        ("features", {"name": "n-fgsm", "noise": 0}, "no slope"),
        ("kl", {"name": "free", "replay": 2}, "another loss"),
        ("guide", {"name": "free", "replay": 2}, "another loss"),
    ],
)
def test_an_attack_that_cannot_be_the_adversary_is_refused(adversary, attack, said):
    with pytest.raises(UserError, match=said):
        configure("guided", {"adversary": adversary}, attack)
    configure("guided", {}, attack)


def test_what_a_guide_that_averages_costs_is_counted():
    options = {"average": 0.9, "batch_size": 4, "consistency": 0.0}
    wanted = {g: Run("guided", "two", (), (), epochs=1, options={**options, "guide": g}) for g in ("average", "none")}
    found = {g: cost.training(run, 1) for g, run in wanted.items()}
    assert found["average"] == (found["none"][0] + 1, found["none"][1])  # its look at the clean image


def test_relations_among_two_classes_say_nothing():
    with pytest.raises(UserError, match="among 2 classes"):
        relations(torch.randn(B, 2), torch.randn(B, 2))


def test_relations_do_not_see_scale_and_shift():
    p, q = torch.randn(B, C), torch.randn(B, C)
    np.testing.assert_allclose(relations(p, q).numpy(), 1 - correlation(p.numpy(), q.numpy()), rtol=1e-4)
    torch.testing.assert_close(relations(3 * p + 1, q), relations(p, q))


def test_low_rank_updates_begin_as_nothing_and_merge_as_they_are(vlm):
    x = torch.rand(2, 3, 16, 16)
    before = vlm.image_embeddings(x)
    model = vlm.with_image_tower(rank=2, seed=1)
    torch.testing.assert_close(model.image_embeddings(x), before)
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    blocks = model.clip.image.blocks
    assert len(learning) == 2 * 4 * len(blocks)
    assert {tuple(p.shape) for n, p in learning.items() if n.endswith("qkv.parametrizations.weight.0.a")} == {(2, 32)}
    with torch.no_grad():
        for n, p in learning.items():
            if n.endswith(".b"):
                p.normal_()
    by_hand = blocks[0].fc1.parametrizations.weight
    weight = by_hand.original + by_hand[0].b @ by_hand[0].a
    after = model.image_embeddings(x)
    assert not torch.allclose(after, before)
    model.precision = "bf16"  # the product stays whole under autocast
    with model._autocast(True):
        assert torch.equal(blocks[0].fc1.weight, weight)
    model.precision = "fp32"
    merge(model.clip.image)
    torch.testing.assert_close(model.image_embeddings(x), after)
    assert torch.equal(blocks[0].fc1.weight, weight)
    assert model.delta().keys() == vlm.with_image_tower().delta().keys()
    torch.testing.assert_close(vlm.image_embeddings(x), before)  # the backbone's own weights never moved


def test_low_rank_is_of_transformers(tmp_path):
    from backbones import open_clip_tensors, resnet_tensors
    from conftest import write_clip

    narrow = dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=1)
    tensors = open_clip_tensors(write_clip(tmp_path / "vit", image=narrow, text=narrow))
    write_openai(tmp_path / "rn.pt", resnet_tensors(tensors, (1, 1, 1, 1), side=32), script=False)
    with pytest.raises(UserError, match="ResNet"):
        runs.load(str(tmp_path / "rn.pt"), "cpu", "fp32").with_image_tower(rank=2)
    with pytest.raises(UserError, match="at least 1"):
        attach(torch.nn.Module(), 0, 0)


def test_a_low_rank_run_is_like_any_other(vlm, task, tmp_path):
    tuned = tune("guided", vlm, task, shots=2, epochs=1, options={**LEARN, "rank": 2}, out=tmp_path / "run", show=False)
    x, tokens = torch.rand(2, 3, 16, 16), tuned.tokens(task.classes, task.template)
    again = runs.load(str(tmp_path / "run"), "cpu", "fp32")
    assert torch.equal(again.classifier(tokens)(x), tuned.classifier(tokens)(x))
    assert not any("parametrizations" in name for name in tuned.delta())
    start = vlm.with_image_tower().delta()
    moved = {name for name, value in tuned.delta().items() if not torch.equal(value, start[name])}
    assert {name.split(".", 4)[-1] for name in moved} == {f"{each}.weight" for each in ("qkv", "out", "fc1", "fc2")}


@pytest.mark.parametrize(
    ("method", "options"), [("tecoa", {}), ("apd", {"teacher": "offline", "image_tokens": 0, "lr": 0.5})]
)
def test_the_average_is_the_result(method, options, vlm, task, monkeypatch):
    """Recomputed from the weights after every step; a student that waits for its teacher begins to learn in the second
    cycle."""
    seen = []
    honest = train.update

    def watched(plan, models, *rest):
        found = honest(plan, models, *rest)
        seen.append({n: p.detach().clone() for n, p in models["student"].named_parameters() if p.requires_grad})
        return found

    monkeypatch.setattr(train, "update", watched)
    start = configure(method, options)[0].setup(vlm, task, 0)["student"].delta()
    options = {**LEARN, "average": 0.3, **options}
    tuned = tune(method, vlm, task, shots=4, epochs=3, options=options, show=False).delta()
    average = {name: value.double() for name, value in start.items()}
    assert len(seen) == 9 * (2 if method == "apd" else 1)
    for step, weights in enumerate(seen[-9:]):
        d = min(0.3, (1 + step) / (10 + step))
        average = {name: d * value + (1 - d) * weights[name].double() for name, value in average.items()}
    for name, value in tuned.items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-6)
        assert value.dim() < 2 or not torch.allclose(value, seen[-1][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"interpolate": 0.5}, pytest.param({"average": 0.9, "guide": "average"}, marks=pytest.mark.slow)]
)
def test_a_compiled_low_rank_run_answers_in_memory_as_it_would_from_disk(options, clip_folder, task):
    found = []
    for compiled in ("", "eager"):
        model = runs.load(str(clip_folder), "cpu", "fp32")
        model.compiled = compiled
        found.append(tune("guided", model, task, shots=2, epochs=2, options={**LEARN, **options}, show=False))
    x, tokens = torch.rand(2, 3, 16, 16), found[0].tokens(task.classes, task.template)
    with torch.no_grad():
        plain, compiled = (each.classifier(tokens)(x) for each in found)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)


def test_an_average_of_prompts_needs_no_tower_of_its_own(vlm, task):
    for trainable, shared in (("prompts", True), ("image-tower", False)):
        method, recipe, _ = configure("guided", {"trainable": trainable, "average": 0.9})
        models = with_average(method.setup(vlm, task, 0), recipe)
        assert (models["average"].clip.image is vlm.clip.image) is shared


@pytest.mark.parametrize("options", [{"trainable": "low-rank"}, {"trainable": "prompts", "guide": "average"}])
def test_an_average_is_resumed_to_the_same_bits(options, vlm, task, tmp_path, monkeypatch):
    how = dict(shots=4, epochs=3, options={**LEARN, "average": 0.9, **options}, show=False)
    whole = tune("guided", vlm, task, out=tmp_path / "whole", **how).delta()
    monkeypatch.setattr(checkpoint, "SECONDS", 0)
    calls = killed_at(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tune("guided", vlm, task, out=tmp_path / "cut", **how)
    resumed = tune("guided", vlm, task, out=tmp_path / "cut", resume=True, **how).delta()
    assert len(calls) < 5 + 9
    assert whole.keys() == resumed.keys() and all(torch.equal(value, resumed[n]) for n, value in whole.items())


def test_a_guide_that_averages_the_student_follows_it(vlm, task):
    how = dict(shots=4, epochs=2, show=False, attack={"steps": 1, "eps": 8 / 255})
    options = {**LEARN, "consistency": 0, "average": 0.9}
    one, other = (
        tune("guided", vlm, task, options={**options, "guide": guide}, **how).delta() for guide in ("average", "frozen")
    )
    assert not all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_interpolation_is_a_straight_line(share, vlm, task):
    how = dict(shots=4, epochs=2, show=False)
    whole = tune("tecoa", vlm, task, options=LEARN, **how).delta()
    part = tune("tecoa", vlm, task, options={**LEARN, "interpolate": share}, **how).delta()
    for name, start in vlm.with_image_tower().delta().items():
        torch.testing.assert_close(part[name], start + share * (whole[name] - start), rtol=1e-5, atol=1e-7)
        assert share > 0 or torch.equal(part[name], start)


def test_prompts_have_no_original(vlm, task, tmp_path):
    with pytest.raises(UserError, match="prompts have no original"):
        tune("capt", vlm, task, shots=2, epochs=1, options={"interpolate": 0.5}, out=tmp_path / "run", show=False)
    assert list(tmp_path.glob("run*")) == []


def test_follow_forgets_its_first_steps():
    average, parameter = torch.zeros(1), torch.ones(1)
    follow([(average, parameter)], 0.99, 0)
    assert average.item() == pytest.approx(0.9)
    follow([(average, 2 * parameter)], 0.99, 10_000)
    assert average.item() == pytest.approx(0.99 * 0.9 + 0.01 * 2)


def test_interpolate_in_place(vlm):
    tuned = vlm.with_image_tower()
    with torch.no_grad():
        tuned.clip.image.position.add_(1)
    interpolate(vlm, tuned, 0.75)
    torch.testing.assert_close(tuned.clip.image.position, vlm.clip.image.position + 0.75)


@pytest.fixture
def tuned(clip_folder, task, tmp_path):
    vlm = runs.load(str(clip_folder), "cpu", "fp32")
    tune("tecoa", vlm, task, shots=4, epochs=2, options=LEARN, out=tmp_path / "tecoa", show=False)
    return tmp_path / "tecoa"


def test_runs_between(tuned, vlm, task, tmp_path, capsys):
    """As if they had been tuned so; measured, and told apart, like any other."""
    assert main(["interpolate", str(tuned), "--share", "0.5", "1/4", "--out", str(tmp_path / "b"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["runs"] == [str(tmp_path / "b" / "0.25"), str(tmp_path / "b" / "0.5")]
    assert made["lines"][-1].startswith(f"next: advtune evaluate {tmp_path / 'b' / '0.5'}")
    at_once = tune("tecoa", vlm, task, shots=4, epochs=2, options={**LEARN, "interpolate": 0.5}, show=False)
    half = runs.load(made["runs"][1], "cpu", "fp32")
    assert all(torch.equal(value, half.delta()[name]) for name, value in at_once.delta().items())
    assert half.run["recipe"]["interpolate"] == 0.5 and half.origin.sha256 == at_once.origin.sha256
    assert main(["interpolate", made["runs"][1], "--share", "0.5", "--out", str(tmp_path / "quarter")]) == 0
    quarter = runs.load(str(tmp_path / "quarter"), "cpu", "fp32")
    assert quarter.run["recipe"]["interpolate"] == 0.25
    for name, value in runs.load(made["runs"][0], "cpu", "fp32").delta().items():
        torch.testing.assert_close(quarter.delta()[name], value, rtol=1e-5, atol=1e-7)
    data = task.spec
    for name in (str(tuned), *made["runs"]):
        assert main(["evaluate", name, "--data", data, "--precision", "fp32"]) == 0
    capsys.readouterr()
    assert main(["report", str(tuned), str(tmp_path / "b"), "--format", "csv"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 4  # a line each: they are no seeds of one setting


def test_a_run_between_is_replaced_when_asked(tuned, tmp_path, capsys):
    ask = ["interpolate", str(tuned), "--share", "0.5", "--out", str(tmp_path / "half")]
    assert main(ask) == 0
    before = (tmp_path / "half" / "delta.safetensors").read_bytes()
    assert main(ask) == 2 and "--overwrite" in capsys.readouterr().err
    ask[3] = "0.75"
    assert main([*ask, "--overwrite"]) == 0
    assert (tmp_path / "half" / "delta.safetensors").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["half", "tecoa"]


@pytest.mark.parametrize("share", ["0", "1", "-1", "2", "half", "nan", ""])
def test_shares_that_are_none(share, tuned, tmp_path, capsys):
    assert main(["interpolate", str(tuned), "--share", share, "--out", str(tmp_path / "b")]) == 2
    assert "--share" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not list(tmp_path.glob("b*"))


@pytest.mark.parametrize("shares", [("0.5", "1/2"), ("0.3333331", "0.3333332")])
def test_shares_that_are_the_same(shares, tuned, tmp_path, capsys):
    """Of one name: the second run would take the first one's folder."""
    assert main(["interpolate", str(tuned), "--share", *shares, "--out", str(tmp_path / "b")]) == 2
    assert "twice" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not list(tmp_path.glob("b*"))


def test_tuning_that_is_not_finished_is_left_alone(tuned, tmp_path, capsys):
    shutil.copytree(tuned, tmp_path / "half.partial")
    (tmp_path / "half.partial" / "delta.safetensors").unlink()
    (tmp_path / "half.partial" / checkpoint.CHECKPOINT).write_text("hours of it")
    ask = ["interpolate", str(tuned), "--share", "0.5", "--out", str(tmp_path / "half")]
    assert main(ask) == 2 and "half.partial exists" in capsys.readouterr().err
    assert (tmp_path / "half.partial" / checkpoint.CHECKPOINT).read_text() == "hours of it"
    assert main([*ask, "--overwrite"]) == 0
    assert not list(tmp_path.glob("half.*")) and runs.is_run(tmp_path / "half")


def test_a_run_of_an_older_version_is_interpolated(tuned, tmp_path):
    """Its recipe says nothing of averages and shares."""
    config = runs.read_config(tuned)
    config["recipe"] = {k: v for k, v in config["recipe"].items() if k not in results.LATER}
    (tuned / "config.json").write_text(json.dumps(config))
    (tuned / "SHA256SUMS").unlink()
    assert main(["interpolate", str(tuned), "--share", "0.5", "--out", str(tmp_path / "half")]) == 0
    made = runs.read_config(tmp_path / "half")["recipe"]
    assert made == {**config["recipe"], **results.LATER, "interpolate": 0.5}
    assert next(iter(made)) == "optimizer"


@pytest.mark.parametrize("lost", ["recipe", "train.jsonl"])
def test_a_damaged_run_is_named_and_nothing_is_left(lost, tuned, tmp_path, capsys):
    config = runs.read_config(tuned)
    config.pop(lost, None)
    (tuned / "config.json").write_text(json.dumps(config))
    (tuned / "SHA256SUMS").unlink()
    if lost == "train.jsonl":
        (tuned / lost).unlink()
    assert main(["interpolate", str(tuned), "--share", "0.5", "--out", str(tmp_path / "b")]) == 2
    assert str(tuned) in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert not list(tmp_path.glob("b*"))


def test_what_cannot_be_interpolated(tuned, vlm, task, tmp_path, capsys):
    capt = tmp_path / "capt"
    tune("capt", runs.load(str(tuned), "cpu", "fp32"), task, shots=2, epochs=1, options=LEARN, out=capt, show=False)
    for name, out, said in (
        (capt, "b", "no original"), (tmp_path / "no", "b", "not a finished run"), (tuned, "tecoa", "is the run"),
    ):  # fmt: skip
        assert main(["interpolate", str(name), "--share", "0.5", "--out", str(tmp_path / out), "--overwrite"]) == 2
        assert said in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert runs.is_run(tuned) and not list(tmp_path.glob("b*"))
