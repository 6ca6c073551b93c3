"""What is scored is what was attacked; a row says all that a table needs."""

import json

import pytest
import torch

import advtune
from advtune import evaluation, train
from advtune.attacks import PGD
from advtune.checks import zero_share
from advtune.results import Row
from advtune.withstand import check_budget

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
    from conftest import write_images

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


def test_a_diverged_model_is_not_scored(vlm, task):
    broken = vlm.with_image_tower()
    with torch.no_grad():
        broken.clip.image.position.fill_(torch.nan)
    with pytest.raises(advtune.UserError, match="not finite"):
        evaluation.evaluate(broken, task, ATTACK, show=False)


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
