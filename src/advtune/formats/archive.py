"""Tensors out of PyTorch's zip archives, TorchScript's as well, without running anything that stands in them.

A pickle is a list of instructions that may call any function of Python's. Here it may call those of `CALLED` alone, all
of them ours; what a TorchScript module is made of becomes an `Inert`, whose code is never looked at.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advtune.errors import UserError
from advtune.untrusted import visible

DEPTH = 64  # of tables within tables
TABLES = 100_000  # that are looked into: one that is named twice at every depth would be without end
DTYPES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
ASIDE = {  # what else checkpoints hold beside their tensors: it is passed over
    ("argparse", "Namespace"), ("numpy", "dtype"), ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"), ("numpy", "ndarray"), ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"), ("_codecs", "encode"),  # the bytes of numpy's numbers
    ("torch", "device"), ("torch", "Size"),
}  # fmt: skip


class Inert:
    """Stands for an object of the archive: takes whatever it is given, does nothing, keeps its attributes."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __new__(cls, *_: Any) -> Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Reader(pickle.Unpickler):
    """Unpickles data.pkl of an archive; raises UnpicklingError for what is not allowed."""

    def __init__(self, archive: zipfile.ZipFile, name: str):
        super().__init__(archive.open(name))
        self.archive, self.root = archive, name.removesuffix("data.pkl")
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__") or (module, name) in ASIDE:
            return Inert
        if module in ("torch", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        if (module, name) in CALLED:
            return CALLED[module, name]
        raise pickle.UnpicklingError(f"asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(count, int):
            raise pickle.UnpicklingError(f"asks for {kind!r:.40}")
        if key not in self.storages:
            numbers = record(self.archive, f"{self.root}data/{key}")
            self.storages[key] = torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)
        if len(self.storages[key]) < count or self.storages[key].dtype != dtype:
            raise pickle.UnpicklingError(f"has {len(self.storages[key])} of {count} numbers")
        return self.storages[key]


def record(archive: zipfile.ZipFile, name: str) -> bytearray:
    """A file of the archive. Raises UnpicklingError for one that is packed, and might grow beyond the memory."""
    facts = archive.getinfo(name)
    if facts.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"{name} is packed")
    return bytearray(archive.read(facts))


def rebuild(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    """A tensor from its numbers; torch refuses a view that leaves them."""
    return torch.as_strided(storage, size, stride, offset)


CALLED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch.jit._pickle", "build_intlist"): list,
    ("torch.jit._pickle", "build_doublelist"): list,
    ("torch.jit._pickle", "build_boollist"): list,
    ("torch.jit._pickle", "build_tensorlist"): list,
    ("torch.jit._pickle", "restore_type_tag"): lambda value, *_: value,
}


def read(file: Path) -> dict[str, Any]:
    """What an archive of torch.save or torch.jit.save holds: tables of tables of tensors, modules as tables. Raises
    UserError for one that is damaged or asks for anything but tensors."""
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            record(archive, name)
            found = Reader(archive, name).load()
            deque(flat(found), 0)
    except StopIteration:
        raise UserError(f"{file}: a zip file, but no archive of PyTorch's") from None
    except pickle.UnpicklingError as error:
        what = visible(str(error))[:120]
        raise UserError(f"{file}: holds other things than tensors, which could run code ({what}); not opened") from None
    except Exception as error:  # nearly anything, on hostile bytes
        reason = visible(str(error).strip().partition("\n")[0])[:120]
        raise UserError(f"{file}: truncated or damaged ({reason}); fetch the file again") from None
    return found if isinstance(found, dict) else {"": found}


def flat(
    value: Any, prefix: str = "", depth: int = 0, left: Iterator[int] | None = None
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """All tensors in tables and modules, with dotted names. Raises UnpicklingError for more than TABLES tables, which
    `read` lets nobody have."""
    left = iter(range(TABLES)) if left is None else left
    if isinstance(value, Inert):
        value = value.state
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, dict) and depth < DEPTH:
        if next(left, None) is None:
            raise pickle.UnpicklingError(f"more than {TABLES} tables")
        for key, each in value.items():
            yield from flat(each, f"{prefix}.{key}" if prefix else str(key), depth + 1, left)
