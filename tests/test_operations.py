"""Operations counted, not timed: what a training step and an attack step cost at the papers' sizes. The counting, the
costs by hand and the numbers to hold them beside are in benchmarks/operations.py."""

import pytest
import torch

from advtune.attacks.gradients import gradient
from advtune.losses import cross_entropy
from advtune.methods import configure
from operations import (
    BATCH,
    NEEDED,
    PLAIN,
    PROMPTED,
    RELEASED,
    TASK,
    Words,
    by_hand,
    image,
    light_copy,
    operations,
    shape,
    step,
    through,
)

# Everything once at 1000 classes. Fewer classes change what texts cost: frozen, with a context, with deep prompts. A
# finer grid changes what images cost: in a tower that learns and one that does not, plain and prompted.
NEW = [("B/32", 1000, name) for name in BATCH]
NEW += [("B/32", 200, name) for name in ("tecoa", "apt", "fap")]
NEW += [("B/16", 1000, name) for name in ("pmg-aft", "apt", "fap")]
ALL = [(patch, classes, name) for patch in ("B/32", "B/16") for classes in (1000, 200) for name in BATCH]
CASES = [pytest.param(*case, marks=() if case in NEW else pytest.mark.slow) for case in ALL]


@pytest.fixture(scope="module")
def shapes():
    return {"B/32": shape(32, 1000), "B/16": shape(16, 1000)}


def counted(vlm, classes, name, whole=False):
    vlm.tokenizer = Words(classes)  # copies keep it
    return step(vlm, name, BATCH[name], whole)


@pytest.mark.parametrize(("patch", "classes", "name"), CASES)
def test_a_step_costs_what_its_equation_needs(patch, classes, name, shapes):
    found = counted(shapes[patch], classes, name)
    expected = by_hand(name, shapes[patch].clip.config, classes, BATCH[name])
    assert 0.99 * expected < found <= 1.005 * expected
    assert found / 1e12 <= 1.05 * NEEDED.get(name, {}).get(patch, 1e9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tecoa", "apt", "fap"])
def test_the_plain_formulation_takes_what_released_code_takes(name, shapes):
    for patch, counts in RELEASED[name].items():
        for classes, count in counts.items():
            assert counted(shapes[patch], classes, name, True) / 1e12 == pytest.approx(count, rel=0.005)


def test_an_attack_step_costs_a_forward_and_an_input_gradient_whatever_the_classes(shapes):
    """Of a tower that learns and of one with prompts that learn, too: nothing is computed to be thrown away."""
    for name, prompts in (("tecoa", PLAIN), ("fap", PROMPTED)):
        for classes in (2, 1000):
            vlm = light_copy(shapes["B/32"])
            vlm.tokenizer = Words(classes)
            model = configure(name)[0].setup(vlm, TASK, 0)["student"].to("meta")
            f = model.classifier(model.tokens(["a"], TASK.template))
            x, y = torch.rand(8, 3, 224, 224, device="meta"), torch.zeros(8, dtype=torch.long, device="meta")
            expected = 8 * (through(image(model.clip.config, prompts)) + 2 * 2 * classes * model.clip.config.embed)
            found = operations(lambda: gradient(f, x, y, cross_entropy))  # noqa: B023
            assert 0.99 * expected < found <= 1.01 * expected
