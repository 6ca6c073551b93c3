"""The formats that backbones come in: each reader says what the model is, whose names the tensors have, and what the
tokenizer does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from advtune.configuration import read_config, table_of
from advtune.errors import UserError
from advtune.formats import open_clip, openai, siglip
from advtune.formats.found import Found
from advtune.huggingface import Layout, layout
from advtune.tokenizer import frame, load_tokenizer, of_model
from advtune.untrusted import visible
from advtune.weights import read_tensors, weight_files

DECISIVE = {"config.json", "preprocessor_config.json", *openai.TOKENIZER}
VOCABULARY = 49408  # of OpenAI's tokenizer, which is meant where a model of so many ids comes without one
OTHERS = {  # model_type of Hugging Face's: why it is not read
    "siglip2": "is SigLIP 2 of any resolution (NaFlex); take a checkpoint of one resolution, as "
    "google/siglip2-base-patch16-224",
    "chinese_clip": "has a BERT for a text tower, which is not read; only towers as CLIP's and SigLIP's are",
    "altclip": "has a RoBERTa for a text tower, which is not read; only towers as CLIP's and SigLIP's are",
    "align": "has an EfficientNet for an image tower, which is not read; only ViTs and OpenAI's ResNets are",
}


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
    if place.is_file():
        return "openai"
    if (place / open_clip.CONFIG).is_file() and (first == "open_clip" or not has_huggingface(place)):
        return "open_clip"
    kind = table_of(place / "config.json").get("model_type")
    if isinstance(kind, str) and kind in OTHERS:
        raise UserError(f"{place}: model_type {kind!r} {OTHERS[kind]}")
    if kind not in ("clip", "siglip", "metaclip_2"):
        raise UserError(
            f"{place}: config.json has model_type {visible(repr(kind))[:60]}; 'clip', 'siglip' and 'metaclip_2' are "
            "known"
        )
    return str(kind)


def has_huggingface(folder: Path) -> bool:
    """Whether a folder holds a model of Hugging Face's, and not a configuration without weights."""
    endings = ("model*.safetensors", "pytorch_model*.bin")
    whole = any(True for ending in endings for _ in folder.glob(ending))
    return whole and (folder / "config.json").is_file()


def huggingface(folder: Path, own_ends: bool = False) -> Found:
    """A CLIP in Hugging Face's format. own_ends: its texts begin and end as the tokenizer says (MetaCLIP 2)."""
    config, files = read_config(folder), weight_files(folder)
    meant = config.vocabulary == VOCABULARY and not own_ends
    place = openai.tokenizer_folder(folder) if meant else folder
    tokenizer = load_tokenizer(place, config)
    if own_ends:
        start, end = frame(tokenizer.encoder)
        config = replace(config, start_token=start, end_token=end)
        tokenizer = of_model(tokenizer.encoder, config, folder)
    decisive = sorted(p for p in folder.iterdir() if p.name in DECISIVE and p.is_file())
    if place != folder:
        decisive += [place / name for name in openai.TOKENIZER if (place / name).is_file()]
    return Found(config, read_tensors(files), Layout(layout(config)), tokenizer, [*decisive, *files], folder)
