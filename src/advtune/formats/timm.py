"""SigLIP's image towers as timm names them, inside open_clip's format. Other towers of timm's are not read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from advtune.clip import ClipConfig, TowerConfig
from advtune.errors import UserError
from advtune.formats.names import Names
from advtune.formats.siglip import VISION
from advtune.shapes import ImageShape
from advtune.untrusted import visible

NAME = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d{1,2})_siglip_(\d{1,4})")
SIZES = {"base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096), "so400m": (1152, 27, 16, 4304),
         "giantopt": (1536, 40, 16, 6144)}  # fmt: skip
TANH = {("base", 32), ("so400m", 16), ("giantopt", 16)}  # their GELU is the approximate one
BLOCK = {"norm1": "norm1", "qkv": "attn.qkv", "out": "attn.proj", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
POOL = {"out": "proj", "norm": "norm", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
TRUNK = "visual.trunk."


def tower(raw: Mapping[str, Any]) -> tuple[TowerConfig, ImageShape, int]:
    """The tower of a timm_model_name, how it is read, and its patch. Raises UserError for other names than SigLIP's."""
    name, pool, project = raw["timm_model_name"], raw.get("timm_pool", "avg"), raw.get("timm_proj", "linear")
    found = NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None or pool != "map" or project not in ("none", None, ""):
        what = f"timm_model_name {visible(repr(name))[:60]} with pool {pool!r:.20} and projection {project!r:.20}"
        raise UserError(f"{what} is not read; of timm's towers SigLIP's are")
    size, patch, side = found[1], int(found[2]), int(found[3])
    width, layers, heads, mlp = SIZES[size]
    tanh = (size, patch) in TANH or (size, side) == ("large", 512)
    tower = TowerConfig(width, layers, heads, mlp, "gelu_pytorch_tanh" if tanh else "gelu", 1e-6)
    return tower, VISION, patch


def names(config: ClipConfig) -> Names:
    """Our names of the image tower's tensors -> timm's below open_clip's `visual.trunk.`"""
    names: Names = {
        "image.position": (f"{TRUNK}pos_embed",),
        "image.pool.probe": (f"{TRUNK}attn_pool.latent",),
    }
    for kind in ("weight", "bias"):
        names[f"image.embed.{kind}"] = (f"{TRUNK}patch_embed.proj.{kind}",)
        names[f"image.norm_post.{kind}"] = (f"{TRUNK}norm.{kind}",)
        names[f"image.pool.qkv.{kind}"] = (f"{TRUNK}attn_pool.q.{kind}", f"{TRUNK}attn_pool.kv.{kind}")
        names |= {f"image.pool.{ours}.{kind}": (f"{TRUNK}attn_pool.{theirs}.{kind}",) for ours, theirs in POOL.items()}
        for i in range(config.image.layers):
            layer = f"{TRUNK}blocks.{i}"
            names |= {f"image.blocks.{i}.{ours}.{kind}": (f"{layer}.{theirs}.{kind}",)
                      for ours, theirs in BLOCK.items()}  # fmt: skip
    return names
