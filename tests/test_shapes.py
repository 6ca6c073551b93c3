"""Full sizes on the meta device, every name and shape; sizes in proportion, computed; other resolutions."""

import json
import shutil

import pytest
import torch

from advtune import load
from advtune.clip import CLIP
from advtune.configuration import read_config
from advtune.errors import UserError
from advtune.formats import siglip
from advtune.huggingface import Layout, fits, layout
from advtune.pretrained import read_pretrained
from backbones import open_clip_tensors, resnet_tensors, spread, unigram, write_open_clip, write_openai, write_siglip
from conftest import write_clip
from test_openai import naive_resnet

TEXTS = ["a photo of a red dog", "blue"]


def tower(width, layers, heads, mlp=None, **more):
    shape = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)
    return {**shape, "intermediate_size": mlp or 4 * width, **more}


GELU = {"hidden_act": "gelu"}
CLIPS = {  # image tower, text tower, projection: of the configurations on the hub
    "openai/clip-vit-base-patch32": (tower(768, 12, 12, patch_size=32), tower(512, 12, 8), 512),
    "openai/clip-vit-base-patch16": (tower(768, 12, 12, patch_size=16), tower(512, 12, 8), 512),
    "openai/clip-vit-large-patch14": (tower(1024, 24, 16, patch_size=14), tower(768, 12, 12), 768),
    "openai/clip-vit-large-patch14-336": (tower(1024, 24, 16, patch_size=14, image_size=336), tower(768, 12, 12), 768),
    "laion/CLIP-ViT-H-14": (tower(1280, 32, 16, patch_size=14, **GELU), tower(1024, 24, 16, **GELU), 1024),
    "laion/CLIP-ViT-bigG-14": (tower(1664, 48, 16, 8192, patch_size=14, **GELU), tower(1280, 32, 20, **GELU), 1280),
}
SIGLIPS = {
    "google/siglip-base-patch16-224": (tower(768, 12, 12, patch_size=16), tower(768, 12, 12)),
    "google/siglip-so400m-patch14-384": (
        tower(1152, 27, 16, 4304, patch_size=14, image_size=384),
        tower(1152, 27, 16, 4304),
    ),
    "google/siglip2-giant-opt-patch16-256": (
        tower(1536, 40, 16, 6144, patch_size=16, image_size=256),
        tower(1152, 27, 16, 4304, projection_size=1536, vocab_size=256000),
    ),
}


def shapes_fit(config, theirs, how):
    with torch.device("meta"):
        clip = CLIP(config)
    assert all(p.device.type == "meta" for p in clip.parameters())
    fits({name: value.shape for name, value in clip.state_dict().items()}, theirs.state_dict(), "hub", how)
    return sum(p.numel() for p in clip.parameters()), sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", CLIPS)
def test_clip_at_full_size_has_every_tensor_of_transformers(name, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    image, text, width = CLIPS[name]
    facts = CLIPConfig(vision_config=image, text_config=text, projection_dim=width)
    facts.save_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = CLIPModel(facts)
    config = read_config(tmp_path)
    ours, wanted = shapes_fit(config, theirs, Layout(layout(config)))
    assert ours == wanted
    assert config.image.activation == image.get("hidden_act", "quick_gelu")


@pytest.mark.parametrize("name", SIGLIPS)
def test_siglip_at_full_size_has_every_tensor_of_transformers(name, tmp_path):
    from tokenizers import Tokenizer
    from transformers import SiglipConfig, SiglipModel

    image, text = SIGLIPS[name]
    facts = SiglipConfig(vision_config=image, text_config=text)
    facts.save_pretrained(tmp_path)
    unigram(tmp_path)
    with torch.device("meta"):
        theirs = SiglipModel(facts)
    config = siglip.configuration(tmp_path, Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    ours, wanted = shapes_fit(config, theirs, Layout(siglip.names(config)))
    assert ours == wanted


PROPORTIONED = {
    "L/14": (dict(image_size=28, patch_size=14, hidden_size=64), dict(hidden_size=48, num_attention_heads=3), 48),
    "H/14": (dict(image_size=28, patch_size=14, **GELU), dict(hidden_size=48, num_attention_heads=4, **GELU), 48),
    "bigG/14": (
        dict(image_size=28, patch_size=14, hidden_size=52, num_attention_heads=4, intermediate_size=256, **GELU),
        dict(hidden_size=40, num_attention_heads=5, intermediate_size=160, **GELU),
        40,
    ),
}


@pytest.mark.parametrize("name", PROPORTIONED)
def test_in_proportion_they_equal_transformers(name, tmp_path):
    """Logits and the gradient by the pixels; widths of towers and projection in the order of the full sizes."""
    image, text, width = PROPORTIONED[name]
    model = spread(write_clip(tmp_path, image=image, text=text, embed=width))
    model.save_pretrained(tmp_path)
    vlm = load(str(tmp_path), "cpu", "fp32")
    tokens, x = vlm.tokenizer(TEXTS), torch.rand(2, 3, 28, 28).requires_grad_()
    ours = vlm.logits(x, vlm.text_features(tokens))
    theirs = model(input_ids=tokens, pixel_values=vlm.clip.config.preprocess(x)).logits_per_image
    assert float((ours - theirs).detach().abs().max()) < 1e-4
    mine, other = (torch.autograd.grad(v[:, 0].sum(), x)[0] for v in (ours, theirs))
    assert float((mine - other).abs().max()) < 1e-4 * float(other.abs().max())


def test_metaclip_2_is_a_clip_whose_texts_end_as_its_tokenizer_says(tmp_path):
    """The first MetaCLIP is a CLIP of Hugging Face's; the second has another tokenizer and other ends."""
    from transformers import MetaClip2Config, MetaClip2Model

    from backbones import VISION

    size = unigram(tmp_path)
    words = dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, vocab_size=size,
        eos_token_id=1, max_position_embeddings=20, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = spread(MetaClip2Model(MetaClip2Config(vision_config=VISION, text_config=words, projection_dim=24)))
    model.save_pretrained(tmp_path)
    vlm = load(str(tmp_path), "cpu", "fp32")
    tokens, x = vlm.tokenizer(TEXTS), torch.rand(2, 3, 16, 16)
    assert (vlm.tokenizer.start, vlm.tokenizer.end) == (None, 1)
    with torch.no_grad():
        theirs = model(input_ids=tokens, pixel_values=vlm.clip.config.preprocess(x)).logits_per_image
        ours = vlm.logits(x, vlm.text_features(tokens))
    assert float((ours - theirs).abs().max()) < 1e-4


# --- other resolutions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [24, 8, 30])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_another_resolution_equals_transformers(kind, side, tmp_path):
    """Positions are interpolated bicubically inside the gradient: logits, the gradient by the pixels and that by the
    position embeddings."""
    model = {"clip": write_clip, "siglip": write_siglip}[kind](tmp_path)
    vlm = load(f"{tmp_path}@{side}", "cpu", "fp32")
    assert vlm.side == side if kind == "clip" else vlm.clip.config.image_size == side
    tokens, x = vlm.tokenizer(TEXTS), torch.rand(2, 3, side, side).requires_grad_()
    own = vlm.clip.image.position.requires_grad_()
    table = model.vision_model.embeddings.position_embedding.weight
    assert own.shape == table.shape
    ours = vlm.logits(x, vlm.text_features(tokens))
    pixels = vlm.clip.config.preprocess(x)
    assert pixels.shape[-1] == side
    theirs = model(input_ids=tokens, pixel_values=pixels, interpolate_pos_encoding=True).logits_per_image
    assert float((ours - theirs).detach().abs().max()) < 1e-4
    mine, other = (torch.autograd.grad(v[:, 0].sum(), leaves) for v, leaves in ((ours, (x, own)), (theirs, (x, table))))
    for one, two in zip(mine, other, strict=True):
        assert float(two.abs().max()) > 0
        assert float((one - two).abs().max()) < 1e-4 * max(1.0, float(two.abs().max()))


@pytest.mark.parametrize("side", [24, 8])
def test_another_resolution_of_open_clip_is_smoothed_as_there(side, tmp_path):
    """open_clip resizes positions with antialiasing, which is another bicubic kernel than transformers'."""
    model = write_open_clip(tmp_path)
    vlm, x = load(f"{tmp_path}@{side}", "cpu", "fp32"), torch.rand(2, 3, side, side)
    embeddings, n = model.vision_model.embeddings, side // 4
    with torch.no_grad():
        pixels = vlm.clip.config.preprocess(x)
        plain = model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output
        table = embeddings.position_embedding.weight
        square = table[1:].T.reshape(1, -1, 4, 4)
        grid = torch.nn.functional.interpolate(square, (n, n), mode="bicubic", antialias=True)[0].flatten(1).T
        embeddings.position_embedding = torch.nn.Embedding.from_pretrained(torch.cat([table[:1], grid]))
        embeddings.position_ids, embeddings.image_size = torch.arange(1 + n * n)[None], side
        theirs = model.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(vlm.image_embeddings(x), theirs, rtol=1e-4, atol=1e-5)
    assert float((theirs - plain).abs().max()) > 0.01


def test_another_resolution_of_a_resnet(tmp_path):
    narrow = dict(hidden_size=64, num_attention_heads=1)
    vit = open_clip_tensors(write_clip(tmp_path / "vit", image=narrow, text=narrow))
    tensors = resnet_tensors(vit)
    write_openai(tmp_path / "rn" / "rn.pt", tensors, script=False)
    clip = read_pretrained(f"{tmp_path / 'rn' / 'rn.pt'}@96").clip.double()
    x = torch.rand(2, 3, 96, 96, dtype=torch.double)
    place = tensors["visual.attnpool.positional_embedding"].double()
    grid = place[1:].T.reshape(1, -1, 2, 2)
    wide = torch.nn.functional.interpolate(grid, (3, 3), mode="bicubic", align_corners=False)[0].flatten(1).T
    t = {name: value.double() for name, value in tensors.items() if name.startswith("visual.")}
    theirs = naive_resnet(t, clip.config.preprocess(x), (1, 2, 1, 2), 4, torch.cat([place[:1], wide]))
    torch.testing.assert_close(clip.encode_image(x), theirs[:, 0], rtol=0, atol=1e-9)


def test_a_resolution_belongs_to_what_a_model_is(clip_folder, tmp_path, image_folder):
    """Another content hash than at its own; the same at its own; a tuned run comes back at the side it was tuned at,
    and its export has the interpolated positions."""
    from transformers import CLIPModel

    from advtune import load_task, tune
    from advtune.export import export

    plain, same, other = (read_pretrained(f"{clip_folder}{end}").sha256 for end in ("", "@16", "@24"))
    assert plain == same != other
    tuned = tune("tecoa", load(f"{clip_folder}@24", "cpu", "fp32"), load_task(f"folder:{image_folder}"), shots=1,
                 epochs=1, out=str(tmp_path / "run"))  # fmt: skip
    again, x = load(str(tmp_path / "run"), "cpu", "fp32"), torch.rand(2, 3, 24, 24)
    assert again.side == 24
    torch.testing.assert_close(again.image_features(x), tuned.image_features(x))
    export(str(tmp_path / "run"), "huggingface", tmp_path / "out")
    theirs = CLIPModel.from_pretrained(tmp_path / "out")
    assert theirs.config.vision_config.image_size == 24
    image = theirs.get_image_features(pixel_values=tuned.clip.config.preprocess(x)).pooler_output
    torch.testing.assert_close(tuned.image_embeddings(x), image, rtol=1e-4, atol=1e-5)


def test_a_side_that_no_image_can_have(clip_folder):
    for side, message in ((2, "at least 4"), (0, "from 1 to"), (99999, "from 1 to")):
        with pytest.raises(UserError, match=message):
            read_pretrained(f"{clip_folder}@{side}")
    assert json.loads((clip_folder / "config.json").read_text())["vision_config"]["image_size"] == 16


def test_a_folder_with_such_a_name_is_that_folder(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "a+b@24")
    assert read_pretrained(str(tmp_path / "a+b@24")).clip.config.image_size == 16
    assert read_pretrained(f"{tmp_path / 'a+b@24'}@24").clip.config.image_size == 24


def test_image_size_on_the_command_line(clip_folder, image_folder, tmp_path, monkeypatch, capsys):
    """It is B@N; a run keeps its own. The run finds its backbone by the way that leads there from its folder."""
    from advtune import cli

    shutil.copytree(clip_folder, tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    data = ["--data", f"folder:{image_folder}"]
    given = ["train", "tecoa", "--backbone", "clip", "--image-size", "24", "--shots", "1", "--epochs", "1"]
    assert cli.main([*given, *data, "--out", "run"]) == 0
    facts = json.loads((tmp_path / "run" / "config.json").read_text())["backbone"]
    assert (facts["name"], facts["path"], facts["image_size"]) == ("clip@24", "../clip@24", 24)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(str(tmp_path / "run"), "cpu", "fp32").clip.config.image_size == 24
    capsys.readouterr()
    assert cli.main(["train", "tecoa", "--backbone", "../run", "--image-size", "16", *data, "--out", "x"]) == 2
    assert "stays with the backbone and image size" in capsys.readouterr().err
