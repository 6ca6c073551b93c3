"""Laws that every attack obeys, and PGD against closed forms."""

import itertools
from dataclasses import replace

import pytest
import torch

from advtune.attacks import PGD
from advtune.attacks.pgd import gradient
from advtune.errors import UserError
from advtune.losses import cross_entropy

EPS = 8 / 255


@pytest.fixture
def linear():
    """f(x) = W x, two classes; the worst case in the l_inf ball is known."""
    weight = torch.randn(2, 27, generator=torch.Generator().manual_seed(0))
    return weight, lambda x: x.flatten(1) @ weight.T


def images(n=32, side=3, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(vlm, task):
    """The tiny dual encoder as f, with images it classifies as their labels by construction."""
    f = vlm.classifier(vlm.tokens(task.classes, task.template))
    x = images(24, 16)
    with torch.no_grad():
        return vlm, f, x, f(x).argmax(1)


def stands(f, x, y):
    with torch.no_grad():
        return f(x).argmax(1) == y


ATTACKS = [
    PGD(eps=EPS),
    PGD(eps=EPS, early_stop=False),
    PGD(eps=EPS, early_stop=False, keep="last"),
    PGD(eps=EPS, restarts=3, random_start=True),
    PGD(eps=EPS, step_size=EPS, random_start=False),
    PGD(eps=EPS, keep="last"),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_stays_in_the_ball_and_in_the_picture(attack, model):
    _, f, x, y = model
    x[:4], x[4:8] = 0, 1  # where the ball leaves [0, 1]
    x_adv = attack(f, x, y)
    assert x_adv.shape == x.shape
    assert float((x_adv - x).abs().max()) <= EPS + 1e-6
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    assert not x_adv.requires_grad
    assert float((x_adv - x).abs().max()) > EPS / 2  # it does something


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_leaves_no_state_behind(attack, vlm, task):
    learner = vlm.with_image_tower()
    learner.train()
    f = learner.classifier(learner.tokens(task.classes, task.template))
    x, y = images(4, 16), torch.tensor([0, 1, 2, 0])
    before = {n: (p.requires_grad, p.grad, p.clone()) for n, p in learner.named_parameters()}
    attack(f, x, y)
    assert learner.training
    assert not x.requires_grad
    for name, p in learner.named_parameters():
        needed, grad, value = before[name]
        assert p.requires_grad == needed
        assert p.grad is grad is None
        assert torch.equal(p, value)


def test_eps_zero_is_the_identity(model):
    _, f, x, y = model
    assert torch.equal(PGD(eps=0.0)(f, x, y), x)


def test_closed_form_on_a_linear_model(linear):
    """An image stands exactly when its margin exceeds eps * |w_y - w_other|_1, edges of [0, 1] aside."""
    weight, f = linear
    x = images(64) * 0.8 + 0.1
    y = f(x).argmax(1)
    difference = weight[y] - weight[1 - y]
    margin = (difference * x.flatten(1)).sum(1)
    eps = float((margin / difference.abs().sum(1)).median())
    expected = margin > eps * difference.abs().sum(1)
    assert 0 < int(expected.sum()) < 64
    for attack in (
        PGD(eps=eps, steps=10),
        PGD(eps=eps, steps=5, early_stop=False),
        PGD(eps=eps, steps=5, keep="last"),
    ):
        assert torch.equal(stands(f, attack(f, x, y), y), expected)
    worst = x - eps * difference.sign().view_as(x)
    torch.testing.assert_close(PGD(eps=eps, steps=8, early_stop=False)(f, x, y), worst)


def test_monotone_in_eps_steps_and_restarts(model):
    _, f, x, y = model
    plain = PGD(random_start=False, early_stop=False, step_size=1 / 255)

    def loss(attack):
        torch.manual_seed(0)
        with torch.no_grad():
            return cross_entropy(f(attack(f, x, y)), y)

    by_steps = [loss(replace(plain, eps=EPS, steps=s)) for s in (1, 3, 9)]
    by_restarts = [loss(replace(plain, eps=EPS, random_start=True, steps=2, restarts=r)) for r in (1, 4)]
    by_eps = [loss(replace(plain, eps=e, steps=8)).mean() for e in (1 / 255, 4 / 255, 8 / 255)]
    for rising in (by_steps, by_restarts):
        assert all((b >= a - 1e-6).all() for a, b in itertools.pairwise(rising))  # of every image
        assert float(rising[-1].sum()) > float(rising[0].sum()) + 1e-4
    assert by_eps == sorted(by_eps)


def test_the_best_iterate_is_kept(model):
    """A step as long as the ball bounces between corners: the last iterate is not the best."""
    _, f, x, y = model
    wild = PGD(eps=EPS, steps=7, step_size=2 * EPS, random_start=False, early_stop=False)
    with torch.no_grad():
        best, last = (cross_entropy(f(replace(wild, keep=k)(f, x, y)), y) for k in ("best", "last"))
    assert (best >= last - 1e-6).all()
    assert float((best - last).max()) > 1e-3


def test_early_stop_is_exact_and_lets_fooled_images_leave(model):
    _, f, x, y = model
    seen = []

    def counted(z):
        seen.append(len(z))
        return f(z)

    plain = PGD(eps=2 / 255, steps=12, random_start=False)
    early = stands(f, plain(counted, x, y), y)
    full = [stands(f, replace(plain, steps=s, early_stop=False, keep="last")(f, x, y), y) for s in range(1, 13)]
    assert torch.equal(early, torch.stack(full).all(0) & stands(f, x, y))
    assert 0 < int(early.sum()) < len(x)
    assert seen[0] == len(x)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == int(early.sum())


def test_independent_of_the_batch(model):
    """The loss is summed: an image's attack does not change with its company."""
    _, f, x, y = model
    attack = PGD(eps=EPS, random_start=False, early_stop=False)
    whole = attack(f, x, y)
    parts = torch.cat([attack(f, a, b) for a, b in zip(x.split(5), y.split(5), strict=True)])
    torch.testing.assert_close(whole, parts, atol=2e-5, rtol=0)
    tiny = 1e-30  # a mean over the batch would push such a gradient to zero in low precision
    slope = gradient(f, x, y, lambda logits, y: cross_entropy(logits, y) * tiny)[0]
    alone = gradient(f, x[:1], y[:1], lambda logits, y: cross_entropy(logits, y) * tiny)[0]
    torch.testing.assert_close(slope[:1], alone, rtol=1e-3, atol=1e-36)


def test_beats_noise(model):
    _, f, x, y = model
    torch.manual_seed(0)
    noisy = (x + torch.empty_like(x).uniform_(-1, 1).sign() * EPS).clamp(0, 1)
    assert int(stands(f, PGD(eps=EPS)(f, x, y), y).sum()) < int(stands(f, noisy, y).sum()) - 3


def test_any_loss_can_be_raised(model):
    """loss= is a function of (f(x), y), with y as the attack was given it: here features, no labels."""
    vlm, _, x, _ = model
    with torch.no_grad():
        target = vlm.image_features(x)
    attack = PGD(eps=EPS, early_stop=False)
    x_adv = attack(vlm.image_features, x, target, loss=lambda z, t: (z - t).square().sum(1))
    with torch.no_grad():
        moved = (vlm.image_features(x_adv) - target).square().sum(1)
        noise = (vlm.image_features((x + EPS * torch.randn_like(x).sign()).clamp(0, 1)) - target).square().sum(1)
    assert float(moved.mean()) > 2 * float(noise.mean())


@pytest.mark.parametrize(("steps", "expected"), [(1, 1), (2, 1), (3, 2 / 3), (8, 1 / 4), (100, 1 / 4)])
def test_the_default_step_is_the_papers(steps, expected):
    assert PGD(eps=EPS, steps=steps).step == pytest.approx(expected * EPS)
    assert PGD(eps=EPS, steps=steps, step_size=0.01).step == 0.01


def test_budgets_that_do_nothing_are_refused():
    for wrong in (dict(step_size=0.0), dict(restarts=2, random_start=False), dict(steps=0), dict(eps=4), dict(eps=1.0)):
        with pytest.raises(UserError):
            PGD(**wrong)


def test_training_attack_costs_a_forward_and_a_backward_a_step(model):
    _, f, x, y = model
    calls = []
    PGD(eps=EPS, steps=3, keep="last", early_stop=False)(lambda z: calls.append(len(z)) or f(z), x, y)
    assert calls == [len(x)] * 3


def test_gradients_are_of_the_input_alone(vlm, task):
    """No weight's gradient is computed in an attack step: the backward's matrix products match the forward's."""
    from torch.utils.flop_counter import FlopCounterMode

    learner = vlm.with_image_tower()
    f = learner.classifier(learner.tokens(task.classes, task.template))
    x, y = images(4, 16), torch.tensor([0, 1, 2, 0])
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        f(x)
    with FlopCounterMode(display=False) as both:
        gradient(f, x, y, cross_entropy)
    with FlopCounterMode(display=False) as training:
        cross_entropy(f(x), y).sum().backward()
    ratio = both.get_total_flops() / forward.get_total_flops()
    assert ratio < 2.4  # attention's fused backward recomputes its scores
    assert training.get_total_flops() > 1.3 * both.get_total_flops()
