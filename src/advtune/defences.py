"""Steps before the model that change its forward pass: examples of what must be attacked adaptively."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

QUALITY, SIGMA = 75, 8 / 255


@torch.no_grad()
def jpeg(x: Tensor) -> Tensor:
    """JPEG at quality 75 of images [B, 3, S, S] (Guo et al., arXiv:1711.00117). It has no gradient: attack it with
    bpda=true."""
    out = torch.empty_like(x)
    for i, image in enumerate((x * 255).round().byte().cpu().permute(0, 2, 3, 1).numpy()):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY)
        out[i] = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float() / 255
    return out


def noise(x: Tensor) -> Tensor:
    """Fresh Gaussian noise of 8/255 on every forward of images [B, 3, S, S]. It is random: attack it with eot=20."""
    return x + SIGMA * torch.randn_like(x)


DEFENCES: dict[str, Callable[[Tensor], Tensor]] = {"jpeg": jpeg, "noise": noise}
