"""Training attacks that are cheaper than the papers': their equations, what they cost, where they are refused."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import advtune
from advtune import checkpoint, cost, runs, train
from advtune.attacks import NFGSM, PGD, Free, Replay, leaving
from advtune.cli import main
from advtune.errors import UserError
from advtune.losses import cross_entropy
from advtune.low_rank import merge
from advtune.methods import METHODS, configure
from advtune.protocols import Run
from advtune.report import render
from advtune.study import Study, plan
from advtune.vlm import Batch
from toys import Linear, Recorded, images

EPS = 8 / 255
ADVERSARIAL = [name for name, kind in METHODS.items() if name != "zero-shot" and kind.attack.eps]


def uphill(f, y):
    """The sign of the gradient of a two-class linear model's cross-entropy, everywhere the same, [B, 3, S, S]."""
    side = round((f.weight.shape[1] / 3) ** 0.5)
    return (f.weight[1 - y] - f.weight[y]).sign().float().unflatten(1, (3, side, side))


# --- N-FGSM -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "step"), [(2.0, None), (0.5, 6 / 255)])
def test_n_fgsm_is_its_equation_and_leaves_the_ball(k, step):
    f, x = Linear(), images(32, 4)
    y = torch.arange(32) % 2
    attack = NFGSM(EPS, k, step)
    torch.manual_seed(3)
    found = attack(f, x, y)
    torch.manual_seed(3)
    noisy = (x + k * EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    length = EPS if step is None else step
    torch.testing.assert_close(found, (noisy + length * uphill(f, y)).clamp(0, 1))
    moved = (found - x).abs().max()
    assert max(EPS, 0.9 * (k * EPS + length)) < moved <= k * EPS + length + 1e-6
    assert not found.requires_grad


def test_n_fgsm_raises_the_loss_that_it_is_given():
    f, x, y = Linear(), images(8, 4), torch.zeros(8, dtype=torch.long)
    torch.manual_seed(0)
    up = NFGSM(EPS)(f, x, y)
    torch.manual_seed(0)
    down = NFGSM(EPS)(f, x, y, loss=lambda logits, target: -cross_entropy(logits, target))
    inside = (up > 0) & (up < 1) & (down > 0) & (down < 1)
    torch.testing.assert_close((up - down)[inside], (2 * EPS * uphill(f, y))[inside])


# --- free replay --------------------------------------------------------------------------------------------


class Tuned:
    """A linear model that learns, two classes; its method is TeCoA's equation."""

    def __init__(self):
        self.f = Linear()
        self.f.weight.requires_grad_(True)
        self.seen = Recorded(self.f)
        self.grads = []

    def loss(self, models, batch, attack):
        if self.f.weight.grad is not None:
            self.grads.append(self.f.weight.grad.clone())
        return {"ce": cross_entropy(self.seen(attack(self.seen, batch.x, batch.y)), batch.y).mean()}


def test_free_replay_takes_both_gradients_from_one_backward_pass():
    """d after each update, by hand; f is asked once an update; a smaller batch takes over the first rows of d."""
    tuned, x, y = Tuned(), images(6, 4, low=0.2, high=0.8), torch.arange(6) % 2
    plan = SimpleNamespace(name="toy", method=tuned, attack=Free(EPS, 3))
    optimiser = torch.optim.SGD([tuned.f.weight], 0.1)
    d = start = Free(EPS).start(x.shape, 0)
    assert start.abs().max() <= EPS and start.std() > 0.5 * EPS
    d, up, expected = start.clone(), uphill(tuned.f, y).detach(), start.clone()
    for step in range(3):
        before = tuned.f.weight.detach().clone()
        train.update(plan, {}, Batch(x, y, {}), optimiser, 1e-6, step, d)
        torch.testing.assert_close(tuned.seen.seen[step], x + expected)
        p = ((x + expected - 0.5).flatten(1).double() @ before.T + tuned.f.bias).softmax(1)
        by_hand = (p - torch.eye(2)[y]).T @ (x + expected - 0.5).flatten(1).double() / len(x)
        torch.testing.assert_close(tuned.f.weight.grad, by_hand, rtol=1e-4, atol=1e-6)
        expected = (expected + EPS * up).clamp(-EPS, EPS)
        torch.testing.assert_close(d, expected)
    assert tuned.seen.sizes == [6, 6, 6]
    torch.testing.assert_close(d, EPS * up)  # a corner: the slope is everywhere the same
    train.update(plan, {}, Batch(x[:2], 1 - y[:2], {}), optimiser, 1e-6, 3, d[:2])
    torch.testing.assert_close(tuned.seen.seen[3], x[:2] + expected[:2])
    torch.testing.assert_close(d[2:], expected[2:])
    torch.testing.assert_close(d[:2], torch.zeros(2, 3, 4, 4))  # back by eps


def test_free_images_stay_in_the_range_of_pixels():
    x = images(4, 4)
    found = Replay(Free(EPS), torch.full_like(x, EPS))(None, x, None)
    torch.testing.assert_close(found, (x + EPS).clamp(max=1))


def test_a_loss_that_does_not_see_the_adversarial_images_is_refused(vlm, task, tmp_path):
    for name, options in (("fap", {"lam": 0}), ("capt", {"lam": 0})):
        with pytest.raises(UserError, match="says nothing of the adversarial images"):
            how = dict(shots=2, epochs=4, options=options, attack={"name": "free"}, out=tmp_path / "r", show=False)
            train.tune(name, vlm, task, **how)
        assert not list(tmp_path.glob("r*"))


def test_each_batch_is_gone_through_so_many_times(vlm, task, monkeypatch):
    """As many updates as ever; the same augmented images in a row, d kept from batch to batch, rates as ever."""
    real, calls = train.update, []

    def seen(plan, models, batch, optimiser, rate, step, d, *rest):
        before = d.clone()
        terms = real(plan, models, batch, optimiser, rate, step, d, *rest)
        calls.append((batch.x, batch.y, rate, before, d.clone()))
        return terms

    monkeypatch.setattr(train, "update", seen)
    how = dict(shots=4, epochs=4, options={"batch_size": 5, "augment": True}, show=False)
    train.tune("tecoa", vlm, task, **how)
    plain = calls[:]
    calls.clear()
    train.tune("tecoa", vlm, task, attack={"name": "free", "replay": 2, "eps": EPS}, **how)
    assert len(calls) == len(plain) == 12  # 12 images in batches of 5, 5 and 2
    assert [len(y) for _, y, *_ in calls] == [5, 5, 5, 5, 2, 2] * 2
    assert [rate for *_, rate, _, _ in calls] == [rate for *_, rate, _, _ in plain]
    for i in range(0, 12, 2):
        assert torch.equal(calls[i][0], calls[i + 1][0])
        assert torch.equal(calls[i][1], plain[i // 2][1])  # the orders of a run without replays
    for one, two in pairwise(calls):
        n = min(len(one[1]), len(two[1]))
        assert torch.equal(one[4][:n], two[3][:n])
    assert not torch.equal(calls[0][0], calls[2][0])
    assert (calls[0][3] != calls[0][4]).any()
    assert torch.stack([after.abs().amax() for *_, after in calls]).max() <= EPS + 1e-7


def test_free_replay_resumes_to_the_same_bits_between_two_replays(vlm, task, tmp_path, monkeypatch):
    how = dict(
        shots=4, epochs=3, options={"lr": 0.02, "batch_size": 4}, attack={"name": "free", "replay": 3}, show=False
    )
    train.tune("capt", vlm, task, out=tmp_path / "whole", **how)
    monkeypatch.setattr(checkpoint, "SECONDS", 0)
    real, calls = train.update, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 6:  # 5 updates are done: in the middle of the second batch's replays
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        train.tune("capt", vlm, task, out=tmp_path / "cut", **how)
    train.tune("capt", vlm, task, out=tmp_path / "cut", resume=True, **how)
    assert len(calls) == 6 + 4
    for name in ("delta.safetensors", "train.jsonl", "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    lines = [json.loads(each) for each in (tmp_path / "cut" / "train.jsonl").read_text().splitlines()]
    assert [each["epoch"] for each in lines] == [0] * 9  # three batches, three times each
    assert b"attack" not in (tmp_path / "cut" / "delta.safetensors").read_bytes()


# --- early stopping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_early_stopping_in_training_asks_only_about_what_still_stands(late, monkeypatch):
    """The last iterate of each, or the first that fools; a step's gradient each and no look back at the end. On an
    accelerator (late) what fools stays a step longer in the batch."""
    monkeypatch.setattr(leaving.Late.__init__, "__defaults__", (late,))
    monkeypatch.setattr(leaving.Leaving.__init__, "__defaults__", (late,))
    f, x = Linear(seed=1), images(64, 4)
    y = f(x).argmax(1)
    y[:9] = 1 - y[:9]
    steps, eps = 3, float(f.distances(x, "linf").quantile(0.6))
    attack = PGD(eps, steps, eps / 3, keep="last", random_start=False)
    seen = Recorded(f)
    found = attack(seen, x, y)
    z, live, sizes = x, torch.ones(64, dtype=torch.bool), []
    for _ in range(steps):
        sizes.append(int(live.sum()))
        live &= f(z).argmax(1) == y
        z = torch.where(live[:, None, None, None], (z + eps / 3 * uphill(f, y)).clamp(0, 1), z)
    torch.testing.assert_close(found, z)
    assert seen.sizes == ([64, *sizes[:2]] if late else sizes)
    assert sizes[:2] == [64, 55] and 0 < sizes[2] < 55


# --- which method takes which -------------------------------------------------------------------------------

SOFT = {"fap", "fare", "agft", "advpt"}  # x' raises a distance to a target that is not a label


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("attack", ["n-fgsm", "free", "early"])
def test_every_method_takes_it_or_says_why_not(attack, name, vlm, task):
    fields = {"early_stop": True} if attack == "early" else {"name": attack}
    reason = {"early": "nothing is fooled" if name in SOFT else "", "free": "made once" if name == "advpt" else ""}
    how = dict(shots=2, epochs=4, options={"batch_size": 3, "augment": False}, attack=fields, show=False)
    if reason.get(attack):
        with pytest.raises(UserError, match=reason[attack]):
            train.tune(name, vlm, task, **how)
        return
    tuned = train.tune(name, vlm, task, **how)
    assert tuned.run["attack"]["name"] == ("pgd" if attack == "early" else attack)
    assert tuned.run["attack"]["eps"] == METHODS[name].attack.eps
    assert not any(p.requires_grad for p in tuned.parameters())
    student = METHODS[name]().setup(vlm, task, 0)["student"]
    merge(student.clip.image)  # low-rank updates have names of their own until then
    start = student.delta()
    assert any(not torch.equal(value, start[key]) for key, value in tuned.delta().items())


REFUSED = {
    "unknown": ("tecoa", {}, {"name": "fast"}, r"unknown name 'fast'; .*known: pgd, n-fgsm, free"),
    "a field of another": ("tecoa", {}, {"name": "n-fgsm", "steps": 2}, "no option steps; .*known: eps, noise, step"),
    "twice": ("tecoa", {}, ["name=free", "name=pgd"], "name is given twice"),
    "whole eps": ("tecoa", {}, {"name": "n-fgsm", "eps": 4}, "4/255"),
    "whole step": ("tecoa", {}, {"name": "n-fgsm", "step_size": 4}, "4/255"),
    "clean": ("coop", {}, {"name": "n-fgsm"}, "takes no training attack"),
    "own steps": ("apt", {"attacker": "perturbed"}, {"name": "n-fgsm"}, "attacker=perturbed takes steps of its own"),
    "other function": ("apt", {"attacker": "constant"}, {"name": "free"}, "attacker=constant attacks another function"),
    "clean phase": ("apd", {"teacher": "offline"}, {"name": "free"}, "a phase without adversarial images"),
    "few epochs": ("fare", {}, {"name": "free"}, "epochs=2 / replay=4 leaves images unseen; write epochs=4 or more"),
}


@pytest.mark.parametrize(("method", "options", "attack", "says"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_is_read(method, options, attack, says):
    with pytest.raises(UserError, match=says) as found:
        configure(method, options, attack)
    assert "\n" not in str(found.value)


def test_the_papers_attack_stays_the_default():
    for name in ADVERSARIAL:
        for given in ((), ["name=pgd"], {"name": "pgd"}):
            assert configure(name, (), given)[2] == METHODS[name].attack
        assert configure(name, (), {"name": "pgd", "steps": 7})[2].steps == 7
    assert configure("fare", {"epochs": 8}, ["name=free"])[2] == Free(METHODS["fare"].attack.eps, 4)
    assert configure("apt", (), "name=n-fgsm")[2] == NFGSM(4 / 255)


@pytest.mark.parametrize("attack", [NFGSM(EPS), Free(EPS)], ids=lambda each: each.name)
def test_nothing_is_measured_with_them(attack, vlm, task, capsys):
    says = f"{attack.name} is only to tune on"
    with pytest.raises(UserError, match=says):
        advtune.evaluate(vlm, task, attack)
    assert main(["evaluate", "zero-shot", "--data", "fashion-mnist-mini", "--attack", attack.name]) == 2
    assert says in capsys.readouterr().err
    study = dict(protocol="few-shot", methods=["tecoa"], data=["cifar10"])
    with pytest.raises(UserError, match=says):
        Study(**study, attacks=[{"name": attack.name}]).evaluation()


# --- what the rows and the plans say ------------------------------------------------------------------------


def test_config_row_and_report_say_which(vlm, task, tmp_path, capsys):
    made = {"pgd": [], "n-fgsm": ["name=n-fgsm", "noise=1"], "free": ["name=free", "replay=2"]}
    rows = []
    for name, given in made.items():
        how = dict(shots=2, epochs=4, options={"lr": 0.01}, show=False)
        model = train.tune("tecoa", vlm, task, attack=given, out=tmp_path / name, **how)
        rows.append(advtune.evaluate(model, task, PGD(EPS, 1), show=False))
    configs = [json.loads((tmp_path / name / runs.CONFIG).read_text()) for name in made]
    usual = {"eps": 1 / 255, "norm": "linf"}
    assert configs[1]["attack"] == {"name": "n-fgsm", **usual, "noise": 1.0, "step_size": 1 / 255}
    assert configs[2]["attack"] == {"name": "free", **usual, "replay": 2}
    assert configs[0]["attack"]["name"] == "pgd" and configs[0]["attack"]["step_size"] == 1 / 255
    assert "each batch is gone through 2 times: 2 times over the images" in configs[2]["notes"]
    assert [row.train["attack"] for row in rows] == [config["attack"] for config in configs]
    facts = json.loads(render(rows, "json"))
    differs = [line["differs"] for line in facts]
    assert sorted(each["train attack name"] for each in differs) == sorted(made)
    assert {key for each in differs for key in each if key.startswith("train attack")} == {"train attack name"}
    assert main(["list", "methods"]) == 0
    shown = capsys.readouterr().out
    assert "noise=2: " in shown and "replay=4: " in shown


def test_a_plan_knows_them_apart_and_what_they_cost():
    made = {name: Run("tecoa", "cifar10", (), epochs=4, train_attack=given) for name, given in {
        "usual": {}, "pgd": {"name": "pgd"}, "n-fgsm": {"name": "n-fgsm"}, "free": {"name": "free"},
    }.items()}  # fmt: skip
    assert made["usual"].key == made["pgd"].key
    assert len({run.key for run in made.values()}) == 3
    assert "name" not in made["pgd"].settings()["attack"]  # keys of studies that were begun before
    assert made["free"].settings()["attack"] == {"name": "free", "eps": 1 / 255, "replay": 4}
    gradients = {name: cost.training(run, 1) for name, run in made.items()}
    assert gradients == {"usual": (0, 12), "pgd": (0, 12), "n-fgsm": (0, 8), "free": (0, 4)}
    study = Study("few-shot", ["tecoa", "coop"], ["cifar10"], shots=[1], train_attack={"name": "n-fgsm", "noise": 1})
    assert [run.configured()[2].name for run in plan(study)] == ["n-fgsm", "pgd"]
