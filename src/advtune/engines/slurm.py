"""A study on Slurm: an array script whose tasks do a run each, and one that goes over what they left."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advtune.errors import UserError

if TYPE_CHECKING:
    from advtune.grid import Bench, Report
    from advtune.protocols import Run

FOLDER, ARRAY, COLLECT = "slurm", "array.sh", "collect.sh"
LARGEST = 1001  # Slurm's MaxArraySize, unless a cluster sets another
KEY = re.compile(r"[a-z][a-z0-9-]*")


@dataclass(frozen=True)
class Slurm:
    """Writes OUT/slurm/array.sh and OUT/slurm/collect.sh and does no run itself. cpus, gpus: of a run (gpus None: one,
    unless the device is cpu). parallel: tasks at once. options: any of sbatch's, `key=value`, or `key` for a switch;
    they win. submit: call sbatch. Raises UserError for what sbatch could not read."""

    cpus: float = 4
    gpus: float | None = None
    parallel: int = 16
    options: Sequence[str] = ()
    submit: bool = False

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--cpus-per-run", self.cpus, 1),
            ("--gpus-per-run", self.gpus or 0, 0),
            ("--parallel", self.parallel, 1),
        ):
            if not least <= value < math.inf or value != int(value):
                raise UserError(f"study: {flag} {value:g}: Slurm takes whole numbers from {least}")
        switches(self.options)

    def __call__(self, todo: Mapping[int, Run], bench: Bench) -> Generator[Report, None, None]:
        """Write the scripts for these runs and submit them, or say what to type; yields nothing."""
        yield from ()
        if not todo:
            return
        folder = bench.out / FOLDER
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        keys = [run.key for run in todo.values()]
        write(folder / ARRAY, array(self, keys, bench))
        write(folder / COLLECT, collect(self, bench))
        said = [f"{folder / ARRAY}: {len(keys)} runs, at most {self.parallel} at once"]
        if len(keys) > LARGEST:
            said.append(f"the cluster has to take arrays of {len(keys)}: scontrol show config | grep MaxArraySize")
        both = [shlex.quote(str(folder / name)) for name in (ARRAY, COLLECT)]
        typed = "sbatch --dependency=afterany:$(sbatch --parsable {}) {}".format(*both)
        if self.submit and shutil.which("sbatch"):
            job, last = submit(folder)
            said.append(f"submitted: {job}, and {last} after it, for what is left then")
        else:
            said.append(f"{'no sbatch here; ' if self.submit else ''}on the cluster, type: {typed}")
        if bench.show:
            print("\n".join(f"advtune: {line}" for line in said), file=sys.stderr)


def array(slurm: Slurm, keys: Sequence[str], bench: Bench) -> str:
    """The script of the tasks: the n-th does the n-th of the runs."""
    tasks = {"array": f"0-{len(keys) - 1}%{slurm.parallel}", "output": log(bench.out, "%A-%a")}
    names = "".join(f"  {shlex.quote(key)}\n" for key in keys)
    what = f"{len(keys)} runs of the study in {one_line(bench.out)}, an array task each."
    # by name, not by number: the study may be extended while the tasks wait
    return (
        head(what, {**tasks, **common(slurm, bench)}, slurm.options)
        + f"runs=(\n{names})\n"
        + body(bench, ' --run "${runs[SLURM_ARRAY_TASK_ID]}"')
    )


def collect(slurm: Slurm, bench: Bench) -> str:
    """The script of what comes after: once more what failed or was cut off, then the tables."""
    what = f"What the tasks of the study in {one_line(bench.out)} left undone, one after the other; then its tables."
    own = [option for option in slurm.options if option.partition("=")[0].strip() != "array"]
    return head(what, {"output": log(bench.out, "collect-%j"), **common(slurm, bench)}, own) + body(bench, "")


def common(slurm: Slurm, bench: Bench) -> dict[str, str]:
    """What both scripts ask for. A task that lost its machine is queued again, and goes on from its checkpoint."""
    from advtune.protocols import slug

    gpus = (0 if bench.device == "cpu" else 1) if slurm.gpus is None else int(slurm.gpus)
    return {
        "job-name": f"advtune-{slug(str(bench.out.resolve()))}",
        "cpus-per-task": str(int(slurm.cpus)),
        **({"gres": f"gpu:{gpus}"} if gpus else {}),
        "open-mode": "append",
        "requeue": "",
    }


def head(what: str, usual: Mapping[str, str], options: Sequence[str]) -> str:
    lines = {**usual, **switches(options)}
    asked = "".join(f"#SBATCH --{key}{'=' + shlex.quote(value) if value else ''}\n" for key, value in lines.items())
    return f"#!/bin/bash\n# {what}\n{asked}set -euo pipefail\n"


def body(bench: Bench, more: str) -> str:
    from advtune.engines.flags import command

    program = shlex.join([sys.executable, "-m", "advtune.cli", *command(bench)])
    threads = 'export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"'
    return f"cd {shlex.quote(str(Path.cwd()))}\n{threads}\nexec {program}{more}\n"


def switches(options: Sequence[str]) -> dict[str, str]:
    """Options of sbatch as a mapping; an empty value is a switch. Raises UserError for what is none."""
    found = dict[str, str]()
    for option in options:
        key, _, value = (part.strip() for part in option.partition("="))
        key = key.removeprefix("--")
        if not KEY.fullmatch(key) or not value.isprintable():
            raise UserError(f"study: --slurm {option!r}: write an option of sbatch as key=value: partition=gpu")
        found[key] = value
    return found


def log(out: Path, name: str) -> str:
    """A file for what a task says, as sbatch wants it: % begins its placeholders."""
    return str((out / FOLDER / "logs").resolve()).replace("%", "%%") + f"/{name}.log"


def one_line(text: Any) -> str:
    return " ".join(str(text).split())


def write(path: Path, text: str) -> None:
    from advtune.results import write_atomic

    write_atomic(path, text)
    path.chmod(0o755)


def submit(folder: Path) -> tuple[str, str]:
    """Submit both scripts, the second for after the first; their job numbers. Raises UserError when sbatch refuses."""
    jobs = list[str]()
    for name in (ARRAY, COLLECT):
        after = [f"--dependency=afterany:{jobs[0]}"] if jobs else []
        done = subprocess.run(
            ["sbatch", "--parsable", *after, str(folder / name)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(f"study: sbatch refused {folder / name}: {one_line(done.stderr)[:300]}")
        jobs.append(done.stdout.strip().partition(";")[0])  # a federation adds its cluster's name
    return jobs[0], jobs[1]
