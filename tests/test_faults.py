"""What breaks from outside: signals, full and read-only disks, damaged files, two processes at once. See
docs/reliability.md, which names these tests."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advtune import checkpoint, disk, grid, runs, sealed, train, withstand
from advtune.cli import main
from advtune.data import Split, images, load_images
from advtune.data.cache import load, replacing
from advtune.data.images import cache_dir
from advtune.errors import UserError
from advtune.results import append, read
from advtune.withstand import Journal
from test_results import make
from test_withstand import Ensemble, facts, run, shades  # noqa: F401

STEPS = 9  # of a training below
FILES = ("delta.safetensors", "train.jsonl", "images.json", "config.json", "SHA256SUMS")


class Commands:
    """Command lines on the tiny backbone and images."""

    def __init__(self, clip, data):
        self.model = ["--device", "cpu", "--precision", "fp32"]
        self.data, self.clip = ["--data", f"folder:{data}"], ["--backbone", str(clip)]
        self.image = str(data / "test" / "red" / "0.png")

    def train(self, out, *more):
        how = ["--shots", "4", "--epochs", "3", "-o", "lr=0.02", "-o", "warmup_epochs=0", "-o", "batch_size=4"]
        return ["train", "capt", *self.clip, *self.data, *how, *self.model, "--out", str(out), *more]

    def evaluate(self, model, *more):
        how = ["--attack", "pgd", "-a", "eps=4/255", "-a", "steps=2", "--batch-size", "1"]
        return ["evaluate", str(model), *self.data, *how, *self.model, *more]

    def study(self, out, *more):
        how = ["--methods", "zero-shot", "capt", "--shots", "1", "--epochs", "1", "-o", "batch_size=2"]
        way = ["--eps", "2/255", "-a", "steps=2", *self.model, "--out", str(out)]
        return ["study", "few-shot", *how, *self.data, *self.clip, *way, *more]


@pytest.fixture(scope="module")
def do(clip_folder, image_folder):
    return Commands(clip_folder, image_folder)


@pytest.fixture(scope="module")
def whole(do, tmp_path_factory):
    """A run that nothing befell; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADVTUNE_CACHE", str(folder / "cache"))
        assert main(do.train(folder / "run")) == 0
    return folder / "run"


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def same_run(one, other, names=FILES):
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def at_call(monkeypatch, place, name, number, what):
    """Do `what` in the middle of a call: when a function is called for the number-th time."""
    real, calls = getattr(place, name), []

    def call(*args, **how):
        calls.append(1)
        if len(calls) == number:
            what()
        return real(*args, **how)

    monkeypatch.setattr(place, name, call)
    return calls


def told(capsys, code, found):
    """The one line that a verb ended with, and the command in it."""
    assert found == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("advtune: ")]
    (line,) = [line for line in lines if not line.startswith("advtune: warning: ")]  # the others tell progress
    words = shlex.split(line.partition("go on with: ")[2])
    return line, words[1:] if words else []


def flip(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(bytes(data))


# --- Ctrl-C and SIGTERM -------------------------------------------------------------------------------------

SIGNALS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_training_saves_the_step_under_way(number, do, whole, tmp_path, monkeypatch, capsys):
    code, word = SIGNALS[number]
    monkeypatch.setattr(checkpoint, "SECONDS", 1000)
    calls = at_call(monkeypatch, train, "update", 5, lambda: signal.raise_signal(number))
    line, again = told(capsys, code, main(do.train(tmp_path / "run")))
    assert line.startswith(f"advtune: {word} after step 5, which is saved; go on with: advtune train capt ")
    assert again == [*do.train(tmp_path / "run"), "--resume"]
    assert sealed.read(tmp_path / "run.partial" / "checkpoint.pt")["step"] == 5 == len(calls)
    assert main(again) == 0
    assert len(calls) == STEPS  # no step twice
    same_run(tmp_path / "run", whole)
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)


def test_what_is_said_goes_on_whether_tuning_had_begun(do, copy, monkeypatch, capsys):
    """With --overwrite: nothing is begun, so the same again; then begun, so --resume in its place."""
    given, before = do.train(copy, "--overwrite"), (copy / "delta.safetensors").read_bytes()
    (copy.parent / "run.partial").mkdir()
    with monkeypatch.context() as patch:
        at_call(patch, train, "load_images", 1, lambda: signal.raise_signal(signal.SIGINT))
        line, again = told(capsys, 130, main(given))
    assert again == given and "step" not in line
    with monkeypatch.context() as patch:
        at_call(patch, train, "update", 2, lambda: signal.raise_signal(signal.SIGINT))
        again = told(capsys, 130, main(given))[1]
    assert again == [*given[:-1], "--resume"]
    assert (copy / "delta.safetensors").read_bytes() == before  # the old run stands
    assert main(again) == 0
    assert not (copy.parent / "run.partial").exists()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_an_evaluation_keeps_what_is_done(number, do, whole, tmp_path, monkeypatch, capsys):
    assert main(do.evaluate(whole, "--out", str(tmp_path / "whole"))) == 0
    capsys.readouterr()
    (row,) = read(tmp_path / "whole" / "results.jsonl")
    given = do.evaluate(whole, "--out", str(tmp_path / "rows"))
    with monkeypatch.context() as patch:
        calls = at_call(patch, withstand, "attacked", 3, lambda: signal.raise_signal(number))
        code, word = SIGNALS[number]
        line, again = told(capsys, code, main(given))
    assert again == given and line.startswith(f"advtune: {word}; go on with: ")
    (journal,) = (cache_dir() / "evaluations").iterdir()
    assert len(journal.read_text().splitlines()) == 2
    calls = at_call(monkeypatch, withstand, "attacked", 0, lambda: None)
    assert main(again) == 0
    assert len(calls) == row.clean["correct"] - 2 > 1
    assert [facts(each) for each in read(tmp_path / "rows" / "results.jsonl")] == [facts(row)]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_a_study_keeps_what_is_done(number, do, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "SECONDS", 1000)
    out, (code, word) = tmp_path / "out", SIGNALS[number]
    with monkeypatch.context() as patch:
        calls = at_call(patch, train, "update", 2, lambda: signal.raise_signal(number))
        line, again = told(capsys, code, main(do.study(out)))
        assert line.startswith(f"advtune: {word} at run 2 of 2; go on with: ")
        (saved,) = out.rglob("checkpoint.pt")
        assert sealed.read(saved)["step"] == 2 == len(calls)
        assert main(again) == 0
    assert main(do.study(tmp_path / "whole")) == 0
    rows, others = (read(*sorted(each.rglob("results.jsonl"))) for each in (out, tmp_path / "whole"))
    assert [row.flags for row in rows] == [row.flags for row in others] and len(rows) == 2
    for name in FILES[:2]:
        assert len({path.read_bytes() for path in tmp_path.rglob(name)}) == 1


def test_from_python_the_step_is_saved_as_well(vlm, task, tmp_path, monkeypatch):
    """And what the program had set for Ctrl-C is as it was."""
    monkeypatch.setattr(checkpoint, "SECONDS", 1000)
    at_call(monkeypatch, train, "update", 2, lambda: signal.raise_signal(signal.SIGINT))
    how = dict(shots=2, epochs=3, options={"batch_size": 2}, show=False)
    with pytest.raises(KeyboardInterrupt, match="after step 2, which is saved"):
        train.tune("capt", vlm, task, out=tmp_path / "run", **how)
    assert sealed.read(tmp_path / "run.partial" / "checkpoint.pt")["step"] == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    at_call(monkeypatch, train, "update", 2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):  # nothing to save: at once
        train.tune("capt", vlm, task, **how)


SECOND = """
import signal, sys
from types import SimpleNamespace
from advtune import ending
now = 0.0
ending.time = SimpleNamespace(monotonic=lambda: now)  # a busy machine may take its time between two signals
with ending.caught(), ending.held() as asked:
    for each in sys.argv[1:]:
        if each == "ctrl-c":
            signal.raise_signal(signal.SIGINT)
        else:
            now += float(each)
print("lived", len(asked))
"""


@pytest.mark.parametrize(("what", "code"), [("ctrl-c 0.6 ctrl-c", -signal.SIGINT), ("ctrl-c 0.1 ctrl-c 0.6", 0)])
def test_a_second_ctrl_c_ends_at_once(what, code):
    """One that comes with the first, as launchers pass it on, is the same one."""
    done = subprocess.run([sys.executable, "-c", SECOND, *what.split()], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout == ("" if code else "lived 1\n")


# --- a full disk, a read-only one ---------------------------------------------------------------------------


def mounted(place, options):
    place.mkdir(exist_ok=True)
    way = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
        return subprocess.run(way, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def mounting(tmp_path_factory):
    """Whether this process may mount; where not, the faults are injected alone."""
    place = tmp_path_factory.mktemp("mount")
    if mounted(place, "size=64k"):
        subprocess.run(["umount", str(place)], check=True)
        return True
    return False


class Small:
    """A folder on a disk that can be filled and emptied: a file system of 1 MB, or a limit on every file's size."""

    def __init__(self, place, real):
        self.place, self.real = place, real

    def fill(self):
        if not self.real:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            return
        with (self.place / "filler").open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    def empty(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (self.place / "filler").unlink(missing_ok=True)


@pytest.fixture(params=["a limit", "a file system"])
def small(request, tmp_path, mounting):
    place, real = tmp_path / "small", request.param == "a file system" and mounting
    place.mkdir()
    assert not real or mounted(place, "size=1m")
    found = Small(place, real)
    yield found
    found.empty()
    if real:
        subprocess.run(["umount", str(place)], check=True)


FULL = r"advtune: error: \S*/(%s): (No space left on device|File too large); make room and go on with: advtune "


def full(capsys, found, name, *more):
    """The one line of a full disk; the command that it names."""
    import re

    line, again = told(capsys, 2, found)
    assert re.match(FULL % name, line), line
    return again


def test_a_full_disk_while_training(small, do, whole, copy, monkeypatch, capsys):
    """The run that is to be replaced stays, the checkpoint before stays, and the run goes on from there."""
    monkeypatch.setattr(checkpoint, "SECONDS", 0)
    out = Path(shutil.copytree(copy, small.place / "run"))
    with monkeypatch.context() as patch:
        at_call(patch, train, "update", 5, small.fill)
        found = main(do.train(out, "--overwrite"))
        small.empty()
        again = full(capsys, found, r"train\.jsonl|checkpoint\.pt")
    same_run(out, whole)
    assert sealed.read(small.place / "run.partial" / "checkpoint.pt")["step"] == 4
    assert not list(small.place.rglob("*.tmp"))
    calls = at_call(monkeypatch, train, "update", 0, lambda: None)
    assert main(again) == 0
    assert len(calls) == STEPS - 4
    same_run(out, whole, FILES[:3])


def test_a_full_disk_at_the_end_of_a_training(small, do, whole, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "SECONDS", 0)
    with monkeypatch.context() as patch:
        at_call(patch, runs, "write_run", 1, small.fill)
        found = main(do.train(small.place / "run"))
        small.empty()
        again = full(capsys, found, r"\S+")
    calls = at_call(monkeypatch, train, "update", 0, lambda: None)
    assert main(again) == 0
    assert not calls
    same_run(small.place / "run", whole, FILES[:3])


def test_a_full_disk_while_evaluating(small, do, whole, monkeypatch, capsys):
    given, rows = do.evaluate(whole, "--out", str(small.place / "rows")), small.place / "rows" / "results.jsonl"
    first = make(notes=["x" * (4000 - len(make(notes=[""]).to_json()))])  # the next row begins another page
    append(rows, first)
    before = rows.read_bytes()
    with monkeypatch.context() as patch:
        at_call(patch, withstand, "attacked", 2, small.fill)
        capsys.readouterr()
        found = main(given)
        small.empty()
        again = full(capsys, found, r"results\.jsonl")
    assert rows.read_bytes() == before
    assert main(again) == 0
    assert main(do.evaluate(whole, "--out", str(small.place / "whole"))) == 0
    (wanted,) = read(small.place / "whole" / "results.jsonl")
    assert [facts(row) for row in read(rows)] == [facts(first), facts(wanted)]


def test_a_full_disk_ends_a_study(small, do, monkeypatch, capsys):
    """A failed run would be no news: all that follow would fail as well."""
    out = small.place / "out"
    with monkeypatch.context() as patch:
        calls = at_call(patch, grid, "evaluate_all", 1, small.fill)
        found = main(do.study(out))
        small.empty()
        again = full(capsys, found, r"results\.jsonl")
        assert len(calls) == 1
    assert not list(out.rglob("failed.jsonl"))
    assert main(again) == 0
    assert len(read(*out.rglob("results.jsonl"))) == 2


@pytest.mark.parametrize("verb", ["predict", "report", "export"])
def test_a_full_disk_under_what_is_written_once(verb, small, do, whole, copy, monkeypatch, capsys):
    """What was there before stays, nothing half-written does, and with room the same command does it."""
    assert main(do.evaluate(copy)) == 0
    given, out = written(verb, do, copy, small.place)
    if verb != "export":
        out.write_text("before")
    with monkeypatch.context() as patch:
        small.fill()
        capsys.readouterr()
        found = main(given)
        small.empty()
        line, _ = told(capsys, 2, found)
        patch.undo()
    assert line.startswith(f"advtune: error: {out}: ") and line.endswith("; make room and try again")
    assert [path.name for path in small.place.iterdir()] == ([out.name] if verb != "export" else [])
    assert verb == "export" or out.read_text() == "before"
    assert main(given) == 0
    assert out.is_dir() if verb == "export" else out.read_text() != "before"


def written(verb, do, model, place):
    """A command that writes something once, and what it writes."""
    out = place / {"predict": "labels.csv", "report": "report.md", "export": "exported"}[verb]
    return {
        "predict": ["predict", str(model), do.image, "--csv", str(out), *do.model],
        "report": ["report", str(model), "--out", str(out)],
        "export": ["export", str(model), "--to", "prompts", "--out", str(out)],
    }[verb], out


def test_a_full_disk_under_the_cache_ends_nothing(small, do, monkeypatch, capsys):
    monkeypatch.setenv("ADVTUNE_CACHE", str(small.place / "cache"))
    given = do.evaluate("zero-shot", *do.clip, "--json")
    small.fill()
    with warnings.catch_warnings(record=True):
        found = main(given)
    small.empty()
    assert found == 0
    printed = json.loads(capsys.readouterr().out)
    assert main(given) == 0
    assert json.loads(capsys.readouterr().out)["flags"] == printed["flags"]


@contextmanager
def refusing(place, patch):
    """Every way to write below a folder says that the file system is read-only; os.access knows nothing of it."""

    def below(path):
        return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(str(place))

    def refuse(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

    def wrap(module, name, writes):
        real = getattr(module, name)
        patch.setattr(
            module, name, lambda path, *a, **k: refuse(path) if below(path) and writes(a) else real(path, *a, **k)
        )

    wrap(os, "mkdir", lambda a: True)
    wrap(os, "open", lambda a: a[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    wrap(io, "open", lambda a: bool(a) and set(a[0]) & set("wax+"))
    yield
    patch.undo()


@pytest.mark.parametrize("kind", ["injected", "a file system"])
@pytest.mark.parametrize("verb", ["train", "evaluate", "study", "predict", "report", "export"])
def test_read_only_output_is_one_line(verb, kind, do, whole, copy, tmp_path, mounting, monkeypatch, capsys):
    """Said before the work where it is long; nothing is written elsewhere either."""
    place, real = tmp_path / "fixed", kind == "a file system" and mounting
    given, _ = written(verb, do, copy, place) if verb in ("predict", "report", "export") else (None, None)
    given = given or {
        "train": do.train(place / "run"),
        "evaluate": do.evaluate(copy, "--out", str(place / "rows")),
        "study": do.study(place / "out"),
    }.get(verb)
    if verb == "report":
        append(copy / "results.jsonl", make())
    place.mkdir()
    if real:
        assert mounted(place, "size=64k,ro")
    calls = at_call(monkeypatch, withstand, "attacked", 0, lambda: None) if real else []
    try:
        with monkeypatch.context() as patch, refusing(place, patch) if not real else warnings.catch_warnings():
            found = main(given)
    finally:
        if real:
            subprocess.run(["umount", str(place)], check=True)
    line, again = told(capsys, 2, found)
    assert line.startswith(f"advtune: error: {place}")
    assert "ead-only" in line and not again and not calls
    assert not list(place.iterdir())


# --- damaged files ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(do, tmp_path_factory):
    """A run that ended after step 6, with its two checkpoints; not to be changed."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADVTUNE_CACHE", str(folder / "cache"))
        patch.setattr(checkpoint, "SECONDS", 0)
        at_call(patch, train, "update", 6, lambda: signal.raise_signal(signal.SIGINT))
        assert main(do.train(folder / "run")) == 130
    return folder / "run.partial"


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "flipped": ({"checkpoint.pt": lambda p: flip(p, 5000)}, 1),
    "cut": ({"checkpoint.pt": cut_short}, 1),
    "empty": ({"checkpoint.pt": lambda p: p.write_bytes(b"")}, 1),
    "gone": ({"checkpoint.pt": Path.unlink}, 1),
    "both": ({"checkpoint.pt": lambda p: flip(p, 700), "checkpoint.previous.pt": cut_short}, 6),
    "log": ({"train.jsonl": lambda p: flip(p, 30)}, 6),
    "log cut": ({"train.jsonl": cut_short}, 1),
    "log gone": ({"train.jsonl": Path.unlink}, 6),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_costs_steps_but_no_bit(name, do, cut, whole, tmp_path, monkeypatch, capsys):
    damage, lost = DAMAGE[name]
    shutil.copytree(cut, tmp_path / "run.partial")
    for file, harm in damage.items():
        harm(tmp_path / "run.partial" / file)
    calls = at_call(monkeypatch, train, "update", 0, lambda: None)
    assert main(do.train(tmp_path / "run", "--resume")) == 0
    assert len(calls) == STEPS - 6 + lost
    same_run(tmp_path / "run", whole)
    said = capsys.readouterr().err
    assert ("; left aside\n" in said) == (name != "gone")
    assert ("no checkpoint is whole; starting anew" in said) == (lost == 6)


def test_no_flipped_bit_of_a_checkpoint_goes_unseen(tmp_path):
    path = tmp_path / "c.pt"
    state = {"step": 3, "learning": {"a": torch.arange(50.0)}, "rate": 0.1}
    sealed.write(state, path, tmp_path / "before.pt")
    whole = path.read_bytes()
    assert torch.equal(torch.load(path, weights_only=True)["learning"]["a"], state["learning"]["a"])
    seen = 0
    for at in [*range(0, len(whole) - sealed.TRAILER, 97), *range(len(whole) - sealed.TRAILER, len(whole))]:
        path.write_bytes(whole)
        flip(path, at, at % 8)
        try:
            found = sealed.read(path)
        except ValueError:
            seen += 1
        else:
            assert at >= len(whole) - sealed.TRAILER  # the words of the checksum itself
            assert torch.equal(found["learning"]["a"], state["learning"]["a"]) and found["step"] == 3
    assert seen > (len(whole) - sealed.TRAILER) // 97
    path.write_bytes(whole[: -sealed.TRAILER])  # what older versions wrote
    assert sealed.read(path)["step"] == 3


def test_a_checkpoint_replaces_only_when_it_is_whole(tmp_path, monkeypatch):
    path, before = tmp_path / "c.pt", tmp_path / "before.pt"
    for step in (1, 2):
        sealed.write({"step": step}, path, before)
    assert (sealed.read(path)["step"], sealed.read(before)["step"]) == (2, 1)

    def stop(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(OSError, match=r"Input/output error: .*c\.pt"):
        sealed.write({"step": 3}, path, before)
    assert (sealed.read(path)["step"], sealed.read(before)["step"]) == (2, 1)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["delta.safetensors", "images.json", "config.json", "SHA256SUMS"])
def test_a_flipped_bit_in_a_run_is_refused_by_name(name, do, copy, capsys):
    given = do.evaluate(copy)[:6] + do.model
    data = (copy / name).read_bytes()
    for at in (len(data) // 3, len(data) // 2):
        flip(copy / name, at)
        line, _ = told(capsys, 2, main(given))
        wrong = name if name != "SHA256SUMS" else ""
        assert line.startswith(f"advtune: error: {copy}/{wrong}") and "SHA256SUMS" in line
        (copy / name).write_bytes(data)
    (copy / name).unlink()
    if name == "SHA256SUMS":  # an older run proves nothing, and is read
        assert main(given) == 0
    else:
        line, _ = told(capsys, 2, main(given))
        assert name in line


def test_sha256sum_reads_the_sums(copy):
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=copy).returncode == 0


def test_no_flipped_bit_of_a_row_goes_unseen(tmp_path):
    """Refused with file and line, or the row is as it was."""
    path, row = tmp_path / "rows.jsonl", make(notes=["ä"], seconds=1.5)
    for _ in range(2):
        append(path, row)
    whole, seen = path.read_bytes(), 0
    half = len(whole) // 2
    wanted = {*range(0, len(whole), 13), *range(half - 30, half + 15), *range(len(whole) - 15, len(whole))}
    for at in sorted(wanted):
        path.write_bytes(whole)
        flip(path, at, at % 8)
        try:
            assert read(path) == [row, row], at
        except UserError as error:
            seen += 1
            assert str(error).startswith(f"{path} line {1 if at < half else 2}: ")
            assert "\n" not in str(error)
            damaged = path.read_bytes()
            with suppress(UserError):
                append(path, row)
            assert path.read_bytes().startswith(damaged)  # never taken for a cut row, and removed
    assert seen > 0.95 * len(wanted)
    facts_ = json.loads(row.to_json())
    facts_.pop("crc32")
    path.write_text(json.dumps(facts_) + "\n")  # what older versions wrote
    assert read(path) == [row]


def test_a_damaged_journal_is_believed_up_to_there(shades, tmp_path, capsys, monkeypatch):  # noqa: F811
    whole, file = run(shades, Ensemble([])), tmp_path / "journal"
    run(shades, Ensemble([]), Journal(file))
    content = file.read_bytes()
    starts = [0, *(i + 1 for i, byte in enumerate(content[:-1]) if byte == ord("\n"))]
    calls = at_call(monkeypatch, withstand, "attacked", 0, lambda: None)
    for number, places in ((0, (12,)), (6, (12, 40, 60)), (15, (40,))):
        for after in places:
            file.write_bytes(content)
            flip(file, starts[number] + after)
            calls.clear()
            outcome = run(shades, Ensemble([]), Journal(file))
            assert torch.equal(outcome.stands, whole.stands)
            assert all(torch.equal(outcome.after[name], whole.after[name]) for name in whole.after)
            assert len(calls) == 16 - number
            assert f"journal line {number + 1} is damaged; attacking again from there" in capsys.readouterr().err
            assert file.read_bytes() == content
    for wrong in (b"[1]\n", b"3\n", b"null\n", b'{"stage": 1}\n', b"\xff\n"):
        assert withstand.facts(wrong) == {}


def test_a_damaged_cache_is_made_again(task, tmp_path, monkeypatch, capsys):
    split, decoded = Split(part="train", resolution=16), []
    real = images.decode
    monkeypatch.setattr(images, "decode", lambda *args: decoded.append(1) or real(*args))
    wanted = load_images(task, split, cache=tmp_path, progress=False).x.clone()
    (file,) = tmp_path.glob("*.safetensors")
    whole, n = file.read_bytes(), len(wanted)
    for at in (*range(0, 200, 19), len(whole) // 2, len(whole) - n - 1, len(whole) - n, len(whole) - 1):
        file.write_bytes(whole)
        flip(file, at)
        decoded.clear()
        assert torch.equal(load_images(task, split, cache=tmp_path, progress=False).x, wanted)
        assert len(decoded) == n
        assert file.read_bytes() == whole
        said = capsys.readouterr().err
        assert at < 200 or said == f"advtune: {file} is damaged; decoding the images again\n"
    decoded.clear()
    load_images(task, split, cache=tmp_path, progress=False)
    assert not decoded


def test_a_cache_of_an_older_version_is_read(task, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    split = Split(part="train", resolution=16)
    wanted = load_images(task, split, cache=tmp_path, progress=False).x.clone()
    (file,) = tmp_path.glob("*.safetensors")
    save_file(load_file(file), file)
    assert b"crc32" not in file.read_bytes()
    monkeypatch.setattr(images, "decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(load_images(task, split, cache=tmp_path, progress=False).x, wanted)
    assert load(file, len(wanted)) is not None


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    """A decoded cache can be as large as the disk; one that is being written by another process stays."""
    file, dead, alive = (tmp_path / name for name in ("key.csv", "key.7.8.tmp", "key.8.9.tmp"))
    mine = tmp_path / "key.mine.tmp"
    for path in (dead, alive, mine):
        path.write_text("half")
    with alive.open() as stream:
        assert disk.locked(stream.fileno())
        with replacing(file) as beside:
            beside.write_text("whole")
            assert not dead.exists()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "key.csv": "whole", "key.8.9.tmp": "half", "key.mine.tmp": "half",
    }  # fmt: skip


# --- two processes, one folder ------------------------------------------------------------------------------


def test_two_trainings_of_one_run(do, copy, cut, tmp_path, capsys):
    """The second is told which folder; a folder that nobody works in is nobody's."""
    shutil.copytree(cut, tmp_path / "other.partial")
    given = do.train(tmp_path / "other", "--resume")
    with disk.alone(tmp_path / "other.partial"):
        for way in (given, [*given[:-1], "--overwrite"], given[:-1]):
            line, _ = told(capsys, 2, main(way))
            assert line == (
                f"advtune: error: {tmp_path / 'other.partial'}: another process works here; wait for it, or choose "
                "another --out"
            )
    assert (tmp_path / "other.partial" / ".lock").exists()  # as a kill leaves it
    assert main(given) == 0
    assert not (tmp_path / "other" / ".lock").exists()


def test_a_run_made_meanwhile_by_another_process_is_not_replaced(do, whole, tmp_path, monkeypatch, capsys):
    at_call(monkeypatch, train, "load_images", 1, lambda: shutil.copytree(whole, tmp_path / "run"))
    line, _ = told(capsys, 2, main(do.train(tmp_path / "run")))
    assert "run exists; go on with --resume" in line
    same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("kind", ["a folder of the user's", "a file"])
def test_what_came_meanwhile_and_is_no_run_stays(kind, do, whole, tmp_path, monkeypatch, capsys):
    """The run is whole beside it, and gets its name when the place is free."""
    out = tmp_path / "run"

    def come():
        (out / "notes").mkdir(parents=True) if kind != "a file" else out.write_text("notes")

    at_call(monkeypatch, train, "update", 2, come)
    line, _ = told(capsys, 2, main(do.train(out)))
    assert f"came while this run was tuned, which is whole in {out}.partial; move it, and --resume" in line
    out.rename(tmp_path / "moved")
    assert (tmp_path / "moved").is_file() or (tmp_path / "moved" / "notes").is_dir()
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("trained again"))
    assert main([*do.train(out), "--resume"]) == 0
    same_run(out, whole)


STALE = """
import os, signal, sys
from pathlib import Path
from advtune.disk import alone
with alone(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_lock_goes_with_its_process(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", STALE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match=f"{tmp_path}: another process works here"), disk.alone(tmp_path):
        pass
    with pytest.raises(UserError, match=f"{tmp_path}: another process works here"):
        disk.check_alone(tmp_path)
    child.kill()
    child.communicate()
    assert (tmp_path / ".lock").exists()
    disk.check_alone(tmp_path)
    with disk.alone(tmp_path):
        pass


def test_a_lock_that_was_removed_is_no_lock(tmp_path):
    """Who opened the file before it went has locked nothing."""
    real = disk.locked

    def late(handle, *how, **more):
        (tmp_path / ".lock").unlink()
        return real(handle, *how, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="another process"):
        patch.setattr(disk, "locked", late)
        with disk.alone(tmp_path):
            pass


def test_many_writers_of_one_results_file(tmp_path):
    path, row = tmp_path / "results.jsonl", make(notes=["x" * 5000])

    def write(name):
        for i in range(10):
            append(path, replace(row, run=f"{name} {i}"))

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.run for each in read(path)) == sorted(f"{name} {i}" for name in "abcd" for i in range(10))


# --- a kill at the worst moment (random ones: test_kills.py) ------------------------------------------------


class Killed(BaseException):
    pass


def die(*_, **__):
    raise Killed


def test_killed_when_all_is_done_but_the_name(do, whole, copy, monkeypatch):
    """The weights are written: nothing is trained again, and the run that is replaced was there until then."""
    given = do.train(copy, "--overwrite")
    for number in range(1, 4):
        with monkeypatch.context() as patch:
            if number == 1:
                patch.setattr(train, "finish", die)
            else:
                at_call(patch, Path, "rename", number - 1, die)
            with pytest.raises(Killed):
                main(given)
        with monkeypatch.context() as patch:
            patch.setattr(train, "fit", lambda *_: pytest.fail("trained again"))
            assert main([*given[:-1], "--resume"]) == 0
        same_run(copy, whole)
        assert sorted(path.name for path in copy.parent.iterdir() if path.name != "cache") == ["run"]


def test_killed_between_the_row_and_the_end_there_is_one_row(do, whole, tmp_path, monkeypatch):
    given = do.evaluate(whole, "--out", str(tmp_path / "rows"))
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "close", die)
        with pytest.raises(Killed):
            main(given)
    for wanted in (1, 2):  # the second time it is a new evaluation
        assert main(given) == 0
        assert len(read(tmp_path / "rows" / "results.jsonl")) == wanted
