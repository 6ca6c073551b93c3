"""Image towers that were published alone, as those of TeCoA, PMG-AFT, APT and FARE, laid over the model they were tuned
from."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advtune.clip import CLIP, ClipConfig
from advtune.errors import UserError
from advtune.formats import archive, siglip, timm
from advtune.formats.names import visual
from advtune.huggingface import Layout, fits, layout, parts
from advtune.weights import check_floats, read_tensors

# Under what names such tables stand in a checkpoint, the ones that say more first.
NESTED = ("vision_encoder_state_dict", "visual", "vision_model", "model_state_dict", "state_dict", "model")
# A tensor that only an image tower has -> what comes before it in our layouts of it.
MARKS = {
    "trunk.patch_embed.proj.weight": "visual.",
    "embeddings.patch_embedding.weight": "vision_model.",
    "attnpool.positional_embedding": "visual.",
    "class_embedding": "visual.",
}


OTHERWISE = "take for BASE the model that it was tuned from"


def lay(clip: CLIP, file: Path) -> None:
    """Put the image tower of a checkpoint in the place of the model's. Raises UserError naming the first tensor that is
    missing, is not of this tower, or has another shape: then nothing has changed."""
    tensors, how = laid(clip, file)
    own = shapes_of(clip)
    fits(own, tensors, file, how)
    for name in {name for group in how.names.values() for name in group}:
        check_floats(name, tensors[name], file)
    for ours, value in clip.state_dict().items():
        if ours in own:
            value.copy_(torch.cat(parts(ours, value.shape, tensors, how)).reshape(value.shape))


def laid(clip: CLIP, file: Path) -> tuple[dict[str, Tensor], Layout]:
    """The image tower's tensors of a checkpoint, and whose names they have. Raises UserError when it holds none, or
    another kind of tower than the model's, which may be on the meta device."""
    tensors, mark = tower_of(table_of(file), file)
    names = {ours: theirs for ours, theirs in layout_of(clip.config, mark).items() if ours.startswith("image.")}
    turned = frozenset({"image.project.weight"} if MARKS[mark] == "visual." else ())
    aside = frozenset(name for name in tensors if name.endswith(("num_batches_tracked", "attn_mask", "position_ids")))
    if set(names) != set(shapes_of(clip)) or mark.startswith("attnpool.") != bool(clip.config.vision.stages):
        raise UserError(f"{file}: its tensors are named as of another kind of tower than the backbone's; {OTHERWISE}")
    return tensors, Layout(names, turned, aside, "this image tower", OTHERWISE)


def shapes_of(clip: CLIP) -> dict[str, torch.Size]:
    """The shapes of the image tower's parameters and buffers, by name."""
    return {name: value.shape for name, value in clip.state_dict().items() if name.startswith("image.")}


def table_of(file: Path) -> dict[str, Any]:
    """What a checkpoint holds, tables within tables."""
    if file.is_dir():
        raise UserError(f"{file}: a folder; name the file of weights in it, as {file / 'model.safetensors'}")
    if not file.is_file():
        raise UserError(f"{file}: no such file; BASE+FILE lays the image tower in FILE over the backbone BASE")
    if file.suffix == ".safetensors" or not zipfile.is_zipfile(file):
        return dict(read_tensors([file]))
    return archive.read(file)


def tower_of(found: Mapping[str, Any], file: Path) -> tuple[dict[str, Tensor], str]:
    """The image tower's tensors under the names of our layouts, and the mark they were known by."""
    tables: list[Any] = [found[key] for key in NESTED if isinstance(found.get(key), dict)]
    for table in [*tables, found]:
        tensors = {name: value for name, value in table.items() if isinstance(value, Tensor)} or dict(
            archive.flat(table)
        )
        for mark, prefix in MARKS.items():
            name = next((name for name in tensors if name == mark or name.endswith(f".{mark}")), None)
            if name is not None:
                return renamed(tensors, name.removesuffix(mark), prefix), mark
    raise UserError(f"{file}: holds no image tower of a name that is known (visual.*, vision_model.*, or one alone)")


def renamed(tensors: Mapping[str, Tensor], found: str, prefix: str) -> dict[str, Tensor]:
    """The tensors below `found`, below `prefix` instead; Hugging Face's projection stands beside its tower."""
    outer = found.removesuffix("vision_model.")
    beside = f"{outer}visual_projection.weight"
    named = {prefix + name.removeprefix(found): value for name, value in tensors.items()
             if name.startswith(found) and name != beside}  # fmt: skip
    return named | ({"visual_projection.weight": tensors[beside]} if beside in tensors else {})


def layout_of(config: ClipConfig, mark: str) -> dict[str, tuple[str, ...]]:
    if mark.startswith("trunk."):
        return timm.names(config)
    if mark.startswith("embeddings."):
        return siglip.names(config) if config.vision.reads == "attention" else layout(config)
    return visual(config)
