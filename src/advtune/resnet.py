"""OpenAI's ResNet (arXiv:2103.00020): three-convolution stem, pooling before every stride, attention pool.

Names are those of OpenAI's checkpoints. Statistics of the batch norms are data: no forward changes them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advtune.memory import through
from advtune.shapes import ClipConfig, resized


class FrozenNorm(nn.Module):
    """Batch norm with the statistics that came with the weights: [B, C, h, w] -> the same shape."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=1e-5)


def convolution(inside: int, outside: int, kernel: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, kernel, stride, padding=kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """[B, inside, h, w] -> [B, 4 * width, h / stride, w / stride]; a stride is an average pool."""

    def __init__(self, inside: int, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv1, self.bn1 = convolution(inside, width), FrozenNorm(width)
        self.conv2, self.bn2 = convolution(width, width, 3), FrozenNorm(width)
        self.conv3, self.bn3 = convolution(width, 4 * width), FrozenNorm(4 * width)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or inside != 4 * width:
            self.downsample = nn.Sequential(convolution(inside, 4 * width), FrozenNorm(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(self.shrink(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(self.shrink(x))))

    def shrink(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x


class MeanPool(nn.Module):
    """Attention pool of a feature map [B, C, h, w]: the mean is the query. [B, D], or of every place [B, 1 + hw, D]."""

    def __init__(self, grid: int, native: int, width: int, heads: int, embed: int):
        super().__init__()
        self.heads, self.grid = heads, grid
        self.positional_embedding = nn.Parameter(torch.randn(1 + native**2, width) * width**-0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed)

    def forward(self, x: Tensor, dense: bool = False) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # [B, hw, C]
        place = self.positional_embedding
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + torch.cat([place[:1], resized(place[1:], self.grid)])
        q = self.q_proj(x if dense else x[:, :1])
        parts = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, self.k_proj(x), self.v_proj(x)))
        found: Tensor = self.c_proj(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return found if dense else found[:, 0]


class ResNet(nn.Module):
    """Normalised images [B, 3, S, S] -> embeddings [B, D], not normalised; dense: of the mean and the places of the
    last map, [B, 1 + N, D]. It has no tokens, so there is no place for prompts."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        width = config.image.width
        self.conv1, self.bn1 = convolution(3, width // 2, 3, 2), FrozenNorm(width // 2)
        self.conv2, self.bn2 = convolution(width // 2, width // 2, 3), FrozenNorm(width // 2)
        self.conv3, self.bn3 = convolution(width // 2, width, 3), FrozenNorm(width)
        inside, stages = width, []
        for i, blocks in enumerate(config.vision.stages):
            wide = width * 2**i
            first = Bottleneck(inside, wide, 2 if i else 1)
            stages.append(nn.Sequential(first, *(Bottleneck(4 * wide, wide, 1) for _ in range(blocks - 1))))
            inside = 4 * wide
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        grid, native = config.image_size // 32, (config.vision.native or config.image_size) // 32
        self.attnpool = MeanPool(grid, native, inside, config.image.heads, config.embed)

    def forward(
        self, x: Tensor, prompts: Tensor | None = None, dense: bool = False, again: bool = False
    ) -> Tensor:  # fmt: skip
        """again: what a stage computes on the way is forgotten, and computed once more for a gradient."""
        if prompts is not None:
            raise ValueError("a ResNet has no place for prompts")
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = F.avg_pool2d(x, 2)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = through(stage, again, x)
        found: Tensor = self.attnpool(x, dense)
        return found
