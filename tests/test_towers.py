"""Two steps of every method on every kind of tower, and the table of docs/backbones.md that says what came out.

`python tests/test_towers.py` writes the table anew; a test holds the page against it.
"""

import re
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from advtune import load
from advtune.errors import UserError
from advtune.methods import METHODS, configure
from advtune.vlm import Batch
from backbones import open_clip_tensors, resnet_tensors, write_open_clip, write_openai, write_siglip
from conftest import write_clip

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
MARK = re.compile(r"(<!-- towers -->\n).*?(<!-- end -->)", re.DOTALL)
TASK = SimpleNamespace(template="a photo of a {}.", classes=("red", "green", "blue"))
SMALL = dict(num_hidden_layers=2)
OTHER = {
    ("advvp", "tokens=0"): "a frame of pixels",
    ("guided", "trainable=image-tower"): "image tower",
}  # what it trains
ROWS = [*((name, ()) for name in METHODS), *((name, (option,)) for name, option in OTHER)]
TUNED = [row for row in ROWS if row[0] != "zero-shot"]
REASONS = [
    "image prompts are tokens, and this backbone's image tower is a ResNet, which has none",
    "low-rank updates are of a transformer's layers, and this backbone's image tower is a ResNet",
]


def clip(folder):
    write_clip(folder, image=SMALL, text=SMALL)
    return folder


def siglip(folder):
    write_siglip(folder, image=SMALL, text=SMALL)
    return folder


def mean(folder):
    """As CLIPA's: no first norm, the mean of the patches, texts that see all of a row and are read at its end."""

    def edit(config, tensors):
        config["vision_cfg"] |= {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
        config["text_cfg"] |= {"no_causal_mask": True, "pool_type": "last"}
        del tensors["visual.ln_pre.weight"], tensors["visual.ln_pre.bias"]

    write_open_clip(folder, image=SMALL, text=SMALL | {"max_position_embeddings": 40}, edit=edit)
    return folder


def resnet(folder):
    narrow = SMALL | dict(hidden_size=64, num_attention_heads=1)
    tensors = open_clip_tensors(write_clip(folder / "vit", image=narrow, text=narrow))
    write_openai(folder / "rn" / "rn.pt", resnet_tensors(tensors, (1, 1, 1, 1), side=32), script=False)
    return folder / "rn" / "rn.pt"


KINDS = {
    "ViT, class token (CLIP)": clip,
    "ViT, attention pool, sigmoid (SigLIP)": siglip,
    "ViT, mean of patches, texts see all (CLIPA)": mean,
    "ResNet (RN50)": resnet,
}


@cache
def backbone(kind):
    with tempfile.TemporaryDirectory() as place, torch.random.fork_rng():
        return load(str(KINDS[kind](Path(place))), "cpu", "fp32")


@cache
def outcome(kind, name, options=()):
    """What learned in two steps, by name, and what the frozen rest was before; or the reason why it cannot."""
    vlm = backbone(kind)
    method, recipe, attack = configure(name, options)
    attack = replace(attack, steps=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            models = method.setup(vlm, TASK, 0)
        except UserError as error:
            return str(error)
        tokens = {key: model.tokens(TASK.classes, TASK.template) for key, model in models.items()}
        x, y = torch.rand(3, 3, vlm.side, vlm.side), torch.tensor([0, 1, 2])
        batch = Batch(x, y, tokens)
        prepare = getattr(method, "prepare", None)
        kept = prepare(models, batch, attack) if prepare else {}
        start = {f"{m}.{n}": v.detach().clone() for m, model in models.items() for n, v in model.state_dict().items()}
        learning = [p for model in models.values() for p in model.parameters() if p.requires_grad]
        optimiser = recipe.optimiser(learning) if learning else None
        for step in range(2 if learning else 0):
            terms = method.loss(models, Batch(x, y, tokens, step % getattr(method, "cycles", 1), kept), attack)
            assert all(bool(value.isfinite()) for value in terms.values()), (kind, name, terms)
            optimiser.zero_grad()
            sum(terms.values()).backward()
            optimiser.step()
    end = {f"{m}.{n}": v for m, model in models.items() for n, v in model.state_dict().items()}
    trainable = {f"{m}.{n}" for m, model in models.items() for n, p in model.named_parameters() if p.requires_grad}
    return {n for n in end if not torch.equal(end[n], start[n])}, trainable


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "options"), ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_two_steps(kind, name, options):
    """What shall learn moves and nothing else does, or one line says why it cannot be."""
    found = outcome(kind, name, options)
    if isinstance(found, str):
        assert number(found)
        assert kind.startswith("ResNet")
        return
    moved, trainable = found
    assert moved <= trainable
    assert bool(moved) == (name != "zero-shot")
    # Of a tower every part learns but key biases, which no softmax sees, and what stands behind a unit that is off.
    assert len(moved) >= 0.9 * len(trainable)


@pytest.mark.parametrize(("name", "options"), TUNED, ids=lambda value: value if isinstance(value, str) else "")
def test_no_loss_of_a_method_knows_the_sigmoid_s_bias(name, options):
    """On SigLIP, attack and loss and what learns from it are the same with another bias: of the softmax over classes
    that a method takes, it falls out."""
    vlm = backbone("ViT, attention pool, sigmoid (SigLIP)")
    method, _, attack = configure(name, options)
    x, y = torch.rand(3, 3, vlm.side, vlm.side, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    own, found = vlm.clip.logit_bias.detach().clone(), []
    assert float(own) < -1
    for bias in (own, own + 5):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            vlm.clip.logit_bias.data.copy_(bias)
            try:
                models = method.setup(vlm, TASK, 0)
                batch = Batch(x, y, {key: model.tokens(TASK.classes, TASK.template) for key, model in models.items()})
                prepare = getattr(method, "prepare", None)
                batch = replace(batch, kept=prepare(models, batch, attack) if prepare else {})
                terms = method.loss(models, batch, attack)
                learning = [p for model in models.values() for p in model.parameters() if p.requires_grad]
                slopes = torch.autograd.grad(sum(terms.values()), learning, allow_unused=True) if learning else ()
            finally:
                vlm.clip.logit_bias.data.copy_(own)
        found.append(({term: float(value.detach()) for term, value in terms.items()}, slopes))
    (first, ones), (second, others) = found
    assert first == pytest.approx(second, rel=1e-4, abs=1e-6)
    for one, other in zip(ones, others, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * (1 + float(one.abs().max())))


def number(reason):
    """Of a reason that is known, from 1."""
    return next(i for i, known in enumerate(REASONS, start=1) if reason.startswith(known))


def table():
    lines = ["| method | trains | " + " | ".join(KINDS) + " |", "|---|---|" + "---|" * len(KINDS)]
    for name, options in ROWS:
        found = [outcome(kind, name, options) for kind in KINDS]
        cells = [f"no ({number(each)})" if isinstance(each, str) else "yes" for each in found]
        shown = " ".join([f"`{name}`", *(f"`-o {option}`" for option in options)])
        trains = OTHER[name, *options] if options else METHODS[name].trains
        lines.append(f"| {shown} | {trains} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{i}. {text}." for i, text in enumerate(REASONS, start=1))])


def page(text):
    return MARK.sub(lambda found: f"{found[1]}\n{table()}\n\n{found[2]}", text)


def test_the_page_is_what_the_steps_give():
    text = PAGE.read_text()
    assert MARK.search(text)
    assert page(text) == text, "run: python tests/test_towers.py"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
