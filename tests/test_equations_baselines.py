"""The losses of the baselines recomputed in numpy from fixed logits, features and patches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import advtune
from advtune.attacks import PGD
from advtune.errors import UserError
from advtune.methods import METHODS, configure
from advtune.prompts import Learned, Prompts
from advtune.train import tune
from advtune.vlm import VLM, Batch
from test_equations import SCALE, B, C, Fake, Y, ce, check, gradients, kl, softmax, terms

D, SIDE = 6, 8


class Towers:
    """A model whose embeddings are free tensors; an image is a patch's weight, so that x' has its own."""

    def __init__(self, seed, trains=True):
        random = torch.Generator().manual_seed(seed)

        def free(*shape):
            return torch.randn(*shape, generator=random).requires_grad_(trains)

        self.clean, self.adversarial, self.text = free(B, D), free(B, D), free(C, D)
        self.clean_patches, self.adversarial_patches = free(B, 4, D), free(B, 4, D)
        self.clip = type("Clip", (), {"config": type("Config", (), {"image_size": SIDE})})

    def image_embeddings(self, x):
        return self.adversarial if bool(x.any()) else self.clean

    def image_features(self, x):
        return F.normalize(self.image_embeddings(x), dim=-1)

    def dense_embeddings(self, x):
        patches = self.adversarial_patches if bool(x.any()) else self.clean_patches
        return torch.cat([self.image_embeddings(x)[:, None], patches], 1)

    def text_features(self, tokens):
        return F.normalize(self.text, dim=-1)

    def towers(self, tokens):
        compare = lambda e: SCALE * e @ self.text_features(tokens).T  # noqa: E731
        return self.image_features, compare

    def classifier(self, tokens):
        encode, compare = self.towers(tokens)
        return lambda x: compare(encode(x))


class Spy:
    """An attack that moves every image by 1 and remembers what it was asked to raise."""

    def __call__(self, f, x, target, loss=None):
        self.answers, self.target, self.loss = f(x + 1).detach(), target, loss
        return x + 1


def run(name, models, attack=None, options=(), kept=None):
    method, _, _ = configure(name, dict(options))
    batch = Batch(torch.zeros(B, 3, 2, 2), torch.tensor(Y), dict.fromkeys(models), kept=kept or {})
    found = method.loss(models, batch, attack or Spy())
    return {key: float(value.detach()) for key, value in found.items()}, found


def unit(a, axis=-1):
    return a / np.linalg.norm(a, axis=axis, keepdims=True)


def numbers(*tensors):
    return [t.detach().double().numpy() for t in tensors]


def test_coop():
    s = Towers(0)
    found, live = run("coop", {"student": s})
    clean, text = numbers(s.clean, s.text)
    check(found, {"ce": ce(SCALE * unit(clean) @ unit(text).T).mean()})
    assert gradients(live["ce"], s.text, s.clean, s.adversarial) == [True, False, False]


@pytest.mark.parametrize("name", ["vpt", "ivlp", "maple"])
def test_clean_methods(name):
    s = Fake(0)
    found, live = terms(METHODS[name](), {"student": s})
    check(found, {"ce": ce(s.numpy()[0]).mean()})
    assert gradients(live["ce"], s.clean, s.adversarial) == [True, False]


@pytest.mark.parametrize("name", ["coop", "vpt", "ivlp", "maple"])
def test_clean_methods_attack_nothing(name):
    assert METHODS[name].attack.eps == 0
    with pytest.raises(UserError, match="clean images"):
        configure(name, (), ["eps=1/255"])


@pytest.mark.parametrize("name", ["advvp", "advvlp", "advmaple", "apt"])
def test_plain_adversarial_methods(name):
    s = Fake(0)
    found, live = terms(METHODS[name](), {"student": s})
    check(found, {"ce": ce(s.numpy()[1]).mean()})
    assert gradients(live["ce"], s.clean, s.adversarial) == [False, True]


def test_apt_constant_attacks_the_hand_written_template():
    s, hand, spy = Fake(0), Fake(1), Spy()
    found, _ = run("apt", {"student": s, "attacker": hand}, spy, {"attacker": "constant"})
    check(found, {"ce": ce(s.numpy()[1]).mean()})
    assert torch.equal(spy.answers, hand.adversarial.detach())
    run("apt", {"student": s}, spy)
    assert torch.equal(spy.answers, s.adversarial.detach())


def test_apt_perturbed_moves_the_attackers_context_uphill(vlm, task, monkeypatch):
    """At ascent 0 it is PGD on the fly. Above, the attacker's contexts climb the loss, and the student's stays."""
    torch.manual_seed(0)
    attack = PGD(eps=8 / 255, steps=4, step_size=4 / 255, keep="last", early_stop=False)
    x, y = torch.rand(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    student = configure("apt", {"tokens": 2})[0].setup(vlm, task, 0)["student"]
    batch = Batch(x, y, {"student": student.tokens(task.classes, task.template)})
    before, seen, honest = student.delta()["prompts.text"].clone(), [], VLM.with_fixed

    def spy(self, learned):
        seen.append(learned.text.detach())
        return honest(self, learned)

    monkeypatch.setattr(VLM, "with_fixed", spy)

    def joint(rate, attack):
        torch.manual_seed(0)
        return configure("apt", {"attacker": "perturbed", "ascent": rate, "tokens": 2})[0]._joint(
            student, batch, attack
        )

    still, moved = joint(0.0, attack), joint(0.5, attack)
    torch.manual_seed(0)
    torch.testing.assert_close(still, attack(student.classifier(batch.tokens["student"]), x, y))
    assert not torch.equal(still, moved)
    assert float((moved - x).abs().max()) <= attack.eps + 1e-6
    assert torch.equal(student.delta()["prompts.text"], before)
    seen.clear()
    joint(0.002, PGD(eps=1e-6, steps=4, keep="last", early_stop=False))  # the pixels hardly move
    heights = [
        float(F.cross_entropy(student.with_fixed(Learned(c)).classifier(batch.tokens["student"])(x), y))
        for c in seen[:4]
    ]
    assert heights == sorted(heights)
    assert heights[-1] > heights[0] + 1e-4


@pytest.mark.parametrize("raised", ["embedding", "ce"])
def test_advpt(raised):
    """Tuned on the frozen tower's embeddings of x'; what the attack raises is the frozen model's affair."""
    s, f0, spy = Towers(0), Towers(1), Spy()
    method = configure("advpt", {"raised": raised})[0]
    batch = Batch(torch.zeros(B, 3, 2, 2), torch.tensor(Y), {"student": None, "frozen": None})
    kept = {k: v.detach() for k, v in method.prepare({"student": s, "frozen": f0}, batch, spy).items()}
    clean, adversarial, text0, text = numbers(f0.clean, f0.adversarial, f0.text, s.text)
    np.testing.assert_allclose(kept["e"].numpy(), unit(adversarial), rtol=1e-5)
    if raised == "ce":
        assert spy.target is batch.y and spy.loss is None
        np.testing.assert_allclose(spy.answers.numpy(), SCALE * unit(adversarial) @ unit(text0).T, rtol=1e-4)
    else:
        height = spy.loss(f0.adversarial, spy.target).detach().numpy()
        np.testing.assert_allclose(height, kl(clean, adversarial), rtol=1e-4)
    found, live = run("advpt", {"student": s, "frozen": f0}, kept=kept)
    check(found, {"ce": ce(SCALE * unit(adversarial) @ unit(text).T).mean()})
    assert gradients(live["ce"], s.text, s.adversarial, f0.adversarial) == [True, False, False]


@pytest.mark.parametrize("lam", [1.5, 0.7])
def test_fap(lam):
    s, spy = Towers(0), Spy()
    found, live = run("fap", {"student": s}, spy, {"lam": lam})
    clean, adversarial, text = numbers(s.clean, s.adversarial, s.text)
    e, e_adv, text = unit(clean), unit(adversarial), unit(text)
    z, z_adv = SCALE * e @ text.T, SCALE * e_adv @ text.T
    closeness = (e * e_adv).sum(-1) + 1
    check(found, {"ce": ce(z).mean(), "consistency": lam * (closeness * kl(z, z_adv)).mean()})
    np.testing.assert_allclose(spy.loss(torch.tensor(z_adv), spy.target).numpy(), kl(z, z_adv), rtol=1e-4)
    assert not spy.target.requires_grad
    assert gradients(live["consistency"], s.clean, s.adversarial, s.text) == [True, True, True]
    slope = torch.autograd.grad(live["consistency"], s.clean, retain_graph=True)[0].double().numpy()
    way, h, heights = np.random.default_rng(0).normal(size=(B, D)), 1e-4, []
    for moved in (clean - h * way, clean + h * way):  # nothing is detached
        near = SCALE * unit(moved) @ text.T
        heights.append(lam * (((unit(moved) * e_adv).sum(-1) + 1) * kl(near, z_adv)).mean())
    assert (slope * way).sum() == pytest.approx((heights[1] - heights[0]) / (2 * h), rel=1e-3)
    assert gradients(live["ce"], s.clean, s.adversarial) == [True, False]


def test_fap_without_consistency_is_clean_training():
    s = Towers(0)
    found, _ = run("fap", {"student": s}, Spy(), {"lam": 0.0})
    clean, text = numbers(s.clean, s.text)
    check(found, {"ce": ce(SCALE * unit(clean) @ unit(text).T).mean()})


def test_fare():
    s, f0, spy = Towers(0), Towers(1), Spy()
    found, live = run("fare", {"student": s, "frozen": f0}, spy)
    adversarial, target = numbers(s.adversarial, f0.clean)
    check(found, {"embedding": ((adversarial - target) ** 2).sum(-1).mean()})
    height = spy.loss(s.adversarial, spy.target).detach().numpy()
    np.testing.assert_allclose(height, ((adversarial - target) ** 2).sum(-1), rtol=1e-5)
    assert gradients(live["embedding"], s.adversarial, f0.clean, s.text) == [True, False, False]


def test_agft():
    s, f0, spy = Fake(0), Fake(1), Spy()
    found, live = run("agft", {"student": s, "frozen": f0}, spy, {"gamma": 0.3, "sharpness": 1.6})
    (_, adversarial), (original, _) = s.numpy(), f0.numpy()
    p = softmax(0.3 * original)
    expected = -(p * np.log(softmax(1.6 * adversarial))).sum(1)
    check(found, {"soft_ce": expected.mean()})
    np.testing.assert_allclose(spy.target.numpy(), p, rtol=1e-5)
    np.testing.assert_allclose(spy.loss(spy.answers, spy.target).numpy(), expected, rtol=1e-5)
    assert gradients(live["soft_ce"], s.adversarial, s.clean, f0.clean) == [True, False, False]


def attention(patches, of_class, text, axis):
    """A by hand: cosines with the label's text, min to max, each patch over its quarter of the image."""
    tokens = unit(np.concatenate([of_class[:, None], patches], 1), axis)
    a = np.einsum("bnd,bd->bn", tokens[:, 1:], unit(text)[Y])
    a = (a - a.min(1, keepdims=True)) / (a.max(1, keepdims=True) - a.min(1, keepdims=True))
    grid = torch.tensor(a.reshape(B, 1, 2, 2))
    return F.interpolate(grid, (SIDE, SIDE), mode="bilinear").numpy().reshape(B, -1)


@pytest.mark.parametrize(("preset", "axis"), [("paper", -1), ("released", 1)])
def test_tga_zsr(preset, axis):
    s, f0 = Towers(0), Towers(1)
    options = {"preset": preset, "alpha": 0.3, "beta": 0.2}
    found, live = run("tga-zsr", {"student": s, "frozen": f0}, Spy(), options)
    clean, adversarial, original, text, text0 = numbers(s.clean, s.adversarial, f0.clean, s.text, f0.text)
    patches = numbers(s.adversarial_patches, s.clean_patches, f0.clean_patches)
    a_adv, a, a0 = (
        attention(own, of_class, text0, axis)
        for own, of_class in zip(patches, (adversarial, clean, original), strict=True)
    )
    check(
        found,
        {
            "ce": ce(SCALE * unit(adversarial) @ unit(text).T).mean(),
            "refine": 0.3 * np.linalg.norm(a_adv - a0, axis=1).mean(),
            "constrain": 0.2 * np.linalg.norm(a - a0, axis=1).mean(),
        },
    )
    for term, where in (("refine", [True, False, False]), ("constrain", [False, True, False])):
        assert gradients(live[term], s.adversarial_patches, s.clean_patches, f0.clean_patches) == where


def test_tga_zsr_without_attention_is_tecoa(vlm, task):
    base = dict(shots=2, epochs=2, show=False)
    options = {"lr": 0.01, "warmup": 0, "batch_size": 4}
    tecoa = tune("tecoa", vlm, task, options=options, **base).delta()
    same = tune("tga-zsr", vlm, task, options={**options, "alpha": 0, "beta": 0}, **base).delta()
    other = tune("tga-zsr", vlm, task, options=options, **base).delta()
    far = [max(float((each[k] - tecoa[k]).abs().max()) for k in tecoa) for each in (same, other)]
    assert far[0] < 1e-5  # the class token is read with the patches
    assert far[1] > 1e-3


def test_an_attack_without_labels_fools_nothing():
    with pytest.raises(UserError, match="early_stop=false"):
        PGD(early_stop=True)(lambda x: x.mean((2, 3)), torch.rand(2, 3, 4, 4), torch.rand(2, 3))


LEARNS = {
    "coop": {"text": (1, 16, 24)},
    "apt": {"text": (1, 16, 24)},
    "advpt": {"text": (1, 16, 24)},
    "vpt": {"image": (3, 8, 32)},
    "ivlp": {"text": (3, 2, 24), "image": (3, 2, 32)},
    "advvlp": {"text": (3, 2, 24), "image": (3, 2, 32)},
    "maple": {"text": (3, 2, 24), "image": (3, 2, 32)},
    "advmaple": {"text": (3, 2, 24), "image": (3, 2, 32)},
    "fap": {"text": (3, 2, 24), "image": (3, 2, 32)},
    "advvp": {"image": (1, 5, 32), "pad": (3, 16, 16)},
}


@pytest.mark.parametrize("name", LEARNS)
def test_the_shapes_that_are_learned(name, vlm, task):
    delta = METHODS[name]().setup(vlm, task, 0)["student"].delta()
    assert {k.removeprefix("prompts."): tuple(v.shape) for k, v in delta.items()} == LEARNS[name]
    couplings = {"maple": "text", "advmaple": "text", "fap": "image"}
    if name in couplings:  # one tower's prompts are parameters, the other's a map of them
        prompts = METHODS[name]().setup(vlm, task, 0)["student"].prompts
        assert getattr(prompts, couplings[name]) is not None and prompts.maps is not None
        assert (prompts.text is None) != (prompts.image is None)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("zero-shot", "tecoa", "pmg-aft", "capt", "apd")])
def test_the_student_moves_and_the_frozen_model_does_not(name, vlm, task, tmp_path):
    before = {n: p.clone() for n, p in vlm.named_parameters()}
    own = {"coop": {"tokens": 3}, "guided": {"trainable": "image-tower"}}  # low-rank: tests/test_guided.py
    options = {"lr": 0.01, "warmup_epochs": 0, "augment": False, **own.get(name, {})}
    tuned = tune(name, vlm, task, shots=2, epochs=2, options=options, out=tmp_path / "run", show=False)
    assert all(torch.equal(p, before[n]) for n, p in vlm.named_parameters())
    assert not any(p.grad is not None for p in vlm.parameters())
    fresh = configure(name, options)[0].setup(vlm, task, 0)["student"].delta()
    assert all(not torch.equal(value, fresh[n]) for n, value in tuned.delta().items() if value.dim() > 1)
    again = advtune.load(str(tmp_path / "run"), device="cpu", precision="fp32")
    x, tokens = torch.rand(2, 3, 16, 16), tuned.tokens(task.classes, task.template)
    assert torch.equal(tokens, again.tokens(task.classes, task.template))
    torch.testing.assert_close(again.classifier(tokens)(x), tuned.classifier(tokens)(x))


def test_a_learned_context_takes_the_templates_place(vlm):
    student = vlm.with_context(3)
    tokens = student.tokens(["red"], "a photo of {}, a type of colour.")
    assert vlm.tokenizer.pieces("x x x red.") == tokens[0, 1:-1].tolist()


def test_class_specific_contexts(vlm, task, tmp_path):
    options = {"tokens": 2, "context": "class-specific", "lr": 0.1, "warmup_epochs": 0}
    tuned = tune("coop", vlm, task, shots=2, epochs=1, options=options, out=tmp_path / "run", show=False)
    context = tuned.delta()["prompts.text"]
    assert context.shape == (1, 3, 2, 24)
    assert not torch.equal(context[0, 0], context[0, 1])
    tokens = tuned.tokens(task.classes, task.template)
    whole = tuned.text_features(tokens)
    for i in range(len(task.classes)):  # each class meets its own context
        alone = vlm.with_prompts("", 2, 0, 1)
        alone.prompts.text.data.copy_(context[:, i])
        torch.testing.assert_close(alone.text_features(tokens[i : i + 1])[0], whole[i])
    again = advtune.load(str(tmp_path / "run"), device="cpu", precision="fp32")
    for others in (task.classes[:2], task.classes[::-1]):
        for model in (tuned, again, again.with_image_tower()):  # also where a tower learns on top of it
            assert torch.equal(model.tokens(task.classes, task.template), tokens)
            with pytest.raises(UserError, match="unified"):
                model.tokens(others, task.template)


def test_the_frame(vlm):
    prompts = Prompts(vlm.clip, 0, 0, 1, pad=60)  # of 224; here 4 of 16
    assert float(prompts().pad.detach().abs().sum()) == 0
    prompts.frame.pixels.data.fill_(1.0)
    pad = prompts().pad.detach()
    assert pad.shape == (3, 16, 16)
    assert float(pad[:, 4:-4, 4:-4].abs().sum()) == 0
    assert float(pad.sum()) == 3 * (16 * 16 - 8 * 8)
    x, model = torch.rand(2, 3, 16, 16), vlm._prompted(prompts)
    inside = vlm.clip.config.preprocess(x) + pad
    torch.testing.assert_close(model.image_embeddings(x), vlm.clip.image(inside))
    with pytest.raises(UserError, match="leaves nothing"):
        Prompts(vlm.clip, 0, 0, 1, pad=120)


def test_patches_are_read_through_the_same_layers(vlm):
    """Densely read, the class token is the one that is read alone; prompts are not among the patches."""
    x = torch.rand(2, 3, 16, 16)
    assert vlm.with_prompts("a {}", 0, 2, 2).dense_embeddings(x).shape == (2, 17, 24)
    dense = vlm.dense_embeddings(x)
    torch.testing.assert_close(dense[:, 0], vlm.image_embeddings(x))
    tower = vlm.clip.image
    tokens = tower.embed(tower.patches(vlm.clip.config.preprocess(x)))
    hidden = tower.norm_pre(torch.cat([tower.class_token.expand(2, 1, -1), tokens], 1) + tower.position)
    for block in tower.blocks:
        hidden = block(hidden)
    torch.testing.assert_close(dense, tower.project(tower.norm_post(hidden)))


KEEPERS = {
    "capt": {},
    "fare": {"optimizer": "sgd", "lr": 1e-4},
    "agft": {},
    "tga-zsr": {"beta": 0.0},  # at the start f is f0: that distance is rounding, and its gradient a matter of chance
    "apd": {"teacher": "frozen"},
    "advpt": {"tokens": 2},
}


@pytest.mark.parametrize("name", KEEPERS)
def test_what_never_changes_is_computed_once_an_image(name, vlm, task, monkeypatch):
    """The frozen model answers each clean image once in three epochs; the run is the one that asks it every time."""
    options = {"batch_size": 5, "augment": False, "lr": 0.01, **KEEPERS[name]}
    calls, honest = [], METHODS[name].prepare

    def counted(self, models, batch, attack):
        calls.append(len(batch.x))
        return honest(self, models, batch, attack)

    monkeypatch.setattr(METHODS[name], "prepare", counted)
    how = dict(shots=4, epochs=3, show=False)
    kept = tune(name, vlm, task, options=options, **how).delta()
    assert sum(calls) == 12
    if name == "advpt":  # asked again, its adversary starts elsewhere
        return
    monkeypatch.setattr("advtune.step.KEEP", 10)
    asked = tune(name, vlm, task, options=options, **how).delta()
    for key, value in kept.items():
        torch.testing.assert_close(value, asked[key], rtol=1e-4, atol=1e-5)
    fresh = METHODS[name]().setup(vlm, task, 0)["student"].delta()
    assert any(not torch.allclose(value, fresh[key], rtol=1e-3, atol=1e-4) for key, value in kept.items())


def test_augmented_images_are_asked_every_time(vlm, task, monkeypatch):
    seen = []
    honest = METHODS["capt"].loss
    monkeypatch.setattr(METHODS["capt"], "loss", lambda *a: seen.append(bool(a[2].kept)) or honest(*a))
    for augment in (True, False):
        tune("capt", vlm, task, shots=2, epochs=1, options={"augment": augment}, show=False)
    assert seen == [False, True]


def test_papers_recipes_of_the_baselines():
    table = {
        "fare": ("adamw", 1e-5, 1e-4, 128, 10, 2 / 255, 1 / 255),
        "advpt": ("sgd", 0.002, 0, 32, 10, 8 / 255, 1 / 255),
        "agft": ("sgd", 4e-4, 0, 128, 2, 1 / 255, 1 / 255),
        "tga-zsr": ("sgd", 1e-4, 0, 128, 2, 1 / 255, 1 / 255),
        "apt": ("sgd", 0.002, 0, 32, 3, 4 / 255, 8 / 765),
        "advvp": ("sgd", 40.0, 0, 4, 2, 1 / 255, 1 / 255),
        "advvlp": ("sgd", 0.0035, 0, 4, 2, 1 / 255, 1 / 255),
        "advmaple": ("sgd", 0.0035, 0, 4, 2, 1 / 255, 1 / 255),
        "fap": ("sgd", 0.0035, 0, 4, 2, 1 / 255, 1 / 255),
    }
    for name, (optimizer, lr, decay, batch, steps, eps, step) in table.items():
        _, recipe, attack = configure(name)
        assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.batch_size) == (optimizer, lr, decay, batch)
        assert (attack.steps, attack.eps, attack.step) == pytest.approx((steps, eps, step))
    assert configure("coop")[1].lr == configure("advpt")[1].lr == 0.002
    assert configure("fare")[1].warmup_share == 0.07
    assert configure("agft")[0].gamma == 0.4 and configure("agft")[0].sharpness == 1.8
    assert (configure("tga-zsr")[0].alpha, configure("tga-zsr")[0].beta) == (0.08, 0.05)
    assert configure("fap")[0].lam == 1.5


def test_an_attack_field_that_a_method_does_not_use_is_refused(vlm, task):
    """A row says how a model was tuned: what had no effect must not stand in it."""
    wrong = [
        ("fare", {}, {"loss": "margin"}),
        ("fap", {}, {"loss": "kl"}),
        ("advpt", {"tokens": 2}, {"loss": "margin"}),
    ]
    wrong += [
        ("apt", {"attacker": "perturbed", "tokens": 2}, field)
        for field in ({"loss": "margin"}, {"random_start": False}, {"eot": 4}, {"restarts": 2})
    ]
    for name, options, attack in wrong:
        with pytest.raises(UserError, match=r"caller|perturbed"):
            tune(name, vlm, task, shots=2, epochs=1, options=options, attack=attack, show=False)


def test_warm_up_as_a_share():
    recipe = configure("fare", {"lr": 1.0})[1]
    rates = [recipe.rate(step, 1000, 100) for step in range(1000)]
    assert rates[:70] == sorted(rates[:70]) and rates[69] < 1.0 == rates[70] and rates[71] < 1.0
