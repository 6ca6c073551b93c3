"""What a reader of a format finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from advtune.clip import ClipConfig
from advtune.huggingface import Layout
from advtune.tokenizer import Tokenizer


@dataclass(frozen=True)
class Found:
    """A backbone as it lies there. `how` says whose names the tensors have; `files` are those whose bytes decide what
    it is, in the order in which its fingerprint takes them; `source` is where it lies, for messages."""

    config: ClipConfig
    tensors: Mapping[str, Tensor]
    how: Layout
    tokenizer: Tokenizer
    files: list[Path]
    source: Path
