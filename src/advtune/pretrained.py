"""A backbone by its name: embedded, a folder, a file, a hub id; every tensor is used, every parameter filled."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from advtune.clip import CLIP
from advtune.configuration import table_of
from advtune.errors import UserError, suggest
from advtune.formats import read
from advtune.formats.found import Found
from advtune.formats.overlay import lay
from advtune.formats.spec import HUB, Spec, at_side, parse
from advtune.huggingface import fill
from advtune.listing import BACKBONES, HUB_BACKBONES
from advtune.tokenizer import Tokenizer
from advtune.untrusted import HUB_ID, expanded, is_there, visible

EMBEDDED = {"mini": Path(__file__).parent / "assets" / "mini"}
SMALL_FILES = ["*.json", "merges.txt"]
KINDS = (  # of weights on the hub: Hugging Face's, open_clip's
    ("model*.safetensors", "pytorch_model*.bin"),
    ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)
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
    """`mini`, a folder in the format of Hugging Face or open_clip, a file of OpenAI's, or a hub id such as
    openai/clip-vit-base-patch32; with +FILE an image tower laid over it, with @SIDE for images of another side.

    The model is in eval mode, fp32, and needs no gradient. Raises UserError when the folder or id cannot be
    had, a file is missing, truncated or damaged, or a tensor is unknown, missing or of the wrong shape.
    """
    spec = parse(name)
    found = read(locate(spec.name), "open_clip" if spec.name.startswith(HUB) else "")
    config = at_side(found.config, spec.side) if spec.side else found.config
    with torch.device("meta"):  # no memory until the weights are of the shapes that the configuration asks for
        clip = CLIP(config)
    clip = fill(clip, found.tensors, found.source, found.how)
    if spec.tower:
        lay(clip, expanded(spec.tower))
    digest = content(found, spec)
    notice = read_notice(found.source if found.source.is_dir() else found.source.parent)
    return Pretrained(clip.eval().requires_grad_(False), found.tokenizer, name, digest, notice)


def content(found: Found, spec: Spec) -> str:
    """sha256 of all that decides what a backbone is: its files, the image tower laid over it, another side."""
    digest = fingerprint(found.files)
    if spec.tower:
        digest = joined(digest, fingerprint([expanded(spec.tower)]))
    if spec.side and spec.side != found.config.image_size:
        digest = joined(digest, f"@{spec.side}")
    return digest


def joined(digest: str, other: str) -> str:
    """sha256 of what two things decide together."""
    return hashlib.sha256(f"{digest}{other}".encode()).hexdigest()


def read_notice(folder: Path) -> str:
    """What card.json wants to be said with every result, or nothing. Raises UserError for a damaged file."""
    if not (folder / "card.json").is_file():
        return ""
    notice = table_of(folder / "card.json").get("notice", "")
    return visible(notice)[:NOTICE] if isinstance(notice, str) else ""


def locate(name: str) -> Path:
    """Where a backbone lies: embedded, a local folder or file, or downloaded from the hub."""
    if name in EMBEDDED:
        return EMBEDDED[name]
    path = expanded(name)
    if name and (is_there(path, Path.is_dir) or is_there(path, Path.is_file)):
        return path
    if name.startswith(HUB) and HUB_ID.fullmatch(name.removeprefix(HUB)):
        return download(name.removeprefix(HUB), tuple(reversed(KINDS)))
    if not HUB_ID.fullmatch(name):
        known, hint = ", ".join(EMBEDDED), architecture(name) or suggest(name, [*EMBEDDED, *HUB_BACKBONES])
        raise UserError(
            f"backbone {name[:200]!r}: no such folder, and not a hub id such as openai/clip-vit-base-patch32 "
            f"(embedded: {known}); {hint}".rstrip("; ")
        )
    return download(name)


def architecture(name: str) -> str:
    """What is meant, where a name is that of an architecture, as ViT-B/32 in OpenAI's package and ViT-B-32 in
    open_clip."""
    same = (each for each, facts in BACKBONES.items() if facts["model"].replace("/", "-") == name.replace("/", "-"))
    return f"did you mean {found}?" if (found := next(same, "")) else ""


def download(repo: str, kinds: tuple[tuple[str, ...], ...] = KINDS) -> Path:
    """Fetch a hub repository's configuration, tokenizer and weights: of the kinds of weights the first that it has."""
    from huggingface_hub import snapshot_download

    try:
        for pattern in (pattern for kind in kinds for pattern in kind):
            folder = Path(snapshot_download(repo, allow_patterns=[*SMALL_FILES, pattern]))
            if list(folder.glob(pattern)):
                break
    except Exception as error:  # the hub client raises many kinds; all mean that it cannot be had
        known = {repo, HUB + repo} & {*HUB_BACKBONES}
        hint = "" if known else architecture(repo) or suggest(repo, HUB_BACKBONES)
        raise UserError(
            f"backbone {repo!r} cannot be downloaded ({reason(error)}); "
            f"{hint or 'give a local folder in the same format'}"
        ) from error
    return folder


def download_tokenizer(repo: str, place: Path) -> Path:
    """Fetch a hub repository's tokenizer, for a model at `place` that came without one."""
    from huggingface_hub import snapshot_download

    try:
        if not HUB_ID.fullmatch(repo):
            raise ValueError("no hub id")
        return Path(snapshot_download(repo, allow_patterns=SMALL_FILES))
    except Exception as error:
        raise UserError(
            f"{place}: no tokenizer there, and that of {visible(repo)[:100]} cannot be downloaded ({reason(error)}); "
            "put tokenizer.json, or bpe_simple_vocab_16e6.txt.gz of OpenAI's package, beside the weights"
        ) from error


def reason(error: Exception) -> str:
    """The first sentence of what a library says, in one line."""
    said = str(error).strip().partition("\n")[0].partition(". ")[0].removesuffix(".")
    return said[:160] or type(error).__name__


def fingerprint(files: list[Path]) -> str:
    """sha256 of the files' bytes, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
