"""Our parameters and Hugging Face's tensors: the names, and the copy in both directions."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from advtune.clip import CLIP, ClipConfig
from advtune.errors import UserError
from advtune.untrusted import visible
from advtune.weights import check_floats

BUFFERS = {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}


def layout(config: ClipConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter name -> Hugging Face's. Several names are stacked along the first axis (q, k, v)."""
    names: dict[str, tuple[str, ...]] = {
        "logit_scale": ("logit_scale",),
        "image.class_token": ("vision_model.embeddings.class_embedding",),
        "image.embed.weight": ("vision_model.embeddings.patch_embedding.weight",),
        "image.position": ("vision_model.embeddings.position_embedding.weight",),
        "image.project.weight": ("visual_projection.weight",),
        "text.embed.weight": ("text_model.embeddings.token_embedding.weight",),
        "text.position": ("text_model.embeddings.position_embedding.weight",),
        "text.project.weight": ("text_projection.weight",),
    }
    norms = {
        "image.norm_pre": "vision_model.pre_layrnorm",
        "image.norm_post": "vision_model.post_layernorm",
        "text.norm_post": "text_model.final_layer_norm",
    }
    towers = (("image", "vision_model", config.image.layers), ("text", "text_model", config.text.layers))
    for kind in ("weight", "bias"):
        names |= {f"{ours}.{kind}": (f"{theirs}.{kind}",) for ours, theirs in norms.items()}
        for tower, prefix, layers in towers:
            for i in range(layers):
                ours, theirs = f"{tower}.blocks.{i}", f"{prefix}.encoder.layers.{i}"
                names |= {
                    f"{ours}.norm1.{kind}": (f"{theirs}.layer_norm1.{kind}",),
                    f"{ours}.qkv.{kind}": tuple(f"{theirs}.self_attn.{c}_proj.{kind}" for c in "qkv"),
                    f"{ours}.out.{kind}": (f"{theirs}.self_attn.out_proj.{kind}",),
                    f"{ours}.norm2.{kind}": (f"{theirs}.layer_norm2.{kind}",),
                    f"{ours}.fc1.{kind}": (f"{theirs}.mlp.fc1.{kind}",),
                    f"{ours}.fc2.{kind}": (f"{theirs}.mlp.fc2.{kind}",),
                }
    return names


def fill(clip: CLIP, tensors: dict[str, Tensor], source: Path) -> CLIP:
    """Copy Hugging Face tensors into our parameters, on the processor, in fp32; a model on the meta device gets its
    memory once every shape is right. Raises UserError naming what does not fit."""
    names = layout(clip.config)
    wanted = {name for group in names.values() for name in group}
    missing, unknown = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted - BUFFERS)
    if missing:
        raise UserError(f"{source}: {len(missing)} tensors are missing, first {missing[0]}")
    if unknown:
        raise UserError(f"{source}: {len(unknown)} tensors are not of a CLIP model, first {visible(unknown[0])[:100]}")
    shapes = {name: value.shape for name, value in clip.named_parameters()}
    assert set(shapes) == set(names), "layout() and CLIP disagree"
    for ours, group in names.items():
        for name in group:
            _check(name, tensors[name], shapes[ours], len(group), source)
    clip = clip.to_empty(device="cpu")
    for ours, parameter in clip.named_parameters():
        parts = [tensors[name].reshape(-1, *parameter.shape[1:]) for name in names[ours]]
        parameter.data.copy_(torch.cat(parts).reshape(parameter.shape))
    return clip


def _check(name: str, value: Tensor, ours: torch.Size, parts: int, source: Path) -> None:
    """Raises UserError unless a tensor is one of so many equal parts of our parameter, in finite numbers."""
    wanted = (ours[0] // parts, *ours[1:]) if ours else ()
    shape = tuple(value.shape)
    flat = (*shape[:1], math.prod(shape[1:])) if len(shape) == 4 else shape  # the patches' convolution
    if flat != wanted and not (value.numel() == 1 and math.prod(wanted) == 1):
        raise UserError(f"{source}: {name} has shape {shape}, config.json asks for {wanted}")
    check_floats(name, value, source)


def to_huggingface(clip: CLIP) -> dict[str, Tensor]:
    """Our parameters under Hugging Face's names; the inverse of `fill`."""
    parameters, config = dict(clip.named_parameters()), clip.config
    tensors: dict[str, Tensor] = {}
    for ours, group in layout(config).items():
        value = parameters[ours].detach()
        if ours == "image.embed.weight":
            value = value.unflatten(1, (3, config.patch, config.patch))
        tensors |= dict(zip(group, value.chunk(len(group)) if len(group) > 1 else (value,), strict=True))
    return {name: value.contiguous().clone() for name, value in tensors.items()}
