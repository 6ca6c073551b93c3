"""The dual encoder: CLIP's image tower and text tower, each with a `prompts` argument.

Shape letters, here and everywhere: B images, C classes, L tokens, P prompt tokens, W tower width,
D embedding width, S image side, H heads, N image patches, K prompt depth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advtune.memory import through
from advtune.pooling import AttentionPool
from advtune.resnet import ResNet
from advtune.shapes import ACTIVATIONS, ClipConfig, TowerConfig, projection, resized

SHORT = 300  # tokens up to which attention's scores are cheaper to keep than to recompute, on a processor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: q [B, H, Q, d], k and v [B, H, L, d] -> [B, H, Q, d], by torch's fused kernel.
    mask [.., Q, L]: true where a query may look.

    At the few tokens of an image tower on a processor the fused backward is slow: written out, an attack step is
    1.4 times as fast (docs/log.md).
    """
    if q.device.type == "cpu" and mask is None and k.shape[2] <= SHORT:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, mask)


class Block(nn.Module):
    """One pre-norm transformer layer: [B, L, W] -> [B, L, W].

    only: the place of the one token of each row that is wanted, [B], or one place for all; then [B, 1, W].
    past: keys and values of tokens before these, the same for every row: see `memory`. mask: see `attend`.
    """

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.width, config.eps)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width, config.eps)
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(
        self, x: Tensor, only: Tensor | int | None = None, past: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        normed = self.norm1(x)
        if only is None:
            q, k, v = self.project(normed, 0, 3)
        else:
            x = pick(x, only)
            q, (k, v) = self.project(pick(normed, only), 0, 1)[0], self.project(normed, 1, 3)
        if past is not None:
            k, v = (torch.cat([p.expand(x.shape[0], -1, -1, -1), t], dim=2) for p, t in zip(past, (k, v), strict=True))
        mixed = attend(q, k, v, mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))

    def memory(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, H, L, d] of tokens x [1, L, W] that rows of further tokens look back at."""
        k, v = self.project(self.norm1(x), 1, 3)
        return k, v

    def project(self, x: Tensor, first: int, stop: int) -> tuple[Tensor, ...]:
        """Queries (0), keys (1), values (2) of x [B, L, W], those from `first` to `stop`: each [B, H, L, d]."""
        rows = slice(first * x.shape[2], stop * x.shape[2])
        found = F.linear(x, self.qkv.weight[rows], self.qkv.bias[rows])
        return tuple(found.unflatten(-1, (stop - first, self.heads, -1)).permute(2, 0, 3, 1, 4))


def pick(x: Tensor, place: Tensor | int) -> Tensor:
    """The token at one place of each row of x [B, L, W]: [B, 1, W]."""
    if isinstance(place, int):
        return x[:, place : place + 1]
    return x[torch.arange(x.shape[0], device=x.device), place][:, None]


def overwrite(x: Tensor, prompt: Tensor, start: int) -> Tensor:
    """x [B, L, W] with positions start .. start + P replaced by prompt [P, W], the same for every row, or by each
    row's own, [B, P, W]."""
    stop = start + prompt.shape[-2]
    return torch.cat([x[:, :start], prompt.to(x.dtype).expand(x.shape[0], -1, -1), x[:, stop:]], dim=1)


class ImageTower(nn.Module):
    """Vision transformer: normalised images [B, 3, S, S] -> embeddings [B, D], not normalised."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        tower, shape = config.image, config.vision
        self.patch, self.grid = config.patch, config.image_size // config.patch
        self.reads, self.norm_after, self.own = shape.reads, shape.norm_after, int(shape.class_token)
        self.smooth = shape.smooth
        self.embed = nn.Linear(3 * config.patch**2, tower.width, bias=shape.patch_bias)
        self.class_token = nn.Parameter(torch.randn(tower.width) * 0.02) if shape.class_token else None
        places = self.own + ((shape.native or config.image_size) // config.patch) ** 2
        self.position = nn.Parameter(torch.randn(places, tower.width) * 0.02)
        self.norm_pre = nn.LayerNorm(tower.width, tower.eps) if shape.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(tower) for _ in range(tower.layers))
        self.norm_post = nn.LayerNorm(tower.width, tower.eps)
        self.pool = AttentionPool(tower) if shape.reads == "attention" else None
        self.project = projection(shape.project, tower.width, config.embed)

    def patches(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, N, 3 * patch * patch]; a remainder at the right and bottom is dropped, as by a
        strided convolution."""
        p, rows, columns = self.patch, x.shape[2] // self.patch, x.shape[3] // self.patch
        x = x[:, :, : rows * p, : columns * p].unflatten(3, (columns, p)).unflatten(2, (rows, p))
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def positions(self) -> Tensor:
        """Position embeddings [n, W] of the class token, where there is one, and the patches."""
        if len(self.position) == self.own + self.grid**2:
            return self.position
        return torch.cat([self.position[: self.own], resized(self.position[self.own :], self.grid, self.smooth)])

    def blank(self) -> Tensor:
        """The token [W] of a patch that shows nothing, at a mean place."""
        bias = 0 if self.embed.bias is None else self.embed.bias
        return (self.position[self.own :].mean(0) + bias).detach()

    def forward(
        self, x: Tensor, prompts: Tensor | None = None, dense: bool = False, again: bool = False
    ) -> Tensor:  # fmt: skip
        """prompts [K, P, W]: the first is appended after the patch tokens, before the pre-norm and without a
        position embedding; prompt k overwrites the same places before layer k (MaPLe, arXiv:2210.03117).
        dense: the embeddings of the class token (of the whole, where there is none) and the patches, [B, 1 + N, D].
        again: see `through`."""
        x = self.embed(self.patches(x))  # [B, N, W]
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)  # [B, 1 + N, W]
        x = x + self.positions()
        plain = x.shape[1]
        if prompts is not None:
            x = torch.cat([x, prompts[0].to(x.dtype).expand(x.shape[0], -1, -1)], dim=1)
        x = self.norm_pre(x)
        for i, block in enumerate(self.blocks):
            if prompts is not None and 0 < i < prompts.shape[0]:
                x = overwrite(x, prompts[i], plain)
            last = i == len(self.blocks) - 1 and not dense and self.reads == "class"
            x = through(block, again, x, 0 if last else None)  # the class token alone is read
        if self.reads == "class":
            return self.project(self.norm_post(x[:, :plain] if dense else x[:, 0]))
        return self.project(self.pooled(x[:, self.own : plain], dense))

    def pooled(self, patches: Tensor, dense: bool) -> Tensor:
        """Patches of the last layer [B, N, W] -> the whole [B, W]; dense: before the patches, [B, 1 + N, W]."""
        normed = self.norm_post(patches)
        if self.pool is not None:
            whole, each = self.pool(normed), self.pool.each(normed) if dense else normed
        else:
            whole, each = self.norm_post(patches.mean(1)) if self.norm_after else normed.mean(1), normed
        return torch.cat([whole[:, None], each], dim=1) if dense else whole


class TextTower(nn.Module):
    """Transformer, as a rule causal: token ids [C, L] -> embeddings [C, D], read at one token, not normalised."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        tower, shape = config.text, config.words
        self.end_token, self.first = config.end_token, config.first
        self.reads, self.causal = shape.reads, shape.causal
        self.embed = nn.Embedding(config.vocabulary, tower.width)
        self.position = nn.Parameter(torch.randn(config.context, tower.width) * 0.01)
        self.blocks = nn.ModuleList(Block(tower) for _ in range(tower.layers))
        self.norm_post = nn.LayerNorm(tower.width, tower.eps)
        self.project = projection(shape.project, tower.width, config.embed)

    def ends(self, tokens: Tensor) -> Tensor:
        """The place that is read of each row [C]: as a rule its first end token. Raises if a row has none, or
        where the last place is read and rows are not as long as the context."""
        if self.reads == "argmax":
            return tokens.argmax(dim=1)
        if self.reads == "last":
            if tokens.shape[1] != len(self.position):
                raise ValueError(f"every text must be filled to {len(self.position)} tokens, not {tokens.shape[1]}")
            return torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
        is_end = tokens.eq(-1 if self.end_token is None else self.end_token)
        if not bool(is_end.any(dim=1).all()):
            raise ValueError(f"every text needs the end token {self.end_token}")
        return is_end.int().argmax(dim=1)

    def lengths(self, tokens: Tensor) -> Tensor:
        """How many tokens of each row [C] decide its embedding: all, where what fills a row is seen."""
        ends = self.ends(tokens)
        return ends + 1 if self.causal else torch.full_like(ends, tokens.shape[1])

    def forward(self, tokens: Tensor, prompts: Tensor | None = None, again: bool = False) -> Tensor:
        """prompts [K, P, W], or a text's own [K, C, P, W], overwrite the P places after the start token (the first P
        where there is none): the first among the embeddings (and so with position embeddings), prompt k before layer k.
        again: see `through`.

        Under the causal mask two things are exact: nothing after the last token that is read is computed, and what all
        texts begin with is computed once. Token ids may stay on the processor: their lengths are asked for there.
        """
        ends = self.ends(tokens)
        tokens = tokens[:, : int(self.lengths(tokens).max())]
        p, device = self.shared(tokens, prompts), self.position.device
        x, ends = self.embed(tokens.to(device)), ends.to(device)
        if prompts is not None:
            x = overwrite(x, prompts[0], self.first)
        x = x + self.position[: tokens.shape[1]]
        head, tail = x[:1, :p], x[:, p:]
        places = torch.arange(tokens.shape[1], device=device)
        mask = places <= places[:, None] if self.causal else None  # [L, L]
        at_ends = (places <= ends[:, None])[:, None, None] if self.causal else None  # [C, 1, 1, L]
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if prompts is not None and 0 < i < prompts.shape[0]:
                if p > self.first:
                    head = overwrite(head, prompts[i], self.first)
                else:
                    tail = overwrite(tail, prompts[i], self.first - p)
            last = i == len(self.blocks) - 1
            only, seen = (ends - p, at_ends) if last else (None, None if mask is None else mask[p:])
            tail = through(block, again, tail, only, block.memory(head) if p else None, seen)
            if p and not last:
                assert mask is not None
                head = through(block, again, head, None, None, mask[:p, :p])
        return self.project(self.norm_post(tail[:, 0]))

    def shared(self, tokens: Tensor, prompts: Tensor | None) -> int:
        """How many places at the beginning are the same in every text [C, L], prompts with them or not at all, and
        precede what is read: none, where tokens see all; else at least the start token, where there is one."""
        if not self.causal:
            return 0
        same, behind = (tokens == tokens[:1]).all(dim=0), 0
        if prompts is not None:
            behind = self.first + prompts.shape[-2]
            same[self.first : behind] = prompts.dim() == 3
        found = min(int(same.int().cumprod(0).sum()), int(self.ends(tokens).min()))
        return found if found >= behind else min(found, self.first)


class CLIP(nn.Module):
    """The dual encoder (CLIP, arXiv:2103.00020). Pixels are floats in [0, 1]; resizing and normalisation
    happen inside, so that a gradient with respect to the pixels goes through them."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.image = ResNet(config) if config.vision.stages else ImageTower(config)
        self.text = TextTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if config.sigmoid else None

    def encode_image(
        self, x: Tensor, prompts: Tensor | None = None, pad: Tensor | None = None, dense: bool = False,
        tower: Callable[..., Tensor] | None = None, again: bool = False,
    ) -> Tensor:  # fmt: skip
        """Pixels [B, 3, any, any] in [0, 1] -> [B, D], not normalised; dense: the patches as well, [B, 1 + N, D].
        prompts [K, P, W] or none. pad [3, S, S], if given, is added to the normalised pixels. tower: stands for the
        image tower, compiled. again: see `through`."""
        x = self.config.preprocess(x)
        x = x if pad is None else x + pad
        return self.image(x, prompts, dense, again) if tower is None else tower(x, prompts, dense)

    def encode_text(self, tokens: Tensor, prompts: Tensor | None = None, again: bool = False) -> Tensor:
        """Token ids [C, L] -> [C, D], not normalised. prompts [K, P, W] or none. again: see `through`."""
        return self.text(tokens, prompts, again)
