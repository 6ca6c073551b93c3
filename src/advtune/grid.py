"""Doing a list of runs: what is done is skipped, what was interrupted goes on, what fails does not stop the rest."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from advtune import runs
from advtune.data import Task, load_task
from advtune.data.catalog import entry, names
from advtune.data.task import TEMPLATE
from advtune.disk import FULL, alone
from advtune.errors import UserError
from advtune.evaluation import evaluate_all
from advtune.options import as_options
from advtune.protocols import ZERO_SHOT, Run, Slice, slug
from advtune.results import Row, append, read, write_atomic
from advtune.rows import WHITE_BOX, attack_facts
from advtune.train import tune
from advtune.vlm import VLM

FAILED, TRACEBACKS = "failed.jsonl", "tracebacks"
Todo = list[tuple[Slice, list[Any]]]


@dataclass(frozen=True)
class Failure:
    """A run that failed: its folder under OUT, the set that it failed on (empty: in tuning), the reason in one line,
    and the file with the whole story."""

    key: str
    test: str
    error: str
    traceback: str


@dataclass
class Outcome:
    """What came of a list of runs: the rows of all that is done, those that failed, and how many were done before."""

    rows: list[Row] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    skipped: int = 0


@dataclass
class Bench:
    """What the runs of one call share: models and data, loaded when first needed, and once; and the contents that all
    rows of a study have in common: what each is of -> (its hash, the folder that it was first seen in)."""

    out: Path
    device: str = "auto"
    precision: str = "auto"
    batch_size: int = 64
    show: bool = True
    compile: bool = False
    models: dict[str, VLM] = field(default_factory=dict)
    tasks: dict[tuple[str, str], Task] = field(default_factory=dict)
    contents: dict[str, tuple[str, Path | str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.precision != "auto":
            self.contents["precision"] = (self.precision, f"--precision {self.precision}")

    def model(self, name: str) -> VLM:
        if name not in self.models:
            self.models[name] = runs.load(name, self.device, self.precision, self.compile)
        return self.models[name]

    def task(self, spec: str, subset: str) -> Task:
        if (spec, subset) not in self.tasks:
            self.tasks[spec, subset] = load_task(spec, subset=subset)
        return self.tasks[spec, subset]

    def rows(self, run: Run) -> list[Row]:
        """The rows that answer a run. Raises UserError when they are not of what the study's others are of."""
        rows = rows_of(run, self.out / run.key)
        for row in rows:
            self.agree(run, identity(run, row))
        return rows

    def agree(self, run: Run, contents: Mapping[str, str]) -> None:
        """Raises UserError unless these are the contents that the rest of the study is of."""
        for what, value in contents.items():
            before, first = self.contents.get(what, (value, ""))
            if value != before:
                raise UserError(f"{what}: not the same as in {first}; remove one of the two, or choose another --out")
        for what, value in contents.items():
            self.contents.setdefault(what, (value, self.out / run.key))


def work(wanted: Sequence[Run], out: str | Path, **how: Any) -> Outcome:
    """Do what is not done of these runs, each in OUT/<key>: tune (an interrupted one goes on), then evaluate.

    Runs whose rows are all there are skipped without loading a model or an image. A run that fails leaves a line in
    OUT/failed.jsonl and its traceback in OUT/tracebacks. how: device, precision, batch_size, show, compile. Raises
    KeyboardInterrupt with a text that says where, UserError when another process works in OUT, OSError when the disk
    is full.
    """
    with alone(Path(out)):
        return through(wanted, Bench(Path(out), **how))


def through(wanted: Sequence[Run], bench: Bench) -> Outcome:
    """As `work`, in a folder that is this process's alone."""
    out, outcome, begin, worked = bench.out, Outcome(), time.monotonic(), 0
    done = [is_done(run, bench) for run in wanted]  # reads what rows there are, before others are made
    for i, (run, skip) in enumerate(zip(wanted, done, strict=True)):
        try:
            failed = [] if skip else do(run, bench)
        except KeyboardInterrupt as stop:
            raise type(stop)(f"at run {i + 1} of {len(wanted)}") from None
        outcome.failed += failed
        outcome.skipped += skip
        with suppress(UserError):  # a folder of other rows is among the failures
            outcome.rows += bench.rows(run)
        worked += not skip
        if bench.show:
            seconds = time.monotonic() - begin
            ahead = seconds / max(1, worked) * max(0, done.count(False) - worked)
            state = f"failed: {failed[0].error}" if failed else "was done" if skip else "done"
            times = f"{clock(seconds)} so far, about {clock(ahead)} left"
            print(f"[{i + 1}/{len(wanted)}] {run.key}: {state} ({times})", file=sys.stderr, flush=True)
    (out / FAILED).unlink(missing_ok=True)
    if outcome.failed:
        write_atomic(out / FAILED, "".join(json.dumps(asdict(each)) + "\n" for each in outcome.failed))
    for reason in dict.fromkeys(each.error for each in outcome.failed) if bench.show else ():
        first, *others = [each for each in outcome.failed if each.error == reason]
        where = first.key + (f" on {first.test}" if first.test else "")
        more = f" (and {len(others)} more)" if others else ""
        print(f"advtune: failed: {where}{more}: {reason} ({out / first.traceback})", file=sys.stderr)
    return outcome


def do(run: Run, bench: Bench) -> list[Failure]:
    """Tune unless the folder is finished, then add the rows that it lacks; what failed."""
    failed = list[Failure]()
    try:
        have = bench.rows(run)
        model = tuned(run, bench)
    except Exception as error:
        return [failure(run, "", error, bench.out)]
    for test, attacks in missing(run, have):
        try:
            for row, attack in zip(evaluated(run, test, attacks, model, bench), attacks, strict=True):
                bench.agree(run, identity(run, row))
                if not any(answers(each, run, test, attack) for each in have):
                    append(bench.out / run.key / runs.RESULTS, row)
        except Exception as error:  # a set that cannot be had does not stop the others
            name = test.data + ("" if test.subset == "all" else f", {test.subset} classes")
            failed.append(failure(run, name, error, bench.out))
    return failed


def tuned(run: Run, bench: Bench) -> VLM:
    """The run's model, tuned now, gone on with, or read. Raises UserError when the study's rows are of another."""
    model = bench.model(run.backbone)
    bench.agree(run, {f"backbone {run.backbone}": model.origin.sha256, "precision": model.precision})
    if run.method != ZERO_SHOT:
        model = tune(
            run.method, model, bench.task(run.data, run.subset), shots=run.shots, seed=run.seed, epochs=run.epochs,
            options=run.options, attack=run.train_attack, part=run.part, limit=run.limit, out=bench.out / run.key,
            resume=True, show=bench.show and sys.stderr.isatty(),
        )  # fmt: skip
    bench.agree(run, {f"model of {run.key}": model.origin.sha256})
    return model


def evaluated(run: Run, test: Slice, attacks: list[Any], model: VLM, bench: Bench) -> list[Row]:
    return evaluate_all(
        model, bench.task(test.data, test.subset), attacks, part=test.part, limit=test.limit,
        batch_size=bench.batch_size, seed=run.attack_seed, resume=True, show=bench.show and sys.stderr.isatty(),
    )  # fmt: skip


def is_done(run: Run, bench: Bench) -> bool:
    """Whether nothing is left to do of a run; reads its rows and nothing else."""
    try:
        return not missing(run, bench.rows(run))
    except UserError:  # said when its turn comes
        return False


def rows_of(run: Run, folder: Path) -> list[Row]:
    """The rows that answer a run, in its order, one an evaluation; others in its folder are left out. Raises UserError
    when the folder holds rows of a model that was tuned otherwise: a name proves nothing."""
    path = folder / runs.RESULTS
    have = read(path) if path.is_file() else []
    if not all(tuned_as(row, run) for row in have):
        raise UserError(f"{folder}: its rows were made with other settings; remove it or choose another --out")
    wanted = [(test, attack) for test in run.tests for attack in run.attacks]
    found = [next((row for row in have if answers(row, run, *each)), None) for each in wanted]
    return [row for row in found if row is not None]


def missing(run: Run, have: Sequence[Row]) -> Todo:
    """The evaluations that no row answers, as (slice, attacks in turn); a curve is gone through as a whole."""
    todo: Todo = []
    for test in run.tests:
        lacks = [a for a in run.attacks if not any(answers(row, run, test, a) for row in have)]
        if lacks and run.curve:
            todo.append((test, list(run.attacks)))
        else:
            todo += [(test, [attack]) for attack in lacks]
    return todo


def answers(row: Row, run: Run, test: Slice, attack: Any) -> bool:
    """Whether a row is this evaluation: the whole slice and every field of the attack, its seed included."""
    facts = None if attack is None else plain({**attack_facts(attack), "seed": run.attack_seed})
    same = plain(row.attack) == facts and row.threat == ("" if attack is None else WHITE_BOX)
    return same and is_slice(row.data, row, spec=test.data, subset=test.subset, part=test.part, limit=test.limit)


def tuned_as(row: Row, run: Run) -> bool:
    """Whether a row's model was tuned as the run says; zero-shot says nothing of its backbone's tuning."""
    if run.method == ZERO_SHOT:
        return True
    method, recipe, attack = run.configured()
    facts, train = (run.method, as_options(method), as_options(recipe)), row.train or {}
    same = facts == (row.method, row.options, row.recipe) and plain(attack_facts(attack)) == plain(train.get("attack"))
    return same and train["seed"] == run.seed and is_slice(
        train, row, spec=run.data, subset=run.subset, part=run.part, shots=run.shots, limit=run.limit
    )  # fmt: skip


def is_slice(facts: Mapping[str, Any], row: Row, *, spec: str, shots: int | None = None, **wanted: Any) -> bool:
    """Whether a row's facts are of this slice as a study takes it: the set's own template, the model's resolution,
    every image."""
    wanted |= {"spec": spec, "shots": shots, "template": entry(spec)["template"] if spec in names() else TEMPLATE}
    wanted |= {"resolution": row.backbone["image_size"], "skipped": []}
    return wanted == {key: facts.get(key, "all" if key == "subset" else None) for key in wanted}


def identity(run: Run, row: Row) -> dict[str, str]:
    """What a row is of, by content: weights, images, class texts, precision. Where two rows of a study name the same
    thing, it has the same value; an old row does not say all."""
    data, train = ({"subset": "all"} | dict(facts or {}) for facts in (row.data, row.train))
    tower = run.method == ZERO_SHOT and train.get("sha256")  # the backbone is a run itself
    found = {
        f"backbone {run.backbone}": row.model if tower else row.backbone["sha256"],
        f"model of {run.key}": row.model,
        "images of {spec} ({subset} classes, {part}, limit {limit})".format(**data): data["sha256"],
        "class texts of {spec} ({subset} classes)".format(**data): data.get("texts_sha256", ""),
        "precision": row.precision,
    }
    if run.method != ZERO_SHOT:
        where = "images of {spec} ({subset} classes, {part}, limit {limit}, {shots} shots, seed {seed})"
        found[where.format(**train)] = train["sha256"]
    return {what: value for what, value in found.items() if value}


def failure(run: Run, test: str, error: Exception, out: Path) -> Failure:
    """The reason in one line; the traceback goes into a file. A disk that takes no file ends the work."""
    if isinstance(error, OSError) and error.errno in FULL:
        raise error
    text = " ".join(str(error).split())[:300]
    reason = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    name = run.key.replace("/", "-") + (f"-{slug(test)}" if test else "")
    path = out / TRACEBACKS / f"{name}.txt"
    write_atomic(path, "".join(traceback.format_exception(error)))
    return Failure(run.key, test, reason, str(path.relative_to(out)))


def plain(facts: Any) -> Any:
    """As JSON has it: tuples are lists."""
    return json.loads(json.dumps(facts))


def clock(seconds: float) -> str:
    """Seconds as people say them: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
