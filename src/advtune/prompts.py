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
        self.coupling = coupling
        self.text = self.image = None
        if text and coupling != "image-to-text":
            self.text = nn.Parameter(words)
        if image and coupling != "text-to-image":
            patches[0] += blank
            self.image = nn.Parameter(patches)
        if coupling == "text-to-image":
            self.maps = _maps(depths[0], config.text.width, config.image.width, blank, random)
        elif coupling == "image-to-text":
            self.maps = _maps(depths[0], config.image.width, config.text.width, words[0].mean(0), random)

    def forward(self) -> tuple[Tensor | None, Tensor | None]:
        """Text and image prompts, each [K, P, W] or none."""
        text, image = self.text, self.image
        if self.coupling == "text-to-image":
            image = _map(self.maps, text)
        elif self.coupling == "image-to-text":
            text = _map(self.maps, image)
        return text, image


class FixedPrompts(nn.Module):
    """Prompts as they were learned, coupling already applied: what a run folder holds."""

    def __init__(self, text: Tensor | None, image: Tensor | None):
        super().__init__()
        self.register_buffer("text", text)
        self.register_buffer("image", image)

    def forward(self) -> tuple[Tensor | None, Tensor | None]:
        return self.text, self.image


def _maps(depth: int, wide: int, out: int, bias: Tensor, random: torch.Generator) -> nn.ModuleList:
    maps = nn.ModuleList(nn.Linear(wide, out) for _ in range(depth))
    bound = wide**-0.5
    for i, layer in enumerate(maps):
        nn.init.uniform_(layer.weight, -bound, bound, generator=random)
        nn.init.zeros_(layer.bias)
        if i == 0:
            layer.bias.data += bias
    return maps


def _map(maps: nn.ModuleList, prompts: Tensor | None) -> Tensor:
    assert prompts is not None
    return torch.stack([layer(prompt) for layer, prompt in zip(maps, prompts, strict=True)])
