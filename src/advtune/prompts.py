"""Learnable prompts for both towers: deep tokens, independent or coupled, class-specific contexts, a pixel frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advtune.clip import CLIP, ImageTower
from advtune.errors import UserError

COUPLINGS = ("independent", "text-to-image", "image-to-text")
SPREAD = 0.02  # standard deviation of a fresh prompt token
FRAME_SIDE = 224  # the papers give a frame's width in pixels of an image of this side


class Learned(NamedTuple):
    """What enters the towers: text [K, P, W] (or class-specific [K, C, P, W]), image [K, P, W], pad [3, S, S]."""

    text: Tensor | None = None
    image: Tensor | None = None
    pad: Tensor | None = None


class Prompts(nn.Module):
    """Deep prompts: `forward()` gives text [K, P, W] and image [K, P, W] (MaPLe, arXiv:2210.03117).

    independent: both are parameters. text-to-image: the image prompts are a linear map of the text prompts,
    one map a layer; image-to-text: the reverse. Coupled towers have equal P and the depth of the shallower.
    The first text prompt starts as `start` [P, W], the embeddings of a template's first words, when given;
    the first image prompt as the mean patch position embedding, a patch that shows nothing. What is learned of the
    image prompts is what is added to that: it can be so long that a map of it would run away (docs/log.md).
    classes: as many contexts of their own, [K, C, P, W] (CoOp, arXiv:2109.01134). pad: width of a frame of pixels
    that is added to the normalised image, for a side of 224 (arXiv:2203.17274).
    """

    blank: Tensor  # [K, 1, W]

    def __init__(
        self, clip: CLIP, text: int, image: int, depth: int, coupling: str = "independent",
        start: Tensor | None = None, seed: int = 0, classes: int = 0, pad: int = 0,
    ):  # fmt: skip
        super().__init__()
        if coupling not in COUPLINGS:
            raise UserError(f"coupling {coupling!r} is not one of {', '.join(COUPLINGS)}")
        if coupling != "independent" and (text != image or text < 1):
            raise UserError(f"coupled prompts need as many text as image tokens, at least 1; got {text}, {image}")
        if depth < 1 or text < 0 or image < 0 or text + image + pad == 0:
            raise UserError(f"prompts need depth >= 1 and some tokens; got depth {depth}, {text} + {image} tokens")
        config = clip.config
        if image and config.vision.stages:
            raise UserError(
                "image prompts are tokens, and this backbone's image tower is a ResNet, which has none: take a method "
                "that tunes the image tower or the text context (advtune list methods)"
            )
        depths = [min(depth, config.text.layers), min(depth, config.image.layers)]
        if coupling != "independent":
            depths = [min(depths)] * 2
        random = torch.Generator().manual_seed(seed)

        def fresh(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random) * SPREAD

        own = (classes,) if classes else ()
        words = fresh(depths[0], *own, text, config.text.width)
        patches = fresh(depths[1], image, config.image.width)
        blank = clip.image.blank().cpu() if isinstance(clip.image, ImageTower) else torch.zeros(config.image.width)
        if start is not None and text:
            words[0, ..., : len(start), :] = start[:text].detach().cpu()
        self.text: nn.Parameter | None = None
        self.image: nn.Parameter | None = None
        self.maps: LayerMaps | None = None
        if text and coupling != "image-to-text":
            self.text = nn.Parameter(words)
        if image and coupling != "text-to-image":
            self.image = nn.Parameter(patches)
            self.register_buffer("blank", torch.zeros(depths[1], 1, len(blank)), persistent=False)
            self.blank[0] = blank
        if coupling == "text-to-image":
            self.maps = LayerMaps(depths[0], config.text.width, config.image.width, blank, random)
        elif coupling == "image-to-text":
            self.maps = LayerMaps(depths[0], config.image.width, config.text.width, words[0].mean(0), random)
        self.frame = Frame(config.image_size, pad) if pad else None

    def forward(self) -> Learned:
        text: Tensor | None = self.text
        image = None if self.image is None else self.image + self.blank
        if self.maps is not None:
            text, image = (text, self.maps(text)) if text is not None else (self.maps(self.image), image)
        return Learned(text, image, None if self.frame is None else self.frame())


class FixedPrompts(nn.Module):
    """Prompts as they were learned, coupling already applied: what a run folder holds."""

    text: Tensor | None
    image: Tensor | None
    pad: Tensor | None

    def __init__(self, text: Tensor | None = None, image: Tensor | None = None, pad: Tensor | None = None):
        super().__init__()
        self.register_buffer("text", text)
        self.register_buffer("image", image)
        self.register_buffer("pad", pad)

    def forward(self) -> Learned:
        return Learned(self.text, self.image, self.pad)


def fixed(clip: CLIP, learned: Mapping[str, Tensor | None]) -> FixedPrompts:
    """Stored prompts for these towers. Raises UserError for a tensor that does not fit them."""
    config = clip.config
    side = config.image_size
    room = {"text": (config.text, config.context - 3), "image": (config.image, side**2)}
    for name, value in learned.items():
        shape = () if value is None else tuple(value.shape)
        if name == "pad":
            fits = shape == (3, side, side)
        else:
            tower, most = room[name]
            kinds = (3, 4) if name == "text" else (3,)
            fits = len(shape) in kinds and 0 < shape[0] <= tower.layers and shape[-1] == tower.width
            fits = fits and 0 < shape[-2] <= most and 0 not in shape
        if value is not None and not fits:
            raise UserError(f"learned tensor prompts.{name} of shape {shape} does not fit the backbone; tune again")
    return FixedPrompts(**learned)


class LayerMaps(nn.Module):
    """One linear map a layer: prompts [K, P, W of one tower] -> [K, P, W of the other]."""

    def __init__(self, depth: int, wide: int, out: int, bias: Tensor, random: torch.Generator):
        super().__init__()
        bound = wide**-0.5  # as nn.Linear starts
        self.weight = nn.Parameter((torch.rand(depth, out, wide, generator=random) * 2 - 1) * bound)
        self.bias = nn.Parameter(torch.zeros(depth, out))
        self.bias.data[0] = bias

    def forward(self, prompts: Tensor) -> Tensor:
        return torch.einsum("kpi,koi->kpo", prompts, self.weight) + self.bias[:, None]


class Frame(nn.Module):
    """A learned frame of normalised pixels, zero within: `forward()` gives [3, S, S]. It starts at zero."""

    places: Tensor

    def __init__(self, side: int, width: int):
        super().__init__()
        width = max(1, round(width * side / FRAME_SIDE))
        if 2 * width >= side:
            raise UserError(
                f"pad: a frame {width} pixels wide leaves nothing of an image of {side}; take a smaller pad"
            )
        inside = torch.zeros(side, side, dtype=torch.bool)
        inside[width:-width, width:-width] = True
        self.side = side
        self.register_buffer("places", (~inside).flatten().nonzero().squeeze(1), persistent=False)
        self.pixels = nn.Parameter(torch.zeros(3, len(self.places)))

    def forward(self) -> Tensor:
        blank = self.pixels.new_zeros(3, self.side**2)
        return blank.index_copy(1, self.places, self.pixels).view(3, self.side, self.side)
