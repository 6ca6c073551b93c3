"""SigLIP and SigLIP 2 of one resolution in Hugging Face's format (arXiv:2303.15343, arXiv:2502.14786)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Encoder
from tokenizers import models

from advtune.clip import ClipConfig
from advtune.configuration import checked, table_of, tower, whole
from advtune.errors import UserError
from advtune.formats.found import Found
from advtune.huggingface import Layout, layout
from advtune.preprocess import SIDE, Preprocess, from_config
from advtune.shapes import ImageShape, TextShape
from advtune.tokenizer import frame, load_encoder, of_model
from advtune.weights import read_tensors, weight_files

DEFAULTS = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, layer_norm_eps=1e-6,
    hidden_act="gelu_pytorch_tanh",
)  # fmt: skip
FILES = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "config.json")
DECISIVE = {*FILES, "preprocessor_config.json"}
ABSENT = ("image.class_token", "image.norm_pre.", "image.project.")
HALF = (0.5, 0.5, 0.5)
VISION = ImageShape((), "attention", False, False, False, True, "none")
WORDS = TextShape("last", False, "affine", fixed=True)


def read(folder: Path) -> Found:
    """A SigLIP folder. Raises UserError as `read_pretrained`."""
    encoder = load_encoder(folder)
    config = checked(folder, lambda: configuration(folder, encoder))
    files = weight_files(folder)
    decisive = sorted(p for p in folder.iterdir() if p.name in DECISIVE and p.is_file())
    how = Layout(names(config), kind="a SigLIP model")
    return Found(config, read_tensors(files), how, of_model(encoder, config, folder), [*decisive, *files], folder)


def configuration(folder: Path, encoder: Encoder) -> ClipConfig:
    """config.json, preprocessor_config.json, and of the tokenizer what frames and fills a text: the ids in config.json
    are another tokenizer's. Raises what `checked` takes for a UserError."""
    raw = table_of(folder / "config.json")
    text, image = ({**DEFAULTS, **(raw.get(key) or {})} for key in ("text_config", "vision_config"))
    if image.get("vision_use_head") is False:
        raise UserError(f"{folder}: vision_use_head is false: without its head the image tower has no embedding")
    size = whole(image, "image_size", 224, most=SIDE)
    file = folder / "preprocessor_config.json"
    square = Preprocess((size, size), None, HALF, HALF)
    # Its image processor crops nothing.
    preprocess = from_config({"image_mean": HALF, "image_std": HALF, "size": {"height": size, "width": size},
                              **table_of(file), "do_center_crop": False}) if file.is_file() else square  # fmt: skip
    if preprocess.side not in (size, None):
        raise ValueError(f"pictures of {preprocess.side} pixels for a model of {size}")
    start, end = frame(encoder)
    width = whole(image, "hidden_size")
    if whole(text, "projection_size", whole(text, "hidden_size")) != width:
        raise ValueError(f"texts of {text.get('projection_size', text['hidden_size'])} numbers, images of {width}")
    first = isinstance(encoder.model, models.Unigram)  # SigLIP 2 has a byte-pair vocabulary, and keeps punctuation
    return ClipConfig(
        image=tower(image),
        text=tower(text),
        embed=width,
        image_size=size,
        patch=whole(image, "patch_size", 16, most=size),
        vocabulary=whole(text, "vocab_size", 32000, low=2),
        context=whole(text, "max_position_embeddings", 64, low=3),
        start_token=start,
        end_token=end,
        preprocess=preprocess,
        vision=VISION,
        words=replace(WORDS, pad=padding(folder, encoder), clean="punctuation" if first else "case"),
        sigmoid=True,
    )


def settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json, as far as they are there."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found |= table_of(folder / name)
    return found


def padding(folder: Path, encoder: Encoder) -> int:
    """The id that fills a row. Raises UserError when the folder does not say which."""
    token = settings(folder).get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    found = encoder.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        raise UserError(f"{folder}: tokenizer_config.json names no pad_token of the tokenizer's; get the whole folder")
    return int(found)


def names(config: ClipConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter name -> Hugging Face's."""
    found = {ours: theirs for ours, theirs in layout(config).items() if not ours.startswith(ABSENT)}
    found["logit_bias"] = ("logit_bias",)
    found["image.embed.bias"] = ("vision_model.embeddings.patch_embedding.bias",)
    found["image.pool.probe"] = ("vision_model.head.probe",)
    head = {"out": "attention.out_proj", "norm": "layernorm", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    for kind in ("weight", "bias"):
        found[f"text.project.{kind}"] = (f"text_model.head.{kind}",)
        found[f"image.pool.qkv.{kind}"] = (f"vision_model.head.attention.in_proj_{kind}",)
        found |= {f"image.pool.{ours}.{kind}": (f"vision_model.head.{theirs}.{kind}",) for ours, theirs in head.items()}
    return found
