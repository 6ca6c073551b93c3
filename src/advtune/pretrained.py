"""Read and write CLIP weights in Hugging Face's folder format; every tensor is used, every parameter filled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from advtune.clip import ACTIVATIONS, CLIP, ClipConfig, TowerConfig
from advtune.errors import UserError, suggest
from advtune.huggingface import fill, to_huggingface
from advtune.listing import HUB_BACKBONES
from advtune.preprocess import Preprocess, from_config
from advtune.tokenizer import Tokenizer, load_tokenizer

EMBEDDED = {"mini": Path(__file__).parent / "assets" / "mini"}
SMALL_FILES = ["*.json", "merges.txt"]
DECISIVE = {"config.json", "preprocessor_config.json", "tokenizer.json", "vocab.json", "merges.txt"}
TEXT_DEFAULTS = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8)
IMAGE_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)


@dataclass(frozen=True)
class Pretrained:
    """A dual encoder, its tokenizer and where both came from. `sha256` is of the bytes of weights,
    configuration and tokenizer, so it names the content whatever the folder is called."""

    clip: CLIP
    tokenizer: Tokenizer
    name: str
    sha256: str
    notice: str = ""


def read_pretrained(name: str) -> Pretrained:
    """`mini`, a folder in Hugging Face CLIP format, or a hub id such as openai/clip-vit-base-patch32.

    The model is in eval mode, fp32, and needs no gradient. Raises UserError when the folder or id cannot be
    had, a file is missing, truncated or damaged, or a tensor is unknown, missing or of the wrong shape.
    """
    folder = locate(name)
    config = read_config(folder)
    files = weight_files(folder)
    clip = CLIP(config)
    fill(clip, read_tensors(files), folder)
    card = folder / "card.json"
    notice = json.loads(card.read_text())["notice"] if card.is_file() else ""
    return Pretrained(
        clip.eval().requires_grad_(False),
        load_tokenizer(folder, config),
        name,
        fingerprint([*sorted(p for p in folder.iterdir() if p.name in DECISIVE), *files]),
        notice,
    )


def locate(name: str) -> Path:
    """The folder of a backbone: embedded, local, or downloaded from the hub."""
    if name in EMBEDDED:
        return EMBEDDED[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        known, hint = ", ".join(EMBEDDED), suggest(name, [*EMBEDDED, *HUB_BACKBONES])
        raise UserError(
            f"backbone {name!r}: no such folder, and not a hub id such as openai/clip-vit-base-patch32 "
            f"(embedded: {known}); {hint}".rstrip("; ")
        )
    return download(name)


def download(repo: str) -> Path:
    """Fetch a hub repository's configuration, tokenizer and weights (safetensors if it has them)."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, allow_patterns=[*SMALL_FILES, "model*.safetensors"]))
        if not list(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(repo, allow_patterns=[*SMALL_FILES, "pytorch_model*.bin"]))
    except Exception as error:  # the hub client raises many kinds; all mean that it cannot be had
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        hint = "" if repo in HUB_BACKBONES else suggest(repo, HUB_BACKBONES)
        raise UserError(
            f"backbone {repo!r} cannot be downloaded ({reason}); {hint or 'give a local folder in the same format'}"
        ) from error
    return folder


def read_config(folder: Path) -> ClipConfig:
    """config.json and preprocessor_config.json of a CLIP folder. Raises UserError when they make no sense."""
    try:
        return _config(folder)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{folder}: config.json or preprocessor_config.json makes no sense ({error})") from None


def _config(folder: Path) -> ClipConfig:
    raw = _json(folder / "config.json")
    if raw.get("model_type") != "clip":
        raise UserError(f"{folder}: config.json has model_type {raw.get('model_type')!r}; only 'clip' is known")
    text = {**TEXT_DEFAULTS, **raw.get("text_config", {})}
    image = {**IMAGE_DEFAULTS, **raw.get("vision_config", {})}
    vocabulary = int(text.get("vocab_size", 49408))
    legacy = text.get("eos_token_id", 49407) == 2  # OpenAI's uploads; there the end token is the last id
    size = int(image.get("image_size", 224))
    preprocessor = folder / "preprocessor_config.json"
    preprocess = from_config(_json(preprocessor)) if preprocessor.is_file() else Preprocess(size, size)
    return ClipConfig(
        image=_tower(image),
        text=_tower(text),
        embed=int(raw.get("projection_dim", 512)),
        image_size=size,
        patch=int(image.get("patch_size", 32)),
        vocabulary=vocabulary,
        context=int(text.get("max_position_embeddings", 77)),
        start_token=vocabulary - 2 if legacy else int(text.get("bos_token_id", 49406)),
        end_token=vocabulary - 1 if legacy else int(text.get("eos_token_id", 49407)),
        preprocess=preprocess,
    )


def _tower(raw: Mapping[str, Any]) -> TowerConfig:
    activation = raw.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise UserError(f"config.json: hidden_act {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if int(raw["hidden_size"]) % int(raw["num_attention_heads"]):
        raise ValueError(f"{raw['num_attention_heads']} heads do not divide width {raw['hidden_size']}")
    return TowerConfig(
        width=int(raw["hidden_size"]),
        layers=int(raw["num_hidden_layers"]),
        heads=int(raw["num_attention_heads"]),
        mlp=int(raw["intermediate_size"]),
        activation=activation,
        eps=float(raw.get("layer_norm_eps", 1e-5)),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: {path.name} is missing; a Hugging Face CLIP folder is needed") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: safetensors before pickled, whole before sharded."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole, index = folder / f"{stem}.{ending}", folder / f"{stem}.{ending}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            shards = [folder / name for name in sorted(set(_json(index)["weight_map"].values()))]
            for shard in shards:
                if not shard.is_file():
                    raise UserError(f"{folder}: shard {shard.name} is named by {index.name} but missing")
            return shards
    raise UserError(f"{folder}: no weights (model.safetensors, or pytorch_model.bin, whole or sharded)")


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of the files; pickles are read with weights_only=True."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                part = load_file(path)
            else:
                part = torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as e:
            reason = str(e).strip().partition("\n")[0][:120]
            raise UserError(f"{path}: weights are truncated or damaged ({reason}); fetch the file again") from e
        tensors.update(part)
    return tensors


def write_pretrained(clip: CLIP, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors, as CLIPModel.from_pretrained reads
    them. The tokenizer's files are the caller's."""
    folder.mkdir(parents=True, exist_ok=True)
    c = clip.config
    towers = {}
    for key, tower in (("text_config", c.text), ("vision_config", c.image)):
        towers[key] = {
            "model_type": f"clip_{key.split('_')[0]}_model",
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
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": c.embed, **towers}
    p = c.preprocess
    size = (
        {"shortest_edge": p.resize}
        if isinstance(p.resize, int)
        else p.resize and dict(zip(("height", "width"), p.resize, strict=True))
    )
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
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
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n")
    tensors = {name: value.to(dtype) for name, value in to_huggingface(clip).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def fingerprint(files: list[Path]) -> str:
    """sha256 of the files' bytes, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
