"""Class texts in portions: the same numbers and gradients as all at once, in less work and less memory."""

import json
import math
from pathlib import Path

import pytest
import torch

import advtune
import naive
from advtune import portions
from advtune.huggingface import to_huggingface
from advtune.memory import container, room
from advtune.vlm import load_vlm

NAMES = ["red", "a b c d e f", "of", "photo", "a b c d e g", "c"]


@pytest.mark.parametrize("kind", ["words", "unified", "specific"])
@pytest.mark.parametrize("memory, portions_of", [(float("inf"), 2), (1.0, 6), (60_000.0, 4)])
def test_portions_equal_the_naive_tower(kind, memory, portions_of, vlm, monkeypatch):
    """Values and gradients, whether texts are grouped by length (LEAST, SHARE) or computed twice for memory."""
    monkeypatch.setattr(portions, "LEAST", 2)
    monkeypatch.setattr(portions, "SHARE", 0)
    clip, config = vlm.clip.double(), vlm.clip.config
    tokens = vlm.tokenizer.prompts(NAMES, "{}.", 2)
    random = torch.Generator().manual_seed(0)
    shape = {"words": None, "unified": (2, 2, 24), "specific": (2, len(NAMES), 2, 24)}[kind]
    prompts = shape and torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()
    tensors = {k: v.requires_grad_() for k, v in to_huggingface(clip).items()}
    embed, seen = clip.text.embed.weight.requires_grad_(), []

    def tower(some, own):
        seen.append(tuple(some.shape))
        return clip.encode_text(some, own)

    lengths = clip.text.ends(tokens) + 1
    ours = portions.encode(tower, config.text, tokens, lengths, prompts, False, memory)
    theirs = naive.text(tensors, config, tokens, prompts)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    first = len(seen)
    naive.check_text_gradients(ours, theirs, embed, tensors, prompts, random)
    assert first == portions_of
    assert len(seen) == (first if memory == float("inf") else 2 * first)  # twice only for memory


def test_portions_under_autocast_equal_all_at_once(vlm):
    """bf16, with a gradient: what is computed again is computed in the same precision."""
    model = vlm.with_prompts("a photo of a {}.", 2, 2, 2)
    tokens, found = model.tokens(NAMES, "a photo of a {}."), []
    model.precision = "bf16"
    for memory in (1e18, 1.0):
        model.text_memory = memory
        features = model.text_features(tokens)
        found.append((features.detach(), torch.autograd.grad(features[:, 0].sum(), model.prompts.text)[0]))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=0.02, atol=0.02 * float(whole.abs().max()))


def test_a_container_s_limit_is_the_memory(tmp_path):
    (tmp_path / "limit").write_text("4000\n")
    (tmp_path / "none").write_text("max\n")
    assert [container(tmp_path / name) for name in ("limit", "none", "missing")] == [4000, math.inf, math.inf]
    assert 0 < room(torch.device("cpu")) < math.inf


def test_portions_need_no_second_forward_without_a_gradient(vlm):
    tokens, seen = vlm.tokenizer.prompts(NAMES, "{}.", 0), []

    def tower(some, own):
        seen.append(len(some))
        return vlm.clip.encode_text(some, own)

    with torch.no_grad():
        portions.encode(tower, vlm.clip.config.text, tokens, vlm.clip.text.ends(tokens) + 1, None, False, 1.0)
    assert seen == [len(NAMES)]


def test_texts_are_grouped_where_that_saves_enough():
    lengths = torch.tensor([5] * 900 + [18] * 100)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    groups = portions.by_length(lengths)
    assert [(len(g), set(lengths[g].tolist())) for g in groups] == [(900, {5}), (100, {18})]
    assert torch.cat(groups).sort().values.equal(torch.arange(1000))
    assert len(portions.by_length(lengths[:30])) == 1  # a launch costs more
    assert len(portions.by_length(torch.full((5000,), 9))) == 1
    assert len(portions.by_length(torch.tensor([9] * 4900 + [10] * 100))) == 1  # saves a tenth only


def test_imagenet_costs_less_than_every_text_at_the_longest_one_s_length():
    """The tokens that go through the tower, of real class names: two thirds of C x L, and half without what all
    share."""
    folder = Path(advtune.__file__).parent / "data" / "sets"
    names = json.loads((folder / "imagenet.json").read_text())["classes"]
    vlm = load_vlm("mini")
    tokens = vlm.tokenizer.prompts(tuple(names), "a photo of a {}.", 0)
    lengths = vlm.clip.text.ends(tokens) + 1
    groups = portions.by_length(lengths)
    spent = [len(g) * int(lengths[g].max()) for g in groups]
    assert 2 <= len(groups) <= 4
    assert sum(spent) < 0.67 * len(names) * int(lengths.max())
    assert sum(n - 5 * len(g) for n, g in zip(spent, groups, strict=True)) < 0.53 * len(names) * (lengths.max() - 5)
