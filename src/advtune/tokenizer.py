"""Class names and a template to token ids, cut to the longest text of the set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Encoder
from torch import Tensor

from advtune.clip import ClipConfig
from advtune.errors import UserError
from advtune.untrusted import parse_json, read_bytes, read_json, visible

PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
PLACEHOLDER = "x"  # stands where a learned prompt token will overwrite the embedding


@dataclass(frozen=True)
class Tokenizer:
    """CLIP's byte-pair encoder with the ids that frame a text."""

    encoder: Encoder
    start: int
    end: int
    context: int

    def pieces(self, text: str) -> list[int]:
        """The ids of one text, without start and end."""
        return self.encoder.encode(text, add_special_tokens=False).ids

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts to ids [C, L]: start, pieces, end, then padding with the end token up to the longest.

        Raises UserError when a text does not fit the context; nothing is cut silently.
        """
        return self._frame([self.pieces(text) for text in texts], texts)

    def prompts(self, classes: Sequence[str], template: str, room: int = 0) -> Tensor:
        """The template filled with every class name, as ids [C, L], with at least `room` tokens between the
        start token and the class name for a learned prompt to overwrite; placeholders fill what the template
        lacks, so a learned prompt never overwrites a name."""
        prefix = template.split("{}")[0].strip()
        have = len(self.pieces(prefix)) if prefix else 0
        padding = " ".join([PLACEHOLDER] * max(0, room - have))
        texts = [f"{padding} {template}".strip().replace("{}", name) for name in classes]
        return self(texts)

    def _frame(self, pieces: list[list[int]], texts: Sequence[str]) -> Tensor:
        length = max(len(ids) for ids in pieces) + 2
        if length > self.context:
            worst = max(range(len(pieces)), key=lambda i: len(pieces[i]))
            raise UserError(
                f"text of {length} tokens is longer than the context of {self.context}: {texts[worst][:60]!r}"
            )
        rows = [[self.start, *ids] + [self.end] * (length - 1 - len(ids)) for ids in pieces]
        return torch.tensor(rows)


def load_tokenizer(folder: Path, config: ClipConfig) -> Tokenizer:
    """From tokenizer.json, or from vocab.json and merges.txt. Raises UserError when neither is there, or damaged."""
    file = folder / "tokenizer.json"
    pair = folder / "vocab.json", folder / "merges.txt"
    if not file.is_file() and not all(each.is_file() for each in pair):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    try:
        encoder = _from_file(file) if file.is_file() else _from_pair(*pair)
        encoder.no_padding()
        encoder.no_truncation()
        found = Tokenizer(encoder, config.start_token, config.end_token, config.context)
        found.pieces("a photo")  # some damage shows only now
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and where it panics not even that
        what = file if file.is_file() else pair[0]
        raise UserError(f"{what}: truncated or damaged ({visible(str(error))[:120]}); fetch the file again") from None
    ids = 1 + max(encoder.get_vocab().values(), default=0)
    if ids > config.vocabulary:
        raise UserError(f"{folder}: the tokenizer has {ids} ids, the model only {config.vocabulary}")
    return found


def _from_file(file: Path) -> Encoder:
    data = read_bytes(file)
    if parse_json(data)["model"].get("continuing_subword_prefix"):  # CLIP has none, and the library panics over some
        raise ValueError("pieces with a prefix")
    return Encoder.from_buffer(data)


def _from_pair(vocabulary: Path, merges: Path) -> Encoder:
    pairs = [tuple(line.split()) for line in read_bytes(merges).decode().splitlines() if line[:8] != "#version"]
    return byte_pair_encoder(read_json(vocabulary), [pair for pair in pairs if len(pair) == 2])


def byte_pair_encoder(vocabulary: dict[str, int], merges: Sequence[tuple[str, ...]]) -> Encoder:
    """CLIP's encoder: lower case, spaces folded, byte-level pieces that end in </w>."""
    encoder = Encoder(
        models.BPE(
            vocab=vocabulary,
            merges=[(a, b) for a, b in merges],
            unk_token="<|endoftext|>",
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    encoder.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    encoder.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return encoder
