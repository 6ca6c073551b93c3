"""Operations counted, not timed: what a training step and an attack step cost at the papers' sizes. The counting, the
costs by hand and the numbers to hold them beside are in benchmarks/operations.py."""

import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from advtune.attacks.gradients import gradient
from advtune.losses import cross_entropy
from advtune.methods import configure
from advtune.portions import graph_bytes
from advtune.vlm import Batch
from operations import (
    BATCH,
    LENGTH,
    NEEDED,
    PLAIN,
    PROMPTED,
    RELEASED,
    TASK,
    Words,
    by_hand,
    image,
    learned,
    light_copy,
    operations,
    shape,
    step,
    through,
)

# Everything once at 1000 classes. Fewer classes change what texts cost, a finer grid what images cost: each once here,
# in all kinds of towers among the slow.
NEW = [("B/32", 1000, name) for name in BATCH]
NEW += [("B/32", 200, "apt"), ("B/16", 1000, "pmg-aft")]
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


@pytest.mark.parametrize("name", ["n-fgsm", "free"])
def test_a_fast_step_costs_one_image_gradient_or_none(name, shapes):
    """Single-step: one gradient by the image, then the weights'. Free replay: the weights' alone."""
    x = image(shapes["B/32"].clip.config)
    expected = 64 * {"n-fgsm": through(x) + learned(x), "free": learned(x)}[name]
    assert 0.99 * expected < step(shapes["B/32"], "tecoa", 64, attack=[f"name={name}"]) <= 1.005 * expected


@pytest.mark.parametrize(
    "name", ["fap", *(pytest.param(each, marks=pytest.mark.slow) for each in ("apt", "capt", "apd"))]
)
def test_a_graph_of_a_thousand_classes_fits_in_8_gb(name, shapes):
    """What autograd keeps from the loss to its gradient, in fp32, on a device of 8 GB: a quarter of it for a portion of
    the texts, which is computed again."""
    shapes["B/32"].tokenizer = Words(1000)
    method, _, attack = configure(name)
    models = {key: model.to("meta") for key, model in method.setup(light_copy(shapes["B/32"]), TASK, 0).items()}
    tokens = {key: model.tokens(["a"], TASK.template) for key, model in models.items()}
    x, y = torch.rand(32, 3, 224, 224, device="meta"), torch.zeros(32, dtype=torch.long, device="meta")
    quarter, kept = 2e9, {}
    for memory in (quarter, 1e18):
        for model in models.values():
            model.text_memory = memory
        kept[memory] = held(lambda: sum(method.loss(models, Batch(x, y, tokens), attack).values()), models)
    portion = held(lambda: models["student"].text_features(tokens["student"]), models)
    assert kept[quarter] + quarter < 8e9
    assert kept[1e18] > kept[quarter] + 2e9  # all texts at once
    assert graph_bytes(models["student"].clip.config.text, LENGTH, 5, False) * 1000 > portion  # never taken for less


class Held:
    def __init__(self, tensor):
        self.tensor = tensor


def held(call, models):
    """Bytes that autograd still holds after a call, parameters aside."""
    own, alive = {p.untyped_storage()._cdata for m in models.values() for p in m.parameters()}, weakref.WeakSet()

    def pack(tensor):
        box = Held(tensor)
        alive.add(box)
        return box

    with saved_tensors_hooks(pack, lambda box: box.tensor):
        out = call()
    found = {box.tensor.untyped_storage()._cdata: box.tensor.untyped_storage().nbytes() for box in alive}
    assert out.requires_grad
    return sum(size for place, size in found.items() if place not in own)
