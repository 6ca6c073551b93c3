"""Doing a list of runs: what is done is skipped, what was interrupted goes on, what fails does not stop the rest."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from advtune import runs
from advtune.data import Task, load_task
from advtune.errors import UserError
from advtune.evaluation import evaluate_all
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
    """What the runs of one call share: models and data are loaded when first needed, and once."""

    device: str
    precision: str
    batch_size: int
    show: bool
    models: dict[str, VLM] = field(default_factory=dict)
    tasks: dict[tuple[str, str], Task] = field(default_factory=dict)

    def model(self, name: str) -> VLM:
        if name not in self.models:
            self.models[name] = runs.load(name, self.device, self.precision)
        return self.models[name]

    def task(self, spec: str, subset: str) -> Task:
        if (spec, subset) not in self.tasks:
            self.tasks[spec, subset] = load_task(spec, subset=subset)
        return self.tasks[spec, subset]


def work(
    wanted: Sequence[Run], out: str | Path, *, device: str = "auto", precision: str = "auto", batch_size: int = 64,
    show: bool = True,
) -> Outcome:  # fmt: skip
    """Do what is not done of these runs, each in OUT/<key>: tune (an interrupted one goes on), then evaluate.

    Runs whose rows are all there are skipped without loading a model or an image. A run that fails leaves a line in
    OUT/failed.jsonl and its traceback in OUT/tracebacks. Raises KeyboardInterrupt with a text that says how to go on.
    """
    out, outcome = Path(out), Outcome()
    bench = Bench(device, precision, batch_size, show and sys.stderr.isatty())
    begin, worked = time.monotonic(), 0
    left = sum(not is_done(run, out) for run in wanted)
    for i, run in enumerate(wanted):
        skip = is_done(run, out)
        try:
            failed = [] if skip else do(run, out, bench)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"at run {i + 1} of {len(wanted)}; the same command goes on from there") from None
        outcome.failed += failed
        outcome.skipped += skip
        with suppress(UserError):  # a folder of other rows is among the failures
            outcome.rows += rows_of(run, out / run.key)
        worked += not skip
        if show:
            seconds = time.monotonic() - begin
            ahead = seconds / max(1, worked) * max(0, left - worked)
            state = f"failed: {failed[0].error}" if failed else "was done" if skip else "done"
            times = f"{clock(seconds)} so far, about {clock(ahead)} left"
            print(f"[{i + 1}/{len(wanted)}] {run.key}: {state} ({times})", file=sys.stderr, flush=True)
    told = {each.key for each in outcome.failed}
    outcome.failed += mixed([run for run in wanted if run.key not in told], out, bench)
    (out / FAILED).unlink(missing_ok=True)
    if outcome.failed:
        write_atomic(out / FAILED, "".join(json.dumps(asdict(each)) + "\n" for each in outcome.failed))
    for reason in dict.fromkeys(each.error for each in outcome.failed) if show else ():
        first, *others = [each for each in outcome.failed if each.error == reason]
        where = first.key + (f" on {first.test}" if first.test else "")
        more = f" (and {len(others)} more)" if others else ""
        print(f"advtune: failed: {where}{more}: {reason} ({out / first.traceback})", file=sys.stderr)
    return outcome


def do(run: Run, out: Path, bench: Bench) -> list[Failure]:
    """Tune unless the folder is finished, then add the rows that it lacks; what failed."""
    failed, folder = list[Failure](), out / run.key
    try:
        have = known(run, folder)
        model = tuned(run, have, folder, bench)
    except Exception as error:
        return [failure(run, "", error, out)]
    for test, attacks in missing(run, have):
        try:
            for row, attack in zip(evaluated(run, test, attacks, model, bench), attacks, strict=True):
                if not any(answers(each, run, test, attack) for each in have):
                    append(folder / runs.RESULTS, row)
        except Exception as error:  # a set that cannot be had does not stop the others
            name = test.data + ("" if test.subset == "all" else f", {test.subset} classes")
            failed.append(failure(run, name, error, out))
    return failed


def tuned(run: Run, have: Sequence[Row], folder: Path, bench: Bench) -> VLM:
    """The run's model, tuned now, gone on with, or read. Raises UserError when its rows are of another backbone."""
    model = bench.model(run.backbone)
    check_backbone(run, have, model, folder)
    if run.method == ZERO_SHOT:
        return model
    return tune(
        run.method, model, bench.task(run.data, run.subset), shots=run.shots, seed=run.seed, epochs=run.epochs,
        options=run.options, attack=run.train_attack, part=run.part, limit=run.limit, out=folder, resume=True,
        show=bench.show,
    )  # fmt: skip


def evaluated(run: Run, test: Slice, attacks: list[Any], model: VLM, bench: Bench) -> list[Row]:
    return evaluate_all(
        model, bench.task(test.data, test.subset), attacks, part=test.part, limit=test.limit,
        batch_size=bench.batch_size, seed=run.attack_seed, resume=True, show=bench.show,
    )  # fmt: skip


def is_done(run: Run, out: Path) -> bool:
    """Whether nothing is left to do of a run; reads its rows and nothing else."""
    try:
        return not missing(run, known(run, out / run.key))
    except UserError:  # said when its turn comes
        return False


def rows_of(run: Run, folder: Path) -> list[Row]:
    """The rows that answer a run, in its order; rows of other evaluations in its folder are left out."""
    have = known(run, folder)
    wanted = [(test, attack) for test in run.tests for attack in run.attacks]
    return [row for test, attack in wanted for row in have if answers(row, run, test, attack)]


def known(run: Run, folder: Path) -> list[Row]:
    """The rows in a run's folder. Raises UserError when one was made with other settings: a name proves nothing."""
    path = folder / runs.RESULTS
    rows = read(path) if path.is_file() else []
    if not all(tuned_as(row, run) for row in rows):
        raise UserError(f"{folder}: its rows were made with other settings; remove it or choose another --out")
    return rows


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
    data = (row.data["spec"], row.data.get("subset", "all"), row.data["part"], row.data["limit"], row.data["shots"])
    facts = None if attack is None else plain({**attack_facts(attack), "seed": run.attack_seed})
    same = data == (test.data, test.subset, test.part, test.limit, None) and plain(row.attack) == facts
    return same and row.threat == ("" if attack is None else WHITE_BOX)


def tuned_as(row: Row, run: Run) -> bool:
    """Whether a row's model was tuned as the run says; zero-shot is known by its backbone alone."""
    if run.method == ZERO_SHOT:
        return True
    want, train = run.settings(), row.train or {}
    slice_ = {**{key: train.get(key) for key in ("part", "shots", "seed", "limit")}, "data": train.get("spec")}
    slice_ |= {"subset": train.get("subset", "all"), "method": row.method, "options": row.options, "recipe": row.recipe}
    attack = {key: value for key, value in (train.get("attack") or {}).items() if key in want["attack"]}
    expected = dict(want["attack"])
    if expected.get("step_size", 0) is None:  # the row has the length that was used
        attack["step_size"] = None
    same = {key: want[key] for key in slice_} == slice_
    return same and plain(attack) == plain(expected)


def check_backbone(run: Run, rows: Sequence[Row], model: VLM, folder: Path) -> None:
    """Raises UserError when rows were made on another backbone of the same name."""
    tower = model.run if run.method == ZERO_SHOT else {}
    sha256 = tower["backbone"]["sha256"] if tower else model.origin.sha256
    if any(row.backbone["sha256"] != sha256 for row in rows):
        raise UserError(f"{folder}: its rows were made on another backbone; remove it or choose another --out")


def mixed(wanted: Sequence[Run], out: Path, bench: Bench) -> list[Failure]:
    """The runs whose rows were made on other content than the backbone that the others of this call were made on."""
    found = []
    for run in wanted:
        with suppress(UserError):
            rows = rows_of(run, out / run.key)
            if rows and run.backbone in bench.models:
                try:
                    check_backbone(run, rows, bench.models[run.backbone], out / run.key)
                except UserError as error:
                    found.append(failure(run, "", error, out))
    return found


def failure(run: Run, test: str, error: Exception, out: Path) -> Failure:
    """The reason in one line; the traceback goes into a file. A disk that takes no file ends the work."""
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
