"""What is particular to each attack and to the losses they raise."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from advtune import defences
from advtune.attacks import APGD, CWL2, FAB, FGSM, PGD, AutoAttack, Defended, Noise, Square, Transfer
from advtune.attacks.apgd import wrong
from advtune.attacks.ball import distance
from advtune.attacks.fab import onto_plane
from advtune.attacks.gradients import gradient
from advtune.attacks.square import eta, square_l2
from advtune.errors import UserError
from advtune.losses import cross_entropy, dlr, margin, targeted_dlr
from toys import Linear, Net, Recorded, between, images, stands

EPS = 8 / 255
NORMS = [("linf", EPS), ("l2", 0.5)]


@pytest.fixture
def model():
    """f, images, and the labels that f gives them."""
    f, x = Net(), images()
    return f, x, f(x).argmax(1)


@pytest.fixture
def many():
    """As `model`, with seven classes."""
    f, x = Net(classes=7), images(40)
    return f, x, f(x).argmax(1)


def left(attack, f, x, y, scored=None):
    return int(stands(scored or f, attack(f, x, y), y).sum())


# Losses


def test_losses_by_hand():
    z = np.array([[3.0, 1.0, 0.5, -1.0, 0.0], [0.2, 2.0, 1.5, 1.0, -4.0], [1.0, 1.0, 0.0, -1.0, -2.0]])
    y, to = np.array([0, 3, 1]), np.array([4, 1, 3])
    logits, labels, targets = torch.tensor(z), torch.tensor(y), torch.tensor(to)
    expected = {"margin": [], "dlr": [], "targeted": []}
    for row, label, target in zip(z, y, to, strict=True):
        first, _, third, fourth = sorted(row, reverse=True)[:4]
        ahead = max(v for i, v in enumerate(row) if i != label) - row[label]
        expected["margin"].append(ahead)
        expected["dlr"].append(ahead / (first - third))
        expected["targeted"].append((row[target] - row[label]) / (first - (third + fourth) / 2))
    np.testing.assert_allclose(margin(logits, labels), expected["margin"])
    np.testing.assert_allclose(dlr(logits, labels), expected["dlr"])
    np.testing.assert_allclose(targeted_dlr(logits, labels, targets), expected["targeted"])
    np.testing.assert_allclose(expected["dlr"], [-2 / 2.5, 1 / 1, 0])


def test_dlr_does_not_change_with_scale_and_shift():
    random = torch.Generator().manual_seed(0)
    z, y = torch.randn(50, 6, generator=random).double(), torch.randint(0, 6, (50,), generator=random)
    to = (y + 1) % 6
    for a, b in ((100.0, 0.0), (1e-2, 7.0), (1.0, -300.0)):
        torch.testing.assert_close(dlr(a * z + b, y), dlr(z, y))
        torch.testing.assert_close(targeted_dlr(a * z + b, y, to), targeted_dlr(z, y, to))
        torch.testing.assert_close(margin(a * z + b, y), a * margin(z, y))


def test_with_few_classes_the_margin_stands_in():
    z = torch.tensor([[1.0, 3.0], [0.5, 0.0]])
    y = torch.tensor([0, 0])
    assert dlr(z, y).tolist() == margin(z, y).tolist() == targeted_dlr(z, y, 1 - y).tolist() == [2.0, -0.5]
    three = torch.tensor([[1.0, 4.0, 2.0]])
    assert dlr(three, y[:1]).tolist() == [3 / 3]
    assert targeted_dlr(three, y[:1], torch.tensor([2])).tolist() == [1.0]


def test_notes_tell_what_few_classes_change():
    ce, free, targeted, fab = APGD(), APGD(loss="dlr"), APGD(loss="dlr-targeted"), FAB()
    for classes in (2, 3, 4, 9, 10, 20):
        assert ce.notes(classes) == []
        assert [("margin stands in" in note) for note in free.notes(classes)] == [True] * (classes < 3)
        told = " ".join(targeted.notes(classes))
        assert ("margin stands in" in told) == (classes < 4)
        for attack in (targeted, fab):
            note = " ".join(attack.notes(classes))
            assert (f"{classes - 1} targets" in note) == (classes < 10)
            assert note == "" or note.startswith(attack.name)
        assert AutoAttack().notes(classes) == targeted.notes(classes) + fab.notes(classes)
        assert AutoAttack(version="rand").notes(classes) == free.notes(classes)
    assert replace(fab, targets=3).notes(4) == []


# PGD


def test_monotone_in_steps_and_restarts(model):
    f, x, y = model
    plain = PGD(random_start=False, early_stop=False, step_size=1 / 255)

    def loss(attack):
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
    f, x, y = model
    wild = PGD(eps=0.2, steps=7, step_size=0.4, random_start=False, early_stop=False)
    with torch.no_grad():
        best, last = (cross_entropy(f(replace(wild, keep=k)(f, x, y)), y) for k in ("best", "last"))
    assert (best >= last - 1e-6).all()
    assert float((best - last).max()) > 1e-3


def test_early_stop_lets_fooled_images_leave(model):
    f, x, y = model
    plain, seen = PGD(eps=EPS, steps=12, step_size=1 / 255, random_start=False), Recorded(f)
    early = stands(f, plain(seen, x, y), y)
    full = [stands(f, replace(plain, steps=s, early_stop=False, keep="last")(f, x, y), y) for s in range(1, 13)]
    assert torch.equal(early, torch.stack(full).all(0))
    assert 0 < int(early.sum()) < len(x)
    assert seen.sizes[0] == len(x)
    assert seen.sizes == sorted(seen.sizes, reverse=True)
    assert seen.sizes[-1] == int(early.sum())


def test_training_attack_costs_a_forward_and_a_backward_a_step(model):
    f, x, y = model
    seen = Recorded(f)
    PGD(eps=EPS, steps=3, keep="last", early_stop=False)(seen, x, y)
    assert seen.sizes == [len(x)] * 3


@pytest.mark.parametrize(("steps", "expected"), [(1, 1), (2, 1), (3, 2 / 3), (8, 1 / 4), (100, 1 / 4)])
def test_the_default_step_is_the_papers(steps, expected):
    assert PGD(eps=EPS, steps=steps).step == pytest.approx(expected * EPS)
    assert PGD(eps=EPS, steps=steps, step_size=0.01).step == 0.01


def test_budgets_that_do_nothing_are_refused():
    for budget in (dict(step_size=0.0), dict(restarts=2, random_start=False), dict(steps=0)):
        with pytest.raises(UserError):
            PGD(**budget)
    with pytest.raises(UserError, match="random_start=true"):
        PGD(loss="kl", random_start=False)
    for budget in (dict(c=0.0), dict(lr=0.0)):
        with pytest.raises(UserError, match="0 does not move"):
            CWL2(**budget)


@pytest.mark.parametrize(("norm", "eps"), NORMS)
def test_kl_starts_at_a_random_point_and_rises(model, norm, eps):
    """KL(f(x) || f(x')), the clean prediction first: at x itself its gradient is 0."""
    f, x, y = model

    def kl(z, clean):
        p, q = clean.softmax(1), z.softmax(1)
        return (p * (p / q).log()).sum(1)

    attack, seen = PGD(eps=eps, loss="kl", early_stop=False, norm=norm), Recorded(f)
    x_adv = attack(seen, x, y)
    assert torch.equal(seen.seen[0], x)  # the target
    first = distance(seen.seen[1] - x, norm)
    assert (first > 0).all()
    assert first.std() > 0
    with torch.no_grad():
        clean = f(x)
        at_start, reached = (kl(f(z), clean) for z in (seen.seen[1], x_adv))
    assert float(reached.mean()) > 4 * float(at_start.mean())
    by_hand = replace(attack, loss="ce")(f, x, clean, loss=kl)
    torch.testing.assert_close(x_adv, by_hand, atol=1e-4, rtol=0)


def test_the_margin_loss_is_named_and_the_two_cw_are_told_apart():
    assert PGD(loss="margin").name == "cw-pgd"
    assert PGD().name == PGD(loss="kl").name == "pgd"
    assert CWL2().name == "cw-l2"
    assert [APGD(loss=loss).name for loss in ("ce", "dlr", "dlr-targeted")] == ["apgd-ce", "apgd-dlr", "apgd-t"]


def test_any_loss_can_be_raised(vlm):
    """loss= is a function of (f(x), y), with y as the attack was given it: here features, no labels."""
    x = images(24, 16)
    with torch.no_grad():
        target = vlm.image_features(x)
    attack = PGD(eps=EPS, early_stop=False)
    x_adv = attack(vlm.image_features, x, target, loss=lambda z, t: (z - t).square().sum(1))
    with torch.no_grad():
        moved = (vlm.image_features(x_adv) - target).square().sum(1)
        noise = (vlm.image_features((x + EPS * torch.randn_like(x).sign()).clamp(0, 1)) - target).square().sum(1)
    assert float(moved.mean()) > 2 * float(noise.mean())


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


def test_gradients_are_summed_over_the_batch(vlm, task):
    """A mean over the batch would push a tiny gradient to zero in low precision."""
    f = vlm.classifier(vlm.tokens(task.classes, task.template))
    x, y = images(24, 16), torch.zeros(24, dtype=torch.long)

    def tiny(logits, y):
        return cross_entropy(logits, y) * 1e-30

    slope, alone = gradient(f, x, y, tiny)[0], gradient(f, x[:1], y[:1], tiny)[0]
    torch.testing.assert_close(slope[:1], alone, rtol=1e-3, atol=1e-36)


# APGD


class Stubborn:
    """Logits whose cross-entropy falls (or rises) with every call, and the gradient of a plane."""

    def __init__(self, rises):
        self.sign, self.calls = 1 if rises else -1, 0

    def __call__(self, x):
        self.calls += 1
        slope = x.flatten(1).sum(1)
        other = -5 + self.sign * 0.01 * self.calls + (slope - slope.detach())
        return torch.stack([torch.zeros_like(other), other], 1)


def halvings(monkeypatch, f, attack):
    """The numbers of the steps after which the step was halved, of one image."""
    lengths, move = [], APGD._move

    def recorded(self, s, share):
        lengths.append(float(s["step"][0]))
        return move(self, s, share)

    monkeypatch.setattr(APGD, "_move", recorded)
    attack(f, images(1), torch.zeros(1, dtype=torch.long))
    assert lengths[0] == pytest.approx(2 * attack.eps)
    assert all(b in (a, a / 2) for a, b in itertools.pairwise(lengths))
    return [i for i in range(1, len(lengths)) if lengths[i] < lengths[i - 1]]


def test_apgd_halves_at_the_papers_checkpoints(monkeypatch):
    f = Stubborn(rises=False)
    assert halvings(monkeypatch, f, APGD(EPS)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert f.calls == 101
    assert halvings(monkeypatch, Stubborn(rises=False), APGD(EPS, 50)) == [11, 21, 30, 38, 45]
    assert halvings(monkeypatch, Stubborn(rises=True), APGD(EPS)) == []


def test_apgd_halves_when_a_longer_run_of_steps_got_nowhere(monkeypatch):
    """Three of four steps rise, but only while the best is far: with rho 0 nothing but standing still halves."""

    class Saw(Stubborn):
        def __call__(self, x):
            logits = super().__call__(x)
            return logits - torch.tensor([0.0, 3.0 * (self.calls > 1) + 0.5 * (self.calls % 2)])

    assert halvings(monkeypatch, Saw(rises=True), APGD(EPS, rho=0.0)) == [41, 70, 87, 99]
    # after a halving, the next checkpoint lets be: the step has changed


@pytest.mark.parametrize(("norm", "eps"), NORMS)
@pytest.mark.parametrize("loss", [cross_entropy, dlr])
def test_apgd_returns_the_best_point(many, loss, norm, eps):
    f, x, y = many
    seen = Recorded(f)
    name = {cross_entropy: "ce", dlr: "dlr"}[loss]
    x_adv = APGD(eps, 25, loss=name, early_stop=False, norm=norm)(seen, x, y)
    assert seen.sizes == [len(x)] * 26
    with torch.no_grad():
        heights = torch.stack([loss(f(z), y) for z in seen.seen])
        torch.testing.assert_close(loss(f(x_adv), y), heights.amax(0), atol=1e-6, rtol=0)
    assert (heights[-1] < heights.amax(0)).any()


def test_apgd_has_momentum():
    """A slope that turns round: x + eps g, then three quarters of the way back and a quarter of the step before."""
    eps, x = 0.1, images(6, low=0.3, high=0.7)
    calls = []

    def f(z):
        calls.append(z)
        height = (z - z.detach()).flatten(1).sum(1) * (1 if len(calls) % 2 else -1)
        return torch.stack([torch.ones_like(height), height], 1)

    APGD(eps, 20)(f, x, torch.zeros(6, dtype=torch.long))
    z0, z1, z2 = (z.detach() for z in calls[:3])
    assert float(distance(z0 - x, "linf").min()) == pytest.approx(eps, rel=1e-4)  # it starts on the surface
    torch.testing.assert_close(z1, x + eps)
    expected = z1 + 0.75 * ((x - eps) - z1) + 0.25 * (z1 - z0)
    torch.testing.assert_close(z2, torch.clamp(expected, x - eps, x + eps))


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_asks_once_a_step_and_lets_fooled_images_leave(many, loss):
    f, x, y = many
    seen = Recorded(f)
    remains = left(APGD(EPS / 4, 30, loss=loss), seen, x, y, scored=f)
    assert 0 < remains < len(x)
    assert seen.sizes[0] == len(x)
    assert seen.sizes == sorted(seen.sizes, reverse=True)
    assert seen.sizes[-1] == remains
    assert len(seen.sizes) == 31


def runs(sizes, steps):
    """How many images begin each run, while some stand after each."""
    assert len(sizes) % (steps + 1) == 0
    return sizes[:: steps + 1]


def test_apgd_targets_what_still_stands_likeliest_first(many):
    f, x, y = many
    steps, seen = 12, Recorded(f)
    attack = APGD(EPS / 2, steps, loss="dlr-targeted", targets=6)
    remains = left(attack, seen, x, y, scored=f)
    begun = runs(seen.sizes[1:], steps)  # the first call ranks the classes
    ends = [left(replace(attack, targets=n), f, x, y) for n in range(1, 7)]
    assert begun == [len(x), *ends[:-1]]
    assert ends[-1] == remains < ends[0] < len(x)
    ranked = torch.stack(wrong(f, x, y, 6))
    order = f(x).argsort(1, descending=True).T
    assert torch.equal(ranked, order[1:])  # all are classified correctly: the first is y
    assert len(wrong(f, x, y, 99)) == 6


def test_apgd_restarts_elsewhere_on_what_still_stands(many):
    f, x, y = many
    steps, seen = 10, Recorded(f)
    attack = APGD(EPS / 4, steps, restarts=3)
    left(attack, seen, x, y, scored=f)
    begun = runs(seen.sizes, steps)
    assert begun == [len(x), *(left(replace(attack, restarts=n), f, x, y) for n in (1, 2))]
    starts = [seen.seen[k * (steps + 1)] for k in range(3)]
    assert not torch.equal(starts[1], starts[0][: len(starts[1])])
    full = Recorded(f)
    replace(attack, early_stop=False)(full, x, y)
    starts = [full.seen[k * (steps + 1)] for k in range(3)]
    assert all(float((a - b).abs().mean()) > EPS / 8 for a, b in itertools.combinations(starts, 2))


# FAB


def nearest(z, slope, c, norm):
    """onto_plane by bisection in float64: z + d in [0, 1], as near as slope . d = c allows, or as far as it can."""
    z, slope, c = (v.double().flatten(1) if v.dim() > 1 else v.double()[:, None] for v in (z, slope, c))
    low, high = torch.zeros_like(c), torch.full_like(c, 1e9)
    for _ in range(200):
        t = (low + high) / 2
        d = t * c.sign() * (slope.sign() if norm == "linf" else slope)
        d = torch.clamp(z + d, 0, 1) - z
        short = (slope * d).sum(1, keepdim=True).abs() < c.abs()
        low, high = torch.where(short, t, low), torch.where(short, high, t)
    return d


@pytest.mark.parametrize("kind", ["even", "uneven", "tiny"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_projects_onto_a_plane_inside_the_picture(norm, kind):
    z = images(64)
    z = torch.where(images(64, seed=1) < 0.5, z.round(), z)  # half of the pixels at a wall
    slope = images(64, seed=2, low=-1, high=1)
    slope = {"even": slope, "uneven": slope**7, "tiny": 1e-20 * slope}[kind]
    up = (slope * torch.where(slope > 0, 1 - z, -z)).flatten(1).sum(1)  # what can be gained, and lost
    down = (slope * torch.where(slope > 0, -z, 1 - z)).flatten(1).sum(1)
    for share in (0.01, 0.5, 0.95):
        for most in (up, down):
            c = share * most
            d = onto_plane(z, slope, c, norm)
            torch.testing.assert_close((slope * d).flatten(1).sum(1) / c, torch.ones(64), atol=3e-4, rtol=0)
            d = d.flatten(1).double()
            assert float((z.flatten(1) + d).min()) >= 0
            assert float((z.flatten(1) + d).max()) <= 1
            p = torch.inf if norm == "linf" else 2
            expected = nearest(z, slope, c, norm) if kind != "tiny" else nearest(z, 1e20 * slope, 1e20 * c, norm)
            torch.testing.assert_close(d.norm(dim=1, p=p), expected.norm(dim=1, p=p), atol=0, rtol=5e-3)
    for most, way in ((up, 1), (down, -1)):  # out of reach: every pixel to its wall
        d = onto_plane(z, slope, 1.5 * most, norm)
        torch.testing.assert_close((slope * d).flatten(1).sum(1) / most, torch.ones(64), atol=1e-5, rtol=0)
        if kind != "uneven":
            torch.testing.assert_close(z + d, torch.where(way * slope > 0, 1.0, 0.0), atol=1e-5, rtol=0)
    assert torch.equal(onto_plane(z, 0 * slope, up, norm), torch.zeros_like(z))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_near_the_walls(norm):
    """The distance to a plane inside [0, 1] is what the projection says, and what FAB finds."""
    f, x = Linear(), images(24, 4)
    x = torch.where(images(24, 4, seed=1) < 0.5, x.round(), x)
    z = f(x)
    y = z.argmax(1)
    slope = (f.weight[1 - y] - f.weight[y]).view_as(x)
    expected = nearest(x, slope, -margin(z, y).double(), norm).norm(dim=1, p=torch.inf if norm == "linf" else 2)
    x_adv = FAB({"linf": 0.9, "l2": 9.0}[norm], 30, norm=norm, early_stop=False)(f, x, y)
    assert not stands(f, x_adv, y).any()
    torch.testing.assert_close(distance(x_adv - x, norm).double(), expected, atol=1e-4, rtol=0.02)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_mixes_two_projections(norm):
    """Both overshoot by 1.05; the image's part is a / (a + a0), at most a tenth, a and a0 how far they move."""
    x, z, slope = images(20), images(20, seed=1), images(20, seed=2, low=-1)
    p, ahead = torch.inf if norm == "linf" else 2, torch.linspace(-0.01, -3, 20)
    onto, back = (slope * (z - x)).flatten(1).sum(1) - ahead, -ahead
    d0, d = nearest(x, slope, onto, norm), nearest(z, slope, back, norm)
    a0, a = d0.norm(dim=1, p=p), d.norm(dim=1, p=p)
    pull = (a / (a + a0)).clamp(max=0.1)[:, None]
    assert 0 < int((pull < 0.1).sum()) < 20
    flat_x, flat_z = x.flatten(1), z.flatten(1)
    expected = ((flat_z + 1.05 * d) * (1 - pull) + (flat_x + 1.05 * d0) * pull).clamp(0, 1)
    found = FAB(0.5, norm=norm)._step(z, x, slope, ahead).flatten(1)
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=0)


def test_fab_counts_only_what_lies_within_eps(model):
    f, x, y = model
    seen = Recorded(f)
    far = distance(FAB(0.9, 30, early_stop=False)(f, x, y) - x, "linf")
    eps = between(far)
    x_adv = FAB(eps, 30)(seen, x, y)
    stood = stands(f, x_adv, y)
    assert torch.equal(x_adv[stood], x[stood])  # nothing was found: x comes back
    assert (far[~stood] <= eps).all()
    assert int((far <= eps).sum()) - int((~stood).sum()) <= 1
    assert seen.sizes[-1] == int(stood.sum())


# Square


def replay(records, f, y, early=False):
    """Images that Square held after each of its queries: a proposal is taken when the margin is higher."""
    held = [records[0]]
    for new in records[1:]:
        with torch.no_grad():
            higher = margin(f(new), y) > margin(f(held[-1]), y)
        held.append(torch.where(higher[:, None, None, None], new, held[-1]))
    return held


def extent(change):
    """The longer side of the smallest window that holds all changed pixels of each image [B]."""
    moved = (change != 0).any(1)
    sides = []
    for each in moved:
        at = each.nonzero()
        sides.append(int((at.amax(0) - at.amin(0)).max()) + 1 if len(at) else 0)
    return sides


def test_square_climbs_by_squares_of_the_papers_sizes():
    f, x = Net(side=16), images(6, 16)
    y, queries = f(x).argmax(1), 520
    seen = Recorded(f)
    x_adv = Square(EPS, queries, early_stop=False)(seen, x, y)
    assert seen.sizes == [6] * (queries + 1)  # where it begins, and its queries
    held = replay(seen.seen, f, y)
    assert torch.equal(held[-1], x_adv)
    stripes = ((held[0] - x).sign() * (x > EPS) * (x < 1 - EPS)).flatten(0, 1)
    assert all(len(stripe[:, k][stripe[:, k] != 0].unique()) <= 1 for stripe in stripes for k in range(16))
    sides = [extent(new - old) for new, old in zip(seen.seen[1:], held, strict=False)]
    phases = [(0, 11, 14), (11, 51, 10), (51, 201, 7), (201, 501, 5), (501, 520, 4)]  # p = 0.8 of 256, then half, ...
    for start, stop, side in phases:
        assert max(max(each) for each in sides[start:stop]) == side
    with torch.no_grad():
        assert (margin(f(x_adv), y) > margin(f(held[0]), y)).all()


def test_square_halves_when_the_paper_does():
    attack, limits = Square(p=0.8), (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
    assert attack._area(0) == 0.8
    for number, limit in enumerate(limits):
        assert attack._area(limit) == 0.8 / 2**number
        assert attack._area(limit + 1) == 0.8 / 2 ** (number + 1)


def test_square_in_l2_spends_all_of_eps():
    f, x = Net(side=16), images(6, 16, low=0.4, high=0.6)
    y, seen, eps = f(x).argmax(1), Recorded(f), 0.4
    x_adv = Square(eps, 80, norm="l2", early_stop=False)(seen, x, y)
    assert torch.equal(replay(seen.seen, f, y)[-1], x_adv)
    for z in seen.seen:
        torch.testing.assert_close(distance(z - x, "l2"), torch.full((6,), eps), atol=1e-5, rtol=0)
    with torch.no_grad():
        assert (margin(f(x_adv), y) > margin(f(seen.seen[0]), y)).all()


def test_square_in_l2_moves_a_window_to_another():
    """The change in the rest stays; each channel keeps its length, which what is left of eps shares out."""
    x = images(30, 16, low=0.4, high=0.6)
    d = images(30, 16, seed=1, low=-1)
    d = 0.3 * d / distance(d, "l2")[:, None, None, None]
    u = torch.rand(30, 8, generator=torch.Generator().manual_seed(2))
    for eps in (0.3, 0.4):
        new = square_l2(x + d, x, eps, 0.1, u) - x  # 5 by 5
        lengths = ((d**2).sum((2, 3)) + (eps**2 - 0.3**2) / 3).sqrt()
        torch.testing.assert_close(new.flatten(2).norm(dim=2), lengths, atol=1e-4, rtol=0)
        same = ((new - d).abs() < 1e-5).all(1).flatten(1).sum(1)
        gone = (new.abs() < 1e-5).all(1).flatten(1).sum(1)
        assert ((same + gone >= 256 - 25) & (same >= 256 - 50) & (gone <= 25)).all()
        assert int(gone.max()) == 25


@pytest.mark.parametrize("side", [3, 4, 7])
def test_squares_l2_pattern_is_the_papers(side):
    """A bump above a hole, each a sum of nested rectangles weighed 1 / (k + 1)^2."""

    def bump(h, w):
        table = np.zeros((h, w))
        top, at = h // 2, w // 2
        for k in range(max(h // 2, w // 2) + 1):
            table[max(top - k, 0) : top + k + 1, max(at - k, 0) : at + k + 1] += 1 / (k + 1) ** 2
        return table / np.linalg.norm(table)

    expected = np.concatenate([bump(side // 2, side), -bump(side - side // 2, side)])
    np.testing.assert_allclose(eta(side).numpy(), expected / np.linalg.norm(expected), atol=1e-6)


@pytest.mark.parametrize(("norm", "eps"), NORMS)
def test_square_asks_for_no_gradient(model, norm, eps):
    f, x, y = model

    def opaque(z):
        assert not torch.is_grad_enabled()
        return torch.from_numpy(f(torch.from_numpy(z.numpy().copy())).detach().numpy())  # refuses what wants a gradient

    attack = Square(eps, 300, norm=norm)
    assert left(attack, opaque, x, y, scored=f) == left(attack, f, x, y) < len(x) * 3 / 4
    assert left(PGD(eps, norm=norm, random_start=False), masked(f), x, y) == len(x)


def test_square_on_a_plane_breaks_most_of_what_can_be():
    f, x = Linear(), images(48, 4, low=0.3, high=0.7)
    y, far = f(x).argmax(1), f.distances(x, "linf")
    eps = between(far)
    stood = stands(f, Square(eps, 600)(f, x, y), y)
    assert stood[far > eps].all()
    assert float(stood[far <= eps].float().mean()) < 0.1


# CW


def test_cw_reaches_its_confidence_and_gives_up_beyond_eps(model):
    f, x, y = model
    plain, sure = (CWL2(3.0, 60, searches=5, confidence=k, early_stop=False)(f, x, y) for k in (0.0, 1.0))
    with torch.no_grad():
        assert (margin(f(plain), y) > 0).all()
        assert (margin(f(sure), y) > 1 - 1e-4).all()
    assert (distance(sure - x, "l2") > distance(plain - x, "l2")).all()
    far = distance(plain - x, "l2")
    eps = between(far)
    x_adv = CWL2(eps, 60, searches=5)(f, x, y)
    stood = stands(f, x_adv, y)
    assert torch.equal(stood, far > eps)
    assert torch.equal(x_adv[stood], x[stood])


# Randomness, steps without a gradient, other models


def drowned(x):
    """x itself, with a gradient that is drowned in fresh noise."""
    return x + (x - x.detach()) * 10 * torch.randn_like(x)


@pytest.mark.parametrize("make", [PGD, APGD])
@pytest.mark.parametrize(("norm", "eps"), NORMS)
def test_eot_sees_through_randomness(make, norm, eps):
    head, x = Net(classes=2), images(48)
    y = head(x).argmax(1)
    f = Defended(drowned, head)

    def remaining(eot):
        torch.manual_seed(0)
        return left(make(eps, steps=10, norm=norm, eot=eot), f, x, y, scored=head)

    once, many, clear = remaining(1), remaining(20), left(make(eps, steps=10, norm=norm), head, x, y)
    assert once - many >= 5
    assert many >= clear


@pytest.mark.parametrize("make", [PGD, APGD])
def test_nothing_leaves_that_a_random_model_may_yet_get_right(make, model):
    """Fooled once, on average over the draws, is not fooled; so the best point is looked for to the end."""
    f, x, y = model
    for eot, stays in ((1, False), (2, True)):
        seen = Recorded(f)
        make(EPS, 5, eot=eot)(seen, x, y)
        assert (set(seen.sizes) == {len(x)}) == stays
        assert len(seen.sizes) == 6 * eot


def test_eot_averages_gradients_losses_and_logits():
    head, x = Net(), images(4)
    y, stds = torch.zeros(4, dtype=torch.long), []
    f, seen = Defended(defences.noise, head), Recorded(Defended(defences.noise, head))
    gradient(seen, x, y, cross_entropy, eot=20)
    assert seen.sizes == [4] * 20
    for eot in (1, 16):
        draws = [gradient(f, x, y, cross_entropy, eot=eot) for _ in range(40)]
        stds.append([torch.stack(kind).std(0).mean().item() for kind in zip(*draws, strict=True)])
    for one, sixteen in zip(*stds, strict=True):
        assert 3 < one / sixteen < 5.3


def quantise(x):
    return (x * 8).round() / 8


@pytest.mark.parametrize("make", [PGD, APGD, FAB])
@pytest.mark.parametrize("step", [defences.jpeg, quantise], ids=["jpeg", "quantise"])
def test_bpda_goes_through_what_has_no_gradient(make, step):
    head, x = Net(side=16), images(32, 16)
    x = torch.nn.functional.avg_pool2d(x, 5, 1, 2)  # smooth, as JPEG likes it
    f = Defended(step, head)
    with torch.no_grad():
        y = f(x).argmax(1)
    attack = make(16 / 255, steps=12)
    blind, adaptive = left(attack, f, x, y), left(replace(attack, bpda=True), f, x, y)
    assert adaptive <= blind - 8
    assert adaptive < 0.7 * blind


def test_bpda_needs_a_step_to_stand_in_for(model):
    f, x, y = model
    for attack in (PGD(EPS, bpda=True), APGD(EPS, bpda=True), FAB(EPS, bpda=True), AutoAttack(EPS, bpda=True)):
        with pytest.raises(UserError, match="bpda=true"):
            attack(f, x, y)


@pytest.mark.parametrize("stand_in", [lambda x: x, lambda x: torch.nn.functional.avg_pool2d(x, 3, 1, 1)])
def test_the_stand_in_changes_the_gradient_alone(stand_in):
    head, x = Net(side=16, dtype=torch.float64), images(32, 16)
    values = []
    f = Defended(defences.jpeg, lambda z: values.append(z.detach()) or head(z), stand_in)
    z = x.clone().requires_grad_(True)
    out = f.approximate(z)
    with torch.no_grad():
        assert torch.equal(out, f(x))
    assert torch.equal(*values)  # to the last bit: what is attacked is what is scored
    (slope,) = torch.autograd.grad(out[:, 0].sum(), z)
    behind = defences.jpeg(x).requires_grad_(True)
    (there,) = torch.autograd.grad(head(behind)[:, 0].sum(), behind)
    z = x.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(stand_in(z), z, there)
    torch.testing.assert_close(slope, expected)


def masked(f):
    """f with gradients that are zero: it looks robust to whoever follows them."""
    return lambda x: f(x.detach())


@pytest.mark.parametrize("inner", [PGD(EPS), PGD(0.5, norm="l2"), APGD(EPS, 20), FGSM(EPS)], ids=str)
def test_transfer_asks_the_source_alone(inner):
    clean, x = Net(), images(48)
    y = clean(x).argmax(1)
    f = Recorded(masked(clean))
    attack = Transfer(inner, clean)
    assert (attack.name, attack.eps, attack.norm) == ("transfer", inner.eps, inner.norm)
    x_adv = attack(f, x, y)
    assert f.seen == []
    assert float(distance(x_adv - x, inner.norm).max()) <= inner.eps * (1 + 1e-5)
    assert int(stands(f, x_adv, y).sum()) <= left(inner, clean, x, y) + 2
    assert int(stands(f, x_adv, y).sum()) < left(inner, f, x, y) - 10  # its own gradients are zero


def test_transfer_pushes_on_when_the_source_is_fooled():
    source, target, x = Net(classes=2), Net(classes=2), images(64)
    with torch.no_grad():
        target.layers[1].weight.add_(0.1 * torch.randn_like(target.layers[1].weight))
    y = source(x).argmax(1)
    attack = PGD(EPS, random_start=False)
    on, off = Transfer(attack, source)(target, x, y), attack(source, x, y)
    with torch.no_grad():
        assert float(margin(source(on), y).mean()) > float(margin(source(off), y).mean())
    assert int(stands(target, on, y).sum()) < int(stands(target, off, y).sum())


@pytest.mark.parametrize("inner", [AutoAttack(EPS), FAB(EPS), CWL2(0.5)], ids=lambda attack: attack.name)
def test_what_stops_at_the_boundary_does_not_transfer(inner):
    with pytest.raises(UserError, match=f"transfer: {inner.name} stops"):
        Transfer(inner, Net())


def test_autoattacks_stages_are_the_papers():
    assert AutoAttack(EPS).stages() == [
        APGD(EPS, 100),
        APGD(EPS, 100, loss="dlr-targeted", targets=9),
        FAB(EPS, 100, targets=9),
        Square(EPS, 5000, 0.8),
    ]
    for stage in (*AutoAttack(0.7, "l2").stages(), *AutoAttack(0.7, "l2", "rand").stages()):
        assert (stage.eps, stage.norm) == (0.7, "l2")
    assert [stage.bpda for stage in AutoAttack(EPS, bpda=True).stages()[:3]] == [True] * 3
    assert AutoAttack(EPS, version="rand").stages() == [APGD(EPS, eot=20), APGD(EPS, loss="dlr", eot=20)]


def test_autoattack_is_the_worst_of_its_stages_each_on_what_still_stands(many, monkeypatch):
    f, x, y = many
    eps = EPS / 4
    stages = [APGD(eps, 6), APGD(eps, 6, loss="dlr-targeted", targets=3), FAB(eps, 6, targets=3), Square(eps, 100)]
    monkeypatch.setattr(AutoAttack, "stages", lambda self: stages)
    alone = [stands(f, stage(f, x, y), y) for stage in stages]
    assert torch.equal(stands(f, AutoAttack(eps)(f, x, y), y), torch.stack(alone).all(0))
    sizes = []
    for kind in {type(stage) for stage in stages}:
        call = kind.__call__
        monkeypatch.setattr(
            kind, "__call__", lambda self, f, x, y, call=call: sizes.append(len(x)) or call(self, f, x, y)
        )
    AutoAttack(eps)(f, x, y)
    expected = [len(x), *(int(torch.stack(alone[:n]).all(0).sum()) for n in (1, 2, 3))]
    assert sizes == expected


def test_noise_is_the_worst_of_its_draws(model):
    f, x, y = model
    stood = [stands(f, Noise(0.3, draws=n)(f, x, y), y) for n in (1, 3, 12)]
    assert all((a | ~b).all() for a, b in itertools.pairwise(stood))
    assert int(stood[-1].sum()) < int(stood[0].sum())


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_no_image_leaves_a_random_model(kind):
    """What fools the mean of some forwards by a hair is scored by another: the attack has to climb on."""
    f, x = Net(), images(32)
    y = f(x).argmax(1)
    noisy = Defended(lambda z: z + 0.1 * torch.randn_like(z), f)
    seen = Recorded(noisy)
    torch.manual_seed(0)
    kind(EPS, 10, eot=4)(seen, x, y)
    assert set(seen.sizes) == {32}

    def stood(attack):
        torch.manual_seed(0)
        x_adv = attack(noisy, x, y)
        return sum(int(stands(noisy, x_adv, y).sum()) for _ in range(20)) / 20

    assert stood(kind(EPS, 20, eot=4)) < stood(kind(EPS, 20)) - 1
