"""Learnable deep prompts for both towers, independent or coupled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from advtune.clip import CLIP
from advtune.errors import UserError

COUPLINGS = ("independent", "text-to-image", "image-to-text")
SPREAD = 0.02  # standard deviation of a fresh prompt token


class Prompts(nn.Module):
    """Deep prompts: `forward()` gives text [K, P, W] and image [K, P, W] (MaPLe, arXiv:2210.03117).

    independent: both are parameters. text-to-image: the image prompts are a linear map of the text prompts,
    one map a layer; image-to-text: the reverse. Coupled towers have equal P and the depth of the shallower.
    The first text prompt starts as `start` [P, W], the embeddings of a template's first words, when given;
    the first image prompt as the mean patch position embedding: a patch that shows nothing.
    """

    def __init__(
        self, clip: CLIP, text: int, image: int, depth: int, coupling: str = "independent",
        start: Tensor | None = None, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        if coupling not in COUPLINGS:
            raise UserError(f"coupling {coupling!r} is not one of {', '.join(COUPLINGS)}")
        if coupling != "independent" and (text != image or text < 1):
            raise UserError(f"coupled prompts need as many text as image tokens, at least 1; got {text}, {image}")
        if depth < 1 or text < 0 or image < 0 or text + image == 0:
            raise UserError(f"prompts need depth >= 1 and some tokens; got depth {depth}, {text} + {image} tokens")
        config = clip.config
        depths = [min(depth, config.text.layers), min(depth, config.image.layers)]
        if coupling != "independent":
            depths = [min(depths)] * 2
        random = torch.Generator().manual_seed(seed)

        def fresh(k: int, p: int, width: int) -> Tensor:
            return torch.randn(k, p, width, generator=random) * SPREAD

        words = fresh(depths[0], text, config.text.width)
        patches = fresh(depths[1], image, config.image.width)
        blank = clip.image.position[1:].mean(0).detach().cpu()
        if start is not None and text:
            words[0, : len(start)] = start[:text].detach().cpu()
        self.text: nn.Parameter | None = None
        self.image: nn.Parameter | None = None
        self.maps: LayerMaps | None = None
        if text and coupling != "image-to-text":
            self.text = nn.Parameter(words)
        if image and coupling != "text-to-image":
            patches[0] += blank
            self.image = nn.Parameter(patches)
        if coupling == "text-to-image":
            self.maps = LayerMaps(depths[0], config.text.width, config.image.width, blank, random)
        elif coupling == "image-to-text":
            self.maps = LayerMaps(depths[0], config.image.width, config.text.width, words[0].mean(0), random)

    def forward(self) -> tuple[Tensor | None, Tensor | None]:
        """Text and image prompts, each [K, P, W] or none."""
        if self.maps is None:
            return self.text, self.image
        if self.text is not None:
            return self.text, self.maps(self.text)
        return self.maps(self.image), self.image


class FixedPrompts(nn.Module):
    """Prompts as they were learned, coupling already applied: what a run folder holds."""

    text: Tensor | None
    image: Tensor | None

    def __init__(self, text: Tensor | None, image: Tensor | None):
        super().__init__()
        self.register_buffer("text", text)
        self.register_buffer("image", image)

    def forward(self) -> tuple[Tensor | None, Tensor | None]:
        return self.text, self.image


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
