"""Training augmentation on a batch of pixels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from advtune.draws import each


def crop_and_flip(x: Tensor, smallest: float = 0.08) -> Tensor:
    """Random resized crop (area smallest..1, aspect 3/4..4/3) and horizontal flip, one draw an image.

    Pixels [B, 3, H, W] in [0, 1] -> the same shape. Bicubic: a crop is only ever enlarged or nearly so.
    """
    n = len(x)
    area = each(lambda n: torch.empty(n).uniform_(smallest, 1), n)
    aspect = each(lambda n: torch.empty(n).uniform_(math.log(3 / 4), math.log(4 / 3)), n).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    across, down, side = (each(torch.rand, n) for _ in range(3))
    centre_x, centre_y = (across * 2 - 1) * (1 - width), (down * 2 - 1) * (1 - height)
    flip = torch.where(side < 0.5, -1.0, 1.0)
    zero = torch.zeros(n)
    row_x = torch.stack([width * flip, zero, centre_x], dim=1)
    row_y = torch.stack([zero, height, centre_y], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1).to(x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(0, 1)
