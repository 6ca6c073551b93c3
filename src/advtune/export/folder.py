"""Tuned towers as a folder that CLIPModel.from_pretrained or SiglipModel.from_pretrained of transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from advtune.errors import UserError
from advtune.export.source import Source
from advtune.formats.writing import write_pretrained
from advtune.tokenizer import ENDS

TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def write_folder(source: Source, folder: Path) -> dict[str, Any]:
    """config.json, preprocessor_config.json, model.safetensors (fp32), the tokenizer's files; card.json keeps the
    backbone's notice for advtune. Raises UserError for learned prompts, which CLIPModel has no place for, and for
    towers that are neither CLIP's nor SigLIP's."""
    if source.model.prompts is not None:
        raise UserError(
            f"{source.name}: {source.config['method']} learned prompts, and transformers' CLIPModel has no place for "
            "them; use --to onnx (a classifier with fixed classes) or --to prompts (the prompts alone)"
        )
    write_pretrained(source.model.clip, folder)
    for name in TOKENIZER:
        if (source.root / name).is_file():
            shutil.copyfile(source.root / name, folder / name)
    if not any((folder / name).is_file() for name in TOKENIZER[:2]):
        source.model.tokenizer.encoder.save(str(folder / TOKENIZER[0]))
    if not (folder / "tokenizer_config.json").is_file():
        write_json(folder / "tokenizer_config.json", tokenizer_config(source))
    if source.model.origin.notice:
        write_json(folder / "card.json", {"notice": source.model.origin.notice})
    return {"parameters": sum(p.numel() for p in source.model.clip.parameters())}


def tokenizer_config(source: Source) -> dict[str, Any]:
    """What transformers asks for where a backbone came without it; CLIP pads with the end token."""
    clip, tokenizer = source.model.clip, source.model.tokenizer
    if clip.config.sigmoid:
        ids = (tokenizer.pad, tokenizer.end)
        pad, end = (None if each is None else tokenizer.encoder.id_to_token(each) for each in ids)
        kind = "PreTrainedTokenizerFast"
        return {"tokenizer_class": kind, "model_max_length": clip.config.context, "pad_token": pad, "eos_token": end}
    return {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": clip.config.context,
        "bos_token": ENDS[0],
        **dict.fromkeys(("eos_token", "pad_token", "unk_token"), ENDS[1]),
    }


def write_json(file: Path, facts: Any) -> None:
    file.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
