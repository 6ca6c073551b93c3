"""Training augmentation on a batch of pixels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(x: Tensor, smallest: float = 0.08) -> Tensor:
    """Random resized crop (area smallest..1, aspect 3/4..4/3) and horizontal flip, one draw an image.

    Pixels [B, 3, H, W] in [0, 1] -> the same shape. Bicubic: a crop is only ever enlarged or nearly so.
    """
    n = len(x)
    area = torch.empty(n).uniform_(smallest, 1)
    aspect = torch.empty(n).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    centre_x, centre_y = (torch.rand(n) * 2 - 1) * (1 - width), (torch.rand(n) * 2 - 1) * (1 - height)
    flip = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    zero = torch.zeros(n)
    across = torch.stack([width * flip, zero, centre_x], dim=1)
    down = torch.stack([zero, height, centre_y], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1).to(x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(0, 1)
