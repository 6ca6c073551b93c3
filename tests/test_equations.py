"""Every method's loss recomputed in numpy from fixed logits, and where each term's gradient goes."""

import numpy as np
import pytest
import torch

from advtune.attacks import PGD
from advtune.errors import UserError
from advtune.methods import METHODS, configure
from advtune.train import tune
from advtune.vlm import Batch

B, C, SCALE = 5, 4, 7.0
Y = np.array([0, 1, 2, 3, 1])


class Fake:
    """A model whose logits are a free tensor: one for clean images, one for adversarial ones."""

    def __init__(self, seed, trains=True):
        random = torch.Generator().manual_seed(seed)
        self.clean, self.adversarial = (
            (3 * torch.randn(B, C, generator=random)).requires_grad_(trains) for _ in range(2)
        )
        self.logit_scale = torch.tensor(SCALE)

    def classifier(self, tokens):
        return lambda x: self.adversarial if bool(x.any()) else self.clean

    def numpy(self):
        return self.clean.detach().double().numpy(), self.adversarial.detach().double().numpy()


def move(f, x, y):
    return x + 1


def terms(method, models, cycle=0):
    batch = Batch(torch.zeros(B, 3, 2, 2), torch.tensor(Y), dict.fromkeys(models), cycle)
    found = method.loss(models, batch, move)
    return {name: float(value.detach()) for name, value in found.items()}, found


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def ce(z):
    return -np.log(softmax(z)[np.arange(B), Y])


def kl(p, q):
    p, q = softmax(p), softmax(q)
    return (p * (np.log(p) - np.log(q))).sum(1)


def check(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def gradients(term, *tensors):
    return [
        g is not None and bool(g.abs().sum() > 0)
        for g in torch.autograd.grad(term, tensors, allow_unused=True, retain_graph=True)
    ]


def test_tecoa():
    s = Fake(0)
    found, live = terms(METHODS["tecoa"](), {"student": s})
    check(found, {"ce": ce(s.numpy()[1]).mean()})
    assert gradients(live["ce"], s.clean, s.adversarial) == [False, True]


@pytest.mark.parametrize("direction", ["target-first", "adversarial-first"])
def test_pmg_aft_paper(direction):
    s, f0 = Fake(0), Fake(1)
    method, _, _ = configure("pmg-aft", {"alpha": 0.7, "beta": 0.4, "direction": direction})
    found, live = terms(method, {"student": s, "frozen": f0})
    (clean, adv), (_, guide) = s.numpy(), f0.numpy()
    pair = (lambda t: kl(t, adv)) if direction == "target-first" else (lambda t: kl(adv, t))
    check(found, {"ce": ce(adv).mean(), "guide": 0.7 * pair(guide).mean(), "clean": 0.4 * pair(clean).mean()})
    assert gradients(live["guide"], s.adversarial, f0.adversarial, f0.clean) == [True, False, False]
    assert gradients(live["clean"], s.clean, s.adversarial) == [True, True]


def test_pmg_aft_released():
    s, f0 = Fake(0), Fake(1)
    method, _, _ = configure("pmg-aft", ["preset=released", "detach_clean=true"])
    found, live = terms(method, {"student": s, "frozen": f0})
    (clean, adv), (_, guide) = s.numpy(), f0.numpy()
    check(
        found,
        {
            "ce": ce(adv / SCALE).mean(),
            "guide": kl(guide / SCALE, adv / SCALE).sum(),
            "clean": kl(clean / SCALE, adv / SCALE).sum(),
        },
    )
    assert gradients(live["clean"], s.clean, s.adversarial) == [False, True]


def test_pmg_aft_released_normalises_with_imagenet(vlm, task):
    for preset, mean in (("paper", 0.4), ("released", 0.485)):
        models = configure("pmg-aft", {"preset": preset})[0].setup(vlm, task, 0)
        assert all(model.clip.config.preprocess.mean[0] == mean for model in models.values())
    assert vlm.clip.config.preprocess.mean[0] == 0.4


def test_presets():
    paper, released = (configure("pmg-aft", [f"preset={name}"])[0] for name in ("paper", "released"))
    assert paper == METHODS["pmg-aft"]()
    assert (released.scale, released.statistics, released.reduction) == ("cosine", "imagenet", "sum")
    assert configure("pmg-aft", ["scale=clip", "preset=released"])[0].scale == "clip"  # an option beats the preset
    few, recipe, _ = configure("guided", {"preset": "few-shot", "epochs": 2})  # the recipe's values as well
    assert (few.guide, recipe.lr, recipe.batch_size, recipe.epochs) == ("none", 3e-3, 8, 2)
    for name, preset in (("pmg-aft", "wrong"), ("capt", "paper"), ("tga-zsr", ["paper"])):
        with pytest.raises(UserError, match="preset"):
            configure(name, {"preset": preset})


@pytest.mark.parametrize("direction", ["target-first", "adversarial-first"])
@pytest.mark.parametrize("images", ["clean", "adversarial", "both"])
@pytest.mark.parametrize("weight", ["constant", "confidence", "loss"])
def test_capt(weight, images, direction):
    s, f0 = Fake(0), Fake(1)
    method, _, _ = configure("capt", {"weight": weight, "a": 0.3, "ce": images, "direction": direction, "lam": 1.7})
    found, live = terms(method, {"student": s, "frozen": f0})
    (clean, adv), (frozen, _) = s.numpy(), f0.numpy()
    p, p0 = softmax(clean)[np.arange(B), Y], softmax(frozen)[np.arange(B), Y]
    a = {
        "constant": 0.3,
        "confidence": p0 / (p0 + p),
        "loss": ce(clean).mean() / (ce(clean).mean() + ce(frozen).mean()),
    }[weight]
    pair = (lambda t: kl(t, adv)) if direction == "target-first" else (lambda t: kl(adv, t))
    expected = {
        "clean": ce(clean).mean(),
        "adversarial": ce(adv).mean(),
        "both": (ce(clean) + ce(adv)).mean() / 2,
    }
    check(
        found,
        {
            "ce": expected[images],
            "train": 1.7 * ((1 - a) * pair(clean)).mean(),
            "frozen": 1.7 * (a * pair(frozen)).mean(),
        },
    )
    assert gradients(live["frozen"], s.adversarial, s.clean, f0.clean) == [
        True,
        False,
        False,
    ]  # a is constant
    assert gradients(live["train"], s.adversarial, s.clean, f0.clean) == [True, True, False]


def test_capt_can_hold_its_target_still():
    s, f0 = Fake(0), Fake(1)
    method, _, _ = configure("capt", {"detach_clean": True})
    _, live = terms(method, {"student": s, "frozen": f0})
    assert gradients(live["train"], s.adversarial, s.clean) == [True, False]


def test_capt_without_consistency_is_prompt_tuning_on_its_cross_entropy():
    s, f0 = Fake(0), Fake(1)
    method, _, _ = configure("capt", {"lam": 0.0, "ce": "adversarial"})
    found, _ = terms(method, {"student": s, "frozen": f0})
    check(found, {"ce": ce(s.numpy()[1]).mean()})


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_apd_online(temperature):
    s, t = Fake(0), Fake(1)
    method, _, _ = configure("apd", {"temperature": temperature, "ce": 0.3, "feedback": 0.6, "distil": 1.2})
    found, live = terms(method, {"student": s, "teacher": t})
    (_, adv), (taught, _) = s.numpy(), t.numpy()
    check(
        found,
        {
            "distil": 1.2 * kl(taught / temperature, adv / temperature).mean(),
            "ce": 0.3 * ce(adv).mean(),
            "teacher_ce": ce(taught).mean(),
            "feedback": 0.6 * kl(adv / temperature, taught / temperature).mean(),
        },
    )
    for name in ("distil", "ce"):  # the student's terms
        assert gradients(live[name], s.adversarial, t.clean) == [True, False]
    for name in ("teacher_ce", "feedback"):  # the teacher's
        assert gradients(live[name], s.adversarial, t.clean) == [False, True]


def test_nothing_to_learn_is_refused():
    with pytest.raises(UserError, match="nothing to learn"):
        METHODS["apd"](distil=0.0, ce=0.0)
    with pytest.raises(UserError, match="lam"):
        METHODS["capt"](lam=-1.0)


def test_capt_weight_by_loss_survives_perfect_answers():
    s, f0 = Fake(0), Fake(1)
    with torch.no_grad():
        for fake in (s, f0):
            fake.clean.copy_(200 * torch.nn.functional.one_hot(torch.tensor(Y), C))
    found, _ = terms(configure("capt", {"weight": "loss"})[0], {"student": s, "frozen": f0})
    assert all(np.isfinite(value) for value in found.values())


def test_apd_offline_and_frozen():
    s, t = Fake(0), Fake(1)
    offline, _, _ = configure("apd", {"teacher": "offline"})
    assert offline.cycles == 2
    first, live = terms(offline, {"student": s, "teacher": t}, cycle=0)
    check(first, {"teacher_ce": ce(t.numpy()[0]).mean()})
    assert gradients(live["teacher_ce"], s.adversarial, t.clean) == [False, True]
    second, live = terms(offline, {"student": s, "teacher": t}, cycle=1)
    check(second, {"distil": kl(t.numpy()[0], s.numpy()[1]).mean()})
    frozen, _, _ = configure("apd", {"teacher": "frozen"})
    assert frozen.cycles == 1
    assert terms(frozen, {"student": s, "teacher": t})[0].keys() == {"distil"}


def test_who_learns(vlm, task):
    def learning(name, **options):
        models = configure(name, options)[0].setup(vlm, task, 0)
        return {
            m: sorted({n.split(".")[0] + "." + n.split(".")[1] for n, p in v.named_parameters() if p.requires_grad})
            for m, v in models.items()
        }

    assert learning("tecoa") == {"student": ["clip.image"]}
    assert learning("pmg-aft") == {"student": ["clip.image"], "frozen": []}
    assert learning("capt") == {"student": ["prompts.maps", "prompts.text"], "frozen": []}
    assert learning("apd") == {
        "student": ["prompts.image", "prompts.text"],
        "teacher": ["prompts.image", "prompts.text"],
    }
    assert learning("apd", teacher="frozen")["teacher"] == []
    assert learning("zero-shot") == {"student": []}


@pytest.mark.parametrize("name", ["tecoa", "pmg-aft", "capt", "apd"])
def test_the_frozen_model_never_moves_and_the_student_does(name, vlm, task):
    before = {n: p.clone() for n, p in vlm.named_parameters()}
    tuned = tune(name, vlm, task, shots=2, epochs=2, options={"lr": 0.01, "warmup": 0, "warmup_epochs": 0}, show=False)
    assert all(torch.equal(p, before[n]) for n, p in vlm.named_parameters())
    assert not any(p.grad is not None for p in vlm.parameters())
    fresh = configure(name)[0].setup(vlm, task, 0)["student"].delta()
    assert all(not torch.equal(value, fresh[n]) for n, value in tuned.delta().items() if value.dim() > 1)


def test_pmg_aft_without_guidance_is_tecoa(vlm, task):
    how = dict(shots=2, epochs=2, show=False)
    base = {"lr": 0.01, "warmup": 0, "batch_size": 4}
    tecoa = tune("tecoa", vlm, task, options=base, **how).delta()
    same = tune("pmg-aft", vlm, task, options={**base, "alpha": 0, "beta": 0}, **how).delta()
    other = tune("pmg-aft", vlm, task, options=base, **how).delta()
    assert all(torch.equal(tecoa[k], same[k]) for k in tecoa)
    assert not all(torch.equal(tecoa[k], other[k]) for k in tecoa)


def test_papers_recipes():
    """What METHODS.md says of each, as one table."""
    table = {
        "tecoa": (1e-5, 10, 256, False, 2, 1.0),
        "pmg-aft": (5e-5, 10, 256, False, 2, 1.0),
        "capt": (0.002, 50, 32, True, 3, 2 / 3),
        "apd": (0.0035, 10, 32, True, 2, 1.0),
    }
    for name, (lr, epochs, batch, augment, steps, step) in table.items():
        _, recipe, attack = configure(name)
        assert (recipe.lr, recipe.epochs, recipe.batch_size, recipe.augment) == (lr, epochs, batch, augment)
        assert (recipe.optimizer, recipe.momentum, recipe.weight_decay, recipe.schedule) == (
            "sgd",
            0.9,
            0,
            "cosine",
        )
        assert isinstance(attack, PGD)
        assert (attack.eps, attack.steps, attack.random_start) == (1 / 255, steps, True)
        assert attack.step == pytest.approx(step / 255)
