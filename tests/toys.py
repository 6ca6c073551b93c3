"""Functions to attack. They compute in float64, so that the path of an attack does not hang on rounding."""

from __future__ import annotations

import torch
from torch import nn


def images(n=32, side=8, seed=0, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def stands(f, x, y):
    with torch.no_grad():
        return f(x).argmax(1) == y


class Net(nn.Module):
    """Two random layers, images [B, 3, side, side] -> logits [B, classes]."""

    def __init__(self, classes=4, side=8, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * side**2, 32), nn.Tanh(), nn.Linear(32, classes))
        self.layers.double()
        self.dtype = dtype
        with torch.no_grad():
            self.layers[1].weight.mul_(2)
            self.layers[3].weight.mul_(4)

    def forward(self, x):
        return self.layers(x.double() - 0.5).to(self.dtype)


class Linear:
    """W (x - 1/2) + b, whose decision boundaries are planes."""

    def __init__(self, classes=2, side=4, seed=0, scale=1.0):
        random = torch.Generator().manual_seed(seed)
        self.weight = scale * torch.randn(classes, 3 * side**2, generator=random).double()
        self.bias = 0.1 * scale * torch.randn(classes, generator=random).double()

    def __call__(self, x):
        return ((x.double() - 0.5).flatten(1) @ self.weight.T + self.bias).float()

    def distances(self, x, norm):
        """To the nearest boundary of the class of each image [B], the walls of [0, 1] aside."""
        z = self(x).double()
        y = z.argmax(1)
        dual = (self.weight[:, None] - self.weight).norm(dim=2, p=1 if norm == "linf" else 2)[y]
        lead = z.gather(1, y[:, None]) - z
        return (lead / dual).scatter(1, y[:, None], torch.inf).amin(1)


class Recorded:
    """f, and every batch of images that it was asked about."""

    def __init__(self, f):
        self.f, self.seen = f, []

    def __call__(self, x):
        self.seen.append(x.detach().clone())
        return self.f(x)

    @property
    def sizes(self):
        return [len(x) for x in self.seen]


def between(distances):
    """A radius in the widest gap of the middle half of the distances: rounding decides about no image."""
    middle = distances.sort().values[len(distances) // 4 : -len(distances) // 4]
    at = int(middle.diff().argmax())
    return float(middle[at] + middle[at + 1]) / 2
