"""Operations counted, not timed: what a training step and an attack step cost at the papers' sizes (torch's
FlopCounterMode on meta tensors: multiplications and additions of matrix products)."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from advtune.attacks.gradients import gradient
from advtune.clip import CLIP, ClipConfig, TowerConfig
from advtune.losses import cross_entropy
from advtune.methods import configure
from advtune.vlm import VLM, Batch, Origin

LENGTH, START, END = 24, 0, 1  # tokens of the longest ImageNet prompt, and the ids that frame it


class Words:
    """Stands for a tokenizer: C texts of LENGTH tokens; what precedes the name is the same in all."""

    def __init__(self, classes):
        self.classes = classes

    def pieces(self, text):
        return [2, 3, 4, 5]

    def prompts(self, names, template, room=0):
        before = max(room, 4)
        ids = torch.full((self.classes, LENGTH), END)
        ids[:, 0] = START
        ids[:, 1 : 1 + before] = torch.arange(2, 2 + before)
        ids[:, 1 + before : -1] = torch.arange(self.classes)[:, None] + 100
        return ids


class Task:
    template, classes = "a photo of a {}.", ("a", "b")


@pytest.fixture(scope="module")
def shapes():
    def build(patch):
        config = ClipConfig(
            TowerConfig(768, 12, 12, 3072), TowerConfig(512, 12, 8, 2048), 512, 224, patch, 2000, 77, START, END
        )
        return VLM(CLIP(config), None, Origin("shape", "")).requires_grad_(False)

    return {"B/32": build(32), "B/16": build(16)}


def operations(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def tower(config, places, others, inside, outside):
    """(forward, the attention's share of it) of one sequence with `places` of its own that look at `others` more; the
    last layer's queries, output and MLP for one place alone. By hand: 2 for a product and a sum."""
    w, mlp = config.width, config.mlp
    attention = 4 * places * (places + others) * w * (config.layers - 1) + 4 * (places + others) * w
    linear = (config.layers - 1) * 2 * places * (4 * w * w + 2 * w * mlp)
    linear += 2 * places * 2 * w * w + 2 * (2 * w * w + 2 * w * mlp)
    return inside + linear + attention + outside, attention


def image(config, prompts=0):
    """(forward, attention's share) of one image with so many prompt tokens."""
    n, w = (config.image_size // config.patch) ** 2, config.image.width
    return tower(config.image, n + 1 + prompts, 0, 2 * n * 3 * config.patch**2 * w, 2 * w * config.embed)


def text(config, shared):
    """(forward, attention's share) of one class beyond the beginning that all share."""
    return tower(config.text, LENGTH - shared, shared, 0, 2 * config.text.width * config.embed)


def ahead(cost):
    return cost[0]


def through(cost):
    """Forward and the gradient by what comes in: the linear maps once more, attention twice more."""
    return 2 * cost[0] + cost[1]


def learned(cost):
    """Forward and the gradient by inputs and weights."""
    return 3 * cost[0]


def step(vlm, name, classes, batch, attack=(), **options):
    """The operations of one training step, texts that never change encoded before."""
    vlm.tokenizer = Words(classes)  # deep copies keep it
    method, _, attack = configure(name, options, attack)
    models = {key: model.to("meta") for key, model in method.setup(copy.deepcopy(vlm), Task, 0).items()}
    tokens = {key: model.tokens(["a"], Task.template) for key, model in models.items()}
    x, y = torch.rand(batch, 3, 224, 224, device="meta"), torch.zeros(batch, dtype=torch.long, device="meta")

    def once():
        sum(method.loss(models, Batch(x, y, tokens), attack).values()).backward()

    for key, model in models.items():
        model.text_features(tokens[key])  # kept, where nothing of it learns
    return operations(once)


PLAIN, PROMPTED, SHARED, CONTEXT = 0, 2, 5, 17  # image prompts; the beginning that texts share with template, context


def by_hand(name, config, classes, batch):
    """The equation's forwards and backwards, each once."""
    x, prompted = image(config), image(config, PROMPTED)
    words, context = text(config, SHARED), text(config, CONTEXT)
    return {
        "tecoa": batch * (2 * through(x) + learned(x)),
        # x' by two steps; f(x'), f(x); the frozen model's answer on x'
        "pmg-aft": batch * (2 * through(x) + 2 * learned(x) + ahead(x)),
        # three steps; f(x') needs no gradient of the image; the text tower learns
        "apt": batch * (3 * through(x) + ahead(x)) + classes * through(context),
        "fap": batch * (2 * through(prompted) + 2 * through(prompted)) + classes * through(words),
        # three steps; f(x'), f(x); f0(x); the frozen model's texts are kept
        "capt": batch * (3 * through(prompted) + 2 * through(prompted) + ahead(x)) + classes * through(words),
        # two steps; the student on x', the teacher on x; both towers of texts learn
        "apd": batch * (2 * through(prompted) + 2 * through(prompted)) + 2 * classes * through(words),
    }[name]


NEEDED = {  # FIELD's column, TFLOP, at 1000 classes
    ("tecoa", 256): {"B/32": 15.8, "B/16": 63.6},
    ("pmg-aft", 256): {"B/32": 24.8, "B/16": 99.5},
    ("apt", 32): {"B/32": 3.20, "B/16": 9.2},
    ("fap", 4): {"B/32": 3.95, "B/16": 4.8},
    ("capt", 32): {},
    ("apd", 32): {},
}


@pytest.mark.parametrize(("patch", "classes"), [("B/32", 1000), ("B/32", 200), ("B/16", 1000), ("B/16", 200)])
@pytest.mark.parametrize(("name", "batch"), NEEDED)
def test_a_step_costs_what_its_equation_needs(name, batch, classes, patch, shapes):
    found = step(shapes[patch], name, classes, batch)
    expected = by_hand(name, shapes[patch].clip.config, classes, batch)
    assert 0.99 * expected < found <= 1.005 * expected
    assert found / 1e12 <= 1.05 * NEEDED[name, batch].get(patch, 1e9)


def test_an_attack_step_costs_a_forward_and_an_input_gradient_whatever_the_classes(shapes):
    """Of a tower that learns and of one with prompts that learn, too: nothing is computed to be thrown away."""
    for name, prompts in (("tecoa", PLAIN), ("fap", PROMPTED)):
        for classes in (2, 1000):
            vlm = copy.deepcopy(shapes["B/32"])
            vlm.tokenizer = Words(classes)
            model = configure(name)[0].setup(vlm, Task, 0)["student"].to("meta")
            f = model.classifier(model.tokens(["a"], Task.template))
            x, y = torch.rand(8, 3, 224, 224, device="meta"), torch.zeros(8, dtype=torch.long, device="meta")
            expected = 8 * (through(image(model.clip.config, prompts)) + 2 * 2 * classes * model.clip.config.embed)
            found = operations(lambda: gradient(f, x, y, cross_entropy))  # noqa: B023
            assert 0.99 * expected < found <= 1.01 * expected


@pytest.mark.parametrize("name", ["n-fgsm", "free"])
def test_a_fast_step_costs_one_image_gradient_or_none(name, shapes):
    """Single-step: one gradient by the image, then the weights'. Free replay: the weights' alone."""
    x = image(shapes["B/32"].clip.config)
    expected = 64 * {"n-fgsm": through(x) + learned(x), "free": learned(x)}[name]
    assert 0.99 * expected < step(shapes["B/32"], "tecoa", 200, 64, {"name": name}) <= 1.005 * expected
