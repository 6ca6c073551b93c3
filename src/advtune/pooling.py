"""SigLIP's attention-pooling head: one learned query looks at all patches, an MLP follows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advtune.shapes import ACTIVATIONS, TowerConfig


class AttentionPool(nn.Module):
    """Patches [B, N, W], normalised -> [B, W] (arXiv:2106.04560, "MAP")."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.heads = config.heads
        self.probe = nn.Parameter(torch.randn(config.width) * 0.02)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        wide = x.shape[2]
        q = F.linear(self.probe, self.qkv.weight[:wide], self.qkv.bias[:wide]).expand(x.shape[0], 1, wide)
        k, v = F.linear(x, self.qkv.weight[wide:], self.qkv.bias[wide:]).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q.to(k.dtype), k, v))
        return self.after(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[:, 0]

    def each(self, x: Tensor) -> Tensor:
        """What the head gives when it looks at one patch alone, [B, N, W]: the dense embeddings."""
        wide = x.shape[2]
        return self.after(F.linear(x, self.qkv.weight[2 * wide :], self.qkv.bias[2 * wide :]))

    def after(self, mixed: Tensor) -> Tensor:
        x = self.out(mixed)
        return x + self.fc2(self.activation(self.fc1(self.norm(x))))
