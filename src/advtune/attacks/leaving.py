"""Images that are done leave the batch of an attack, and an accelerator never waits to be asked which."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Late:
    """Reads small tensors of an accelerator one call late, of a processor at once.

    A host that asks for a value waits until the device is idle. Here the value sets out for the host when it is
    known, and is read when the next piece of work is under way.
    """

    def __init__(self, device: torch.device, late: bool | None = None):
        self.late = device.type == "cuda" if late is None else late
        self.sent: tuple[Tensor, torch.cuda.Event | None] | None = None

    def __call__(self, value: Tensor) -> np.ndarray | None:
        """value [B], on the device -> what was given the last time (None at first), or at once this value."""
        before, self.sent = self.sent, self._send(value)
        if not self.late:
            before = self.sent
        if before is None:
            return None
        there, arrived = before
        if arrived is not None:
            arrived.synchronize()
        return there.numpy()

    def _send(self, value: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if value.device.type != "cuda":
            return value.detach().to("cpu", copy=True), None
        there = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        there.copy_(value.detach(), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(value.device))
        return there, arrived


class Leaving:
    """Which images stay in the batch of an attack. One that is done stays for one step more on an accelerator: the
    attack keeps what it found."""

    def __init__(self, device: torch.device, late: bool | None = None):
        self.read, self.device = Late(device, late), device
        self.cut: np.ndarray | None = None  # those of the last call that were still there at this one

    def __call__(self, done: Tensor) -> Tensor | None:
        """done [B]: images that may leave -> places [b] of those that stay, or None when all do."""
        known = self.read(done)
        if known is None:
            return None
        known = known if self.cut is None else known[self.cut]
        stay = np.flatnonzero(~known)
        self.cut = stay if self.read.late and known.any() else None
        return torch.from_numpy(stay).to(self.device, non_blocking=True) if known.any() else None
