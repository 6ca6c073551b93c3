"""The result row: one line of JSON. What is not in the row is not in the table."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

from advtune import __version__
from advtune.disk import check_plain, crc_fits, locked, naming, with_crc
from advtune.errors import UserError, suggest
from advtune.kinds import check_kinds
from advtune.untrusted import parse_json

SCHEMA = 1
LAST = {"average": 0.0, "interpolate": 1.0}  # of a recipe whose result is the last weights, and all the way
LATER = {"warmup_share": 0.0, **LAST}  # of a recipe that does not say
START = b'{"schema": '  # how every line begins; tells a cut row from a stranger's file


def said(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with what older versions did not say of it."""
    return {**recipe, **LATER, **recipe}  # in its own order


def wilson(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion, as fractions in [0, 1]. Raises ValueError for n < 1.

    centre = (p + z^2/2n) / (1 + z^2/n), half = z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n).
    """
    if n < 1 or not 0 <= correct <= n or not 0 < level < 1:
        raise ValueError(f"no interval for {correct} correct of {n} at level {level}")
    z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
    p = correct / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # at the ends the exact bound is 0 or 1, which rounding misses
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


def flag_text(flags: Iterable[Any]) -> str:
    """Flags per image as the row keeps them: one 0 or 1 each. Takes booleans, 0/1 or such a text."""
    if isinstance(flags, str):
        if set(flags) - set("01"):
            raise ValueError("a text of flags holds only 0 and 1")
        return flags
    values = list(flags)
    if any(flag not in (0, 1) for flag in values):
        raise ValueError("a flag is true or false")
    return "".join("1" if flag else "0" for flag in values)


def accuracy(flags: Sequence[bool] | str) -> dict[str, Any]:
    """`{"correct", "n", "accuracy", "low", "high"}`; fractions, with the 95 % Wilson interval.

    Raises ValueError when there is no flag.
    """
    text = flag_text(flags)
    correct, n = text.count("1"), len(text)
    low, high = wilson(correct, n)
    return {"correct": correct, "n": n, "accuracy": correct / n, "low": low, "high": high}


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; one value has no spread. Raises ValueError when there is none."""
    if not values:
        raise ValueError("no values to average")
    return statistics.fmean(values), (statistics.stdev(values) if len(values) > 1 else None)


def now() -> str:
    """The time in UTC, ISO 8601, to the microsecond; sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluation of one model on one split. Raises ValueError when flags and counts disagree."""

    schema: int = SCHEMA
    advtune: str = __version__
    time: str = field(default_factory=now)
    run: str = ""  # name of the run's folder
    model: str = ""  # sha256 of the weights that were scored, the backbone's and what was learned; old rows have none
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    reconstructed: list[str] = field(default_factory=list)  # options whose value no public source gives
    recipe: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] | None = None  # spec, name, part, shots, seed, n, sha256, classes, attack
    backbone: dict[str, Any]  # name, sha256, image_size, logit_scale, notice
    data: dict[str, Any]  # spec, name, part, shots, seed, limit, resolution, n, sha256, template, skipped, ...
    attack: dict[str, Any] | None = None  # name, eps, steps, ...
    threat: str = ""
    clean: dict[str, Any]
    robust: dict[str, Any] | None = None
    zero_gradient: dict[str, Any] | None = None  # share, n
    stages: list[dict[str, Any]] = field(default_factory=list)  # of the attack: name, attacked, fell, seconds
    checks: list[dict[str, Any]] = field(default_factory=list)  # findings: name, alarm, value, limit, n, text
    precision: str = "fp32"
    device: str = ""
    batch_size: int = 0
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    flags: dict[str, str]  # clean, robust, after <stage>: one 0 or 1 an image, in the split's order

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema}, this version reads {SCHEMA}")
        if (self.attack is None) != (self.robust is None):
            raise ValueError("attack and robust go together: both or neither")
        for name, counts in (("clean", self.clean), ("robust", self.robust)):
            if (counts is None) != (name not in self.flags):
                raise ValueError(f"flags and counts of {name} go together: both or neither")
            if counts is None:
                continue
            found = accuracy(self.flags[name])
            if any(not math.isclose(counts[key], found[key], abs_tol=1e-9) for key in found):
                raise ValueError(f"flags of {name} give {found['correct']} of {found['n']}, the counts differ")

    def to_json(self) -> str:
        """One line with its checksum, without the newline. Raises ValueError for nan or infinity."""
        return with_crc({each.name: getattr(self, each.name) for each in dataclasses.fields(self)})

    @classmethod
    def from_json(cls, text: str | bytes) -> Row:
        """Raises ValueError when the text is not a row, one of another schema, or not what was written. A row of an
        older version has no checksum; its counts and flags have to agree."""
        facts = parse_json(text, _not_a_number)
        if not isinstance(facts, dict) or "schema" not in facts:
            raise ValueError("not a result row")
        if facts["schema"] != SCHEMA:
            raise ValueError(f"schema {facts['schema']}, this version reads {SCHEMA}")
        fits = crc_fits(facts)
        if isinstance(facts.get("recipe"), dict) and facts["recipe"]:
            facts["recipe"] = said(facts["recipe"])
        try:
            row = cls(**facts)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a result row: {error}") from error
        if fits is False:
            raise ValueError("damaged or changed, its crc32 differs")
        return row


def append(path: str | os.PathLike[str], row: Row) -> None:
    """Adds one line of JSON and waits until it is on the disk. A row cut short by a killed writer is removed.

    Raises UserError when the file ends in something that is not a row.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = row.to_json().encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        with naming(path):
            locked(handle, wait=True)  # closing the handle lets go
            line = _mend(handle, path) + line
            end = os.fstat(handle).st_size
            try:
                if os.write(handle, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, end)
                raise
    finally:
        os.close(handle)


def read(*paths: str | os.PathLike[str]) -> list[Row]:
    """The rows of JSON-lines files, in order; a half-written last line is skipped.

    Raises UserError naming file and line for a broken one, and for a file that cannot be read.
    """
    rows = []
    for path in paths:
        try:
            lines = Path(path).read_bytes().split(b"\n")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; name a file of result rows") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append(Row.from_json(line))
            except ValueError as error:
                if number == len(lines) and _cut(line):
                    continue
                raise UserError(f"{path} line {number}: {_one_line(error)}; mend or remove that line") from error
    return rows


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes beside, waits for the disk, renames: the file is whole or untouched. Text is UTF-8."""
    path = Path(path)
    check_plain(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{token_hex(4)}.tmp")
    try:
        with naming(path), beside.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _mend(handle: int, path: Path) -> bytes:
    """Cuts an unfinished last line off; returns the newline that a finished one lacks, or nothing."""
    end, take, tail = os.fstat(handle).st_size, 65536, b""
    with path.open("rb") as file:
        while b"\n" not in tail and len(tail) < end:
            file.seek(max(0, end - take))
            tail, take = file.read(), take * 4
    tail = tail.rpartition(b"\n")[2]
    if not tail.strip():
        return b""
    try:
        Row.from_json(tail)
        return b"\n"
    except ValueError:
        if not _cut(tail):
            raise UserError(f"{path} does not end in a result row; give another file to append to") from None
    os.ftruncate(handle, end - len(tail))
    return b""


def _cut(line: bytes) -> bool:
    """Whether this is the beginning of a row; a lost block reads as zeros."""
    line = line.rstrip(b"\0")
    if not line.startswith(START):
        return START.startswith(line)
    try:
        json.JSONDecoder().raw_decode(line.decode())
    except (ValueError, RecursionError):
        return True
    return False  # whole, so not cut: a row of another schema, a wrong one, or one with a damaged end


def files_in(place: Path) -> list[Path]:
    """The files of result rows under a path. Raises UserError when there are none."""
    if not place.exists():
        beside = place.parent.iterdir() if place.parent.is_dir() else ()
        hint = suggest(str(place), [str(each) for each in beside])
        raise UserError(
            f"{place}: there is no such file or folder; {hint or 'name a run folder, or one of run folders'}"
        )
    found = [place] if place.is_file() else sorted(place.rglob("results.jsonl"))
    if not found:
        run = place if (place / "config.json").is_file() else "DIR"
        raise UserError(f"{place}: no results.jsonl; evaluate first: advtune evaluate {run} --data ... --attack pgd")
    return found


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
