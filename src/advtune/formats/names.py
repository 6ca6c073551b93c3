"""How OpenAI and open_clip name the tensors of both towers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from advtune.clip import ClipConfig
from advtune.resnet import ResNet

BLOCK = {"norm1": "ln_1", "out": "attn.out_proj", "norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
Names = dict[str, tuple[str, ...]]


def without(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors without a prefix that all of them have; as they are, where one has it not."""
    if tensors and all(name.startswith(prefix) for name in tensors):
        return {name.removeprefix(prefix): value for name, value in tensors.items()}
    return dict(tensors)


def blocks(tower: str, prefix: str, layers: int) -> Names:
    """A tower's layers."""
    names: Names = {}
    for i in range(layers):
        ours, theirs = f"{tower}.blocks.{i}", f"{prefix}transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            names[f"{ours}.qkv.{kind}"] = (f"{theirs}.attn.in_proj_{kind}",)
            names |= {f"{ours}.{one}.{kind}": (f"{theirs}.{other}.{kind}",) for one, other in BLOCK.items()}
    return names


def visual(config: ClipConfig, prefix: str = "visual.") -> Names:
    """Our names of a ViT's or ResNet's tensors -> theirs; `proj` lies there the other way round."""
    if config.vision.stages:
        with torch.device("meta"):
            return {f"image.{name}": (f"{prefix}{name}",) for name in ResNet(config).state_dict()}
    names = {
        "image.class_token": (f"{prefix}class_embedding",),
        "image.position": (f"{prefix}positional_embedding",),
        "image.embed.weight": (f"{prefix}conv1.weight",),
        "image.project.weight": (f"{prefix}proj",),
    }
    norms = {"norm_post": "ln_post"} | ({"norm_pre": "ln_pre"} if config.vision.norm_pre else {})
    for kind in ("weight", "bias"):
        names |= {f"image.{ours}.{kind}": (f"{prefix}{theirs}.{kind}",) for ours, theirs in norms.items()}
    return names | blocks("image", prefix, config.image.layers)


def words(config: ClipConfig, prefix: str = "") -> Names:
    """Our names of the text tower's tensors -> theirs; a plain `text_projection` lies there the other way round."""
    names = {
        "text.embed.weight": (f"{prefix}token_embedding.weight",),
        "text.position": (f"{prefix}positional_embedding",),
        "text.norm_post.weight": (f"{prefix}ln_final.weight",),
        "text.norm_post.bias": (f"{prefix}ln_final.bias",),
    }
    if config.words.project == "affine":
        names |= {f"text.project.{kind}": (f"{prefix}text_projection.{kind}",) for kind in ("weight", "bias")}
    elif config.words.project == "linear":
        names["text.project.weight"] = (f"{prefix}text_projection",)
    return names | blocks("text", prefix, config.text.layers)
