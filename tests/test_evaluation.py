"""What is scored is what was attacked; a row says all that a table needs."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

import advtune
from advtune import evaluation, train, withstand
from advtune.attacks import APGD, FGSM, PGD, AutoAttack, Noise, Square, Transfer
from advtune.checks import zero_share
from advtune.defences import jpeg, noise
from advtune.results import Row
from advtune.withstand import check_budget
from conftest import write_clip, write_images

ATTACK = PGD(eps=4 / 255, steps=4)


@pytest.fixture
def tuned(vlm, task, tmp_path):
    return train.tune(
        "tecoa", vlm, task, epochs=30, options={"lr": 0.05, "warmup": 0, "batch_size": 6}, attack={"eps": "4/255"},
        out=tmp_path / "run", show=False,
    )  # fmt: skip


def test_tuning_works(vlm, tuned, task):
    """On colours with noise, adversarial tuning learns; zero-shot with random weights does not know."""
    before = evaluation.evaluate(vlm, task, ATTACK, show=False)
    after = evaluation.evaluate(tuned, task, ATTACK, show=False)
    assert after.robust["accuracy"] > before.robust["accuracy"] + 0.3
    broken = evaluation.evaluate(tuned, task, PGD(eps=64 / 255, steps=9), show=False)
    assert broken.robust["accuracy"] < after.robust["accuracy"] - 0.3


def test_the_row_is_complete(tuned, task):
    row = evaluation.evaluate(tuned, task, ATTACK, limit=10, show=False)
    assert row.data["n"] == row.clean["n"] == row.robust["n"] == len(row.flags["clean"]) == 10
    assert row.flags["robust"].count("1") == row.robust["correct"]
    assert all(c == "1" for c, r in zip(row.flags["clean"], row.flags["robust"], strict=True) if r == "1")
    assert row.attack == {
        "name": "pgd", "eps": 4 / 255, "steps": 4, "step_size": 2 / 255, "restarts": 1, "random_start": True,
        "keep": "best", "early_stop": True, "norm": "linf", "loss": "ce", "eot": 1, "bpda": False, "seed": 0,
    }  # fmt: skip
    assert row.train["attack"]["eps"] == 4 / 255
    assert (row.train["seed"], row.train["shots"], row.train["part"]) == (0, None, "train")
    assert (row.data["part"], row.data["resolution"], row.data["template"]) == (
        "test",
        16,
        "a photo of a {}.",
    )
    assert row.threat.startswith("white-box")
    assert row.recipe["epochs"] == 30
    assert len(row.backbone["sha256"]) == len(row.data["sha256"]) == 64
    assert row.zero_gradient["n"] == 10
    assert Row.from_json(row.to_json()) == row
    clean = evaluation.evaluate(tuned, task, show=False)
    assert (clean.robust, clean.attack, clean.threat) == (None, None, "")


def test_independent_of_the_batch_size(tuned, task):
    still = PGD(eps=4 / 255, steps=6, random_start=False)
    rows = [evaluation.evaluate(tuned, task, still, batch_size=size, show=False) for size in (1, 5, 64)]
    assert rows[0].flags == rows[1].flags == rows[2].flags


def test_bf16_agrees_with_fp32(tuned, task):
    rows = {}
    for precision in ("fp32", "bf16"):
        tuned.precision = precision
        rows[precision] = evaluation.evaluate(tuned, task, ATTACK, part="all", show=False)
    assert rows["bf16"].precision == "bf16"
    for kind in ("clean", "robust"):
        one, two = (getattr(rows[p], kind) for p in ("fp32", "bf16"))
        assert abs(one["correct"] - two["correct"]) <= 2


def test_cross_dataset_takes_the_other_sets_words(tuned, tmp_path):
    other = write_images(tmp_path / "other", classes=("crimson", "azure"))
    row = evaluation.evaluate(tuned, f"folder:{other}", show=False)
    assert (row.data["classes"], row.train["classes"]) == (2, 3)
    assert row.data["name"] != row.train["name"]


def test_evaluating_on_the_training_images_is_noted(tuned, task):
    assert evaluation.evaluate(tuned, task, show=False).notes == []
    for part, note in (("train", "18 of the 18 images were tuned on"), ("all", "18 of the 30 images were tuned on")):
        assert note in evaluation.evaluate(tuned, task, part=part, show=False).notes
    val = evaluation.evaluate(tuned, task, part="val", show=False)
    assert f"{val.data['n']} of the {val.data['n']} images were tuned on" in val.notes


def test_a_run_keeps_its_words_on_its_own_data(vlm, image_folder):
    spec = f"folder:{image_folder}"
    own = advtune.load_task(spec, classes="sapphire,emerald,ruby", template="art of {}")
    model = train.tune("capt", vlm, own, shots=1, epochs=1, show=False)
    same = evaluation.task_for(model, spec)
    assert (same.classes, same.template) == (own.classes, own.template)
    assert evaluation.task_for(model, spec, template="a {}").template == "a {}"
    assert evaluation.task_for(vlm, spec).template == "a photo of a {}."
    model.run["train"]["source_classes"] = ["cat", "dog", "owl"]  # the folder has other classes by now
    assert evaluation.task_for(model, spec).classes == ("blue", "green", "red")


def test_a_run_on_the_base_classes_keeps_its_words_on_the_new_ones(vlm, tmp_path):
    spec = f"folder:{write_images(tmp_path / 'set', classes=('ant', 'bee', 'cat', 'dog', 'elk'))}"
    own = advtune.load_task(spec, classes={"bee": "wasp", "elk": "moose"}, template="art of {}", subset="base")
    assert (own.classes, own.parts["test"].labels) == (("ant", "wasp", "cat"), [0] * 4 + [1] * 4 + [2] * 4)
    model = train.tune("capt", vlm, own, shots=1, epochs=1, show=False)
    new = evaluation.task_for(model, spec, subset="new")
    assert (new.classes, new.template, new.subset) == (("dog", "moose"), "art of {}", "new")
    assert evaluation.task_for(model, spec).classes == ("ant", "wasp", "cat", "dog", "moose")
    assert evaluation.task_for(model, spec, template="a {}", subset="new").template == "a {}"
    row = evaluation.evaluate(model, new, show=False)
    assert (row.data["subset"], row.data["classes"], row.clean["n"]) == ("new", 2, 8)
    assert (row.train["subset"], row.train["classes"], row.train["n"]) == ("base", 3, 3)
    assert row.data["split"] == row.train["split"] == "as given"
    assert "all_classes" not in row.train


def test_a_diverged_model_is_not_scored(vlm, task):
    broken = vlm.with_image_tower()
    with torch.no_grad():
        broken.clip.image.position.fill_(torch.nan)
    with pytest.raises(advtune.UserError, match="not finite"):
        evaluation.evaluate(broken, task, ATTACK, show=False)


def test_what_is_not_told_from_guessing_is_said_of_tuned_models(vlm, tuned, task, monkeypatch):
    assert not any("guess" in note for note in evaluation.evaluate(tuned, task, ATTACK, show=False).notes)
    y = torch.tensor(task.parts["test"].labels)
    monkeypatch.setattr(evaluation, "predict", lambda s: torch.zeros_like(s.images.y))
    said = evaluation.evaluate(tuned, task, show=False).notes[-1]
    told = f"clean accuracy is not told from a guess among {len(task.classes)} classes by {len(y)} images"
    assert said.startswith(told) and said.endswith("tune with a smaller lr")
    assert told == evaluation.evaluate(tuned, replace(task, name="other"), show=False).notes[-1]
    assert not any("guess" in note for note in evaluation.evaluate(vlm, task, show=False).notes), "it was not tuned"


def test_an_attack_that_leaves_its_budget_is_not_scored(vlm, task):
    class Cheat:
        name, norm, eps = "cheat", "linf", 1 / 255

        def __call__(self, f, x, y, loss=None):
            return (x + 2 / 255).clamp(0, 1)

    class Bright(Cheat):
        def __call__(self, f, x, y, loss=None):
            return x + 1 / 255

    class Lost(Cheat):
        def __call__(self, f, x, y, loss=None):
            return x * torch.nan

    dark, light = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    for cheat, x in ((Cheat(), dark), (Bright(), light), (Lost(), light)):
        with pytest.raises(RuntimeError, match="left its budget"):
            check_budget(x, cheat(None, x, None), cheat)


def test_blind_gradients_are_counted():
    x, y = torch.rand(8, 3, 16, 16), torch.arange(8) % 3
    assert zero_share(lambda x: (x.sum((2, 3)) * 0).round() + x.mean((2, 3)).round(), x, y) == 1
    assert zero_share(lambda x: x.square().mean((2, 3)), x, y) < 0.1


def test_evaluation_leaves_the_generator_alone(vlm, task):
    state = torch.random.get_rng_state()
    one = evaluation.evaluate(vlm, task, ATTACK, show=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert evaluation.evaluate(vlm, task, ATTACK, show=False).flags == one.flags


def test_rows_are_json_on_one_line(vlm, task):
    text = evaluation.evaluate(vlm, task, show=False).to_json()
    assert "\n" not in text
    assert json.loads(text)["method"] == "zero-shot"


# --- robust accuracy over eps -------------------------------------------------------------------------------


@pytest.fixture
def attacked(monkeypatch):
    """(eps, rows) of every batch that was attacked."""
    real, seen = withstand.attacked, []

    def note(f, images, rows, attack, device):
        seen.append((attack.eps, rows.tolist()))
        return real(f, images, rows, attack, device)

    monkeypatch.setattr(withstand, "attacked", note)
    return seen


def standing(flags):
    return {i for i, flag in enumerate(flags) if flag == "1"}


def test_a_curve_falls_and_attacks_nobody_twice(vlm, task, attacked):
    eps = (4 / 255, 0, 8 / 255, 2 / 255)
    rows = advtune.evaluate_curve(vlm, task, PGD(steps=4), eps, part="all", batch_size=4, show=False)
    assert [row.attack["eps"] for row in rows] == sorted(eps)
    assert rows[0].flags["robust"] == rows[0].flags["clean"] == rows[-1].flags["clean"]
    for small, large in itertools.pairwise(rows):
        assert standing(large.flags["robust"]) <= standing(small.flags["robust"])
        met = [row for budget, some in attacked if budget == large.attack["eps"] for row in some]
        assert met == sorted(standing(small.flags["robust"]))
        assert large.stages[0]["attacked"] == len(met)
        assert large.stages[0]["fell"] == len(met) - large.robust["correct"]
    assert rows[-1].robust["correct"] < rows[1].robust["correct"]
    note = "images that fell at a smaller eps were not attacked again"
    assert [note in row.notes for row in rows] == [False, True, True, True]
    assert all(Row.from_json(row.to_json()) == row for row in rows)
    single = evaluation.evaluate(vlm, task, PGD(eps=2 / 255, steps=4), part="all", batch_size=4, show=False)
    assert single.flags == rows[1].flags
    assert single.notes == []


def test_a_curve_of_an_ensemble_in_another_norm(vlm, task, short_square, attacked):
    rows = advtune.evaluate_curve(vlm, task, AutoAttack(0.5, norm="l2"), (0.5, 0.1), show=False, checks=False)
    assert [[stage["attack"] for stage in row.stages] for row in rows] == [["apgd-ce", "apgd-t", "fab-t", "square"]] * 2
    assert [{each["eps"] for each in row.attack["stages"]} for row in rows] == [{0.1}, {0.5}]
    assert {each["norm"] for row in rows for each in row.attack["stages"]} == {"l2"}
    assert standing(rows[1].flags["after apgd-ce"]) <= standing(rows[0].flags["robust"])
    assert standing(rows[1].flags["robust"]) < standing(rows[0].flags["clean"])


@pytest.mark.parametrize(
    ("eps", "said"),
    [
        ((1 / 255, 2 / 255, 1 / 255), "different values"), ((), "different values"), ((0, 4), "4/255"),
        ((-1 / 255, 0), "too low"), ((float("nan"),), "eps"),
    ],
)  # fmt: skip
def test_a_curve_that_means_nothing_is_refused(eps, said, vlm, task):
    with pytest.raises(advtune.UserError, match=said):
        advtune.evaluate_curve(vlm, task, PGD(), eps, show=False)


# --- what is not the white box ------------------------------------------------------------------------------


@pytest.fixture
def other(vlm):
    """Another model: the same towers, less alike than a tuned one is."""
    model = vlm.with_image_tower().requires_grad_(False)
    with torch.no_grad():
        model.clip.image.position.mul_(1.5)
    model.origin, model.learned = replace(model.origin, name="the other", sha256="other"), ()
    return model


def test_transfer_scores_the_images_of_another_model(vlm, other, task):
    attack = PGD(eps=6 / 255, steps=4)
    row = evaluation.evaluate(vlm, task, attack, part="all", source=other, show=False)
    assert row.threat == "transfer: images made on the other, scored on this model"
    assert (row.attack["name"], row.attack["eps"]) == ("pgd", 6 / 255)
    assert [stage["attack"] for stage in row.stages] == ["transfer"]
    assert row.flags["after transfer"] == row.flags["robust"]
    images = evaluation.load_images(task, evaluation.Split(part="all", resolution=16), progress=False)
    f, source = (model.classifier(model.tokens(task.classes, task.template)) for model in (vlm, other))
    right = torch.tensor([flag == "1" for flag in row.flags["clean"]])
    x, y = images.x[right].float() / 255, images.y[right]
    torch.manual_seed(0)
    x_adv = replace(attack, early_stop=False)(source, x, y)
    assert row.flags["robust"].count("1") == int((f(x_adv).argmax(1) == y).sum())
    white = evaluation.evaluate(vlm, task, attack, part="all", show=False)
    own = evaluation.evaluate(vlm, task, attack, part="all", source=vlm, show=False)
    assert white.robust["correct"] <= own.robust["correct"] < row.robust["correct"] < row.clean["correct"]


def test_a_source_may_be_named(vlm, task, clip_folder):
    one = evaluation.evaluate(vlm, task, ATTACK, source=str(clip_folder), limit=6, show=False)
    two = evaluation.evaluate(vlm, task, ATTACK, source=vlm, limit=6, show=False)
    assert one.flags == two.flags
    assert f"images made on {clip_folder}" in one.threat
    with pytest.raises(advtune.UserError, match="nowhere"):
        evaluation.evaluate(vlm, task, ATTACK, source="./nowhere", show=False)


def test_a_defence_is_named_and_attacked_through(vlm, other, task):
    open_, behind = "white-box: the attacked function is the scored one", "behind the defence jpeg"
    attack = replace(ATTACK, eps=16 / 255, steps=8)
    blind = evaluation.evaluate(vlm, task, attack, part="all", defence=jpeg, show=False)
    assert blind.threat == f"{open_}, {behind}, with its own gradient"
    assert blind.zero_gradient["share"] == 1
    through = replace(attack, bpda=True)
    seen = evaluation.evaluate(vlm, task, through, part="all", defence=jpeg, show=False)
    assert seen.threat == f"{open_}, {behind}, its gradient replaced (BPDA)"
    assert seen.zero_gradient["share"] < 0.1
    assert seen.attack["bpda"] is True
    assert seen.robust["correct"] < blind.robust["correct"]
    crossed = evaluation.evaluate(vlm, task, ATTACK, defence=jpeg, source=other, limit=6, show=False)
    assert crossed.threat == (
        f"transfer: images made on the other, scored on this model, {behind}, with its own gradient"
    )
    clean = evaluation.evaluate(vlm, task, defence=jpeg, part="all", show=False)
    assert (clean.threat, clean.robust) == (behind, None)
    assert clean.flags["clean"] == seen.flags["clean"]


def test_a_defence_of_ones_own(vlm, task):
    def swap(x):
        """Red for blue."""
        return x.flip(1)

    row = evaluation.evaluate(vlm, task, ATTACK, part="all", defence=swap, show=False)
    assert "behind the defence swap, with its own gradient" in row.threat
    assert row.zero_gradient["share"] < 0.1
    assert row.flags["clean"] != evaluation.evaluate(vlm, task, part="all", show=False).flags["clean"]


def test_a_stand_in_without_a_step_is_refused_before_anything_is_read(task):
    with pytest.raises(advtune.UserError, match="name the step with --defence"):
        evaluation.evaluate("no such model", task, PGD(bpda=True), show=False)
    with pytest.raises(advtune.UserError, match="name the step with --defence"):
        advtune.evaluate_curve("no such model", task, APGD(bpda=True), (1 / 255, 2 / 255), show=False)


def test_a_random_defence_is_drawn_from_the_seed_alone(vlm, task):
    """The same numbers whatever was drawn before, and the caller's generator is left where it was."""

    def storm(x):
        return x + torch.randn_like(x)

    def row(seed=0, defence=storm):
        attack = PGD(8 / 255, 2, eot=2)
        return evaluation.evaluate(vlm, task, attack, part="all", defence=defence, seed=seed, show=False)

    one = row()
    torch.rand(5)
    state = torch.random.get_rng_state()
    assert (row().flags, row().zero_gradient) == (one.flags, one.zero_gradient)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert row(seed=1).flags["clean"] != one.flags["clean"]
    assert "behind the defence noise" in row(defence=noise).threat


# --- checks and stages --------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Checks of four images and without the large embedded model, to save time."""
    monkeypatch.setattr(evaluation, "IMAGES", 4)
    monkeypatch.setattr(evaluation, "other_model", lambda s: s.model)


CHECKED = [
    "random", "stale", "outputs", "zero-gradient", "batch-size", "noise", "large-eps", "gap", "black-box", "transfer",
]  # fmt: skip


def test_checks_are_in_the_row_when_asked_for(vlm, task, short_square, few):
    def names(attack, **how):
        row = evaluation.evaluate(vlm, task, attack, show=False, **how)
        assert Row.from_json(row.to_json()) == row
        return [finding["name"] for finding in row.checks]

    assert names(ATTACK) == names(ATTACK, checks=False) == []
    assert names(ATTACK, checks=True) == CHECKED
    assert names(AutoAttack(20 / 255)) == CHECKED
    assert names(AutoAttack(20 / 255), checks=False) == []
    assert names(PGD(0.0), checks=True) == []
    assert names(None, checks=True) == []


def test_a_curve_is_checked_at_every_radius(vlm, task, few):
    rows = advtune.evaluate_curve(vlm, task, FGSM(), (0, 1 / 255, 4 / 255), checks=True, show=False)
    assert [bool(row.checks) for row in rows] == [False, True, True]


def test_checks_do_not_change_the_numbers(vlm, task, few):
    one, two = (evaluation.evaluate(vlm, task, ATTACK, checks=on, show=False) for on in (True, False))
    assert one.flags == two.flags
    state = torch.random.get_rng_state()
    again = evaluation.evaluate(vlm, task, ATTACK, checks=True, show=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.checks == one.checks


def test_bf16_is_checked_beside_fp32(vlm, task, few):
    vlm.precision = "bf16"
    for how in (dict(), dict(defence=jpeg, attack=replace(ATTACK, bpda=True))):
        row = evaluation.evaluate(vlm, task, **({"attack": ATTACK, "checks": True, "limit": 6, "show": False} | how))
        found = {finding["name"]: finding for finding in row.checks}
        assert "in bf16 and" in found["precision"]["text"]
        assert not found["precision"]["alarm"]
        assert vlm.precision == row.precision == "bf16"


def test_masking_is_noticed_from_end_to_end(vlm, task, few):
    """JPEG without a stand-in: what seems robust is only unseen, and the row says so; with it, it is not."""
    blind = evaluation.evaluate(vlm, task, PGD(8 / 255, 8), part="all", defence=jpeg, checks=True, show=False)
    alarms = {finding["name"] for finding in blind.checks if finding["alarm"]}
    assert {"zero-gradient", "large-eps"} <= alarms
    through = PGD(8 / 255, 8, bpda=True)
    seen = evaluation.evaluate(vlm, task, through, part="all", defence=jpeg, checks=True, show=False)
    alarms = {finding["name"] for finding in seen.checks if finding["alarm"]}
    assert not {"zero-gradient", "large-eps", "noise", "random", "stale", "batch-size"} & alarms


def test_prompts_that_change_under_the_attack_are_noticed(vlm, task, few):
    model = vlm.with_prompts("a photo of a {}.", text=4, image=4, depth=2)

    class Meddling(Noise):
        def __call__(self, f, x, y, loss=None):
            with torch.no_grad():
                for parameter in model.prompts.parameters():
                    parameter.add_(torch.randn_like(parameter))
            return x

    row = evaluation.evaluate(model, task, Meddling(4 / 255), part="all", checks=True, show=False)
    assert {finding["name"]: finding["alarm"] for finding in row.checks}["stale"]


def test_the_checks_look_at_right_images_across_the_set(vlm, task, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation, "check", lambda sample, advance: seen.append(sample) or [])
    monkeypatch.setattr(evaluation, "IMAGES", 5)
    row = evaluation.evaluate(vlm, task, PGD(6 / 255, 4), part="all", checks=True, show=False)
    right = sorted(standing(row.flags["clean"]))
    assert len(right) > 8
    (s,) = seen
    chosen = [right[round(i * (len(right) - 1) / 4)] for i in range(5)]
    assert s.stood.tolist() == [row.flags["robust"][i] == "1" for i in chosen]
    with torch.no_grad():
        assert torch.equal(s.f(s.x).argmax(1), s.y)
    assert (s.n, s.total, s.fell_blind, s.zero) == (5, len(right), None, row.zero_gradient["share"])
    assert s.zero_n == row.zero_gradient["n"]
    images = evaluation.load_images(task, evaluation.Split(part="all", resolution=16), progress=False)
    assert torch.equal(s.x, images.x[chosen].float() / 255)


def test_only_an_ensembles_last_stage_is_its_black_box(vlm, task, short_square, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation, "check", lambda sample, advance: seen.append(sample.fell_blind) or [])
    row = evaluation.evaluate(vlm, task, AutoAttack(8 / 255), checks=True, show=False)
    evaluation.evaluate(vlm, task, Square(8 / 255, 5), checks=True, show=False)
    evaluation.evaluate(vlm, task, AutoAttack(0.0, version="rand"), checks=True, show=False)
    assert seen == [row.stages[-1]["fell"], None, None]


def test_the_model_to_transfer_from(vlm, tuned, task, tmp_path, clip_folder):
    def other(model, **how):
        images = evaluation.load_images(task, evaluation.Split(limit=2, resolution=16), progress=False)
        s = evaluation.Setting(model, task, evaluation.Split(), images, lambda x: x, 2, 0, False, **how)
        return evaluation.other_model(s)

    backbone = other(tuned)
    assert backbone.origin.sha256 == vlm.origin.sha256 != tuned.origin.sha256
    assert other(vlm).origin.name == "mini"
    assert other(advtune.load("mini", device="cpu")) is None
    assert other(tuned, source=vlm) is None
    tuned.run["backbone"]["path"] = "../gone"
    assert other(tuned) is None


def test_the_stages_of_an_ensemble_are_in_the_row(vlm, task, short_square):
    row = evaluation.evaluate(vlm, task, AutoAttack(6 / 255), part="all", checks=False, show=False)
    names = ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert [stage["attack"] for stage in row.stages] == [each["name"] for each in row.attack["stages"]] == names
    assert list(row.flags) == ["clean", *(f"after {name}" for name in names), "robust"]
    before = row.flags["clean"]
    for stage, name in zip(row.stages, names, strict=True):
        after = row.flags[f"after {name}"]
        assert standing(after) <= standing(before)
        assert stage["attacked"] == before.count("1")
        assert stage["fell"] == before.count("1") - after.count("1")
        assert stage["seconds"] >= 0
        before = after
    assert before == row.flags["robust"]
    assert row.stages[0]["fell"] > 0 and row.stages[1]["attacked"] > 0
    assert Row.from_json(row.to_json()) == row


@pytest.mark.parametrize(("classes", "least"), [(("one", "two"), 2), (("one", "two", "three"), 3)])
def test_what_few_classes_change_is_noted(classes, least, vlm, tmp_path):
    data = f"folder:{write_images(tmp_path / 'few', classes=classes)}"

    def notes(attack):
        return evaluation.evaluate(vlm, data, attack, limit=2, checks=False, show=False).notes

    targets = f"{least - 1} targets, all the wrong classes there are, not 9"
    margin = f"with {least} classes the margin stands in for DLR"
    assert notes(AutoAttack(0.0)) == [f"apgd-t: {margin}", f"apgd-t: {targets}", f"fab-t: {targets}"]
    assert notes(APGD(steps=1, loss="dlr")) == ([f"apgd-dlr: {margin}"] if least == 2 else [])
    assert notes(PGD(steps=1)) == notes(APGD(steps=1)) == notes(Square(queries=1)) == []


def test_the_attack_of_a_row_can_be_built_again():
    """All fields of the attack are in the row, and the stages' too: nothing of an ensemble is left to a default."""
    facts = evaluation.attack_facts(AutoAttack(2 / 255))
    assert facts["stages"][1]["loss"] == "dlr-targeted" and facts["stages"][3]["queries"] == 5000
    assert {each["eps"] for each in facts["stages"]} == {2 / 255}
    inner = Transfer(PGD(eps=2 / 255, steps=3), lambda x: x)
    assert evaluation.attack_facts(inner) == evaluation.attack_facts(inner.attack) | {"early_stop": False}
    assert evaluation.attack_facts(inner)["step_size"] == inner.attack.step


def test_no_transfer_from_a_model_that_cannot_read_the_class_texts(tmp_path, task):
    write_clip(tmp_path / "long", text={"max_position_embeddings": 300})
    vlm = advtune.load(str(tmp_path / "long"), device="cpu")
    wordy = replace(task, classes=(*task.classes[:-1], "x" * 200))
    images = evaluation.load_images(task, evaluation.Split(limit=2, resolution=16), progress=False)
    s = evaluation.Setting(vlm, wordy, evaluation.Split(), images, 2, 0, False, "")
    assert evaluation.other_model(s) is None
