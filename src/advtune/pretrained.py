"""Read and write CLIP weights in Hugging Face's folder format; every tensor is used, every parameter filled."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from advtune.clip import CLIP
from advtune.configuration import read_config, table_of
from advtune.errors import UserError
from advtune.huggingface import fill, to_huggingface
from advtune.tokenizer import Tokenizer, load_tokenizer
from advtune.untrusted import HUB_ID, expanded, is_there, visible
from advtune.weights import read_tensors, weight_files

EMBEDDED = {"mini": Path(__file__).parent / "assets" / "mini"}
SMALL_FILES = ["*.json", "merges.txt"]
DECISIVE = {"config.json", "preprocessor_config.json", "tokenizer.json", "vocab.json", "merges.txt"}
NOTICE = 600  # letters of a card's notice that are kept: it stands below every table


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
    with torch.device("meta"):  # no memory until the weights are of the shapes that the configuration asks for
        clip = CLIP(config)
    clip = fill(clip, read_tensors(files), folder)
    return Pretrained(
        clip.eval().requires_grad_(False),
        load_tokenizer(folder, config),
        name,
        fingerprint([*sorted(p for p in folder.iterdir() if p.name in DECISIVE and p.is_file()), *files]),
        read_notice(folder),
    )


def read_notice(folder: Path) -> str:
    """What card.json wants to be said with every result, or nothing. Raises UserError for a damaged file."""
    if not (folder / "card.json").is_file():
        return ""
    notice = table_of(folder / "card.json").get("notice", "")
    return visible(notice)[:NOTICE] if isinstance(notice, str) else ""


def locate(name: str) -> Path:
    """The folder of a backbone: embedded, local, or downloaded from the hub."""
    if name in EMBEDDED:
        return EMBEDDED[name]
    path = expanded(name)
    if name and is_there(path, Path.is_dir):
        return path
    if not HUB_ID.fullmatch(name):
        known = ", ".join(EMBEDDED)
        raise UserError(
            f"backbone {name[:200]!r}: no such folder, and not a hub id such as openai/clip-vit-base-patch32 "
            f"(embedded: {known})"
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
        raise UserError(
            f"backbone {repo!r} cannot be downloaded ({reason}); give a local folder in the same format"
        ) from error
    return folder


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
