"""Laws that every attack obeys, and closed forms."""

import dataclasses
from dataclasses import replace
from functools import partial

import pytest
import torch

from advtune.attacks import APGD, ATTACKS, CWL2, FAB, FGSM, PGD, AutoAttack, Noise, Square
from advtune.attacks.ball import distance, project, projection
from advtune.errors import UserError
from toys import Linear, Net, Recorded, between, images, stands

EPS = {"linf": 8 / 255, "l2": 0.5}
FEW = {"steps": 8, "targets": 2, "queries": 60, "searches": 4, "draws": 4}


def names(attack):
    return {field.name for field in dataclasses.fields(attack)}


def quick(attack, **changes):
    """The attack with few steps."""
    return replace(attack, **{k: v for k, v in FEW.items() if k in names(attack)}, **changes)


def label(attack):
    """Its name and what differs from the defaults."""
    plain = type(attack)()
    changed = [f"{k}={getattr(attack, k)}" for k in sorted(names(attack)) if getattr(attack, k) != getattr(plain, k)]
    return "-".join([attack.name, attack.norm, *(each for each in changed if each[:4] not in ("eps=", "norm"))])


def cases():
    """Every attack of the registry in every norm it has."""
    for name, attack in ATTACKS.items():
        for norm in EPS if "norm" in names(attack) else [attack.norm]:
            here = {"norm": norm} if "norm" in names(attack) else {}
            yield pytest.param(quick(attack, eps=EPS[norm], **here), id=f"{name}-{norm}")


def variants():
    """Attacks with other options than the registry's."""
    for norm, eps in EPS.items():
        yield PGD(eps, early_stop=False, norm=norm)
        yield PGD(eps, early_stop=False, keep="last", norm=norm)
        yield PGD(eps, restarts=3, norm=norm, eot=2)
        yield PGD(eps, step_size=eps, random_start=False, norm=norm)
        yield PGD(eps, keep="last", norm=norm)
        yield PGD(eps, loss="kl", norm=norm)
        yield quick(APGD(eps, loss="dlr-targeted", early_stop=False, restarts=2, norm=norm))
        yield quick(APGD(eps, eot=2, norm=norm))
        yield quick(FAB(eps, early_stop=False, norm=norm))
        yield quick(Square(eps, early_stop=False, norm=norm))
        yield AutoAttack(eps, norm, "rand")
    yield quick(CWL2(), eps=EPS["l2"], early_stop=False)


CASES = list(cases())
ALL = CASES + [pytest.param(attack, id=label(attack)) for attack in variants()]


@pytest.fixture(autouse=True)
def quick_stages(monkeypatch):
    """AutoAttack with few steps."""
    stages = AutoAttack.stages
    monkeypatch.setattr(AutoAttack, "stages", lambda self: [quick(stage) for stage in stages(self)])


@pytest.fixture
def model():
    """f, images, and the labels that f gives them."""
    f, x = Net(), images()
    return f, x, f(x).argmax(1)


@pytest.mark.parametrize("attack", ALL)
def test_stays_in_the_ball_and_in_the_picture(attack, model):
    f, x, _ = model
    x[:4], x[4:8] = 0, 1  # where the ball leaves [0, 1]
    x[8:20] = torch.where(images(12, seed=1) < 0.5, x[8:20].round(), x[8:20])
    y = f(x).argmax(1)
    x_adv = attack(f, x, y)
    assert (x_adv.shape, x_adv.dtype, x_adv.requires_grad) == (x.shape, x.dtype, False)
    far = distance(x_adv - x, attack.norm)
    assert float(far.max()) <= attack.eps * (1 + 1e-5)
    assert float(far.max()) > attack.eps / 2  # it does something
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1


@pytest.mark.parametrize("attack", ALL)
def test_leaves_no_state_behind(attack, model):
    f, x, y = model
    f.train()
    f.layers[1].bias.requires_grad_(False)
    f.layers[3].bias.grad = torch.ones_like(f.layers[3].bias)
    before = {n: (p.requires_grad, p.grad, p.clone()) for n, p in f.named_parameters()}
    images_before, random = x.clone(), torch.get_rng_state()
    x_adv = attack(f, x, y)
    assert all(layer.training for layer in f.modules())
    for name, p in f.named_parameters():
        needed, grad, value = before[name]
        assert p.requires_grad == needed
        assert p.grad is grad
        assert torch.equal(p, value)
    assert torch.equal(f.layers[3].bias.grad, torch.ones(4))
    assert torch.equal(x, images_before)
    assert not x.requires_grad
    assert torch.is_grad_enabled()
    hurry = isinstance(attack, PGD) and attack.keep == "last" and attack.restarts == 1
    assert torch.equal(torch.get_rng_state(), random) != hurry  # only the training attack draws from torch's stream
    if not hurry:
        with torch.no_grad():
            assert torch.equal(attack(f, x, y), x_adv)


@pytest.mark.parametrize("attack", ALL)
def test_eps_zero_is_the_identity_and_no_images_are_no_trouble(attack, model):
    f, x, y = model
    assert torch.equal(replace(attack, eps=0.0)(f, x, y), x)
    assert attack(f, x[:0], y[:0]).shape == x[:0].shape


@pytest.mark.parametrize("attack", CASES)
def test_independent_of_the_batch(attack, model):
    """Neither its losses, nor its steps, nor its random numbers: an image's attack does not change with its company."""
    f, x, y = model
    whole = attack(f, x, y)
    order = torch.arange(len(x)) * 5 % len(x)
    parts = torch.cat([attack(f, x[rows], y[rows]) for rows in order.split(7)])[order.argsort()]
    assert torch.equal(stands(f, whole, y), stands(f, parts, y))
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attack", CASES)
def test_random_starts_hang_on_torchs_seed(attack, model):
    f, x, y = model

    def under(seed):
        torch.manual_seed(seed)
        torch.rand(3)  # where the stream stands does not matter
        return attack(f, x, y)

    one, two, again = (under(seed) for seed in (1, 2, 1))
    assert torch.equal(one, again)
    assert torch.equal(one, two) == isinstance(attack, FAB | CWL2 | FGSM)  # these have no random start


@pytest.mark.parametrize("attack", CASES)
def test_at_least_as_strong_as_noise(attack, model):
    f, x, y = model
    noise = quick(Noise(attack.eps, norm=attack.norm))
    left, floor = (int(stands(f, each(f, x, y), y).sum()) for each in (attack, noise))
    assert left < floor - 5 or isinstance(attack, Noise)


@pytest.mark.parametrize("attack", CASES)
def test_monotone_in_eps(attack, model):
    f, x, y = model
    left = [int(stands(f, replace(attack, eps=k * attack.eps)(f, x, y), y).sum()) for k in (0, 0.3, 1, 3)]
    assert left == sorted(left, reverse=True)
    assert left[0] == len(x)
    assert left[-1] < len(x) / (1.1 if isinstance(attack, Noise) else 4)


@pytest.mark.parametrize("attack", [case for case in CASES if "early_stop" in names(case.values[0])])
def test_early_stop_is_exact(attack):
    """With two classes, where every loss rises exactly when the margin does."""
    f, x = Net(classes=2), images()
    y = f(x).argmax(1)
    short, long = Recorded(f), Recorded(f)
    early, late = attack(short, x, y), replace(attack, early_stop=False)(long, x, y)
    left = stands(f, early, y)
    assert torch.equal(left, stands(f, late, y))
    assert 0 < int(left.sum()) < len(x)
    assert sum(short.sizes) < sum(long.sizes)
    torch.testing.assert_close(early[left], late[left], atol=1e-6, rtol=0)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("attack", ALL)
def test_runs_with_few_classes(attack, classes):
    f, x = Net(classes=classes), images(12)
    y = f(x).argmax(1)
    assert int(stands(f, attack(f, x, y), y).sum()) <= 12 - (not isinstance(attack, Noise))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("attack", CASES)
def test_logits_may_have_any_precision(attack, dtype):
    f, x = Net(dtype=dtype), images(8)
    x_adv = attack(f, x, f(x).argmax(1))
    assert x_adv.dtype == x.dtype
    assert float(distance(x_adv - x, attack.norm).max()) <= attack.eps * (1 + 1e-5)


# Closed forms on linear models, images away from 0 and 1.


def exact_with_two_classes(norm):
    for loss in ("ce", "margin"):
        yield PGD(EPS[norm], steps=40, norm=norm, loss=loss)
        yield PGD(EPS[norm], steps=40, norm=norm, loss=loss, early_stop=False)
        yield PGD(EPS[norm], steps=40, norm=norm, loss=loss, keep="last")
    yield PGD(EPS[norm], steps=40, norm=norm, loss="kl", restarts=16)  # half of the starts climb the wrong way
    for loss in ("ce", "dlr", "dlr-targeted"):
        yield APGD(EPS[norm], steps=40, norm=norm, loss=loss)
        yield APGD(EPS[norm], steps=40, norm=norm, loss=loss, early_stop=False)
    yield FAB(EPS[norm], steps=10, norm=norm)
    yield FGSM(EPS[norm], norm=norm)
    yield AutoAttack(EPS[norm], norm=norm)
    if norm == "l2":
        yield CWL2(steps=100, searches=6)


@pytest.mark.parametrize("attack", [a for norm in EPS for a in exact_with_two_classes(norm)], ids=label)
def test_closed_form_with_two_classes(attack):
    """An image stands exactly when its margin exceeds eps times the dual norm of w."""
    f, x = Linear(), images(48, 4, low=0.3, high=0.7)
    far, y = f.distances(x, attack.norm), f(x).argmax(1)
    eps = between(far)
    assert 0 < eps < 0.25
    expected = far > eps
    assert 10 < int(expected.sum()) < 38
    assert torch.equal(stands(f, replace(attack, eps=eps)(f, x, y), y), expected)


@pytest.mark.parametrize("attack", CASES)
def test_closed_form_with_five_classes(attack):
    """The nearest of four boundaries: no attack breaks what lies within; those that try every class break the rest."""
    f, x = Linear(classes=5), images(48, 4, low=0.3, high=0.7)
    far, y = f.distances(x, attack.norm), f(x).argmax(1)
    eps = between(far)
    longer = {k: v for k, v in {"targets": 4, "steps": 30}.items() if k in names(attack)}
    left = stands(f, replace(attack, eps=eps, **longer)(f, x, y), y)
    assert (left | (far <= eps)).all()
    if attack.name in ("apgd-t", "fab-t"):
        assert torch.equal(left, far > eps)


@pytest.mark.parametrize("norm", EPS)
def test_autoattack_tries_every_class(norm, monkeypatch):
    monkeypatch.undo()
    f, x = Linear(classes=5), images(48, 4, low=0.3, high=0.7)
    far, y = f.distances(x, norm), f(x).argmax(1)
    monkeypatch.setattr(Square, "__call__", lambda self, f, x, y: x)  # minutes on what stands; nothing is left for it
    assert torch.equal(stands(f, AutoAttack(between(far), norm)(f, x, y), y), far > between(far))


@pytest.mark.parametrize(
    ("attack", "tolerance"),
    [(FAB(0.25, 20), 0.01), (FAB(1.0, 20, norm="l2"), 0.01), (CWL2(1.0, 200), 0.05)],
    ids=["fab-linf", "fab-l2", "cw-l2"],
)
@pytest.mark.parametrize("classes", [2, 5])
def test_the_distance_found_is_the_distance_to_the_boundary(attack, tolerance, classes):
    f, x = Linear(classes=classes), images(24, 4, low=0.3, high=0.7)
    far, y = f.distances(x, attack.norm), f(x).argmax(1)
    x_adv = replace(attack, early_stop=False)(f, x, y)
    assert not stands(f, x_adv, y).any()
    ratio = (distance(x_adv - x, attack.norm) / far)[far > 0.002]
    assert float(ratio.min()) > 1 - 1e-3
    assert float(ratio.max()) < 1 + tolerance


@pytest.mark.parametrize("make", [FGSM, PGD, partial(PGD, loss="margin"), partial(FAB, steps=10)])
@pytest.mark.parametrize("norm", EPS)
def test_a_gradient_of_any_length_points(make, norm):
    """A small scale of the logits is no defence: squares of 1e-25 would be 0."""
    x = images(48, 4, low=0.3, high=0.7)
    far, y = Linear().distances(x, norm), Linear()(x).argmax(1)
    attack = make(eps=between(far), norm=norm)
    for scale in (1.0, 1e-8, 1e-25):
        f = Linear(scale=scale)
        left = stands(f, attack(f, x, y), y)
        assert (left | (far <= attack.eps)).all()
        assert int(left.sum()) <= int((far > attack.eps).sum()) + 1


@pytest.mark.parametrize("make", [PGD, APGD, FAB, Square, FGSM, Noise, AutoAttack])
def test_units_are_checked(make):
    for norm, eps, written in (("linf", 4, 4), ("linf", 1.0, 1), ("l2", 128, 128), ("l2", 32.0, 32)):
        with pytest.raises(UserError, match=f"write {written}/255"):
            make(eps=eps, norm=norm)
    with pytest.raises(UserError, match="length of the whole change"):
        make(norm="l2")
    with pytest.raises(UserError, match="too low"):
        make(eps=-0.1)
    assert make(eps=3.0, norm="l2").eps == 3


def test_units_of_steps_and_of_cw_are_checked():
    for step in (1, 2.0):
        with pytest.raises(UserError, match=f"write {step:g}/255"):
            PGD(step_size=step)
    with pytest.raises(UserError, match="write 128/255"):
        CWL2(eps=128)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_projection_for_many_steps_is_the_projection(norm):
    x = images(6)
    x[0], x[1] = 0.0, 1.0
    z = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(projection(x, 0.1, norm)(z), project(z, x, 0.1, norm))
