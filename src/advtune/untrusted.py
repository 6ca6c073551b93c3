"""What comes from outside: files read within bounds, JSON of any depth, texts harmless on a terminal or in a table."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMAGE_BYTES = 1 << 30  # of an encoded image
TEXT_BYTES = 256 << 20  # of a JSON, TOML or CSV file; the largest split file of CoOp has a third of it
# Control characters, line and paragraph separators, changes of direction, halves of a character.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
HUB_ID = re.compile(r"(?!.*(\.\.|--))\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)  # OWNER/NAME, never a path
FORMULA = tuple("=+-@\t\r＝＋－＠")


def read_bytes(path: Path, most: int = TEXT_BYTES) -> bytes:
    """The bytes of a plain file: no pipe or device, which might never end, and no more than `most`. Raises OSError,
    whose strerror says why."""

    def at_once(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe without a writer would be waited for

    try:
        with open(path, "rb", opener=at_once) as stream:
            facts = os.fstat(stream.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(errno.EINVAL, "not a plain file", str(path))
            if facts.st_size > most:
                raise OSError(errno.EFBIG, f"larger than {most // 1_000_000} MB", str(path))
            return stream.read()
    except ValueError:  # a zero byte, half a character
        raise OSError(errno.EINVAL, "not a name that a file can have", visible(str(path))) from None


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises OSError as `read_bytes`, ValueError for what is not JSON."""
    return parse_json(read_bytes(path))


def parse_json(text: str | bytes, constant: Callable[[str], Any] | None = None) -> Any:
    """What JSON says; `constant` makes something of NaN and Infinity. Raises ValueError for what is not JSON, or nested
    beyond what Python can follow."""
    try:
        return json.loads(text, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deep") from None


def expanded(name: str | Path) -> Path:
    """The path, with ~ for the home of a user that there is."""
    try:
        return Path(name).expanduser()
    except (RuntimeError, ValueError):  # no such user, or no name of one
        return Path(name)


def is_there(path: Path, kind: Callable[[Path], bool] = Path.exists) -> bool:
    """Whether there is such a path (Path.is_dir: such a folder); a name that no file can have is none."""
    try:
        return kind(path)
    except (OSError, ValueError):  # too long; a zero byte
        return False


def visible(text: str) -> str:
    """The text on one line with nothing that a terminal obeys: control characters are written out, as `\\x1b`."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def cell(value: Any) -> Any:
    """A value for a CSV file: a text that a spreadsheet would compute gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    return ("'" if value.startswith(FORMULA) else "") + visible(value)
