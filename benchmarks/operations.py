"""Operations of a training step, counted and not timed: torch's FlopCounterMode on meta tensors (multiplications and
additions of matrix products). tests/test_operations.py and bench.py hold what a step takes beside what it needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from advtune.clip import CLIP, ClipConfig, TowerConfig
from advtune.methods import configure
from advtune.vlm import VLM, Batch, Origin
from plain import plain, plain_attack

START, END, LENGTH, CONTEXT = 0, 1, 24, 77  # LENGTH: tokens of the longest ImageNet prompt
TASK: Any = SimpleNamespace(template="a photo of a {}.", classes=("a", "b"))
PLAIN, PROMPTED, TEMPLATE, LEARNED = 0, 2, 5, 17  # image prompts; the beginning that texts share: template, context
BATCH = {"tecoa": 256, "pmg-aft": 256, "apt": 32, "fap": 4, "capt": 32, "apd": 32}  # of the papers
# TFLOP at 1000 classes: what the equation needs, and what the released code takes, by reading it: every attack step
# encodes the texts anew, 77 tokens each, with gradients (weights' too, where a tower learns); PMG-AFT's frozen
# model has gradients; FAP's clean branch is computed in every attack step. CAPT and APD released none.
NEEDED = {
    "tecoa": {"B/32": 15.8, "B/16": 63.6},
    "pmg-aft": {"B/32": 24.8, "B/16": 99.5},
    "apt": {"B/32": 3.20, "B/16": 9.2},
    "fap": {"B/32": 3.95, "B/16": 4.8},
}
RELEASED = {
    "tecoa": {"B/32": {1000: 74.0, 200: 31.0}, "B/16": {1000: 134.6, 200: 91.7}},
    "pmg-aft": {"B/32": {1000: 123.2, 200: 51.7}, "B/16": {1000: 224.2, 200: 152.7}},
    "apt": {"B/32": {1000: 50.2}, "B/16": {1000: 56.3}},
    "fap": {"B/32": {1000: 72.8}, "B/16": {1000: 74.1}},
}
Cost = tuple[float, float]  # forward, and the attention's share of it


class Words:
    """Stands for a tokenizer: C texts of LENGTH tokens; what precedes the name is the same in all."""

    def __init__(self, classes: int):
        self.classes = classes

    def pieces(self, text: str) -> list[int]:
        return [2, 3, 4, 5]

    def prompts(self, names: Sequence[str], template: str, room: int = 0) -> Tensor:
        before = max(room, 4)
        ids = torch.full((self.classes, LENGTH), END)
        ids[:, 0] = START
        ids[:, 1 : 1 + before] = torch.arange(2, 2 + before)
        ids[:, 1 + before : -1] = torch.arange(self.classes)[:, None] + 100
        return ids


def shape(patch: int, classes: int, meta: bool = True) -> VLM:
    """A frozen model of CLIP's ViT-B shape with C class texts. meta: without weights, one number stands for each
    tensor's, so that copies cost nothing and `setup` works; else random weights."""
    config = ClipConfig(
        TowerConfig(768, 12, 12, 3072), TowerConfig(512, 12, 8, 2048), 512, 224, patch, 2000, CONTEXT, START, END
    )
    return bare(config, classes, meta)


def bare(config: ClipConfig, classes: int, meta: bool = True) -> VLM:
    """A frozen model of a shape: see `shape`."""
    with torch.device("meta" if meta else "cpu"):
        clip = CLIP(config)
    for module in clip.modules() if meta else ():
        for name, value in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.zeros(()).expand(value.shape)))
    words: Any = Words(classes)
    return VLM(clip, words, Origin(f"random weights, patch {config.patch}", "")).requires_grad_(False)


def operations(call: Callable[[], Any]) -> int:
    """Multiplications and additions of the matrix products in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def light_copy(vlm: VLM) -> VLM:
    """A copy whose modules are its own and whose weights are the other's."""
    return copy.deepcopy(vlm, {id(p): p for p in vlm.parameters()})


def step(vlm: VLM, name: str, batch: int, whole: bool = False, attack: Sequence[str] = ()) -> int:
    """The operations of one training step, texts that never change encoded before. whole: in the plain formulation
    (see plain.py). attack: fields of the training attack."""
    method, _, training = configure(name, (), attack)
    models = {key: model.to("meta") for key, model in method.setup(light_copy(vlm), TASK, 0).items()}
    models = {key: plain(model) for key, model in models.items()} if whole else models
    tokens = {key: model.tokens(["a"], TASK.template) for key, model in models.items()}
    x, y = torch.rand(batch, 3, 224, 224, device="meta"), torch.zeros(batch, dtype=torch.long, device="meta")
    climb: Any = plain_attack(training, models) if whole else training

    def once() -> None:
        torch.stack(list(method.loss(models, Batch(x, y, tokens), climb).values())).sum().backward()

    for key, model in models.items():
        model.text_features(tokens[key])  # kept, where nothing of it learns
    return operations(once)


def tower(config: TowerConfig, places: int, others: int, inside: float, outside: float) -> Cost:
    """One sequence with `places` of its own that look at `others` more; the last layer's queries, output and MLP for
    one place alone. By hand: 2 for a product and a sum."""
    w, mlp = config.width, config.mlp
    attention = 4 * places * (places + others) * w * (config.layers - 1) + 4 * (places + others) * w
    linear = (config.layers - 1) * 2 * places * (4 * w * w + 2 * w * mlp)
    linear += 2 * places * 2 * w * w + 2 * (2 * w * w + 2 * w * mlp)
    return inside + linear + attention + outside, attention


def image(config: ClipConfig, prompts: int = 0) -> Cost:
    """One image with so many prompt tokens."""
    n, w = (config.image_size // config.patch) ** 2, config.image.width
    return tower(config.image, n + 1 + prompts, 0, 2 * n * 3 * config.patch**2 * w, 2 * w * config.embed)


def text(config: ClipConfig, shared: int) -> Cost:
    """One class beyond the beginning that all share."""
    return tower(config.text, LENGTH - shared, shared, 0, 2 * config.text.width * config.embed)


def ahead(cost: Cost) -> float:
    return cost[0]


def through(cost: Cost) -> float:
    """Forward and the gradient by what comes in: the linear maps once more, attention twice more."""
    return 2 * cost[0] + cost[1]


def learned(cost: Cost) -> float:
    """Forward and the gradient by inputs and weights."""
    return 3 * cost[0]


def by_hand(name: str, config: ClipConfig, classes: int, batch: int) -> float:
    """The equation's forwards and backwards, each once."""
    x, prompted = image(config), image(config, PROMPTED)
    words, context = text(config, TEMPLATE), text(config, LEARNED)
    found: Mapping[str, float] = {
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
    }
    return found[name]
