"""A dual encoder as a folder in Hugging Face's format, CLIP's or SigLIP's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from advtune.clip import CLIP, ClipConfig
from advtune.errors import UserError
from advtune.formats import siglip
from advtune.huggingface import layout, to_huggingface
from advtune.shapes import ImageShape, TextShape

NAMES = {"clip": layout, "siglip": siglip.names}


def write_pretrained(clip: CLIP, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors, as CLIPModel.from_pretrained, or of a SigLIP
    SiglipModel.from_pretrained, reads them. The tokenizer's files are the caller's. Raises UserError for towers that
    neither has a place for."""
    kind = kind_of(clip.config)
    folder.mkdir(parents=True, exist_ok=True)
    config = configuration(clip.config, kind)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor(clip.config, kind), indent=1) + "\n")
    tensors = {name: value.to(dtype) for name, value in to_huggingface(clip, NAMES[kind](clip.config)).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def kind_of(c: ClipConfig) -> str:
    """Which of Hugging Face's models this is. Raises UserError when it is none."""
    vision = dataclasses.replace(c.vision, native=0, smooth=False)
    texts = dataclasses.replace(c.words, pad=None, fixed=False, clean="none")
    if not c.sigmoid and c.start_token is not None and (vision, texts) == (ImageShape(), TextShape()):
        return "clip"
    if c.sigmoid and (vision, texts) == (siglip.VISION, dataclasses.replace(siglip.WORDS, fixed=False)):
        return "siglip"
    tower = "a ResNet" if vision.stages else "of other towers than CLIP's and SigLIP's"
    raise UserError(
        f"the backbone is {tower}, and transformers has no model for it; use --to onnx or --to prompts, or keep the run"
    )


def configuration(c: ClipConfig, kind: str) -> dict[str, Any]:
    """What config.json says."""
    towers: dict[str, dict[str, Any]] = {}
    for key, tower in (("text_config", c.text), ("vision_config", c.image)):
        towers[key] = {
            "model_type": f"{kind}_{key.split('_')[0]}_model",
            "hidden_size": tower.width,
            "intermediate_size": tower.mlp,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "hidden_act": tower.activation,
            "layer_norm_eps": tower.eps,
            "projection_dim": c.embed,
        }
    towers["vision_config"] |= {"image_size": c.image_size, "patch_size": c.patch, "num_channels": 3}
    towers["text_config"] |= {
        "vocab_size": c.vocabulary,
        "max_position_embeddings": c.context,
        "bos_token_id": c.start_token,
        "eos_token_id": c.end_token,
        "pad_token_id": c.end_token,
    }
    if kind == "siglip":
        for facts in towers.values():
            del facts["projection_dim"]
        towers["text_config"]["projection_size"] = c.embed
        return {"architectures": ["SiglipModel"], "model_type": "siglip", **towers}
    return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": c.embed, **towers}


def preprocessor(c: ClipConfig, kind: str) -> dict[str, Any]:
    """What preprocessor_config.json says."""
    p = c.preprocess
    size = (
        {"shortest_edge": p.resize}
        if isinstance(p.resize, int)
        else p.resize and dict(zip(("height", "width"), p.resize, strict=True))
    )
    return {
        "image_processor_type": "SiglipImageProcessor" if kind == "siglip" else "CLIPImageProcessor",
        "do_resize": p.resize is not None,
        "size": size or {"shortest_edge": c.image_size},
        "resample": {"bilinear": 2, "bicubic": 3}[p.mode],
        "do_center_crop": p.crop is not None,
        "crop_size": {"height": p.crop or c.image_size, "width": p.crop or c.image_size},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }
