"""The plain formulation of a training step, as released code has it, to hold ours beside: the same equations and
numbers, and everything computed whenever it is written.

Texts are encoded in every call, 77 tokens each, with gradients (to the text tower's weights, too, where a tower is
tuned); every token goes through every layer; an attack step is a `backward()` that fills the weights' gradients, and
computes a clean branch anew. Not copied from any repository; benchmarks/operations.py quotes what those count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from advtune.attacks import PGD
from advtune.attacks.ball import ascent, project, random_point
from advtune.clip import Block, overwrite
from advtune.losses import cross_entropy
from advtune.prompts import Learned
from advtune.vlm import VLM, Classifier


class Plain(VLM):
    """A VLM that keeps nothing and leaves nothing out; for prompts that all classes share."""

    def towers(self, tokens: Tensor) -> tuple[Classifier, Classifier]:
        return self.image_features, lambda image: self._scaled(image, self.text_features(tokens))

    def _image(self, x: Tensor, learned: Learned, dense: bool = False) -> Tensor:
        tower = self.clip.image
        with self._autocast(self.precision == "bf16"):
            tokens = tower.embed(tower.patches(self.clip.config.preprocess(x)))
            first = tower.class_token.to(tokens.dtype).expand(len(x), 1, -1)
            h = torch.cat([first, tokens], dim=1) + tower.position
            plain = h.shape[1]
            if learned.image is not None:
                h = torch.cat([h, learned.image[0].to(h.dtype).expand(len(x), -1, -1)], dim=1)
            h = through(list(tower.blocks), tower.norm_pre(h), learned.image, plain)
            return tower.project(tower.norm_post(h[:, 0])).float()

    def _text(self, tokens: Tensor, prompts: Tensor | None) -> Tensor:
        tower, config = self.clip.text, self.clip.config
        padded = torch.full((len(tokens), config.context), config.end_token)
        padded[:, : tokens.shape[1]] = tokens
        mask = torch.ones(config.context, config.context, dtype=torch.bool, device=self.device).tril()
        with self._autocast(self.precision == "bf16"):
            h = tower.embed(padded.to(self.device))
            h = (h if prompts is None else overwrite(h, prompts[0], 1)) + tower.position
            h = through(list(tower.blocks), h, prompts, 1, mask)
            h = h[torch.arange(len(h), device=self.device), tower.ends(tokens).to(self.device)]
            return F.normalize(tower.project(tower.norm_post(h)).float(), dim=-1)


def through(
    blocks: list[Any], h: Tensor, prompts: Tensor | None, start: int, mask: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Tokens [B, L, W] through every layer, deep prompts [K, P, W] laid over the places from `start` on."""
    for i, block in enumerate(blocks):
        assert isinstance(block, Block)
        if prompts is not None and 0 < i < len(prompts):
            h = overwrite(h, prompts[i], start)
        h = block(h, mask=mask)
    return h


def plain(model: VLM) -> VLM:
    """The same weights in the plain formulation. Where the image tower learns, the text tower has gradients, too."""
    found = Plain(model.clip, model.tokenizer, model.origin, model.prompts)
    found.precision, found.template = model.precision, model.template
    if any(p.requires_grad for p in model.clip.image.parameters()):
        model.clip.text.requires_grad_(True)
    return found


def plain_attack(pgd: PGD, models: Mapping[str, VLM]) -> Callable[..., Tensor]:
    """A training attack of the same iterates as PGD's, by `backward()`; the weights' gradients are thrown away."""

    def attack(f: Classifier, x: Tensor, y: Tensor, loss: Any = cross_entropy) -> Tensor:
        z = random_point(x, pgd.eps, pgd.norm, torch.rand_like(x))
        for _ in range(pgd.steps):
            z = z.detach().requires_grad_(True)
            loss(f(z), f(x) if y.is_floating_point() else y).sum().backward()
            assert z.grad is not None
            slope = z.grad
            for model in models.values():
                model.zero_grad()
            z = project(z.detach() + pgd.step * ascent(slope, pgd.norm), x, pgd.eps, pgd.norm)
        return z

    return attack
