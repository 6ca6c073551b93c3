"""Small backbones in every format that is read, made from a random model of transformers' or of torch's own layers.
The conversions are written out here, apart from the package's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from conftest import tiny_tokenizer, write_clip

WORDS = [
    "▁a",
    "▁photo",
    "▁of",
    "▁red",
    "▁green",
    "▁blue",
    "▁x",
    "▁dog",
    "▁",
    "s",
    *"abcdefghijklmnopqrstuvwxyz0123456789",
]
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4
)  # fmt: skip


def spread(model):
    """Random weights of which every part has a say: transformers' start is nearly silent."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=random)
            if value.dim() > 1:
                value.copy_(noise * (2 / value.shape[-1]) ** 0.5 if "embedd" not in name else noise * 0.3)
            elif "logit" not in name:
                value.add_(0.1 * noise)
    return model.eval()


def unigram(folder: Path, clean=True):
    """A sentencepiece vocabulary as tokenizer.json, as SigLIP's: </s> ends and fills, no start."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = [("<unk>", -20.0), ("</s>", 0.0), *((word, -2.0 - 0.01 * i) for i, word in enumerate(WORDS))]
    encoder = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    if clean:
        marks = Regex(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]")
        encoder.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(marks, "")])
    encoder.pre_tokenizer = pre_tokenizers.Metaspace()
    encoder.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    encoder.add_special_tokens(["</s>", "<unk>"])
    encoder.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>", "eos_token": "</s>", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return len(vocabulary)


def bytepairs(folder: Path):
    """A byte-pair vocabulary as SigLIP 2's, saved by transformers' own tokenizer with an end token as on the hub."""
    from tokenizers import processors
    from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer

    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4}
    pairs = [("▁", "r"), ("▁r", "e"), ("▁re", "d"), ("o", "f")]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.!,'"]
    words = [*special, *letters, *("".join(pair) for pair in pairs)]
    tokenizer = Siglip2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=pairs)
    end = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer._tokenizer.post_processor = end
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    return len(words)


def write_siglip(folder: Path, *, image=None, text=None, words=unigram, seed=0):
    """A random transformers SiglipModel, saved with tokenizer and preprocessor config; returns the model."""
    from transformers import SiglipConfig, SiglipModel

    folder.mkdir(parents=True, exist_ok=True)
    size = words(folder)
    torch.manual_seed(seed)
    inner = dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, vocab_size=size,
        max_position_embeddings=64, projection_size=32,
    )  # fmt: skip
    config = SiglipConfig(vision_config=VISION | (image or {}), text_config=inner | (text or {}))
    model = spread(SiglipModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
        model.logit_bias.fill_(-4.0)
    model.save_pretrained(folder)
    side = config.vision_config.image_size
    facts = {"size": {"height": side, "width": side}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**facts, "image_processor_type": "SiglipImageProcessor"})
    )
    return model


PARTS = {"ln_1": "layer_norm1", "attn.out_proj": "self_attn.out_proj", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
         "mlp.c_proj": "mlp.fc2"}  # fmt: skip


def resblocks(tensors, theirs, layers):
    """transformers' layers as OpenAI and open_clip name them."""
    found = {}
    for i in range(layers):
        layer, block = f"{theirs}.encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            three = [tensors[f"{layer}.self_attn.{c}_proj.{kind}"] for c in "qkv"]
            found[f"{block}.attn.in_proj_{kind}"] = torch.cat(three)
            found |= {f"{block}.{one}.{kind}": tensors[f"{layer}.{other}.{kind}"] for one, other in PARTS.items()}
    return found


def open_clip_tensors(model, custom=False):
    """The tensors of a transformers CLIPModel as open_clip and OpenAI store them."""
    t, config = model.state_dict(), model.config
    image = {
        "class_embedding": t["vision_model.embeddings.class_embedding"],
        "positional_embedding": t["vision_model.embeddings.position_embedding.weight"],
        "conv1.weight": t["vision_model.embeddings.patch_embedding.weight"],
        "proj": t["visual_projection.weight"].T.contiguous(),
        **{f"ln_pre.{kind}": t[f"vision_model.pre_layrnorm.{kind}"] for kind in ("weight", "bias")},
        **{f"ln_post.{kind}": t[f"vision_model.post_layernorm.{kind}"] for kind in ("weight", "bias")},
        **resblocks(t, "vision_model", config.vision_config.num_hidden_layers),
    }
    text = {
        "token_embedding.weight": t["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": t["text_model.embeddings.position_embedding.weight"],
        "text_projection": t["text_projection.weight"].T.contiguous(),
        **{f"ln_final.{kind}": t[f"text_model.final_layer_norm.{kind}"] for kind in ("weight", "bias")},
        **resblocks(t, "text_model", config.text_config.num_hidden_layers),
    }
    prefix = "text." if custom else ""
    return {f"visual.{name}": value for name, value in image.items()} | {
        f"{prefix}{name}": value for name, value in text.items()
    } | {"logit_scale": t["logit_scale"]}  # fmt: skip


def open_clip_siglip_tensors(model):
    """The tensors of a transformers SiglipModel as open_clip stores them, the image tower being timm's."""
    t, config = model.state_dict(), model.config
    wide, head = config.vision_config.hidden_size, "vision_model.head"
    found = {
        "visual.trunk.pos_embed": t["vision_model.embeddings.position_embedding.weight"][None],
        "visual.trunk.attn_pool.latent": t[f"{head}.probe"],
        "text.token_embedding.weight": t["text_model.embeddings.token_embedding.weight"],
        "text.positional_embedding": t["text_model.embeddings.position_embedding.weight"],
        "logit_scale": t["logit_scale"].reshape(()),
        "logit_bias": t["logit_bias"].reshape(()),
    }
    for kind in ("weight", "bias"):
        found[f"visual.trunk.patch_embed.proj.{kind}"] = t[f"vision_model.embeddings.patch_embedding.{kind}"]
        found[f"visual.trunk.norm.{kind}"] = t[f"vision_model.post_layernorm.{kind}"]
        three = t[f"{head}.attention.in_proj_{kind}"]
        found[f"visual.trunk.attn_pool.q.{kind}"] = three[:wide].contiguous()
        found[f"visual.trunk.attn_pool.kv.{kind}"] = three[wide:].contiguous()
        for one, other in (("proj", "attention.out_proj"), ("norm", "layernorm"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):  # noqa: E501  # fmt: skip
            found[f"visual.trunk.attn_pool.{one}.{kind}"] = t[f"{head}.{other}.{kind}"]
        found[f"text.ln_final.{kind}"] = t[f"text_model.final_layer_norm.{kind}"]
        found[f"text.text_projection.{kind}"] = t[f"text_model.head.{kind}"]
        for i in range(config.vision_config.num_hidden_layers):
            layer, block = f"vision_model.encoder.layers.{i}", f"visual.trunk.blocks.{i}"
            found[f"{block}.attn.qkv.{kind}"] = torch.cat([t[f"{layer}.self_attn.{c}_proj.{kind}"] for c in "qkv"])
            for one, other in (("norm1", "layer_norm1"), ("attn.proj", "self_attn.out_proj"), ("norm2", "layer_norm2"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):  # noqa: E501  # fmt: skip
                found[f"{block}.{one}.{kind}"] = t[f"{layer}.{other}.{kind}"]
    blocks = resblocks(t, "text_model", config.text_config.num_hidden_layers)
    return found | {f"text.{name}": value for name, value in blocks.items()}


def open_clip_config(model, **more):
    """open_clip_config.json of a CLIPModel whose MLPs and heads are what open_clip computes them from."""
    image, text = model.config.vision_config, model.config.text_config
    return {
        "model_cfg": {
            "embed_dim": model.config.projection_dim,
            "vision_cfg": {
                "image_size": image.image_size,
                "layers": image.num_hidden_layers,
                "width": image.hidden_size,
                "head_width": image.hidden_size // image.num_attention_heads,
                "mlp_ratio": image.intermediate_size / image.hidden_size,
                "patch_size": image.patch_size,
            },
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "width": text.hidden_size,
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
                "mlp_ratio": text.intermediate_size / text.hidden_size,
            },
            **more,
        },
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic",
                           "resize_mode": "shortest"},
    }  # fmt: skip


def write_open_clip(folder: Path, *, activation="gelu", custom=False, image=None, text=None, edit=None, pickled=False):
    """A random CLIPModel saved in open_clip's format, with a CLIP tokenizer; returns the model. edit: changes the
    configuration and the tensors before they are written."""
    from safetensors.torch import save_file

    both = {"hidden_act": activation}
    model = write_clip(folder, image=both | (image or {}), text=both | (text or {}))
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (folder / name).unlink()
    config = open_clip_config(model, quick_gelu=activation == "quick_gelu")
    tensors = open_clip_tensors(model, custom)
    if edit is not None:
        edit(config["model_cfg"], tensors)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if pickled:
        torch.save({f"module.{name}": value for name, value in tensors.items()}, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(tensors, folder / "open_clip_model.safetensors")
    return model


class Named(nn.Module):
    """A tree of modules with given parameters and buffers, to be saved by TorchScript."""

    def __init__(self, tensors, buffers=()):
        super().__init__()
        inner: dict[str, dict] = {}
        for name, value in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                inner.setdefault(first, {})[rest] = value
            elif name in buffers or not value.is_floating_point():
                self.register_buffer(first, value)
            else:
                self.register_parameter(first, nn.Parameter(value))
        for first, rest in inner.items():
            self.add_module(first, Named(rest, buffers))


class Runs(Named):
    """With something that runs."""

    def forward(self, x: torch.Tensor):
        return x


def write_openai(file: Path, tensors, script=True):
    """A state dict as OpenAI's archive (TorchScript, fp16, with its three numbers) or as a plain one, beside a CLIP
    tokenizer."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(file.parent)
    if script:
        numbers = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
        half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
        buffers = ("running_mean", "running_var")
        torch.jit.save(torch.jit.script(Runs(half | numbers, buffers)), str(file))
    else:
        torch.save(tensors, file)


def resnet_tensors(vit, stages=(1, 2, 1, 2), width=8, embed=24, side=64):
    """OpenAI's names of a small random ResNet beside the text tower of `vit`."""
    random = torch.Generator().manual_seed(5)
    found = {name: value for name, value in vit.items() if not name.startswith("visual.")}

    def weight(name, *shape):
        fan = torch.tensor(shape[1:]).prod() if len(shape) > 1 else 1
        found[f"visual.{name}"] = torch.randn(shape, generator=random) * (2 / fan) ** 0.5

    def norm(name, channels):
        found[f"visual.{name}.weight"] = 1 + 0.2 * torch.randn(channels, generator=random)
        found[f"visual.{name}.bias"] = 0.2 * torch.randn(channels, generator=random)
        found[f"visual.{name}.running_mean"] = 0.2 * torch.randn(channels, generator=random)
        found[f"visual.{name}.running_var"] = 0.5 + torch.rand(channels, generator=random)
        found[f"visual.{name}.num_batches_tracked"] = torch.tensor(9)

    for i, (inside, outside) in enumerate(((3, width // 2), (width // 2, width // 2), (width // 2, width)), start=1):
        weight(f"conv{i}.weight", outside, inside, 3, 3)
        norm(f"bn{i}", outside)
    inside = width
    for stage, blocks in enumerate(stages, start=1):
        wide = width * 2 ** (stage - 1)
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            for i, shape in enumerate(((wide, inside, 1, 1), (wide, wide, 3, 3), (4 * wide, wide, 1, 1)), start=1):
                weight(f"{name}.conv{i}.weight", *shape)
                norm(f"{name}.bn{i}", shape[0])
            if block == 0:
                weight(f"{name}.downsample.0.weight", 4 * wide, inside, 1, 1)
                norm(f"{name}.downsample.1", 4 * wide)
            inside = 4 * wide
    weight("attnpool.positional_embedding", (side // 32) ** 2 + 1, inside)
    for each in ("q_proj", "k_proj", "v_proj", "c_proj"):
        rows = embed if each == "c_proj" else inside
        weight(f"attnpool.{each}.weight", rows, inside)
        found[f"visual.attnpool.{each}.bias"] = 0.1 * torch.randn(rows, generator=random)
    return found
