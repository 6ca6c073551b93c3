"""OpenAI's files: a TorchScript archive (ViT-B-32.pt, RN50.pt) or a plain state dict; the shapes say what it is."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from advtune.clip import ClipConfig, TowerConfig
from advtune.configuration import checked
from advtune.errors import UserError
from advtune.formats import archive
from advtune.formats.found import Found
from advtune.formats.names import visual, without, words
from advtune.huggingface import Layout
from advtune.preprocess import Preprocess
from advtune.shapes import ImageShape
from advtune.tokenizer import ENDS, OPENAI, load_encoder, of_model
from advtune.weights import read_tensors

HEAD = 64  # the width of every head of OpenAI's
VOCABULARY = "openai/clip-vit-base-patch32"
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", OPENAI)
NUMBERS = frozenset({"input_resolution", "context_length", "vocab_size"})


def read(file: Path) -> Found:
    """A file of OpenAI's with the tokenizer beside it, or the hub's. Raises UserError as `read_pretrained`."""
    tensors = tensors_of(file)
    config = checked(file, lambda: configuration(tensors))
    folder = tokenizer_folder(file.parent)
    encoder = load_encoder(folder)
    if encoder.token_to_id(ENDS[1]) != config.end_token:
        raise UserError(f"{folder}: the tokenizer is not CLIP's; put {OPENAI} of OpenAI's package beside {file.name}")
    beside = [folder / name for name in TOKENIZER if (folder / name).is_file()]
    how = naming(config, tensors)
    return Found(config, tensors, how, of_model(encoder, config, folder), [*beside, file], file)


def naming(config: ClipConfig, tensors: Mapping[str, Tensor]) -> Layout:
    """Our names -> OpenAI's."""
    aside = {n for n in tensors if n.endswith(("num_batches_tracked", "attn_mask"))} | NUMBERS
    names = visual(config) | words(config) | {"logit_scale": ("logit_scale",)}
    return Layout(names, frozenset({"image.project.weight", "text.project.weight"}), frozenset(aside))


def tensors_of(file: Path) -> dict[str, Tensor]:
    """The named tensors of a file: of a module in TorchScript, of a state dict, or of one within `state_dict` or
    `model`. Raises UserError when it is no such file, or not to be trusted."""
    if file.suffix == ".safetensors" or not zipfile.is_zipfile(file):
        return without(read_tensors([file]), "module.")
    found = archive.read(file)
    for key in ("state_dict", "model"):
        inner = found.get(key)
        found = inner if isinstance(inner, dict) else found
    return without(dict(archive.flat(found)), "module.")


def configuration(tensors: Mapping[str, Tensor]) -> ClipConfig:
    """What the shapes say. Raises what `checked` takes for a UserError, as when they are not of such a model."""
    missing = {"visual.conv1.weight", "text_projection", "positional_embedding", "ln_final.weight"} - set(tensors)
    if missing:
        raise UserError(f"no model of OpenAI's: there is no tensor {min(missing)}")
    context, width = tensors["positional_embedding"].shape
    vocabulary, embed = len(tensors["token_embedding.weight"]), tensors["text_projection"].shape[1]
    tower, shape, patch, size = image_tower(tensors)
    text = TowerConfig(width, layers(tensors, "transformer.resblocks"), heads(width), mlp(tensors, "", width))
    return ClipConfig(
        tower, text, embed, size, patch, vocabulary, context, vocabulary - 2, vocabulary - 1, Preprocess(size, size),
        shape,
    )  # fmt: skip


def image_tower(tensors: Mapping[str, Tensor]) -> tuple[TowerConfig, ImageShape, int, int]:
    """The image tower, how it is built, its patch and the side of its images."""
    if "visual.attnpool.positional_embedding" in tensors:
        width = len(tensors["visual.layer1.0.conv1.weight"])
        stages = tuple(layers(tensors, f"visual.layer{i}") for i in (1, 2, 3, 4))
        grid = round((len(tensors["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
        return TowerConfig(width, sum(stages), heads(width * 32), 0), ImageShape(stages), 32, grid * 32
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    grid = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
    count = layers(tensors, "visual.transformer.resblocks")
    tower = TowerConfig(width, count, heads(width), mlp(tensors, "visual.", width))
    return tower, ImageShape(), patch, grid * patch


def layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers stand below a name."""
    found = {int(m[1]) for name in tensors if (m := re.match(re.escape(prefix) + r"\.(\d{1,3})\.", name))}
    return max(found, default=-1) + 1


def heads(width: int) -> int:
    if width < HEAD or width % HEAD:
        raise ValueError(f"a tower of width {width} is not of heads of {HEAD}")
    return width // HEAD


def mlp(tensors: Mapping[str, Tensor], prefix: str, width: int) -> int:
    value = tensors.get(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")
    return 4 * width if value is None else len(value)


def tokenizer_folder(folder: Path) -> Path:
    """Where CLIP's tokenizer lies: beside the file, else on the hub."""
    from advtune.pretrained import download_tokenizer

    beside = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", OPENAI))
    return folder if beside else download_tokenizer(VOCABULARY, folder)
