"""Our parameters and Hugging Face's tensors: the names, and the copy in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from advtune.clip import CLIP, ClipConfig, ImageTower
from advtune.errors import UserError
from advtune.untrusted import visible
from advtune.weights import check_floats

BUFFERS = frozenset({"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"})


class Layout(NamedTuple):
    """How others name what we have. names: our parameter or buffer -> theirs, several stacked along the first axis.
    transposed: ours whose matrix lies there the other way round. aside: tensors that are no weights. otherwise: what to
    do when they do not fit."""

    names: dict[str, tuple[str, ...]]
    transposed: frozenset[str] = frozenset()
    aside: frozenset[str] = BUFFERS
    kind: str = "a CLIP model"
    otherwise: str = "weights and configuration are not of one model, fetch both again"


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


def fill(clip: CLIP, tensors: Mapping[str, Tensor], source: Path, how: Layout | None = None) -> CLIP:
    """Copy tensors into our parameters and buffers, on the processor, in fp32; a model on the meta device gets its
    memory once every shape is right. how: whose names they have; by default Hugging Face's of a CLIP. Raises UserError
    naming what does not fit."""
    how = how or Layout(layout(clip.config))
    fits({name: value.shape for name, value in clip.state_dict().items()}, tensors, source, how)
    for group in how.names.values():
        for name in group:
            check_floats(name, tensors[name], source)
    clip = clip.to_empty(device="cpu")
    for ours, value in clip.state_dict().items():
        value.copy_(torch.cat(parts(ours, value.shape, tensors, how)).reshape(value.shape))
    return clip


def fits(shapes: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], source: Path, how: Layout) -> None:
    """Raises UserError naming the first tensor that is missing, unknown or of another shape than our own."""
    missing, unknown = gaps(tensors, how)
    if missing:
        raise UserError(f"{source}: {count(missing)} missing, first {missing[0]}; {how.otherwise}")
    if unknown:
        first = visible(unknown[0])[:100]
        raise UserError(f"{source}: {count(unknown)} not of {how.kind}, first {first}; {how.otherwise}")
    assert set(shapes) == set(how.names), "layout and CLIP disagree"
    for name, own, asked in misshapen(shapes, tensors, how):
        raise UserError(f"{source}: {name} has shape {own}, the configuration asks for {asked}; {how.otherwise}")


def count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def gaps(tensors: Mapping[str, Tensor], how: Layout) -> tuple[list[str], list[str]]:
    """The names of tensors that are missing, and of those that belong to no parameter."""
    wanted = {name for group in how.names.values() for name in group}
    return sorted(wanted - set(tensors)), sorted(set(tensors) - wanted - how.aside)


def misshapen(
    shapes: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], how: Layout
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """The tensors of another shape than our own: name, shape, and what the configuration asks for. A parameter of which
    a part is missing is passed over."""
    for ours, group in how.names.items():
        if not set(group) <= set(tensors):
            continue
        own, rows = shapes[ours], parts(ours, shapes[ours], tensors, how)
        if {r.shape[1:] for r in rows} == {own[1:]} and sum(len(r) for r in rows) == (own[0] if own else 1):
            continue
        share = (own[0] // len(group), *own[1:]) if own else (1,)
        name = next((n for n, r in zip(group, rows, strict=True) if tuple(r.shape) != share), group[0])
        asked = share if own else ()
        yield name, tuple(tensors[name].shape), asked[::-1] if ours in how.transposed else asked


def parts(ours: str, own: torch.Size, tensors: Mapping[str, Tensor], how: Layout) -> list[Tensor]:
    """What one of our parameters is made of, to be stacked along the first axis."""
    found = []
    for name in how.names[ours]:
        value = tensors[name]
        if value.numel() == 1 and own.numel() == 1:
            value = value.reshape(own)
        while value.dim() > len(own) and value.shape[0] == 1:  # a batch of one
            value = value[0]
        if value.dim() == 4 and len(own) == 2:  # the patches' convolution
            value = value.flatten(1)
        value = value.T if ours in how.transposed and value.dim() == 2 else value
        found.append(value if value.dim() else value[None])
    return found


def to_huggingface(clip: CLIP, names: Mapping[str, tuple[str, ...]] | None = None) -> dict[str, Tensor]:
    """Our parameters under Hugging Face's names, by default a CLIP's; the inverse of `fill`."""
    parameters, config = clip.state_dict(), clip.config
    tensors: dict[str, Tensor] = {}
    for ours, group in (names or layout(config)).items():
        value = parameters[ours]
        if ours == "image.position" and isinstance(clip.image, ImageTower):
            value = clip.image.positions().detach()
        if ours == "image.embed.weight":
            value = value.unflatten(1, (3, config.patch, config.patch))
        if ours == "image.pool.probe":
            value = value[None, None]
        if config.sigmoid and ours in ("logit_scale", "logit_bias"):
            value = value[None]
        tensors |= dict(zip(group, value.chunk(len(group)) if len(group) > 1 else (value,), strict=True))
    return {name: value.contiguous().clone() for name, value in tensors.items()}
