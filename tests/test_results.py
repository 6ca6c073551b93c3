"""The result row: intervals, what a row refuses, and files that a killed writer leaves."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from advtune import results
from advtune.data.cache import replacing
from advtune.errors import UserError
from advtune.results import Row, accuracy, append, flag_text, mean_and_spread, read, wilson, write_atomic


def make(**changes: Any) -> Row:
    flags = {"clean": "1101", "robust": "0100"}
    facts: dict[str, Any] = {
        "method": "tecoa",
        "backbone": {"name": "tiny", "sha256": "ab"},
        "data": {"name": "pets", "n": 4},
        "attack": {"name": "pgd", "eps": 4 / 255, "steps": 20},
        "clean": accuracy(flags["clean"]),
        "robust": accuracy(flags["robust"]),
        "flags": flags,
    }
    return Row(**(facts | changes))


# roots q of (p - q)^2 = z^2 q (1 - q) / n in 40 digits; 81/263 is Newcombe 1998, table I: 0.2553 to 0.3662
@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (50, 100, 0.4038315, 0.5961685),
        (1, 1, 0.2065493, 1.0),
        (81, 263, 0.2552885, 0.3662096),
    ],
)
def test_wilson(correct: int, n: int, low: float, high: float) -> None:
    found = wilson(correct, n)
    assert found == pytest.approx((low, high), abs=2e-7)
    assert found[0] >= 0 and found[1] <= 1
    if correct == 0:
        assert found[0] == 0
    if correct == n:
        assert found[1] == 1


def test_wilson_level_and_errors() -> None:
    wide, narrow = wilson(5, 10, level=0.99), wilson(5, 10, level=0.5)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]
    for bad in ((0, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="no interval"):
            wilson(*bad)


def test_accuracy() -> None:
    found = accuracy([True, False, True, True])
    assert (found["correct"], found["n"], found["accuracy"]) == (3, 4, 0.75)
    assert (found["low"], found["high"]) == wilson(3, 4)
    assert accuracy("1011") == found  # "0" is true in Python; as a flag it is not
    for bad in ([], "", "012", [0.7]):
        with pytest.raises(ValueError):
            accuracy(bad)  # type: ignore[arg-type]
    assert flag_text([1, 0, True]) == "101"


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_spread([0.5]) == (0.5, None)
    with pytest.raises(ValueError):
        mean_and_spread([])


def test_row_round_trip() -> None:
    row = make(train={"name": "imagenet", "seed": 0}, notes=["ä"])
    assert Row.from_json(row.to_json()) == row
    assert "\n" not in row.to_json() and row.to_json().encode().startswith(results.START)
    assert row.schema == results.SCHEMA and row.time.endswith("+00:00")


def test_a_recipe_of_an_older_row_says_what_it_did() -> None:
    """Else a study would tune again what it has, and a table would keep seeds of one setting apart."""
    old = make(recipe={"lr": 0.1})
    row = Row.from_json(old.to_json())
    assert row.recipe == {"lr": 0.1, "warmup_share": 0.0, "average": 0.0, "interpolate": 1.0}
    assert Row.from_json(make(recipe={"lr": 0.1, "average": 0.9}).to_json()).recipe["average"] == 0.9
    assert Row.from_json(make().to_json()).recipe == {}  # zero-shot has none
    assert next(iter(row.recipe)) == "lr"  # what a row says comes first


@pytest.mark.parametrize(
    "changes",
    [
        {"clean": accuracy("1111")},
        {"clean": accuracy("11010")},
        {"robust": accuracy("1100")},
        {"robust": accuracy("0100") | {"accuracy": 0.5}},
        {"robust": accuracy("0100") | {"low": 0.2}},
        {"robust": None},
        {"robust": None, "attack": None},
        {"attack": None},
        {"flags": {"robust": "0100"}},
        {"flags": {"clean": "1101", "robust": "01x0"}},
        {"schema": 99},
    ],
)
def test_row_refuses_flags_that_disagree(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        make(**changes)


def test_row_without_attack() -> None:
    assert make(attack=None, robust=None, flags={"clean": "1101"}).robust is None


def test_row_is_finite() -> None:
    with pytest.raises(ValueError):
        make(seconds=float("nan")).to_json()
    with pytest.raises(ValueError, match="NaN"):
        Row.from_json(make().to_json().replace('"seconds": 0.0', '"seconds": NaN'))


def test_append_and_read(tmp_path: Path) -> None:
    one, two = make(), make(method="fare")
    path = tmp_path / "new" / "rows.jsonl"
    append(path, one)
    append(path, two)
    append(tmp_path / "more.jsonl", one)
    assert read(path, tmp_path / "more.jsonl") == [one, two, one]
    assert path.read_bytes().count(b"\n") == 2


def test_append_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    write, sync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda handle, text: calls.append("write") or write(handle, text))
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync") or sync(handle))
    append(tmp_path / "rows.jsonl", make())
    assert calls == ["write", "fsync"]


def test_any_cut_line_is_skipped_and_mended(tmp_path: Path) -> None:
    one, two = make(), make(method="fare")
    whole = (one.to_json() + "\n").encode()
    path = tmp_path / "rows.jsonl"
    for cut in [1, 5, 12, 40, len(whole) // 2, len(whole) - 2]:
        path.write_bytes(whole + whole[:cut])
        assert read(path) == [one]
        append(path, two)
        assert read(path) == [one, two]
    path.write_bytes(whole[:100])
    append(path, two)
    assert read(path) == [two]


def test_cut_line_longer_than_a_block(tmp_path: Path) -> None:
    flags = {"clean": "1" * 300_000, "robust": "0" * 300_000}
    big = make(flags=flags, clean=accuracy(flags["clean"]), robust=accuracy(flags["robust"]))
    path = tmp_path / "rows.jsonl"
    append(path, make())
    with path.open("ab") as file:
        file.write(big.to_json().encode()[:-9])
    append(path, big)
    assert [len(row.flags["clean"]) for row in read(path)] == [4, 300_000]


@pytest.mark.parametrize("start", [b"", b'{"sch', b'{"schema": 1, "adv'])
def test_lost_block_reads_as_zeros(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    append(path, make())
    with path.open("ab") as file:
        file.write(start + bytes(50))
    assert len(read(path)) == 1
    append(path, make())
    assert len(read(path)) == 2


def test_whole_row_without_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(make().to_json())
    assert len(read(path)) == 1
    append(path, make())
    assert len(read(path)) == 2


@pytest.mark.parametrize("broken", ['{"schema": 1, "met', "[]", "{}", '{"schema": 2}', '{"schema": 1, "x": 3}'])
def test_broken_line_in_the_middle(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{make().to_json()}\n{broken}\n{make().to_json()}\n")
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: ") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_wrong_counts_in_a_file(tmp_path: Path) -> None:
    facts = json.loads(make().to_json())
    facts["robust"]["correct"] = 4
    (tmp_path / "rows.jsonl").write_text(json.dumps(facts) + "\n")
    with pytest.raises(UserError, match="line 1: flags of robust"):
        read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("end", ["hello", '{"schema": 2}', '{"schema": 1}'])
def test_append_never_cuts_what_is_not_a_cut_row(tmp_path: Path, end: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(f"first\n{end}")
    with pytest.raises(UserError, match="another file"):
        append(path, make())
    assert path.read_text() == f"first\n{end}"


def test_read_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl"):
        read(tmp_path / "none.jsonl")


def test_write_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "a.txt"
    write_atomic(path, "ä")
    assert path.read_text(encoding="utf-8") == "ä"
    write_atomic(path, b"new")

    def fail(*_: object) -> None:
        raise OSError("killed")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="killed"):
        write_atomic(path, "newer")
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


def test_a_row_is_kept_where_files_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    append(tmp_path / "a.jsonl", make())
    assert len(read(tmp_path / "a.jsonl")) == 1


@pytest.mark.parametrize("way", [lambda path: write_atomic(path, "x"), lambda path: replacing(path).__enter__()])
def test_a_pipe_or_a_device_is_not_replaced(tmp_path: Path, way: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe or a device; name a file"):
        way(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo() and len([*tmp_path.iterdir()]) == 1


def test_rows_can_be_changed_only_into_rows_that_agree() -> None:
    with pytest.raises(ValueError, match="flags of clean"):
        replace(make(), clean=accuracy("1111"))
