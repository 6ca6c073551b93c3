"""The formats that backbones come in: each reader says what the model is, whose names the tensors have, and what the
tokenizer does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer as Encoder

from advtune.clip import ClipConfig
from advtune.configuration import legacy_end, read_config, table_of
from advtune.errors import UserError
from advtune.formats import open_clip, openai, siglip
from advtune.formats.found import Found
from advtune.huggingface import Layout, layout
from advtune.tokenizer import ENDS, frame, load_encoder, of_model
from advtune.untrusted import visible
from advtune.weights import read_tensors, weight_files

DECISIVE = {"config.json", "preprocessor_config.json", *openai.TOKENIZER}
VOCABULARY = 49408  # of OpenAI's tokenizer, which is meant where a model of so many ids comes without one
OTHERS = {  # model_type of Hugging Face's: why it is not read
    "siglip2": "is SigLIP 2 of any resolution (NaFlex); take a checkpoint of one resolution, as "
    "google/siglip2-base-patch16-224",
    "chinese_clip": "has a BERT for a text tower, which is not read; only towers as CLIP's and SigLIP's are",
    "altclip": "has a RoBERTa for a text tower, which is not read; only towers as CLIP's and SigLIP's are",
    "clip_vision_model": "is an image tower alone; lay its weights over the model it was tuned from: BASE+FILE",
    "siglip_vision_model": "is an image tower alone; lay its weights over the model it was tuned from: BASE+FILE",
    "align": "has an EfficientNet for an image tower, which is not read; only ViTs and OpenAI's ResNets are",
}
KNOWN = ("clip", "siglip", "metaclip_2")
KINDS = {"clip": "Hugging Face CLIP", "metaclip_2": "Hugging Face MetaCLIP 2", "siglip": "Hugging Face SigLIP",
         "open_clip": "open_clip", "openai": "OpenAI's file"}  # fmt: skip


def read(place: Path, first: str = "") -> Found:
    """What lies in a folder, or in a file of OpenAI's. first: "open_clip", where a folder is both that and Hugging
    Face's. Raises UserError when it is nothing that is known, or damaged."""
    kind = kind_of(place, first)
    if kind in ("clip", "metaclip_2"):
        return huggingface(place, kind == "metaclip_2")
    return {"openai": openai, "open_clip": open_clip, "siglip": siglip}[kind].read(place)


def kind_of(place: Path, first: str = "") -> str:
    """Which of KINDS lies there, by the files' names and what config.json calls itself. Raises UserError for others."""
    described = (folder_of(place) / open_clip.CONFIG).is_file()
    if place.is_file():
        if not described and place.name in open_clip.WEIGHTS:
            raise UserError(
                f"{place}: needs its {open_clip.CONFIG} beside it, which says what the towers are; get both"
            )
        return "open_clip" if described else "openai"
    if described and (first == "open_clip" or not has_huggingface(place)):
        return "open_clip"
    if not (place / "config.json").exists():
        raise UserError(f"{place}: {nothing(place)}")
    kind = table_of(place / "config.json").get("model_type")
    if isinstance(kind, str) and kind in OTHERS:
        raise UserError(f"{place}: model_type {kind!r} {OTHERS[kind]}")
    if kind not in KNOWN:
        hub = f"; its {open_clip.CONFIG} is read under hf-hub:OWNER/NAME" if described else ""
        raise UserError(
            f"{place}: config.json has model_type {visible(repr(kind))[:60]}; 'clip', 'siglip' and 'metaclip_2' are "
            f"known{hub}"
        )
    return str(kind)


def folder_of(place: Path) -> Path:
    return place if place.is_dir() else place.parent


def nothing(folder: Path) -> str:
    """What to do with a folder that holds no configuration."""
    files = sorted(file.name for file in folder.iterdir() if file.suffix in (".pt", ".pth") and file.is_file())
    if files:
        return f"holds no config.json; to read a file in it, name that: {visible(str(folder / files[0]))[:200]}"
    return f"neither config.json (Hugging Face) nor {open_clip.CONFIG} (open_clip) is there; get the whole folder"


def has_huggingface(folder: Path) -> bool:
    """Whether a folder holds a model of Hugging Face's, and not a configuration without weights, or one of timm's
    beside open_clip's files."""
    endings = ("model*.safetensors", "pytorch_model*.bin")
    if not (folder / "config.json").is_file() or not any(True for ending in endings for _ in folder.glob(ending)):
        return False
    kind = table_of(folder / "config.json").get("model_type")
    return kind in KNOWN or not any((folder / name).is_file() for name in open_clip.WEIGHTS)


def huggingface(folder: Path, own_ends: bool = False) -> Found:
    """A CLIP in Hugging Face's format. own_ends: its texts begin and end as the tokenizer says (MetaCLIP 2)."""
    config, files = read_config(folder), weight_files(folder)
    meant = config.vocabulary == VOCABULARY and not own_ends
    place = openai.tokenizer_folder(folder) if meant else folder
    encoder = load_encoder(place)
    start, end = frame(encoder)
    if not own_ends:
        start, end = ends(folder, config, encoder)
    config = replace(config, start_token=start, end_token=end)
    tokenizer = of_model(encoder, config, folder)
    decisive = sorted(p for p in folder.iterdir() if p.name in DECISIVE and p.is_file())
    if place != folder:
        decisive += [place / name for name in openai.TOKENIZER if (place / name).is_file()]
    return Found(config, read_tensors(files), Layout(layout(config)), tokenizer, [*decisive, *files], folder)


def ends(folder: Path, config: ClipConfig, encoder: Encoder) -> tuple[int | None, int | None]:
    """The ids that frame a text: the tokenizer's, as in transformers, whatever config.json says of the start; those of
    config.json where the tokenizer has none. Raises UserError when a text would be read at another token than its
    end."""
    own = zip(frame(encoder), map(encoder.token_to_id, ENDS), strict=True)
    start, end = (named if framed is None else framed for framed, named in own)
    if end not in (None, config.end_token) and not legacy_end(folder):
        raise UserError(
            f"{folder}: texts end with id {config.end_token} by config.json, with {end} by the tokenizer; is it this "
            "model's? get the whole folder again"
        )
    return config.start_token if start is None else start, config.end_token if end is None else end
