"""SigLIP and SigLIP 2 against transformers' SiglipModel and tokenizers, and against a naive re-computation."""

import json
import string

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from advtune import load
from advtune.errors import UserError
from advtune.pretrained import read_pretrained
from backbones import bytepairs, unigram, write_siglip

TEXTS = ["a photo of a red dog", "Blue!", "x", "A PHOTO, of: green dogs' 7_8 (a b c)"]
CONFIGS = {
    "base": {},
    "exact gelu": {"image": {"hidden_act": "gelu"}, "text": {"hidden_act": "gelu"}},
    "wide images": {"image": {"hidden_size": 40, "num_attention_heads": 5}, "text": {"projection_size": 40}},
    "odd side": {"image": {"image_size": 19}},
    "short texts": {"text": {"max_position_embeddings": 20, "num_hidden_layers": 1}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip") / "siglip"
    write_siglip(folder)
    return folder


@pytest.mark.parametrize(("name", "words"), [("base", bytepairs), *((name, unigram) for name in CONFIGS)])
def test_equals_transformers(name, words, tmp_path):
    """Logits with scale and bias, and the gradient by the pixels."""
    model = write_siglip(tmp_path, words=words, **CONFIGS[name])
    vlm = load(str(tmp_path), "cpu", "fp32")
    texts = [text[:12] if name == "short texts" else text for text in TEXTS]
    tokens = vlm.tokenizer(texts)
    side = model.config.vision_config.image_size
    x = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours = vlm.logits(x, vlm.text_features(tokens))
    theirs = model(input_ids=tokens, pixel_values=x * 2 - 1).logits_per_image
    assert float(theirs.detach().std()) > 0.5
    assert float((ours - theirs).detach().abs().max()) < 1e-4
    y = torch.tensor([0, 1, 2])
    mine, other = (torch.autograd.grad(F.cross_entropy(logits, y), x)[0] for logits in (ours, theirs))
    assert float((mine - other).abs().max()) < 1e-4 * float(other.abs().max())


def test_ids_are_the_reference_s(folder, tmp_path):
    """SigLIP: lower case, no punctuation, </s> once and then as filling; SigLIP 2: lower case, <eos> and <pad>."""
    write_siglip(tmp_path / "v1", words=lambda place: unigram(place, clean=False))
    for place in (folder, tmp_path / "v1"):  # whether tokenizer.json strips them or leaves that to the program
        plain = ["".join(c for c in text.lower() if c not in string.punctuation) for text in TEXTS]
        reference = PreTrainedTokenizerFast(tokenizer_file=str(place / "tokenizer.json"), pad_token="</s>")
        wanted = reference(plain, padding="max_length", max_length=64, return_tensors="pt").input_ids
        assert torch.equal(read_pretrained(str(place)).tokenizer(TEXTS), wanted)
        assert wanted.shape == (4, 64)
    write_siglip(tmp_path / "v2", words=bytepairs)
    reference = AutoTokenizer.from_pretrained(tmp_path / "v2", padding_side="right")
    wanted = reference(TEXTS, padding="max_length", max_length=64, return_tensors="pt").input_ids
    ours = read_pretrained(str(tmp_path / "v2")).tokenizer(TEXTS)
    assert torch.equal(ours, wanted)
    assert set(ours[2].tolist()[-10:]) == {0}
    facts = json.loads((tmp_path / "v2" / "tokenizer.json").read_text())  # Gemma's own, which keeps capitals
    facts["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    (tmp_path / "v2" / "tokenizer.json").write_text(json.dumps(facts))
    assert torch.equal(read_pretrained(str(tmp_path / "v2")).tokenizer(TEXTS), wanted)


def test_an_image_prompt_starts_as_a_patch_that_shows_nothing(folder):
    image = read_pretrained(str(folder)).clip.image
    shown = image.embed(torch.zeros(1, 48))[0] + image.position.mean(0)
    assert float(image.embed.bias.abs().max()) > 0
    torch.testing.assert_close(image.blank(), shown)


def test_pixels_are_resized_to_a_square_and_normalised_with_a_half(folder):
    pixels = read_pretrained(str(folder)).clip.config.preprocess
    assert (pixels.resize, pixels.crop, pixels.mean, pixels.std) == ((16, 16), None, (0.5,) * 3, (0.5,) * 3)


def prompted(model, tokens, pixels, words, patches):
    """transformers' own layers one by one, with prompts put among the tokens by hand."""
    h = model.text_model.embeddings.token_embedding(tokens)
    n = words.shape[1]
    h[:, :n] = words[0]
    h = h + model.text_model.embeddings.position_embedding.weight
    for i, layer in enumerate(model.text_model.encoder.layers):
        if 0 < i < len(words):
            h = torch.cat([words[i].expand(len(h), -1, -1), h[:, n:]], 1)
        h = layer(h, None)
    text = model.text_model.head(model.text_model.final_layer_norm(h)[:, -1])
    h = model.vision_model.embeddings(pixels)
    count = h.shape[1]
    for i, layer in enumerate(model.vision_model.encoder.layers):
        if i < len(patches):
            h = torch.cat([h[:, :count], patches[i].expand(len(h), -1, -1)], 1)
        h = layer(h, None)
    return text, model.vision_model.head(model.vision_model.post_layernorm(h[:, :count]))


def test_deep_prompts_in_both_towers_equal_transformers_layers(folder):
    """Text prompts stand at the very beginning; image prompts are seen by all patches and read by none."""
    from transformers import SiglipModel

    model = SiglipModel.from_pretrained(folder).double().eval()
    read = read_pretrained(str(folder))
    clip, random = read.clip.double(), torch.Generator().manual_seed(1)
    words, patches = (
        torch.randn(2, 3, width, generator=random, dtype=torch.double).requires_grad_() for width in (24, 32)
    )
    x = torch.rand(2, 3, 16, 16, generator=random, dtype=torch.double)
    tokens = read.tokenizer.prompts(["red", "a green one"], "a photo of {}", room=3)
    text, image = prompted(model, tokens, x * 2 - 1, words, patches)
    for ours, theirs, leaf in (
        (clip.encode_text(tokens, words), text, words),
        (clip.encode_image(x, patches), image, patches),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
        weight = torch.randn(ours.shape, generator=random, dtype=torch.double)
        mine, other = (torch.autograd.grad((v * weight).sum(), leaf)[0] for v in (ours, theirs))
        assert float(other.abs().min(dim=-1).values.min()) > 0
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)
    own = words.detach()[:, None].expand(-1, 2, -1, -1)  # class-specific: each text its own
    torch.testing.assert_close(clip.encode_text(tokens, own), text, rtol=0, atol=1e-9)


def test_nothing_of_a_text_that_sees_all_is_cut_or_shared(folder):
    """Two texts with the same beginning: every layer sees all 64 tokens of both; the last is computed where it is
    read alone."""
    vlm = load(str(folder), "cpu", "fp32")
    tokens = vlm.tokenizer(["a photo of red", "a photo of a green dog"])
    seen = []
    for block in vlm.clip.text.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append((tuple(args[0].shape), tuple(out.shape))))
    vlm.text_features(tokens)
    assert seen == [((2, 64, 24), (2, 64, 24))] * 2 + [((2, 64, 24), (2, 1, 24))]
    assert vlm.clip.text.shared(tokens, None) == 0
    with pytest.raises(ValueError, match="filled to 64"):
        vlm.clip.encode_text(tokens[:, :20])


def test_the_dense_embedding_of_a_patch_is_the_head_s_when_it_sees_that_patch_alone(folder):
    clip = read_pretrained(str(folder)).clip
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    dense = clip.encode_image(x, dense=True)
    torch.testing.assert_close(dense[:, 0], clip.encode_image(x))
    caught = []
    clip.image.norm_post.register_forward_hook(lambda module, args, out: caught.append(out))
    clip.encode_image(x)
    alone = torch.stack([clip.image.pool(caught[0][:, i : i + 1]) for i in range(16)], 1)
    torch.testing.assert_close(dense[:, 1:], alone, rtol=1e-4, atol=1e-5)


def test_the_softmax_of_a_sigmoid_model_knows_no_bias(folder):
    """What the methods minimise: the bias is the same for every class, so softmax, cross-entropy, their gradients and
    the winner are those of the scaled cosines; the winner is the sigmoid's, too."""
    vlm = load(str(folder), "cpu", "fp32")
    text = vlm.text_features(vlm.tokenizer(TEXTS))
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = vlm.logits(x, text)
    cosines = vlm.image_features(x) @ text.T
    torch.testing.assert_close(logits, vlm.logit_scale * cosines - 4.0)
    torch.testing.assert_close(logits.softmax(1), (vlm.logit_scale * cosines).softmax(1))
    assert torch.equal(logits.argmax(1), logits.sigmoid().argmax(1))
    assert not torch.allclose(logits.softmax(1), logits.sigmoid(), atol=0.05)
    y = torch.arange(5) % 4
    ours, other = (
        torch.autograd.grad(F.cross_entropy(z, y), x, retain_graph=True)[0] for z in (logits, vlm.logit_scale * cosines)
    )
    torch.testing.assert_close(ours, other)


def test_a_folder_we_write_is_read_by_transformers(folder, tmp_path):
    from transformers import AutoModel

    from advtune.export import export

    made = export(str(folder), "huggingface", tmp_path / "out")
    assert made["facts"]["parameters"] > 1000
    ours, theirs = (AutoModel.from_pretrained(place).state_dict() for place in (tmp_path / "out", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = read_pretrained(str(tmp_path / "out"))
    assert again.clip.config == read_pretrained(str(folder)).clip.config
    assert torch.equal(again.tokenizer(TEXTS), read_pretrained(str(folder)).tokenizer(TEXTS))
    assert "SiglipModel.from_pretrained" in (tmp_path / "out" / "README.md").read_text()


REFUSED = {
    "naflex": (lambda c: c.update(model_type="siglip2"), "any resolution"),
    "no head": (lambda c: c["vision_config"].update(vision_use_head=False), "vision_use_head"),
    "two widths": (lambda c: c["text_config"].update(projection_size=24), "texts of 24 numbers, images of 32"),
    "another family": (lambda c: c.update(model_type="chinese_clip"), "BERT for a text tower"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_in_one_line(name, tmp_path):
    write_siglip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit, message = REFUSED[name]
    edit(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        read_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_folder_that_does_not_say_what_fills_a_row_is_refused(tmp_path):
    write_siglip(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="names no pad_token"):
        read_pretrained(str(tmp_path))
