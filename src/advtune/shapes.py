"""What towers differ in, as data: every default is what OpenAI's ViT does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advtune.preprocess import Preprocess


@dataclass(frozen=True)
class TowerConfig:
    """What decides the shape of one transformer tower. Of a ResNet: the stem's width, all blocks, the pool's heads."""

    width: int
    layers: int
    heads: int
    mlp: int
    activation: str = "quick_gelu"
    eps: float = 1e-5


@dataclass(frozen=True)
class ImageShape:
    """How the image tower is built and read.

    stages: blocks of a ResNet's four stages; empty for a transformer. reads: the "class" token, the "mean" of the
    patches, or an "attention" head over them. norm_after: the last norm comes after the mean. project: "linear",
    "affine" (with a bias) or "none". native: side in pixels that positions are stored for; 0: that of the images.
    smooth: how positions are resized for others, see `resized`.
    """

    stages: tuple[int, ...] = ()
    reads: str = "class"
    class_token: bool = True
    norm_pre: bool = True
    norm_after: bool = False
    patch_bias: bool = False
    project: str = "linear"
    native: int = 0
    smooth: bool = False


@dataclass(frozen=True)
class TextShape:
    """How the text tower is built and read, and what its tokenizer does.

    reads: the first "end" token, the token of the highest id ("argmax"), or the "last" of the context. causal: tokens
    see only what precedes them. project: as an image's. pad: what fills a row, none: the end token. fixed: rows
    are filled to the whole context, since what fills them is seen. clean: what happens to a text first, see `CLEAN`.
    """

    reads: str = "end"
    causal: bool = True
    project: str = "linear"
    pad: int | None = None
    fixed: bool = False
    clean: str = "none"


@dataclass(frozen=True)
class ClipConfig:
    """What decides the shape of the dual encoder, and how it wants its pixels. sigmoid: logits have a bias."""

    image: TowerConfig
    text: TowerConfig
    embed: int
    image_size: int
    patch: int
    vocabulary: int
    context: int
    start_token: int | None
    end_token: int | None
    preprocess: Preprocess = field(default_factory=Preprocess)
    vision: ImageShape = field(default_factory=ImageShape)
    words: TextShape = field(default_factory=TextShape)
    sigmoid: bool = False

    @property
    def first(self) -> int:
        """The place of the first text prompt: after the start token, or the very first where there is none."""
        return 0 if self.start_token is None else 1


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's GELU: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def projection(kind: str, width: int, embed: int) -> nn.Module:
    """The last map of a tower, [.., W] -> [.., D]: "linear", "affine" or "none"."""
    return nn.Identity() if kind == "none" else nn.Linear(width, embed, bias=kind == "affine")


def resized(grid: Tensor, side: int, smooth: bool = False) -> Tensor:
    """Position embeddings of a square of patches [n * n, W] for another square [side * side, W], bicubic; as they are
    where the sides are equal. smooth: antialiased, as open_clip and timm do it; transformers does not."""
    own = round(len(grid) ** 0.5)
    if own == side:
        return grid
    image = grid.T.unflatten(1, (own, own))[None]  # [1, W, n, n]
    return F.interpolate(image, (side, side), mode="bicubic", align_corners=False, antialias=smooth)[0].flatten(1).T
