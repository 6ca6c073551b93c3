"""Weight files of a folder to named tensors; nothing of a stranger's is executed, and no file names another place."""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from advtune.configuration import table_of
from advtune.errors import UserError
from advtune.untrusted import is_there, visible

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: safetensors before pickled, whole before sharded. Raises UserError when there are
    none, or one is missing or elsewhere."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole, index = folder / f"{stem}.{ending}", folder / f"{stem}.{ending}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return [folder / name for name in _shards(folder, index, ending)]
    raise UserError(
        f"{folder}: no weights (model.safetensors, or pytorch_model.bin, whole or in shards with their index)"
    )


def _shards(folder: Path, index: Path, ending: str) -> list[str]:
    places = table_of(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{index}: has no weight_map of tensors to files; fetch the file again")
    for name in sorted(set(names)):
        if Path(name).name != name or "\\" in name or not name.endswith(f".{ending}"):
            raise UserError(f"{index}: names {visible(name)[:60]!r}, not a .{ending} file beside it; do not trust this")
        if not is_there(folder / name, Path.is_file):
            raise UserError(f"{folder}: shard {visible(name)} is named by {index.name} but missing; fetch it")
    return sorted(set(names))


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of the files. Of a pickle only what tensors are made of is read (weights_only): one that asks for
    more is refused. Raises UserError."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            part = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
        except UserError:
            raise
        except UnpicklingError:
            raise UserError(
                f"{path}: holds other things than tensors, which could run code, or is damaged; it was not opened: "
                "get the model as safetensors"
            ) from None
        except Exception as error:  # both libraries raise nearly anything on hostile bytes
            reason = visible(str(error).strip().partition("\n")[0])[:120]
            raise UserError(f"{path}: weights are truncated or damaged ({reason}); fetch the file again") from None
        tensors |= part
    return tensors


def _unpickled(path: Path) -> dict[str, Tensor]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(each.file_size for each in archive.infolist()) > path.stat().st_size:
                raise UserError(f"{path}: is packed and would grow; torch.save packs nothing: get it as safetensors")
    found: Any = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise UserError(f"{path}: is no table of named tensors; get the model as safetensors")
    return found


def check_floats(name: str, value: Tensor, where: str | Path) -> None:
    """Raises UserError for a tensor that is not of plain finite floating-point numbers in memory, as fp32 has them."""
    if value.dtype not in FLOATS or value.layout != torch.strided or value.device.type != "cpu":
        kind = str(value.dtype).removeprefix("torch.")
        raise UserError(f"{where}: {name} holds {kind} numbers, not floating-point weights; get the unquantised model")
    if value.nbytes > value.untyped_storage().nbytes():  # a view that repeats a few, and would fill the memory
        raise UserError(f"{where}: {name} is larger than what the file holds of it; get another copy of the model")
    if not bool(value.float().isfinite().all()):
        raise UserError(f"{where}: {name} holds nan or infinite weights; get another copy of the model")
