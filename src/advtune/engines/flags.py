"""The flags that say who does the runs of a study, and the command that goes on with one. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from advtune.engines import ENGINES
from advtune.errors import UserError
from advtune.parsing import Parser

FIELDS = {  # a flag -> the engine's field that it fills
    "ray_address": "address", "cpus_per_run": "cpus", "gpus_per_run": "gpus", "retries": "retries",
    "parallel": "parallel", "slurm": "options", "submit": "submit",
}  # fmt: skip


def add(p: Parser) -> None:
    """Gives a parser the flags, as a group of their own."""
    group = p.add_argument_group("who does the runs (docs/studies.md, on a cluster)")

    def flag(*names: str, **how: Any) -> None:
        p.arguments.append(group.add_argument(*names, **how))

    flag("--engine", choices=list(ENGINES), help="local: this process; ray: a task a run; slurm: write an array script")
    flag("--cpus-per-run", type=float, metavar="N", help="ray, slurm: processors of a run (default 1; slurm: 4)")
    flag("--gpus-per-run", type=float, metavar="N",
         help="ray: also a fraction, 0.5: two runs share one; slurm (default 1 where there are any)")  # fmt: skip
    flag("--parallel", type=int, metavar="N", help="ray, slurm: at most N runs at once (default: what fits; slurm: 16)")
    flag("--retries", type=int, metavar="N", help="ray: so often a run is tried again whose worker died (default 2)")
    flag("--ray-address", metavar="A", help="ray: a cluster that is there, auto or HOST:PORT (default: one here)")
    flag("--slurm", nargs="+", metavar="KEY=VALUE", help="slurm: options of sbatch: partition=gpu time=8:00:00")
    flag("--submit", action="store_true", default=None, help="slurm: call sbatch, if it is here")
    flag("--run", metavar="K", help="do this run alone: its folder under DIR, or its number from 0; what a task does")


def chosen(args: Any) -> Any:
    """The engine that the flags name. Raises UserError for one that its engine does not have."""
    name = args.engine or "local"
    if args.run is not None and name != "local":
        raise UserError(f"study: --run does one run, here; leave out --engine {name}")
    given = {flag: getattr(args, flag) for flag in FIELDS if getattr(args, flag) is not None}
    for flag in given:
        having = [each for each, kind in ENGINES.items() if FIELDS[flag] in fields(kind)]
        if name not in having:
            raise UserError(f"study: --{flag.replace('_', '-')} goes with --engine {' or '.join(having)}")
    return ENGINES[name](**{FIELDS[flag]: value for flag, value in given.items()})


def fields(kind: Any) -> list[str]:
    return [each.name for each in dataclasses.fields(kind)]


def command(how: Any) -> list[str]:
    """`advtune`'s arguments that go on with the study in how.out, with the device, precision and so on of `how`."""
    from advtune.study import FILE

    way = (("--device", how.device, "auto"), ("--precision", how.precision, "auto"),
           ("--batch-size", how.batch_size, 64))  # fmt: skip
    flags = [str(part) for flag, value, usual in way if value != usual for part in (flag, value)]
    return ["study", str(Path(how.out) / FILE), "--out", str(how.out), *flags, *["--compile"] * how.compile]


def again(args: Any) -> list[str]:
    """As `command`, with the engine's flags of a command line."""
    words = command(args)
    for flag in ("engine", "run", *FIELDS):
        value = getattr(args, flag)
        if value is not None:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{flag.replace('_', '-')}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    return words
