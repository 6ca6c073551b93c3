"""open_clip's format: open_clip_config.json beside open_clip_model.safetensors or open_clip_pytorch_model.bin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Encoder
from torch import Tensor

from advtune.clip import ClipConfig, TowerConfig
from advtune.configuration import LAYERS, checked, table_of, whole
from advtune.errors import UserError
from advtune.formats import timm
from advtune.formats.found import Found
from advtune.formats.names import visual, words
from advtune.formats.openai import tensors_of
from advtune.huggingface import Layout
from advtune.preprocess import SIDE, Preprocess
from advtune.shapes import ImageShape, TextShape
from advtune.tokenizer import CLEAN, ENDS, frame, load_encoder, of_model
from advtune.untrusted import visible

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
OWN = {"lower", "canonicalize"}  # what may happen to a text before CLIP's own tokenizer, which lowers it
VOCABULARY = "openai/clip-vit-base-patch32"  # whose tokenizer is meant where none is named
PLAIN = {"block_type": "default", "text_arch": "clip"}
READ = {  # settings of a tower that are read here, or change nothing that is computed; any other must be off
    "image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "pool_type", "final_ln_after_pool",
    "no_ln_pre", "act_kwargs", "norm_kwargs", "pos_embed_type", "patch_dropout", "output_tokens", "image_seq_len",
    "attn_pooler_queries", "attn_pooler_heads", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj",
    "timm_drop", "timm_drop_path", "context_length", "vocab_size", "heads", "hf_tokenizer_name", "tokenizer_kwargs",
    "pad_id", "bos_id", "eos_id", "no_causal_mask", "proj_bias", "proj_type", "hf_model_pretrained", "hf_proj_type",
    "hf_pooler_type", "tiktoken_name",
}  # fmt: skip


def read(place: Path) -> Found:
    """A folder in open_clip's format, or weights beside its configuration, as a checkpoint of its training. Raises
    UserError as `read_pretrained`, and for what no tower here can be."""
    folder, file = (place.parent, place) if place.is_file() else (place, weights(place))
    tensors = tensors_of(file)
    raw = table_of(folder / CONFIG)
    place = tokenizer_folder(folder, raw)
    encoder = load_encoder(place)
    config = checked(folder, lambda: configuration(raw, encoder, settings(place), "logit_bias" in tensors))
    of = [folder / CONFIG, *sorted(place / name for name in TOKENIZER if (place / name).is_file()), file]
    return Found(config, tensors, naming(config, tensors), of_model(encoder, config, place), of, folder)


def weights(folder: Path) -> Path:
    """The file of weights in a folder. Raises UserError when there is none."""
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: no weights ({' or '.join(WEIGHTS)}) beside {CONFIG}; or name the file itself")
    return file


def naming(config: ClipConfig, tensors: Mapping[str, Tensor], kind: str = "an open_clip model") -> Layout:
    """Our names -> open_clip's, where the text tower may lie below `text.` and the image tower be one of timm's."""
    prefix = "text." if any(name.startswith("text.") for name in tensors) else ""
    image = timm.names(config) if config.vision.reads == "attention" else visual(config)
    names = image | words(config, prefix) | {"logit_scale": ("logit_scale",)}
    names |= {"logit_bias": ("logit_bias",)} if config.sigmoid else {}
    turned = {"image.project.weight", *(["text.project.weight"] if config.words.project == "linear" else [])}
    aside = {n for n in tensors if n.endswith(("num_batches_tracked", "attn_mask", "position_ids"))}
    return Layout(names, frozenset(turned), frozenset(aside), kind)


def configuration(raw: Mapping[str, Any], encoder: Encoder, tokens: Mapping[str, Any], bias: bool) -> ClipConfig:
    """What open_clip_config.json says. tokens: settings of the tokenizer; bias: whether there is a logit bias. Raises
    what `checked` takes for a UserError."""
    model = raw["model_cfg"]
    image, text = model["vision_cfg"], model["text_cfg"]
    if "multimodal_cfg" in model:
        raise UserError("multimodal_cfg: a CoCa, whose text tower is not CLIP's, is not read")
    for part in (image, text):
        for key, value in part.items():
            if value and key not in READ and value != PLAIN.get(key):
                raise UserError(f"{visible(key)[:40]} is {visible(repr(value))[:60]}, and such towers are not read")
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    embed, size = whole(model, "embed_dim"), side(image)
    tower, shape, patch = image_tower(image, act, size)
    if shape.project == "none" and tower.width != embed:
        raise ValueError(f"embed_dim is {embed}, the image tower's width {tower.width}")
    config = ClipConfig(
        image=tower,
        text=TowerConfig(
            width := whole(text, "width", 512),
            whole(text, "layers", 12, most=LAYERS),
            heads(width, whole(text, "heads", 8)),
            int(width * text.get("mlp_ratio", 4.0)),
            activation(text, act),
            eps(text),
        ),
        embed=embed,
        image_size=size,
        patch=patch,
        vocabulary=whole(text, "vocab_size", 49408, low=2),
        context=whole(text, "context_length", 77, low=3),
        start_token=None,
        end_token=None,
        preprocess=preprocessing(raw.get("preprocess_cfg") or {}, size),
        vision=replace(shape, smooth=True),
        sigmoid=bias,
    )
    return tokenized(config, text, encoder, tokens)


def image_tower(raw: Mapping[str, Any], act: str, size: int) -> tuple[TowerConfig, ImageShape, int]:
    """The image tower, how it is read, and its patch (of a ResNet: what it shrinks a side by)."""
    if raw.get("timm_model_name"):
        return timm.tower(raw)
    width = whole(raw, "width", 768)
    if isinstance(raw.get("layers"), list):
        stages = tuple(raw["layers"])
        if len(stages) != 4 or not all(isinstance(n, int) and 1 <= n <= LAYERS for n in stages) or size % 32:
            raise ValueError(f"layers are {raw['layers']!r:.40} at {size} pixels")
        pool = width * 32 // whole(raw, "head_width", 64)
        return TowerConfig(width, sum(stages), heads(width * 32, pool), 0), ImageShape(stages), 32
    count = heads(width, width // whole(raw, "head_width", 64))
    mlp = int(width * raw.get("mlp_ratio", 4.0))
    layers = whole(raw, "layers", 12, most=LAYERS)
    pool, late = raw.get("pool_type", "tok"), bool(raw.get("final_ln_after_pool"))
    reads = {"tok": "class", "avg": "mean"}.get(pool)
    if reads is None:
        raise UserError(f"pool_type is {pool!r:.40}; tok and avg are read")
    shape = ImageShape((), reads, True, not raw.get("no_ln_pre"), late)
    tower = TowerConfig(width, layers, count, mlp, activation(raw, act), eps(raw))
    return tower, shape, whole(raw, "patch_size", 16, most=size)


def tokenized(
    config: ClipConfig, text: Mapping[str, Any], encoder: Encoder, tokens: Mapping[str, Any]
) -> ClipConfig:  # fmt: skip
    """The configuration with what the text tower and its tokenizer do with a text."""
    options = text.get("tokenizer_kwargs") or {}
    named = bool(text.get("hf_tokenizer_name"))
    start, end = frame(encoder) if named else (encoder.token_to_id(each) for each in ENDS)
    pad: int | None = 0  # what CLIP's own tokenizer fills rows with, whatever pad_id says
    if named:
        pad = encoder.token_to_id(tokens["pad_token"]) if tokens.get("pad_token") else text.get("pad_id", 0)
    pool, causal = text.get("pool_type", "argmax"), not text.get("no_causal_mask")
    if pool not in ("argmax", "eos", "last"):
        raise UserError(f"the texts' pool_type is {pool!r:.40}; argmax, eos and last are read")
    clean, ways = options.get("clean", "whitespace" if named else "lower"), {*CLEAN} if named else OWN
    if clean not in ways:
        raise UserError(f"tokenizer_kwargs: clean is {clean!r:.40}, which is not one of {', '.join(sorted(ways))}")
    if pool == "eos":
        end = whole(text, "eos_id", 2, low=0)
    if options.get("strip_sep_token"):
        end = pad
    # The highest id is the end token's in CLIP's vocabulary, not in others.
    reads = "last" if pool == "last" else "argmax" if named and pool == "argmax" else "end"
    if reads == "end" and end is None:
        raise UserError("the tokenizer has no end token, where texts are read; is it this model's?")
    project = "none" if text.get("proj_type") == "none" else "affine" if text.get("proj_bias") else "linear"
    fixed = not causal or reads == "last"
    shape = TextShape(reads, causal, project, pad if named or fixed else None, fixed, clean)
    return replace(config, start_token=start, end_token=end, words=shape)


def tokenizer_folder(folder: Path, raw: Mapping[str, Any]) -> Path:
    """Where the tokenizer lies: beside the weights, else on the hub, under the name in the configuration."""
    from advtune.pretrained import download_tokenizer

    if any((folder / name).is_file() for name in TOKENIZER[:2]):
        return folder
    text = (raw.get("model_cfg") or {}).get("text_cfg") or {}
    return download_tokenizer(text.get("hf_tokenizer_name") or VOCABULARY, folder)


def settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json, tokens by their text."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found |= table_of(folder / name)
    return {key: value["content"] if isinstance(value, dict) and "content" in value else value
            for key, value in found.items()}  # fmt: skip


def preprocessing(raw: Mapping[str, Any], size: int) -> Preprocess:
    """preprocess_cfg; the size is the image tower's."""
    plain, mode = Preprocess(), raw.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise UserError(f"resize_mode is {mode!r:.40}; shortest and squash are read")
    mean, std = (tuple(v) if isinstance(v, list | tuple) else (v,) * 3 for v in (raw.get("mean") or plain.mean, raw.get("std") or plain.std))  # noqa: E501  # fmt: skip
    how = "bilinear" if raw.get("interpolation") == "bilinear" else "bicubic"
    return Preprocess(size, size, mean, std, how) if mode == "shortest" else Preprocess((size, size), None, mean, std, how)  # noqa: E501  # fmt: skip


def activation(raw: Mapping[str, Any], act: str) -> str:
    options = raw.get("act_kwargs") or {}
    if options and (act, options) != ("gelu", {"approximate": "tanh"}):
        raise UserError(f"act_kwargs {visible(repr(options))[:60]} are not read")
    return "gelu_pytorch_tanh" if options else act


def eps(raw: Mapping[str, Any]) -> float:
    options = raw.get("norm_kwargs") or {}
    if set(options) - {"eps"} or not 0 <= options.get("eps", 1e-5) < 1:
        raise UserError(f"norm_kwargs {visible(repr(options))[:60]} are not read")
    return float(options.get("eps", 1e-5))


def heads(width: int, count: int) -> int:
    if count < 1 or width % count:
        raise ValueError(f"{count} heads do not divide width {width}")
    return count


def side(raw: Mapping[str, Any]) -> int:
    """The side of the image; a pair of equal sides will do."""
    size = raw.get("image_size", 224)
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    return whole({"image_size": size}, "image_size", most=SIDE)
