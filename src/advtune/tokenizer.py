"""Class names and a template to token ids, cut to the longest text of the set."""

from __future__ import annotations

import gzip
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Encoder
from torch import Tensor

from advtune.clip import ClipConfig
from advtune.data.templates import filled, parts
from advtune.errors import UserError
from advtune.untrusted import TEXT_BYTES, parse_json, read_bytes, read_json, visible

PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
OPENAI = "bpe_simple_vocab_16e6.txt.gz"
ENDS = ("<|startoftext|>", "<|endoftext|>")
PUNCTUATION = str.maketrans("", "", string.punctuation)
PLACEHOLDER = "x"  # stands where a learned prompt token will overwrite the embedding


CLEAN: dict[str, Callable[[str], str]] = {
    "none": str,
    "punctuation": lambda text: folded(text.lower().translate(PUNCTUATION)),  # SigLIP
    "canonicalize": lambda text: folded(text.replace("_", " ").lower().translate(PUNCTUATION)),  # the same in open_clip
    "case": str.lower,  # SigLIP 2
    "lower": lambda text: folded(text.lower()),
    "whitespace": lambda text: folded(text),
    "whitespace_underscore": lambda text: folded(text.replace("_", " ")),
}


def folded(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class Tokenizer:
    """A text encoder with the ids that frame a text, or none. pad: what fills a row, by default the end token; fixed:
    up to the context. clean: what is done to a text first."""

    encoder: Encoder
    start: int | None
    end: int | None
    context: int
    pad: int | None = None
    fixed: bool = False
    clean: str = "none"

    def pieces(self, text: str) -> list[int]:
        """The ids of one text, without start and end."""
        return self.encoder.encode(CLEAN[self.clean](text), add_special_tokens=False).ids

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts to ids [C, L]: start, pieces, end, then padding with the end token up to the longest.

        Raises UserError when a text does not fit the context; nothing is cut silently.
        """
        return self._frame([self.pieces(text) for text in texts], texts)

    def prompts(self, classes: Sequence[str], template: str, room: int = 0) -> Tensor:
        """The template filled with every class name, as ids [C, L], with at least `room` tokens between the
        start token and the class name for a learned prompt to overwrite; placeholders fill what the template
        lacks, so a learned prompt never overwrites a name. Of several templates [T, C, L], without room."""
        if len(several := parts(template)) > 1:
            return self(filled(classes, template)).view(len(several), len(classes), -1)
        prefix = template.split("{}")[0].strip()
        have = len(self.pieces(prefix)) if prefix else 0
        padding = " ".join([PLACEHOLDER] * max(0, room - have))
        texts = [f"{padding} {template}".strip().replace("{}", name) for name in classes]
        return self(texts)

    def _frame(self, pieces: list[list[int]], texts: Sequence[str]) -> Tensor:
        start, end = ([] if each is None else [each] for each in (self.start, self.end))
        length = max(len(ids) for ids in pieces) + len(start) + len(end)
        if length > self.context:
            worst = max(range(len(pieces)), key=lambda i: len(pieces[i]))
            raise UserError(
                f"text of {length} tokens is longer than the context of {self.context}: {texts[worst][:60]!r}"
            )
        length = self.context if self.fixed else length
        pad = self.end if self.pad is None else self.pad
        rows = [[*start, *ids, *end] for ids in pieces]
        return torch.tensor([row + [pad] * (length - len(row)) for row in rows])


def of_model(encoder: Encoder, config: ClipConfig, folder: Path) -> Tokenizer:
    """An encoder with what the model says of texts. Raises UserError when it has ids that the model has not."""
    ids = 1 + max(encoder.get_vocab().values(), default=0)
    if ids > config.vocabulary:
        raise UserError(f"{folder}: the tokenizer has {ids} ids, the model only {config.vocabulary}")
    words = config.words
    return Tokenizer(
        encoder, config.start_token, config.end_token, config.context, words.pad, words.fixed, words.clean
    )  # fmt: skip


def load_encoder(folder: Path) -> Encoder:
    """From tokenizer.json, from vocab.json and merges.txt, or from the file of OpenAI's package. Raises UserError when
    none is there, or damaged."""
    file, packed = folder / "tokenizer.json", folder / OPENAI
    pair = folder / "vocab.json", folder / "merges.txt"
    if not any(each.is_file() for each in (file, packed)) and not all(each.is_file() for each in pair):
        raise UserError(f"{folder}: no tokenizer; put tokenizer.json, or vocab.json and merges.txt, or {OPENAI} there")
    ways = {file: _from_file, pair[0]: lambda _: _from_pair(*pair), packed: _from_openai}
    what = file if file.is_file() else pair[0] if pair[0].is_file() else packed
    try:
        encoder = ways[what](what)
        encoder.no_padding()
        encoder.no_truncation()
        encoder.encode("a photo", add_special_tokens=False)  # some damage shows only now
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and where it panics not even that
        raise UserError(f"{what}: truncated or damaged ({visible(str(error))[:120]}); fetch the file again") from None
    return encoder


def frame(encoder: Encoder) -> tuple[int | None, int | None]:
    """The ids that an encoder itself puts before and after a text, or none."""
    plain, framed = (encoder.encode("a photo", add_special_tokens=each).ids for each in (False, True))
    at = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
    before, after = framed[:at], framed[at + len(plain) :]
    return (before[-1] if before else None), (after[0] if after else None)


def _from_openai(file: Path) -> Encoder:
    """bpe_simple_vocab_16e6.txt.gz of OpenAI's package: of its merges the first 48894 are used."""
    with gzip.open(file) as stream:
        lines = stream.read(TEXT_BYTES).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    letters = list(bytes_to_letters().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    return byte_pair_encoder({word: i for i, word in enumerate([*words, *ENDS])}, merges)


def bytes_to_letters() -> dict[int, str]:
    """The letter that stands for each byte, printable ones for themselves, in the order of OpenAI's vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _from_file(file: Path) -> Encoder:
    data = read_bytes(file)
    model = parse_json(data)["model"]
    # BERT's has one, CLIP's has none, and the library panics over some.
    if model.get("type") != "WordPiece" and model.get("continuing_subword_prefix"):
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
    encoder.add_special_tokens(list(ENDS))
    return encoder
