"""The dual encoder against transformers' CLIPModel and against a naive re-computation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import naive
from advtune import clip as clip_module
from advtune.clip import CLIP
from advtune.huggingface import to_huggingface
from advtune.preprocess import Preprocess, from_config
from advtune.pretrained import EMBEDDED, read_pretrained
from conftest import write_clip

SHARED = Path(__file__).parents[2] / "shared" / "backbones" / "lit-s14-112"
CONFIGS = {
    "base": {},
    "gelu": {"image": {"hidden_act": "gelu"}, "text": {"hidden_act": "gelu"}},
    "odd side": {"image": {"image_size": 19, "patch_size": 4}},
    "large patch": {"image": {"image_size": 32, "patch_size": 16, "hidden_size": 40, "num_attention_heads": 5}},
    "wide text": {"text": {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}, "embed": 56},
    "eps": {"image": {"layer_norm_eps": 1e-3}, "text": {"layer_norm_eps": 1e-4}},
}


def parity(folder, model, side):
    """Largest differences in image features, text features and logits."""
    read = read_pretrained(str(folder))
    tokens = read.tokenizer(["a photo of red", "x", "a much longer text, with 42 signs: of dogs!"])
    x = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = read.clip.config.preprocess(x)
        theirs = model(input_ids=tokens, pixel_values=pixels)
        image, text = read.clip.encode_image(x), read.clip.encode_text(tokens)
        image, text = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
        logits = read.clip.logit_scale.exp() * image @ text.T
    return [
        float((a - b).abs().max())
        for a, b in (
            (image, theirs.image_embeds),
            (text, theirs.text_embeds),
            (logits, theirs.logits_per_image),
        )
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name, tmp_path):
    model = write_clip(tmp_path / "clip", seed=3, **CONFIGS[name])
    assert max(parity(tmp_path / "clip", model, model.config.vision_config.image_size)) < 1e-5


@pytest.mark.parametrize("folder", [EMBEDDED["mini"], SHARED], ids=["mini", "lit-s14-112"])
def test_real_backbones_equal_transformers(folder):
    from transformers import CLIPModel

    if not folder.is_dir():
        assert folder == SHARED, "the embedded backbone is part of the package"
        pytest.skip("the shared backbone is not beside this clone")
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    assert max(parity(folder, model, model.config.vision_config.image_size)) < 1e-5


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_deep_prompts_equal_naive(activation, tmp_path):
    act = {"hidden_act": activation}
    write_clip(tmp_path / "clip", image=act, text=act)
    read = read_pretrained(str(tmp_path / "clip"))
    clip, config = read.clip.double(), read.clip.config
    tensors = to_huggingface(clip)
    random = torch.Generator().manual_seed(1)
    patches = torch.randn(2, 3, 32, generator=random, dtype=torch.double).requires_grad_()
    words = torch.randn(3, 2, 24, generator=random, dtype=torch.double).requires_grad_()
    x = torch.rand(2, 3, 16, 16, generator=random, dtype=torch.double)
    tokens = read.tokenizer.prompts(["red", "a green one"], "a photo of {}", room=2)
    mean, std = (torch.tensor(v, dtype=torch.double).view(3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))
    pairs = [
        (clip.encode_image(x, patches), naive.image(tensors, config, (x - mean) / std, patches), patches),
        (clip.encode_text(tokens, words), naive.text(tensors, config, tokens, words), words),
        (clip.encode_image(x), naive.image(tensors, config, (x - mean) / std), None),
    ]
    for ours, theirs, prompts in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        if prompts is not None:
            weight = torch.randn(ours.shape, generator=random, dtype=torch.double)
            mine, other = (torch.autograd.grad((v * weight).sum(), prompts)[0] for v in (ours, theirs))
            assert float(other.abs().min(dim=-1).values.min()) > 0  # every prompt token has a say
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


def test_text_cut_equals_whole_context(vlm):
    """Cut to the longest text of the set: the same values and gradients as at 77 tokens."""
    clip, config = vlm.clip.double(), vlm.clip.config
    tokens = vlm.tokenizer(["red", "a photo of a very red thing"])
    assert tokens.shape[1] < config.context
    tensors = {k: v.requires_grad_() for k, v in to_huggingface(clip).items()}
    embed = clip.text.embed.weight.requires_grad_()
    lengths = []
    clip.text.blocks[0].register_forward_hook(lambda module, args, out: lengths.append(tuple(out.shape[:2])))
    padded = torch.cat([tokens, torch.full((2, 77 - tokens.shape[1]), config.end_token)], 1)
    ours, theirs = clip.encode_text(padded), naive.text(tensors, config, tokens)
    assert sorted(lengths) == [(1, 1), (2, tokens.shape[1] - 1)]  # the start token is computed once
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    mine = torch.autograd.grad(ours.square().sum(), embed)[0]
    other = torch.autograd.grad(theirs.square().sum(), tensors["text_model.embeddings.token_embedding.weight"])[0]
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


TEXTS = {
    "a long shared beginning": (["a photo of a red dog", "a photo of a red hat", "a photo of a blue thing"], "words"),
    "none but the start token": (["red", "blue dog", "a"], "words"),
    "one text": (["a photo of a red dog"], "words"),
    "the same text twice": (["a photo of a red dog"] * 2, "words"),
    "the shorter begins the longer": (["a photo of a red dog", "a photo of a red dog and more"], "words"),
    "deep prompts": (["a photo of a red dog", "a photo of a red hat"], "unified"),
    "deep prompts before other words": (["x x red", "y y blue dog"], "unified"),
    "class-specific prompts": (["a photo of a red dog", "a photo of a red hat"], "specific"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_shared_beginning_is_exact_and_computed_once(name, vlm):
    """Values and gradients of the naive tower that computes every text alone; the tokens that each layer sees."""
    texts, kind = TEXTS[name]
    clip, config = vlm.clip.double(), vlm.clip.config
    tokens = vlm.tokenizer(texts)
    length, width = tokens.shape[1], config.text.width
    random = torch.Generator().manual_seed(0)
    shape = {"words": None, "unified": (2, 2, width), "specific": (2, len(texts), 2, width)}[kind]
    prompts = shape and torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()
    tensors = {k: v.requires_grad_() for k, v in to_huggingface(clip).items()}
    embed, seen = clip.text.embed.weight.requires_grad_(), []
    for block in clip.text.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape[:2])))
    ours, theirs = clip.encode_text(tokens, prompts), naive.text(tensors, config, tokens, prompts)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    same = [len(set(column)) == 1 for column in zip(*tokens.tolist(), strict=True)]
    same[1:3] = {"words": same[1:3], "unified": [True, True], "specific": [False, False]}[kind]
    p = min([*same, False].index(False), length - 1)
    heads, tails = [s for s in seen if s == (1, p)], [s for s in seen if s == (len(texts), length - p)]
    assert len(tails) >= config.text.layers and len(heads) >= config.text.layers - 1
    assert set(seen) == {(1, p), (len(texts), length - p)}
    naive.check_text_gradients(ours, theirs, embed, tensors, prompts, random)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_written_out_attention_equals_the_fused_kernel(dtype, monkeypatch):
    random = torch.Generator().manual_seed(0)
    shape = (2, 3, 17, 8)
    q, k, v, weight = (torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for _ in range(4))
    found = []
    for short in (300, 0):
        monkeypatch.setattr(clip_module, "SHORT", short)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = clip_module.attend(*leaves)
        found.append([out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)])
    for ours, fused in zip(*found, strict=True):
        torch.testing.assert_close(ours, fused, rtol=0, atol=1e-12 if dtype == torch.float64 else 6e-2)


def test_a_text_without_end_is_refused(vlm):
    with pytest.raises(ValueError, match="end token"):
        vlm.clip.encode_text(torch.zeros(1, 5, dtype=torch.long))


def test_resize_equals_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 37, 3)).astype(np.uint8)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    plain = Preprocess(20, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    theirs = np.asarray(Image.fromarray(pixels).resize((20, 27), Image.Resampling.BICUBIC)) / 255
    assert np.abs(plain(x)[0].permute(1, 2, 0).numpy() - theirs).max() < 1.01 / 255


def test_preprocess_is_inside_the_gradient_and_exact_at_its_own_size():
    x = torch.rand(1, 3, 40, 24, requires_grad=True)
    out = Preprocess(16, 16)(x)
    assert out.shape == (1, 3, 16, 16)
    out.sum().backward()
    assert float((x.grad[:, :, 10:30] != 0).float().mean()) > 0.9
    y = torch.rand(1, 3, 16, 16)
    own = Preprocess(16, 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert torch.equal(own(y), y)


@pytest.mark.parametrize(
    ("raw", "resize", "crop"),
    [
        ({"size": 20, "crop_size": 18}, 20, 18),
        ({"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 18}}, 20, 18),
        ({"size": {"height": 20, "width": 22}, "do_center_crop": False}, (20, 22), None),
        ({"do_resize": False, "crop_size": 18}, None, 18),
    ],
)
def test_preprocessor_config(raw, resize, crop):
    read = from_config({**raw, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "resample": 2})
    assert (read.resize, read.crop, read.mode) == (resize, crop, "bilinear")
    assert read.mean == (0.1, 0.2, 0.3)
    assert read.std == (1, 2, 3)


def test_logit_scale_and_statistics_come_from_the_files(clip_folder):
    read = read_pretrained(str(clip_folder))
    assert read.clip.config.preprocess.mean == (0.4, 0.5, 0.6)
    assert isinstance(read.clip, CLIP)
    assert not any(p.requires_grad for p in read.clip.parameters())
