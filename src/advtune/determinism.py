"""The same bits from the same command: what torch is told for it."""

from __future__ import annotations

import os

LACKS = "does not have a deterministic implementation"  # how torch says that an operation has none


def deterministic() -> None:
    """From now on the whole process uses only operations that give the same bits every time, in full fp32: no TF32, no
    choice of algorithms by trial. An operation that has no such form raises RuntimeError. Call it before a GPU is used.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS is first used
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def said() -> list[str]:
    """What a row says of it."""
    import torch

    return ["deterministic operations only"] if torch.are_deterministic_algorithms_enabled() else []
