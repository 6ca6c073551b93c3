"""Doing a list of runs: what is done is skipped, what was interrupted goes on, what fails does not stop the rest."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from advtune import runs
from advtune.answers import answers, identity, missing, rows_of
from advtune.data import Task, load_task
from advtune.disk import FULL, alone, lock
from advtune.errors import UserError
from advtune.evaluation import evaluate_all
from advtune.progress import Tally
from advtune.protocols import ZERO_SHOT, Run, Slice, slug
from advtune.results import Row, append, write_atomic
from advtune.train import tune
from advtune.vlm import VLM

FAILED, TRACEBACKS, CLAIMS = "failed.jsonl", "tracebacks", ".claims"


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
    tasks: dict[tuple[str, ...], Task] = field(default_factory=dict)
    contents: dict[str, tuple[str, Path | str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.precision != "auto":
            self.contents["precision"] = (self.precision, f"--precision {self.precision}")

    def model(self, name: str) -> VLM:
        if name not in self.models:
            self.models[name] = runs.load(name, self.device, self.precision, self.compile)
        return self.models[name]

    def task(self, spec: str, subset: str, template: str = "") -> Task:
        key = (spec, subset, template)
        if key not in self.tasks:
            self.tasks[key] = load_task(spec, subset=subset, template=template or None)
        return self.tasks[key]

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


# What an engine says of a run: its place in the plan, what failed of it, how many others run (None: one at a time).
Report = tuple[int, list[Failure], int | None]
Engine = Callable[[Mapping[int, Run], Bench], Generator[Report, None, None]]


def claimed(out: Path, run: Run) -> AbstractContextManager[None]:
    """Keeps other tasks of the study from this run. Raises UserError when one works on it."""
    refusal = f"{out / run.key}: another task works on this run; wait for it"
    return lock(out / CLAIMS / run.key.replace("/", "-"), refusal)


def in_turn(todo: Mapping[int, Run], bench: Bench) -> Generator[Report, None, None]:
    """The local engine: one run after the other, in this process."""
    for place, run in todo.items():
        yield place, do(run, bench), None


def work(wanted: Sequence[Run], out: str | Path, engine: Engine = in_turn, **how: Any) -> Outcome:
    """Do what is not done of these runs, each in OUT/<key>: tune (an interrupted one goes on), then evaluate.

    Runs whose rows are all there are skipped without loading a model or an image. A run that fails leaves a line in
    OUT/failed.jsonl and its traceback in OUT/tracebacks. engine: who does them, see `advtune.engines`. how: device,
    precision, batch_size, show, compile. Raises KeyboardInterrupt with a text that says where, UserError when another
    process works in OUT, OSError when the disk is full.
    """
    with alone(Path(out)):
        return through(wanted, Bench(Path(out), **how), engine)


def through(wanted: Sequence[Run], bench: Bench, engine: Engine = in_turn, only: int | None = None) -> Outcome:
    """As `work`, in a folder that is this process's alone; with `only`, the place of the one run to do, in a folder
    that is shared with tasks that do others."""
    done = [is_done(run, bench) for run in wanted]  # reads what rows there are, before others are made
    mine = range(len(wanted)) if only is None else [only]
    todo = {place: wanted[place] for place in mine if not done[place]}
    tally, failed = Tally(len(mine), len(todo), bench.show), dict[int, list[Failure]]()
    keep(bench.out, [], None if only is None else {wanted[only].key})
    for place in (place for place in mine if done[place]):
        tally.tell(wanted[place].key, "was done", None)
    try:
        with closing(engine(todo, bench)) as reports:
            for place, found, running in reports:
                failed[place] = found or disagreement(wanted[place], bench)
                keep(bench.out, failed[place], {wanted[place].key})
                tally.worked, tally.failed = tally.worked + 1, tally.failed + bool(failed[place])
                state = f"failed: {failed[place][0].error}" if failed[place] else "done"
                tally.tell(wanted[place].key, state, running)
    except KeyboardInterrupt as stop:
        raise type(stop)(f"at run {tally.told + 1} of {len(mine)}") from None
    outcome = Outcome([], [each for place in sorted(failed) for each in failed[place]], len(mine) - len(todo))
    for place in mine:
        with suppress(UserError):  # a folder of other rows is among the failures
            outcome.rows += bench.rows(wanted[place])
    if bench.show:
        tell_failures(outcome.failed, bench.out)
    return outcome


def tell_failures(failed: Sequence[Failure], out: Path) -> None:
    """Each reason once, with the first run that failed for it."""
    for reason in dict.fromkeys(each.error for each in failed):
        first, *others = [each for each in failed if each.error == reason]
        where = first.key + (f" on {first.test}" if first.test else "")
        more = f" (and {len(others)} more)" if others else ""
        print(f"advtune: failed: {where}{more}: {reason} ({out / first.traceback})", file=sys.stderr)


def keep(out: Path, failed: Sequence[Failure], keys: Collection[str] | None) -> None:
    """Put failures into OUT/failed.jsonl, in the place of those of the runs `keys` (None: of all)."""
    path = out / FAILED
    if not failed and not path.exists():
        return
    with lock(out / CLAIMS / FAILED):  # tasks of one study write it at the same time
        kept = path.read_text().splitlines(keepends=True) if keys is not None and path.exists() else []
        lines = [line for line in kept if json.loads(line)["key"] not in (keys or ())]
        lines += [json.dumps(asdict(each)) + "\n" for each in failed]
        if lines:
            write_atomic(path, "".join(lines))
        else:
            path.unlink(missing_ok=True)


def disagreement(run: Run, bench: Bench) -> list[Failure]:
    """A failure where a run's new rows are not of what the study's others are of."""
    try:
        bench.rows(run)
    except UserError as error:
        return [failure(run, "", error, bench.out)]
    return []


def do(run: Run, bench: Bench) -> list[Failure]:
    """Tune unless the folder is finished, then add the rows that it lacks; what failed."""
    failed = list[Failure]()
    with ExitStack() as stack:
        try:
            stack.enter_context(claimed(bench.out, run))
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
            run.method, model, bench.task(run.data, run.subset, run.template), shots=run.shots, seed=run.seed,
            epochs=run.epochs, options=run.options, attack=run.train_attack, part=run.part, limit=run.limit,
            out=bench.out / run.key, resume=True, show=bench.show and sys.stderr.isatty(),
        )  # fmt: skip
    bench.agree(run, {f"model of {run.key}": model.origin.sha256})
    return model


def evaluated(run: Run, test: Slice, attacks: list[Any], model: VLM, bench: Bench) -> list[Row]:
    return evaluate_all(
        model, bench.task(test.data, test.subset, run.template), attacks, part=test.part, limit=test.limit,
        batch_size=bench.batch_size, seed=run.attack_seed, resume=True, show=bench.show and sys.stderr.isatty(),
    )  # fmt: skip


def is_done(run: Run, bench: Bench) -> bool:
    """Whether nothing is left to do of a run; reads its rows and nothing else."""
    try:
        return not missing(run, bench.rows(run))
    except UserError:  # said when its turn comes
        return False


def failure(run: Run, test: str, error: Exception, out: Path) -> Failure:
    """The reason in one line; the traceback goes into a file. A disk that takes no file ends the work."""
    if isinstance(error, OSError) and error.errno in FULL:
        raise error
    text = " ".join(str(error).split())
    reason = text[:1000] if isinstance(error, UserError) else f"{type(error).__name__}: {text[:300]}"
    name = run.key.replace("/", "-") + (f"-{slug(test)}" if test else "")
    path = out / TRACEBACKS / f"{name}.txt"
    write_atomic(path, "".join(traceback.format_exception(error)))
    return Failure(run.key, test, reason, str(path.relative_to(out)))
