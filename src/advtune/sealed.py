"""A checkpoint: what torch.save writes, and at its end the checksum of all that; torch.load reads it as well."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from advtune.disk import naming

TRAILER = len("\nsha256 ") + 64 + 1  # bytes


def write(state: Mapping[str, Any], path: Path, before: Path) -> None:
    """Write a checkpoint; the one that was there is then called `before`. Raises OSError, and nothing changed."""
    new = path.with_suffix(".tmp")
    try:
        with naming(path), new.open("wb") as file:
            stream = Hashed(file)
            torch.save(state, cast(BinaryIO, stream))
            if stream.error:
                raise stream.error
            file.write(f"\nsha256 {stream.digest.hexdigest()}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if path.exists():
        path.replace(before)
    new.replace(path)


class Hashed:
    """A file for torch.save, which turns an OSError into something else: it is kept instead."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            if self.error is None:
                self.digest.update(data)
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        pass


def read(path: Path) -> dict[str, Any]:
    """A checkpoint. Raises ValueError when it is damaged; one of an older version may be so unseen, as it has no
    checksum."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TRAILER))
        told = re.fullmatch(rb"\nsha256 ([0-9a-f]{64})\n", file.read())
        if told:
            digest, left = hashlib.sha256(), size - TRAILER
            file.seek(0)
            while left and (chunk := file.read(min(left, 1 << 20))):
                digest.update(chunk)
                left -= len(chunk)
            if digest.hexdigest().encode() != told[1]:
                raise ValueError("its checksum differs")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # anything, of hostile bytes
        raise ValueError(f"cannot be read ({type(error).__name__})") from None
