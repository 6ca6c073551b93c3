"""Prompts, tokens and what a VLM learns."""

import shutil
from pathlib import Path

import pytest
import torch

from advtune.configuration import read_config
from advtune.errors import UserError
from advtune.pretrained import EMBEDDED
from advtune.prompts import Prompts
from advtune.tokenizer import load_encoder, of_model


def load_tokenizer(folder, config):
    return of_model(load_encoder(folder), config, folder)


def shapes(prompts):
    return [None if p is None else tuple(p.shape) for p in prompts()[:2]]


def test_shapes_by_coupling_and_depth(vlm):
    clip = vlm.clip  # 3 layers in each tower, widths 24 and 32
    assert shapes(Prompts(clip, 2, 3, 9)) == [(3, 2, 24), (3, 3, 32)]
    assert shapes(Prompts(clip, 0, 3, 2)) == [None, (2, 3, 32)]
    assert shapes(Prompts(clip, 2, 0, 1)) == [(1, 2, 24), None]
    for coupling in ("text-to-image", "image-to-text"):
        assert shapes(Prompts(clip, 2, 2, 2, coupling)) == [(2, 2, 24), (2, 2, 32)]


def test_coupling_is_a_linear_map_of_the_other_tower(vlm):
    prompts = Prompts(vlm.clip, 2, 2, 2, "text-to-image")
    text, image, pad = prompts()
    assert pad is None
    expected = text[1] @ prompts.maps.weight[1].T + prompts.maps.bias[1]
    torch.testing.assert_close(image[1], expected)
    assert prompts.image is None  # it has no parameter of its own
    image.sum().backward()
    assert float(prompts.text.grad.abs().sum()) > 0


def test_what_is_mapped_to_text_is_what_was_added_to_the_blank_patch(vlm):
    """The mean position embedding can be so long that a map of it runs away at any learning rate."""
    with torch.no_grad():
        vlm.clip.image.position[1:] += 100
    prompts = Prompts(vlm.clip, 2, 2, 2, "image-to-text", start=vlm.clip.text.embed.weight[:2])
    text, image, _ = prompts()
    blank = vlm.clip.image.position[1:].mean(0)
    torch.testing.assert_close(image[0], prompts.image[0] + blank)
    torch.testing.assert_close(image[1], prompts.image[1])
    torch.testing.assert_close(text[0], prompts.image[0] @ prompts.maps.weight[0].T + prompts.maps.bias[0])
    assert float(text.detach().norm(dim=-1).max()) < 2 * float(vlm.clip.text.embed.weight[:2].norm(dim=-1).max())


def test_the_first_text_prompt_starts_from_the_template(vlm):
    learner = vlm.with_prompts("photo of a {}.", 2, 2, 2)
    ids = vlm.tokenizer.pieces("photo of")
    torch.testing.assert_close(learner.prompts.text[0], vlm.clip.text.embed.weight[ids])
    tokens = learner.tokens(["red", "blue"], "photo of a {}.")
    assert torch.equal(tokens, vlm.tokens(["red", "blue"], "photo of a {}."))  # no placeholder was needed
    with torch.no_grad():
        learner.prompts.text[1:] = 0
        same_first = learner.text_features(tokens)
    assert same_first.shape == (2, 24)


def test_the_same_seed_gives_the_same_prompts(vlm):
    one, two, other = (vlm.with_prompts("a {}", 2, 2, 2, "text-to-image", seed).delta() for seed in (0, 0, 1))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["prompts.image"], other["prompts.image"])


def test_a_learned_prompt_never_overwrites_a_name(vlm):
    learner = vlm.with_prompts("{}", 3, 0, 1)
    tokens = learner.tokens(["red"], "{}")
    assert vlm.tokenizer.pieces("x x x red") == tokens[0, 1:-1].tolist()
    one, other = learner.tokens(["red", "dot"], "{}")
    with torch.no_grad():
        features = learner.text_features(torch.stack([one, other]))
    assert float((features[0] - features[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        dict(text=2, image=3, depth=1, coupling="text-to-image"),
        dict(text=2, image=2, depth=1, coupling="sideways"),
        dict(text=0, image=0, depth=1),
        dict(text=1, image=1, depth=0),
    ],
)
def test_impossible_prompts_are_refused(vlm, wrong):
    with pytest.raises(UserError):
        Prompts(vlm.clip, **wrong)


def test_prompts_on_prompts_are_refused(vlm):
    with pytest.raises(UserError, match="already"):
        vlm.with_prompts("a {}", 1, 1, 1).with_prompts("a {}", 1, 1, 1)


def test_delta_round_trip(vlm):
    tokens, x = vlm.tokens(["red", "blue"], "a photo of {}"), torch.rand(2, 3, 16, 16)
    for learner in (vlm.with_prompts("a photo of {}", 2, 2, 2, "image-to-text"), vlm.with_image_tower()):
        with torch.no_grad():
            for value in learner.parameters():
                if value.requires_grad:
                    value.add_(0.05)
        delta = learner.delta()
        again = vlm.with_delta(delta)
        torch.testing.assert_close(again.classifier(tokens)(x), learner.classifier(tokens)(x))
        assert not torch.allclose(again.classifier(tokens)(x), vlm.classifier(tokens)(x), atol=1e-3)
        assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(UserError, match="does not fit"):
        vlm.with_delta({"clip.image.position": torch.zeros(1, 1)})


def test_the_text_cache_follows_the_tokens(vlm):
    one, two = (vlm.tokens(names, "a {}") for names in (["red", "blue"], ["dot", "dog"]))
    assert vlm.tokens(["red", "blue"], "a {}").equal(one)
    first = vlm.text_features(one)
    assert not torch.equal(vlm.text_features(two), first)
    assert torch.equal(vlm.text_features(one), first)


# --- tokens -----------------------------------------------------------------------------------------------

HARD = ["a photo of red", "Café's naïve  Straße", "日本 12 dogs!!", "it's 😀", "under_score-dash"]


@pytest.mark.parametrize("which", ["tiny", "mini"])
def test_ids_equal_transformers(which, clip_folder):
    from transformers import CLIPTokenizerFast

    folder = clip_folder if which == "tiny" else EMBEDDED["mini"]
    ours = load_tokenizer(folder, read_config(folder))
    theirs = CLIPTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in HARD:
        assert ours.pieces(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    batch = ours(HARD)
    assert batch.shape[1] == max(len(ours.pieces(t)) for t in HARD) + 2
    assert (batch[:, 0] == ours.start).all()
    assert (batch[:, -1] == ours.end).all()


def test_vocab_and_merges_equal_tokenizer_json(clip_folder, tmp_path):
    import json

    model = json.loads((clip_folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = read_config(clip_folder)
    one, two = load_tokenizer(clip_folder, config), load_tokenizer(tmp_path, config)
    assert all(one.pieces(text) == two.pieces(text) for text in HARD)
    assert one.pieces("photo") == two.pieces("photo")
    assert len(one.pieces("photo")) == 1  # merges are in use


def test_too_long_and_no_tokenizer(clip_folder, tmp_path):
    config = read_config(clip_folder)
    with pytest.raises(UserError, match="longer than the context of 77"):
        load_tokenizer(clip_folder, config)(["z" * 80])
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(Path(shutil.os.devnull).parent / "nowhere", config)
