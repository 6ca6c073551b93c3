"""Tuned towers as a folder that transformers.CLIPModel.from_pretrained loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from advtune.errors import UserError
from advtune.export.source import Source
from advtune.pretrained import write_pretrained

TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def write_folder(source: Source, folder: Path) -> dict[str, Any]:
    """config.json, preprocessor_config.json, model.safetensors (fp32), the tokenizer's files; card.json keeps the
    backbone's notice for advtune. Raises UserError for learned prompts, which CLIPModel has no place for."""
    if source.model.prompts is not None:
        raise UserError(
            f"{source.name}: {source.config['method']} learned prompts, and transformers' CLIPModel has no place for "
            "them; use --to onnx (a classifier with fixed classes) or --to prompts (the prompts alone)"
        )
    write_pretrained(source.model.clip, folder)
    for name in TOKENIZER:
        if (source.root / name).is_file():
            shutil.copyfile(source.root / name, folder / name)
    if not (folder / "tokenizer_config.json").is_file():
        write_json(folder / "tokenizer_config.json", tokenizer_config(source))
    if source.model.origin.notice:
        write_json(folder / "card.json", {"notice": source.model.origin.notice})
    return {"parameters": sum(p.numel() for p in source.model.clip.parameters())}


def tokenizer_config(source: Source) -> dict[str, Any]:
    """What transformers asks for where a backbone came without it; CLIP pads with the end token."""
    ends = ("<|startoftext|>", "<|endoftext|>")
    return {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": source.model.clip.config.context,
        "bos_token": ends[0],
        **dict.fromkeys(("eos_token", "pad_token", "unk_token"), ends[1]),
    }


def write_json(file: Path, facts: Any) -> None:
    file.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
