"""The decoded cache: a safetensors file that is mapped, never read whole, so that memory does not grow with the set.

It holds "x" uint8 [N, 3, height, width] and "good" bool [N], in this order.
"""

import errno
import json
import math
import mmap
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

Arrays = tuple[np.ndarray, np.ndarray]
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python names it from 3.13 on


def cache_dir() -> Path:
    """$ADVTUNE_CACHE, else $XDG_CACHE_HOME/advtune, else ~/.cache/advtune."""
    if given := os.environ.get("ADVTUNE_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "advtune"


def load(file: Path, n: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """x and good of n images, paged in when touched; what is changed stays in memory. None: no whole file of them."""
    try:
        with file.open("rb") as stream:
            pages = _map_copy_on_write(stream.fileno())
    except (OSError, ValueError):  # ValueError: an empty file
        return None
    found = re.search(rb'"shape":\[%d,3,(\d+),(\d+)\]' % n, pages[:128])
    if not found:
        return None
    shape = (n, 3, int(found[1]), int(found[2]))
    head = _header(shape)
    if pages[: len(head)] != head or len(pages) != _size(shape):
        return None
    x, good = _arrays(pages, shape)
    return torch.from_numpy(x), torch.from_numpy(good)


def create(file: Path, shape: tuple[int, ...]) -> Arrays:
    """x uint8 `shape` and good bool [N], zero, in a new file. Raises OSError, for a full disk as well."""
    with file.open("w+b") as stream:
        _reserve(stream.fileno(), _size(shape))
        stream.write(_header(shape))
        stream.flush()
        return _arrays(mmap.mmap(stream.fileno(), 0), shape)


def in_memory(shape: tuple[int, ...]) -> Arrays:
    """What `create` gives, without a file."""
    return np.zeros(shape, np.uint8), np.zeros(shape[0], bool)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to; it becomes `file` when the block ends well, and goes when not.

    Raises OSError.
    """
    beside = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with beside.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(beside, file)
    finally:
        with suppress(OSError):
            beside.unlink()


def _header(shape: tuple[int, ...]) -> bytes:
    """Byte for byte what safetensors writes."""
    pixels, n = math.prod(shape), shape[0]
    entries = {
        "x": {"dtype": "U8", "shape": shape, "data_offsets": [0, pixels]},
        "good": {"dtype": "BOOL", "shape": [n], "data_offsets": [pixels, pixels + n]},
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _size(shape: tuple[int, ...]) -> int:
    return len(_header(shape)) + math.prod(shape) + shape[0]


def _arrays(pages: mmap.mmap, shape: tuple[int, ...]) -> Arrays:
    data = np.frombuffer(pages, np.uint8, offset=len(_header(shape)))
    x, good = np.split(data, [math.prod(shape)])
    return x.reshape(shape), good.view(bool)


def _map_copy_on_write(descriptor: int) -> mmap.mmap:
    """As safetensors maps a file, but Linux need not set memory aside, which it refuses to beyond RAM and swap."""
    if sys.platform == "win32":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | MAP_NORESERVE)


def _reserve(descriptor: int, size: int) -> None:
    """Make the file `size` long now: a disk that is full later, under the mapping, kills the process with SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
    os.ftruncate(descriptor, size)
