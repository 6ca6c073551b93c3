"""Every alarm goes off on a model that was made to set it off, and on no honest one."""

import dataclasses
import json

import pytest
import torch

from advtune.attacks import APGD, PGD, AutoAttack, Defended, Noise, Square, Transfer
from advtune.checks import CHECKS, SMALL_BATCH, Finding, Sample, check, stands, zero_share

EPS, N = 4 / 255, 48
NAMES = ["random", "outputs", "zero-gradient", "batch-size", "noise", "large-eps", "gap", "black-box"]


def images(n=N, side=8, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def linear(x):
    """Five classes; a third of the images withstand EPS, none 64/255, and PGD is exact."""
    weight = torch.randn(x.shape[1:].numel(), 5, generator=torch.Generator().manual_seed(0))
    return (x - 0.5).flatten(1) @ weight


def conv(x):
    random = torch.Generator().manual_seed(6)
    kernel, weight = torch.randn(12, 3, 3, 3, generator=random), torch.randn(12 * 9, 5, generator=random)
    hidden = torch.nn.functional.gelu(torch.nn.functional.conv2d(x - 0.5, 0.4 * kernel))
    return torch.nn.functional.adaptive_avg_pool2d(hidden, 3).flatten(1) @ weight


def coarse(x):
    """A step on the images without a gradient."""
    return (x * 12).round() / 12


def straight(x):
    with torch.no_grad():
        return linear(x)


def sample(f, attack=None, of=None, y=None, n=N, **facts):
    """What stood under the attack, of images labelled as f (or `of`) sees them."""
    attack = attack or PGD(EPS, 20)
    x = images(n)
    torch.manual_seed(0)
    with torch.no_grad():
        y = (of or f)(x).argmax(1) if y is None else y
    bare = Sample(f, x, y, torch.ones(n) > 0, attack, 0.0)
    zero = zero_share(f, x, y, bare.way["bpda"])
    return dataclasses.replace(bare, stood=stands(f, bare, attack), zero=zero, **facts)


def findings(*arguments, **facts):
    return {each["name"]: each for each in check(sample(*arguments, **facts))}


def alarms(found):
    return {name for name, each in found.items() if each["alarm"]}


# --- honest models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [linear, conv], ids=["linear", "conv"])
@pytest.mark.parametrize("attack", [PGD(EPS, 20), PGD(0.25, 20, norm="l2")], ids=["linf", "l2"])
def test_an_honest_model_raises_no_alarm(f, attack):
    found = findings(f, attack, exact=f, fresh=f, source=linear if f is conv else conv)
    assert alarms(found) == set()
    assert list(found) == ["random", "stale", *NAMES[1:4], "precision", *NAMES[4:], "transfer"]
    stood = sample(f, attack).stood
    assert 0.2 < float(stood.float().mean()) < 0.8  # the attack neither breaks all nor nothing


def test_what_does_not_apply_is_left_out():
    assert list(findings(linear)) == NAMES
    assert list(findings(linear, Square(EPS, 50))) == NAMES[:-1]
    crossed = Transfer(PGD(EPS), conv)
    assert "transfer" not in findings(linear, crossed, source=conv)
    assert check(sample(linear, PGD(0.0))) == []
    assert check(sample(linear, n=0, y=torch.zeros(0, dtype=torch.long))) == []


@pytest.mark.parametrize("f", [linear, lambda x: linear(coarse(x)), lambda x: 1e4 * linear(x)], ids=["sane", "a", "b"])
def test_findings_are_data(f):
    found = check(sample(f, exact=linear, fresh=linear, source=linear))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert len(found) == len(CHECKS)
    for each in found:
        assert list(each) == [field.name for field in dataclasses.fields(Finding)]
        assert [type(value) for value in each.values()] == [str, bool, float, float, int, str]
        assert each["n"] == N
        assert not each["text"].endswith(".")
        if each["name"] not in ("noise", "outputs"):  # a count beside a count, and a range
            assert each["alarm"] == (each["value"] > each["limit"])
        if each["name"] in ("zero-gradient", "batch-size", "large-eps", "gap"):
            assert f"{100 * each['value']:.1f}" in each["text"]
        assert each["alarm"] == (";" in each["text"] or ": " in each["text"])  # an alarm says what it means


def test_checks_leave_the_model_alone():
    """No check changes the images, or the labels, of the sample."""
    s = sample(linear, exact=linear, fresh=linear, source=conv)
    before = s.x.clone(), s.y.clone(), s.stood.clone()
    one, two = check(s), check(s)
    assert one == two
    assert all(torch.equal(*pair) for pair in zip(before, (s.x, s.y, s.stood), strict=True))


# --- masked gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [lambda x: linear(coarse(x)), straight], ids=["round", "no grad"])
def test_a_model_without_a_gradient(f):
    found = findings(f, source=linear)
    assert alarms(found) == {"zero-gradient", "noise", "large-eps", "black-box", "transfer"}
    assert found["zero-gradient"]["value"] == 1
    assert "100.0 % of the input gradients are exactly zero" in found["zero-gradient"]["text"]
    noise = found["noise"]
    fell, by_pgd = round(noise["value"] * N), round(noise["limit"] * N)
    assert by_pgd <= fell > 0
    assert f"ten draws of noise break {fell} images of {N}, PGD-20 {by_pgd};" in noise["text"]
    assert found["large-eps"]["value"] > 0.2
    assert "stand at eps 64/255;" in found["large-eps"]["text"]
    assert found["transfer"]["value"] > found["black-box"]["value"] > 0.02


def test_a_saturated_softmax():
    """Logits so great that the cross-entropy's gradient underflows: DLR, which has no scale, finds the way."""
    found = findings(lambda x: 1e4 * linear(x))
    assert {"zero-gradient", "large-eps", "gap", "black-box"} <= alarms(found)
    assert found["gap"]["value"] > 0.4
    assert "% of the sample that pgd left standing; pgd numbers of this model are too high" in found["gap"]["text"]


def test_the_gap_beside_an_ensemble():
    """What AutoAttack broke and PGD-20 did not."""
    masked = sample(lambda x: 1e4 * linear(x))
    truth = sample(linear).stood
    for f, alarm in ((masked.f, True), (linear, False)):
        s = dataclasses.replace(masked, f=f, attack=AutoAttack(EPS), stood=truth, zero=0.0, fell_blind=0, total=500)
        found = {each["name"]: each for each in check(s)}
        assert found["gap"]["alarm"] is alarm
        missed = int((stands(f, s, PGD(EPS, 20)) & ~truth).sum())
        assert found["gap"]["value"] == missed / N
        assert (
            f"PGD-20 leaves {100 * missed / N:.1f} % of the sample standing that AutoAttack breaks"
            in found["gap"]["text"]
        )
        assert ("PGD numbers of this model are too high" in found["gap"]["text"]) == alarm


def test_the_ensembles_own_black_box_stage_counts():
    """Of the whole set, not of the sample; without such a stage the check attacks by itself."""
    for fell, alarm in ((0, False), (10, False), (11, True)):
        found = findings(linear, fell_blind=fell, total=500)["black-box"]
        assert (found["alarm"], found["value"], found["n"]) == (alarm, fell / 500, 500)
        assert f"breaks {fell} of 500 images that withstood gradients" in found["text"]
        assert ("masked" in found["text"]) == alarm


def test_a_step_without_a_gradient_is_attacked_through_its_stand_in():
    """The checks' own attacks are not blinder than the attack that they judge."""
    f = Defended(coarse, linear)
    assert {"zero-gradient", "large-eps", "black-box"} <= alarms(findings(f, PGD(8 / 255, 20)))
    through = PGD(8 / 255, 20, bpda=True)
    found = findings(f, through, exact=f, fresh=f, source=Defended(coarse, conv))
    assert alarms(found) == set()
    assert alarms(findings(f, Transfer(through, f))) <= {"gap"}


def test_noise_that_breaks_everything_like_pgd_is_no_alarm():
    s = sample(linear, PGD(0.3, 20))
    fell = ~stands(linear, s, Noise(0.3))
    assert 0 < int(fell.sum()) < N
    some = dataclasses.replace(s, x=s.x[fell], y=s.y[fell], stood=s.stood[fell])
    (found,) = [each for each in check(some) if each["name"] == "noise"]
    assert (found["value"], found["limit"], found["alarm"]) == (1, 1, False)


def test_a_large_eps_is_one_of_the_norm():
    for attack, radius in ((PGD(EPS, 20), "64/255"), (PGD(0.25, 20, norm="l2"), "3.48 in l2")):  # 64/255 sqrt(192)
        found = findings(lambda x: linear(coarse(x)), attack)["large-eps"]
        assert f"{100 * found['value']:.1f} % stand at eps {radius}; " in found["text"]


# --- answers that are not what they seem --------------------------------------------------------------------


def test_a_random_model():
    def f(x):
        return linear(x) + 0.3 * torch.randn(len(x), 5)

    found = findings(f, of=linear)
    assert "random" in alarms(found)
    assert "version=rand" in found["random"]["text"]
    assert not {"random"} & alarms(findings(f, PGD(EPS, 5, eot=2), of=linear))
    assert not {"random"} & alarms(findings(f, Transfer(PGD(EPS, 5, eot=2), f), of=linear))
    rand = dataclasses.replace(sample(f, PGD(EPS, 5), of=linear), attack=AutoAttack(EPS, version="rand"))
    assert not [each for each in check(rand) if each["name"] == "random" and each["alarm"]]
    standard = dataclasses.replace(rand, attack=AutoAttack(EPS))
    assert [each for each in check(standard) if each["name"] == "random" and each["alarm"]]


def test_what_asks_twice_is_not_asked_of_a_random_model():
    """Its answers differ by themselves: neither its batch, nor bf16, nor a stale prompt is to blame."""

    def f(x):
        return linear(x) + torch.randn(len(x), 5)

    found = findings(f, PGD(EPS, 5, eot=2), of=linear, exact=f, fresh=f)
    assert not {"stale", "batch-size", "precision"} & set(found)
    assert {"noise", "large-eps", "gap", "black-box"} <= set(found)


def test_the_checks_attacks_average_as_the_attack_does():
    calls = []

    def f(x):
        calls.append(len(x))
        return linear(x)

    s = sample(f, PGD(EPS, 5, eot=3))
    calls.clear()
    s.pgd(7)(f, s.x[:1], s.y[:1])
    once = len(calls)
    assert once % 3 == 0 and once > 3
    assert s.pgd(7, 0.5).eps == 0.5 and s.pgd(7).eps == EPS


@pytest.mark.parametrize(
    ("f", "what"),
    [
        (lambda x: linear(x).softmax(1), "probabilities"),
        (lambda x: torch.nn.functional.normalize(linear(x), dim=1), "cosines without a logit scale"),
    ],
    ids=["softmax", "cosines"],
)
def test_outputs_that_are_not_logits(f, what):
    found = findings(f)
    assert "outputs" in alarms(found)
    assert f"they look like {what}; attack the logits" in found["outputs"]["text"]
    assert f"outputs reach {found['outputs']['value']:.3g} in size" in found["outputs"]["text"]
    scaled = findings(lambda x: 20 * f(x))
    assert "outputs" not in alarms(scaled)


def test_a_stale_prompt(vlm, task):
    """Prompts that go on learning after the classifier was made: it is attacked as it was."""
    model = vlm.with_prompts("a photo of a {}.", text=4, image=4, depth=2)
    tokens = model.tokens(task.classes, task.template)
    with torch.no_grad():
        f = model.classifier(tokens)
    x = images(8, 16)
    with torch.no_grad():
        y = f(x).argmax(1)
    s = Sample(f, x, y, torch.ones(8) > 0, PGD(EPS, 2), 0.0)

    def stale():
        with torch.no_grad():
            return next(each for each in check(dataclasses.replace(s, fresh=model.classifier(tokens))) if
                        each["name"] == "stale")  # fmt: skip

    before = stale()
    assert (before["alarm"], before["value"]) == (False, 0)
    with torch.no_grad():
        for parameter in model.prompts.parameters():
            parameter.add_(torch.randn_like(parameter))
    after = stale()
    assert after["alarm"]
    assert f"differ by {after['value']:.2g} of the logits, " in after["text"]
    assert "; its prompts or weights changed" in after["text"]


def test_a_model_that_looks_at_the_whole_batch():
    def f(x):
        z = linear(x)
        return (z - z.mean(0)) / (z.std(0, unbiased=False) + 0.1)

    found = findings(f)
    assert "batch-size" in alarms(found)
    text = found["batch-size"]["text"]
    assert f"in batches of 7 changes {100 * found['batch-size']['value']:.1f} % of the answers" in text
    assert "robust accuracy depends on the batch" in text


def test_a_low_precision_that_hides_what_is_there():
    def low(x):
        return (linear(x) * 4).round() / 4

    found = findings(low, PGD(EPS, 20), exact=linear)
    assert "precision" in alarms(found)
    both = [float(stands(f, sample(low), PGD(EPS, 10)).float().mean()) for f in (low, linear)]
    assert found["precision"]["value"] == pytest.approx(both[0] - both[1])
    assert f"{100 * both[0]:.1f} % standing in bf16 and {100 * both[1]:.1f} % in fp32;" in found["precision"]["text"]
    assert "precision" not in alarms(findings(linear, exact=lambda x: linear(x.bfloat16().float())))
    assert "precision" not in alarms(findings(linear, exact=low))  # stronger than fp32 is no masking


def test_an_attack_that_is_weak_where_the_model_is_sane():
    """The alarm is of the attack: one step of little length."""
    found = findings(linear, PGD(8 / 255, 1, step_size=1e-4, random_start=False))
    assert alarms(found) == {"gap", "black-box"}
    assert alarms(findings(linear, APGD(8 / 255, 30))) == set()


def test_one_image_is_no_finding_and_three_are():
    """Of few images one is a large share: an alarm takes a count, too."""
    for fell, alarm in ((1, False), (2, False), (3, True)):
        assert findings(linear, fell_blind=fell, total=20)["black-box"]["alarm"] == alarm


def test_a_model_that_no_longer_answers_as_before_is_stale():
    """Weights that change under the attacked function: f and the model still agree, but not with what was scored."""
    found = findings(lambda x: linear(x).roll(1, 1), of=linear, fresh=lambda x: linear(x).roll(1, 1))["stale"]
    assert found["value"] == 0
    assert found["alarm"]
    assert f"{N} answers changed" in found["text"]


def test_a_check_that_fails_is_an_alarm_and_loses_nothing():
    """The evaluation that it would judge is done: no error of a check may throw it away."""

    def full(x):
        raise torch.OutOfMemoryError("out of memory")

    found = findings(linear, exact=full)
    assert found["precision"]["alarm"]
    assert "could not be made: out of memory" in found["precision"]["text"]
    assert len(found) > 8


def test_the_checks_keep_to_the_batch_size():
    """A batch size chosen for want of memory holds for the checks as well."""
    seen = []

    def f(x):
        seen.append(len(x))
        return linear(x)

    check(dataclasses.replace(sample(linear), f=f, size=5))
    assert max(seen) == SMALL_BATCH
