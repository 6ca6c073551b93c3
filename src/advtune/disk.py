"""What a disk does to files: it is full, read-only, another process's, or gives back other bytes than were written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from advtune.errors import UserError

LOCK, SUMS = ".lock", "SHA256SUMS"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CRC = "crc32"


@contextmanager
def lock(path: Path, refusal: str = "", shared: bool = False) -> Iterator[None]:
    """Holds a lock file, which is made, alone or with others that share it. Raises UserError with `refusal`, if there
    is one, when another process holds it, else waits.

    The lock goes with the process that holds it, however that ends; where files cannot be locked, nobody is kept away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        gone = not locked(file.fileno(), shared, wait=not refusal) or not path.exists()
        if refusal and (gone or path.stat().st_ino != os.fstat(file.fileno()).st_ino):
            raise UserError(refusal)
        yield  # closing the file lets go


def alone(folder: Path, shared: bool = False) -> AbstractContextManager[None]:
    """Keeps other processes from working in a folder, which is made, but those that share it. Raises UserError when one
    does."""
    return lock(folder / LOCK, f"{folder}: another process works here; wait for it, or choose another --out", shared)


def locked(handle: int, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file for this process; False when another has it."""
    try:
        import fcntl

        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, and file systems without locks
        pass
    return True


def check_alone(folder: Path) -> None:
    """Raises UserError when another process works in a folder; leaves no trace."""
    if (folder / LOCK).is_file() and os.access(folder / LOCK, os.W_OK):
        with alone(folder):
            pass


def check_writable(out: Path) -> None:
    """Raises UserError when nothing can be written to `out` or, as long as it is not there, above it."""
    place = out.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not os.access(place, os.W_OK):
        raise UserError(f"{place}: read-only, or not yours to write to; choose another --out")


def check_plain(path: Path) -> None:
    """Raises OSError for a pipe or a device: what is written beside and renamed would take its place."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "a pipe or a device; name a file", str(path))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A block that writes `path`: an OSError, also one that a library turned into its own, then says so."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def with_crc(facts: Mapping[str, Any]) -> str:
    """Facts as one line of JSON that ends in its own checksum. Raises ValueError for nan and infinity."""
    text = json.dumps(facts, allow_nan=False)
    return f'{text[:-1]}, "{CRC}": "{zlib.crc32(text.encode()):08x}"}}'


def crc_fits(facts: dict[str, Any]) -> bool | None:
    """Takes the checksum off facts that were read; whether they are what was written, None when there was none."""
    told = facts.pop(CRC, None)
    return None if told is None else told == f"{zlib.crc32(json.dumps(facts).encode()):08x}"


def sums(contents: Mapping[str, bytes]) -> str:
    """The lines of a SHA256SUMS file, which `sha256sum -c` reads."""
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())


def check_sums(folder: Path, *names: str) -> None:
    """Raises UserError naming the first of these files that is not what SHA256SUMS says; older folders have none."""
    if not (folder / SUMS).is_file():
        return
    lines = (folder / SUMS).read_text(errors="replace").splitlines()
    known = {line[66:]: line[:64] for line in lines}
    for name in names:
        try:
            with (folder / name).open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{folder / name}: missing or damaged ({error.strerror}); tune again") from None
        if known.get(name) != digest:
            why = f"damaged: not what {SUMS} says; tune again (or remove {SUMS}, if you changed the file)"
            raise UserError(f"{folder / name}: {why}")
