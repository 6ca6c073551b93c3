"""OpenAI's archives and ResNets: read without running them, equal to transformers' ViT and to a ResNet written out
naively; image towers of others laid over a model."""

import pickle
import zipfile

import numpy as np
import pytest
import torch

from advtune import load, load_task, tune
from advtune.errors import UserError
from advtune.formats.openai import configuration
from advtune.pretrained import read_pretrained
from backbones import open_clip_tensors, resnet_tensors, spread, write_openai, write_siglip
from conftest import write_clip

TEXTS = ["a photo of a red dog", "blue"]
SHAPE = dict(
    image=dict(hidden_size=64, num_attention_heads=1, intermediate_size=96, num_hidden_layers=2),
    text=dict(hidden_size=64, num_attention_heads=1, num_hidden_layers=2, intermediate_size=80),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A ViT whose heads are as wide as OpenAI's."""
    return spread(write_clip(tmp_path_factory.mktemp("clip"), **SHAPE))


@pytest.fixture(scope="module")
def archive(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("openai") / "ViT-tiny.pt"
    write_openai(file, open_clip_tensors(model))
    return file


@pytest.fixture(scope="module")
def resnet(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("resnet") / "RN-tiny.pt"
    write_openai(file, resnet_tensors(open_clip_tensors(model)))
    return file


@pytest.mark.parametrize("script", [True, False])
def test_a_vit_equals_transformers(script, model, archive, tmp_path):
    """From fp16 in TorchScript, and from a plain state dict."""
    if not script:
        write_openai(tmp_path / "plain.pt", open_clip_tensors(model), script=False)
    vlm = load(str(archive if script else tmp_path / "plain.pt"), "cpu", "fp32")
    half = model.half().float() if script else model
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = vlm.tokenizer(TEXTS)
    ours = vlm.logits(x, vlm.text_features(tokens))
    theirs = half(input_ids=tokens, pixel_values=vlm.clip.config.preprocess(x)).logits_per_image
    assert float((ours - theirs).detach().abs().max()) < 1e-4
    mine, other = (torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in (ours, theirs))
    assert float((mine - other).abs().max()) < 1e-4 * max(1.0, float(other.abs().max()))


def test_the_code_in_an_archive_is_not_run(archive, tmp_path):
    """What stands under code/ may be anything; a pickle that calls another function than a tensor's is refused."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        for each in old.infolist():
            new.writestr(each.filename, b"not even Python" if "/code/" in each.filename else old.read(each))
    (tmp_path / "tokenizer.json").write_bytes((archive.parent / "tokenizer.json").read_bytes())
    assert torch.equal(
        read_pretrained(str(tmp_path / "x.pt")).clip.text.position, read_pretrained(str(archive)).clip.text.position
    )

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for payload in (Evil(), {"state_dict": {"x": Evil()}}):
        torch.save(payload, tmp_path / "evil.pt")
        with pytest.raises(UserError, match="could run code"):
            read_pretrained(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()


def written(file, instructions, storage=b"\0" * 16, packed=False):
    with zipfile.ZipFile(file, "w") as new:
        new.writestr("a/data.pkl", instructions)
        new.writestr("a/data/0", storage, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)


def view(size, stride=(1,), count=4, offset=0):
    """The pickle of a tensor over the first storage."""

    class Stored:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Stored) else None

    import io

    class Rebuilt:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Stored(), offset, size, stride, False, None)

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"x": Rebuilt()})
    return stream.getvalue()


def doubled(depth):
    """The pickle of a table that holds one twice, which holds one twice, and so on: small, and never gone through."""
    found = {}
    for _ in range(depth):
        found = {"a": found, "b": found}
    return pickle.dumps(found, 2)


HOSTILE = {
    "tables without end": (dict(instructions=doubled(40)), "more than 100000 tables"),
    "beyond its numbers": (dict(instructions=view((5,))), "damaged"),
    "before them": (dict(instructions=view((1,), offset=-3)), "damaged"),
    "more numbers than there are": (dict(instructions=view((4,), count=9)), "4 of 9 numbers"),
    "packed": (dict(instructions=view((4,)), storage=b"\0" * 10**6, packed=True), "is packed"),
    "no pickle": (dict(instructions=b"\x80\x02"), "damaged|could run code"),
    "a global of builtins": (dict(instructions=b"cbuiltins\neval\n."), "asks for builtins.eval"),
    "a dotted name": (dict(instructions=b"\x80\x04\x8c\x05torch\x8c\x09hub.load_\x93."), "damaged|asks for"),
    "nothing of the kind": (dict(instructions=view((4,))), "no model of OpenAI's"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_in_one_line(name, tmp_path):
    how, message = HOSTILE[name]
    written(tmp_path / "x.pt", **how)
    with pytest.raises(UserError, match=message) as error:
        read_pretrained(str(tmp_path / "x.pt"))
    assert "\n" not in str(error.value)


def test_every_place_where_an_archive_may_be_cut_is_one_line(archive, tmp_path):
    data = archive.read_bytes()
    for end in (3, 100, len(data) // 2, len(data) - 5):
        (tmp_path / "x.pt").write_bytes(data[:end])
        with pytest.raises(UserError):
            read_pretrained(str(tmp_path / "x.pt"))


def test_the_tokenizer_of_openai_s_package(archive, tmp_path):
    """bpe_simple_vocab_16e6.txt.gz, of whose merges the first 48894 are used: ids as of vocab.json and merges.txt."""
    import gzip

    from tokenizers import pre_tokenizers

    from advtune.tokenizer import load_encoder

    merges = ["p h", "ph o", "pho t", "phot o</w>", "o f</w>", "r e", "re d</w>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    rest = [f"{a} {b}" for a in letters for b in letters if a + b not in ("ph", "re")]
    lines = ["#version", *merges, *rest[: 48894 - len(merges)], "never used", "nor this"]
    with gzip.open(tmp_path / "bpe_simple_vocab_16e6.txt.gz", "wt") as stream:
        stream.write("\n".join(lines))
    encoder = load_encoder(tmp_path)
    assert encoder.get_vocab_size() == 49408
    assert (encoder.token_to_id("<|startoftext|>"), encoder.token_to_id("<|endoftext|>")) == (49406, 49407)
    assert [encoder.token_to_id(each) for each in ("!", "a", "¡", "Ā", "!</w>", "ph")] == [0, 64, 94, 188, 256, 512]
    ids = encoder.encode("Photo  of red", add_special_tokens=False).ids
    assert ids == [512 + 3, 512 + 4, 512 + 6]
    with pytest.raises(UserError, match="is not CLIP's"):  # of another size than the model's vocabulary
        (tmp_path / "x.pt").write_bytes(archive.read_bytes())
        read_pretrained(str(tmp_path / "x.pt"))


# --- ResNets -----------------------------------------------------------------------------------------


def convolved(x, weight, stride=1):
    """A convolution as a sum over its places, zeros around."""
    k = weight.shape[-1]
    x = torch.nn.functional.pad(x, (k // 2,) * 4)
    rows, columns = ((x.shape[i] - k) // stride + 1 for i in (2, 3))
    out = 0
    for i in range(k):
        for j in range(k):
            part = x[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride]
            out = out + torch.einsum("bchw,oc->bohw", part, weight[:, :, i, j])
    return out


def batch_normed(x, t, name):
    mean, var, weight, bias = (
        t[f"{name}.{each}"].view(-1, 1, 1) for each in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


def halved(x):
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def naive_resnet(t, x, stages, heads, position=None):
    """Normalised images [B, 3, S, S] -> embeddings of the mean and all places [B, 1 + N, D]."""
    t = {name.removeprefix("visual."): value for name, value in t.items()}
    for i, stride in ((1, 2), (2, 1), (3, 1)):
        x = batch_normed(convolved(x, t[f"conv{i}.weight"], stride), t, f"bn{i}").clamp(min=0)
    x = halved(x)
    for stage, blocks in enumerate(stages, start=1):
        for block in range(blocks):
            name, shrink = f"layer{stage}.{block}", halved if stage > 1 and block == 0 else lambda v: v
            y = batch_normed(convolved(x, t[f"{name}.conv1.weight"]), t, f"{name}.bn1").clamp(min=0)
            y = batch_normed(convolved(y, t[f"{name}.conv2.weight"]), t, f"{name}.bn2").clamp(min=0)
            y = batch_normed(convolved(shrink(y), t[f"{name}.conv3.weight"]), t, f"{name}.bn3")
            if f"{name}.downsample.0.weight" in t:
                x = batch_normed(convolved(shrink(x), t[f"{name}.downsample.0.weight"]), t, f"{name}.downsample.1")
            x = (x + y).clamp(min=0)
    places = [x[:, :, i, j] for i in range(x.shape[2]) for j in range(x.shape[3])]
    x = torch.stack([sum(places) / len(places), *places], 1)
    x = x + (t["attnpool.positional_embedding"] if position is None else position)
    q, k, v = (x @ t[f"attnpool.{c}_proj.weight"].T + t[f"attnpool.{c}_proj.bias"] for c in "qkv")
    size, out = x.shape[2] // heads, []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        out.append(torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / size**0.5, -1) @ v[..., part])
    return torch.cat(out, 2) @ t["attnpool.c_proj.weight"].T + t["attnpool.c_proj.bias"]


def test_a_resnet_equals_a_naive_one(resnet, model):
    """Values, dense embeddings and the gradient by the pixels, in double precision."""
    clip = read_pretrained(str(resnet)).clip.double()
    t = {k: v.half().double() for k, v in resnet_tensors(open_clip_tensors(model)).items() if k.startswith("visual.")}
    assert clip.config.vision.stages == (1, 2, 1, 2)
    assert clip.config.image_size == 64
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.double).requires_grad_()
    ours, dense = clip.encode_image(x), clip.encode_image(x, dense=True)
    theirs = naive_resnet(t, clip.config.preprocess(x), (1, 2, 1, 2), 4)
    assert float(theirs.detach().std()) > 0.1
    torch.testing.assert_close(ours, theirs[:, 0], rtol=0, atol=1e-9)
    torch.testing.assert_close(dense, theirs, rtol=0, atol=1e-9)
    weight = torch.randn(dense.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    mine, other = (torch.autograd.grad((v * weight).sum(), x)[0] for v in (dense, theirs))
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)


def test_tuning_a_resnet_moves_weights_and_no_statistics(resnet, image_folder, tmp_path):
    """Batch norms learn their weights and stay with the statistics that came with them, in train mode, too."""
    vlm = load(str(resnet), "cpu", "fp32")
    before = {k: v.clone() for k, v in vlm.clip.image.state_dict().items()}
    tuned = tune("tecoa", vlm, load_task(f"folder:{image_folder}"), shots=1, epochs=1, out=str(tmp_path / "run"))
    tuned.clip.image.train()(torch.rand(2, 3, 64, 64))
    moved = {k for k, v in tuned.clip.image.state_dict().items() if not torch.equal(v, before[k])}
    statistics = {k for k in before if "running" in k}
    assert statistics
    assert not moved & statistics
    assert {"bn1.weight", "layer4.1.conv3.weight", "attnpool.c_proj.weight"} <= moved
    again = load(str(tmp_path / "run"), "cpu", "fp32")
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.image_features(x), tuned.image_features(x))
    assert not any("running" in name for name in again.delta())


def test_a_resnet_has_no_place_for_image_prompts(resnet):
    vlm = load(str(resnet), "cpu", "fp32")
    with pytest.raises(UserError, match="is a ResNet, which has none: take a method") as error:
        vlm.with_prompts("a photo of a {}", 2, 2, 2)
    assert "\n" not in str(error.value)
    assert vlm.with_prompts("a photo of a {}", 2, 0, 2).prompts().image is None
    low = load(str(resnet), "cpu", "bf16")
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(low.image_features(x), vlm.image_features(x), atol=0.03, rtol=0)


FULL = {
    "RN50": ((3, 4, 6, 3), 64, 1024, 224, (512, 8)),
    "RN101": ((3, 4, 23, 3), 64, 512, 224, (512, 8)),
    "RN50x4": ((4, 6, 10, 6), 80, 640, 288, (640, 10)),
}
COUNTS = {"RN50": 38_316_896, "RN101": 56_259_936, "RN50x4": 87_137_080}  # of the image towers, as published


@pytest.mark.parametrize("name", FULL)
def test_full_sizes_from_their_shapes(name):
    """The shapes of OpenAI's files, written out from the paper's table, give the model, and its number of weights."""
    from advtune.clip import CLIP

    stages, width, embed, side, (text, heads) = FULL[name]
    t = {
        "visual.attnpool.positional_embedding": ((side // 32) ** 2 + 1, width * 32),
        "visual.layer1.0.conv1.weight": (width, width, 1, 1),
        "visual.conv1.weight": (width // 2, 3, 3, 3),
        "text_projection": (text, embed), "positional_embedding": (77, text), "ln_final.weight": (text,),
        "token_embedding.weight": (49408, text), "transformer.resblocks.11.ln_1.weight": (text,),
        "transformer.resblocks.0.mlp.c_fc.weight": (4 * text, text),
    }  # fmt: skip
    for stage, blocks in enumerate(stages, start=1):
        t[f"visual.layer{stage}.{blocks - 1}.bn1.weight"] = (1,)
    config = configuration({name: torch.empty(shape, device="meta") for name, shape in t.items()})
    assert (config.vision.stages, config.embed, config.image_size, config.text.heads) == (stages, embed, side, heads)
    assert (config.text.layers, config.image.heads) == (12, width * 32 // 64)
    with torch.device("meta"):
        clip = CLIP(config)
    assert sum(p.numel() for p in clip.image.parameters()) == COUNTS[name]


# --- image towers alone --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "clip"
    write_clip(folder, **SHAPE)
    return folder


def wrapped(tensors):
    """A checkpoint as the training scripts of TeCoA and PMG-AFT write it: the best accuracy is a mean of numpy's."""
    from argparse import Namespace

    weight = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    beside = {"epoch": 3, "args": Namespace(lr=0.1), "best_acc1": np.mean([40.5, 41.0]), "seen": np.zeros(3)}
    return {**beside, "add_prompter": {}, "optimizer": optimizer.state_dict(), **tensors}


def visual(model):
    return {k.removeprefix("visual."): v for k, v in open_clip_tensors(model).items() if k.startswith("visual.")}


FILES = {
    "FARE: bare": lambda m: visual(m),
    "visual.": lambda m: {f"visual.{k}": v for k, v in visual(m).items()},
    "module.visual. in state_dict": lambda m: wrapped(
        {"state_dict": {f"module.visual.{k}": v for k, v in visual(m).items()}}
    ),
    "TeCoA: vision_encoder_state_dict": lambda m: wrapped(
        {"state_dict": {k: v * 0 for k, v in open_clip_tensors(m).items()}, "vision_encoder_state_dict": visual(m)}
    ),
    "the whole model": lambda m: {"model": open_clip_tensors(m)},
    "Hugging Face": lambda m: {k: v for k, v in m.state_dict().items() if k.startswith("vis")},
    "Hugging Face in module.": lambda m: {"state_dict": {f"module.{k}": v for k, v in m.state_dict().items()}},
}


@pytest.mark.parametrize("name", FILES)
def test_an_image_tower_is_laid_over_its_base(name, model, base, tmp_path):
    file = tmp_path / "tower.pt"
    torch.save(FILES[name](model), file)
    read, plain = read_pretrained(f"{base}+{file}"), read_pretrained(str(base))
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs = model.get_image_features(pixel_values=read.clip.config.preprocess(x)).pooler_output
    torch.testing.assert_close(read.clip.encode_image(x), theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain.clip.encode_image(x), theirs, atol=0.1)
    assert torch.equal(read.clip.text.embed.weight, plain.clip.text.embed.weight)
    assert read.sha256 != plain.sha256
    assert read.name == f"{base}+{file}"


def test_a_safetensors_file_and_a_siglip_tower(tmp_path):
    from safetensors.torch import save_file

    write_siglip(tmp_path / "base")
    other = write_siglip(tmp_path / "other", seed=4)
    with torch.no_grad():
        other.vision_model.head.probe.add_(1)
    tower = {k: v for k, v in other.state_dict().items() if k.startswith("vision_model.")}
    save_file(tower, tmp_path / "tower.safetensors")
    clip = read_pretrained(f"{tmp_path / 'base'}+{tmp_path / 'tower.safetensors'}").clip
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs = other.get_image_features(pixel_values=x * 2 - 1).pooler_output
    torch.testing.assert_close(clip.encode_image(x), theirs, rtol=1e-4, atol=1e-4)


def without(tensors, name):
    return {k: v for k, v in tensors.items() if k != name}


BAD = {
    "one missing": (lambda m: without(visual(m), "ln_post.bias"), "1 tensor is missing, first visual.ln_post.bias"),
    "no projection": (
        lambda m: {k: v for k, v in m.state_dict().items() if k.startswith("vision_model.")},
        "missing, first visual_projection.weight",
    ),
    "one too many": (
        lambda m: visual(m) | {"adapter": torch.zeros(2)},
        "not of this image tower, first visual.adapter",
    ),
    "another shape": (
        lambda m: visual(m) | {"class_embedding": torch.zeros(60)},
        r"visual.class_embedding has shape \(60,\), the configuration asks for \(64,\)",
    ),
    "not a number": (lambda m: visual(m) | {"class_embedding": torch.full((64,), torch.nan)}, "nan or infinite"),
    "another kind": (lambda m: resnet_tensors(open_clip_tensors(m)), "named as of another kind of tower"),
    "no tower": (lambda m: {"prompt": torch.zeros(3)}, "holds no image tower"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_tower_that_does_not_fit_is_refused_and_named(name, model, base, tmp_path):
    make, message = BAD[name]
    torch.save(make(model), tmp_path / "tower.pt")
    with pytest.raises(UserError, match=message) as error:
        read_pretrained(f"{base}+{tmp_path / 'tower.pt'}")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file; BASE"):
        read_pretrained(f"{base}+{tmp_path / 'nowhere.pt'}")
