"""How a method is optimised: its paper's optimiser, schedule and batch, as data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from advtune.options import option


@dataclass(frozen=True)
class Recipe:
    """Optimiser, schedule and batches of a training run; every field can be overridden by `-o key=value`."""

    optimizer: str = option("sgd", "optimiser", choices=("sgd", "adamw"))
    lr: float = option(1e-3, "peak learning rate", low=0)
    momentum: float = option(0.9, "SGD momentum (AdamW keeps its own betas)", low=0)
    weight_decay: float = option(0.0, "weight decay", low=0)
    schedule: str = option("cosine", "after warm-up: cosine to zero, or constant", choices=("cosine", "constant"))
    warmup: int = option(0, "steps of linear warm-up; cut to a tenth of the run", low=0)
    warmup_share: float = option(0.0, "share of the run that is linear warm-up", low=0, high=1)
    warmup_epochs: int = option(0, "epochs at warmup_lr before all else; cut to a tenth of the run", low=0)
    warmup_lr: float = option(1e-5, "learning rate of those epochs", low=0)
    epochs: int = option(10, "passes over the training images", low=1)
    batch_size: int = option(32, "images a step", low=1)
    augment: bool = option(False, "random resized crop and horizontal flip")
    average: float = option(
        0.0, "decay of the moving average of the weights that is the result (0.99: of 100 steps); 0: the last",
        low=0, high=0.9999,
    )  # fmt: skip
    interpolate: float = option(
        1.0, "the result's place between the original image tower (0) and the tuned one (1)", low=0, high=1
    )

    def optimiser(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over the parameters that learn."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return torch.optim.AdamW(parameters, self.lr, weight_decay=self.weight_decay)

    def rate(self, step: int, steps: int, steps_per_epoch: int) -> float:
        """The learning rate of step 0 .. steps - 1."""
        limit = steps // 10
        flat = min(self.warmup_epochs * steps_per_epoch, limit)
        rise = max(min(self.warmup, limit), round(self.warmup_share * steps))
        if step < flat:
            return self.warmup_lr
        if step < rise:
            return self.lr * (step + 1) / (rise + 1)
        if self.schedule == "constant":
            return self.lr
        begin = max(flat, rise)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - begin) / max(1, steps - begin)))
