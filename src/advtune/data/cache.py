"""The decoded cache: a safetensors file that is mapped, never read whole, so that memory does not grow with the set.

It holds "x" uint8 [N, 3, height, width] and "good" bool [N], in this order, and the checksum of both.
"""

import errno
import json
import math
import mmap
import os
import re
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from advtune.disk import check_plain, locked, naming

Arrays = tuple[np.ndarray, np.ndarray]
BLANK = b"00000000"  # where the checksum will stand
_intact: set[tuple[Path, int, int, int]] = set()  # files that were read whole by this process
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
    found = re.search(rb'"shape":\[%d,3,(\d+),(\d+)\]' % n, pages[:256])
    if not found:
        return None
    shape = (n, 3, int(found[1]), int(found[2]))
    head = _header(shape, _told(pages[:256]))
    if pages[: len(head)] != head or len(pages) != len(head) + math.prod(shape) + n:
        return None
    x, good = _arrays(pages, shape, len(head))
    return torch.from_numpy(x), torch.from_numpy(good)


def intact(file: Path) -> bool:
    """Whether a file holds what was written, as far as it says: earlier versions wrote no checksum. It is read whole,
    once in a process."""
    with file.open("rb") as stream:
        facts = os.fstat(stream.fileno())
        key = file, facts.st_ino, facts.st_size, facts.st_mtime_ns
        if key not in _intact:
            told = _told(stream.read(256))
            if told is not None and told != _checksum(stream):
                return False
            _intact.add(key)
    return True


def seal(file: Path) -> None:
    """Write the checksum of what a file that `create` made now holds. Raises OSError."""
    with file.open("rb+") as stream:
        digest = _checksum(stream)
        stream.seek(0)
        stream.seek(stream.read(256).index(BLANK))
        stream.write(digest)


def create(file: Path, shape: tuple[int, ...]) -> Arrays:
    """x uint8 `shape` and good bool [N], zero, in a new file. Raises OSError, for a full disk as well."""
    with file.open("w+b") as stream:
        head = _header(shape, BLANK)
        _reserve(stream.fileno(), len(head) + math.prod(shape) + shape[0])
        stream.write(head)
        stream.flush()
        return _arrays(mmap.mmap(stream.fileno(), 0), shape, len(head))


def in_memory(shape: tuple[int, ...]) -> Arrays:
    """What `create` gives, without a file."""
    return np.zeros(shape, np.uint8), np.zeros(shape[0], bool)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to; it becomes `file` when the block ends well, and goes when not. What a killed
    process left beside it goes, too.

    Raises OSError.
    """
    check_plain(file)
    beside = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(file):
            with beside.open("w+b") as stream:
                locked(stream.fileno())
                _sweep(file, beside)
                yield beside
                os.fsync(stream.fileno())
                if sys.platform != "win32":  # there, an open file keeps its name
                    os.replace(beside, file)
            if sys.platform == "win32":
                os.replace(beside, file)
    finally:
        with suppress(OSError):
            beside.unlink()


def _sweep(file: Path, beside: Path) -> None:
    """Remove what is beside `file` and locked by nobody."""
    pattern = re.compile(re.escape(file.stem) + r"\.\d+\.\d+\.tmp")
    for path in file.parent.iterdir() if sys.platform != "win32" else ():
        if path != beside and pattern.fullmatch(path.name):
            with suppress(OSError), path.open("rb") as stream:
                if locked(stream.fileno()):
                    path.unlink()


def _told(head: bytes) -> bytes | None:
    """The checksum in a header."""
    found = re.search(rb'"crc32":"([0-9a-f]{8})"', head)
    return found and found[1]


def _checksum(stream: BinaryIO) -> bytes:
    """Of all that follows the header."""
    stream.seek(0)
    stream.seek(8 + int.from_bytes(stream.read(8), "little"))
    digest = 0
    while chunk := stream.read(1 << 20):
        digest = zlib.crc32(chunk, digest)
    return b"%08x" % digest


def _header(shape: tuple[int, ...], told: bytes | None) -> bytes:
    """Byte for byte what safetensors writes."""
    pixels, n = math.prod(shape), shape[0]
    entries: dict[str, Any] = {} if told is None else {"__metadata__": {"crc32": told.decode()}}
    entries |= {
        "x": {"dtype": "U8", "shape": shape, "data_offsets": [0, pixels]},
        "good": {"dtype": "BOOL", "shape": [n], "data_offsets": [pixels, pixels + n]},
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _arrays(pages: mmap.mmap, shape: tuple[int, ...], offset: int) -> Arrays:
    data = np.frombuffer(pages, np.uint8, offset=offset)
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
