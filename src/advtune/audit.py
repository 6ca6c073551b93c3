"""One question about a deployed model: how robust is it, is the number to be believed, and does tuning help?"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from advtune import __version__, runs
from advtune.arguments import build
from advtune.attacks import PGD, Attack, AutoAttack
from advtune.checkpoint import claim
from advtune.data import Images, Split, Task, load_images
from advtune.data.fewshot import select
from advtune.errors import UserError
from advtune.evaluation import evaluate, evaluate_curve, task_for
from advtune.methods import configure
from advtune.options import fill
from advtune.results import Row, read, write_atomic
from advtune.rows import WHITE_BOX, attack_facts
from advtune.train import Options, check_seed, tune
from advtune.vlm import VLM

CURVE = tuple(k / 255 for k in (0, 1, 2, 4, 8))  # eps of the quick attack
STEPS = 20  # of its PGD
EPS, LIMIT, SHOTS, OUT = 1 / 255, 200, 16, "runs/audit"
FIX = "tecoa"  # of those that keep most of what a model could do without tuning, the cheapest
BEFORE, PAGE = "before", "audit.html"  # in the folder of an audit


@dataclass(frozen=True)
class Side:
    """One model as it was measured: `curve`, a row for each eps, ascending, and `auto`, the row of AutoAttack."""

    model: VLM
    curve: list[Row]
    auto: Row

    @property
    def rows(self) -> list[Row]:
        return [*self.curve, self.auto]


@dataclass(frozen=True)
class Audit:
    """What an audit found. `sides`: the model as it came, and after --fix the tuned one. total: images that the part
    has, of which `images` were used. again: the command, for what to do next."""

    sides: list[Side]
    task: Task
    images: Images
    total: int
    out: Path
    fix: str = ""
    again: list[str] = field(default_factory=list)

    @property
    def part(self) -> str:
        return str(self.sides[0].auto.data["part"])

    @property
    def rows(self) -> list[Row]:
        return [row for side in self.sides for row in side.rows]


def audit(
    model: VLM | str, data: Task | str, out: str | Path = OUT, *, eps: float = EPS, limit: int | None = LIMIT,
    fix: str | None = None, shots: int | None = SHOTS, epochs: int | None = None, options: Options = (),
    attack: Options = (), part: str = "test", resolution: int | str | None = None, on_bad: str = "fail",
    batch_size: int = 64, seed: int = 0, overwrite: bool = False, again: Sequence[str] = (), show: bool = True,
) -> Audit:  # fmt: skip
    """Measure a model: clean, PGD over eps, AutoAttack at `eps` with its checks; OUT/audit.html tells it.

    fix: a method to tune with, on `shots` images a class of the train part (of fit, when val is measured), into the
    run folder OUT/METHOD; the tuned model is measured alike, on the same images. What OUT has of these very settings
    is not measured again, and what was interrupted goes on; `overwrite` begins anew. Raises UserError on bad input,
    before anything is measured.
    """
    out, auto = Path(out), AutoAttack(eps=eps)
    check_seed(seed)
    check(out, eps, fix, options, attack, overwrite)
    model = runs.load(model) if isinstance(model, str) else model
    task = task_for(model, data) if isinstance(data, str) else data
    split = Split(part, limit=limit, resolution=model.side if resolution is None else resolution, on_bad=on_bad)
    images = load_images(task, split, progress=show)
    if overwrite:
        (out / BEFORE / runs.RESULTS).unlink(missing_ok=True)
    models = {BEFORE: model}
    if fix is not None:
        models[fix] = tune(
            fix, model, task, shots=shots, seed=seed, epochs=epochs, options=options, attack=attack, out=out / fix,
            part="fit" if part == "val" else "train", resolution=resolution, on_bad=on_bad, resume=not overwrite,
            overwrite=overwrite, show=show,
        )  # fmt: skip
    asked = Asked(task, split, images, auto, batch_size, seed, show)
    plain = ["advtune", "audit", "--backbone", model.origin.name, "--data", task.spec, "--out", str(out)]
    sides = [measure(each, out / name, asked) for name, each in models.items()]
    total = len(select(task, replace(split, limit=None)))
    return Audit(sides, task, images, total, out, fix or "", list(again) or plain)


@dataclass(frozen=True)
class Asked:
    """What both sides of an audit are asked."""

    task: Task
    split: Split
    images: Images
    auto: AutoAttack
    batch_size: int
    seed: int
    show: bool


def measure(model: VLM, folder: Path, asked: Asked) -> Side:
    """The rows of a model, those of `folder` where it has them."""
    file, how = folder / runs.RESULTS, {**vars(asked.split), "batch_size": asked.batch_size, "seed": asked.seed}
    how = {key: value for key, value in how.items() if key != "shots"} | {"out": folder, "resume": True}
    there = read(file) if file.is_file() else []
    quick = PGD(eps=asked.auto.eps, steps=STEPS)
    radii = sorted({*CURVE, asked.auto.eps})
    curve = [known(there, model, asked, replace(quick, eps=eps)) for eps in radii]
    auto = known(there, model, asked, asked.auto)
    kept = sum(row is not None for row in (*curve, auto))
    if kept and asked.show:
        print(f"advtune: {file}: {kept} of {len(radii) + 1} rows are there; --overwrite begins anew", file=sys.stderr)
    found = [row for row in curve if row is not None]
    if len(found) < len(radii):
        found = evaluate_curve(model, asked.task, quick, radii, show=asked.show, **how)
    return Side(model, found, auto or evaluate(model, asked.task, asked.auto, show=asked.show, **how))


def known(rows: Sequence[Row], model: VLM, asked: Asked, attack: Attack) -> Row | None:
    """The latest of these rows that says what would be measured again."""
    facts = json.loads(json.dumps({**attack_facts(attack), "seed": asked.seed}))
    texts = hashlib.sha256("\n".join(asked.task.texts()).encode()).hexdigest()
    for row in reversed(rows):
        data = (row.data.get("sha256"), row.data.get("resolution"), row.data.get("texts_sha256"))
        same = (row.model, row.attack, row.threat) == (model.origin.sha256, facts, WHITE_BOX)
        how = (row.precision, row.advtune) == (model.precision, __version__)
        if same and how and data == (asked.images.sha256, asked.split.resolution, texts):
            return row
    return None


def check(out: Path, eps: float, fix: str | None, options: Options, attack: Options, overwrite: bool) -> None:
    """Raises UserError for an eps that attacks nothing, a folder that cannot be an audit's, and a fix that is none."""
    if eps == 0:
        raise UserError("--eps 0 attacks nothing (the curve begins there anyway); name the largest change to withstand")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give --out a folder")
    if runs.is_run(out):
        raise UserError(f"{out} is a run folder; give --out another, and audit it with --backbone {out}")
    if fix == "zero-shot":
        raise UserError("--fix zero-shot trains nothing; name a method of: advtune list methods")
    if fix is not None:
        configure(fix, options, attack)
        claim(out / fix, resume=not overwrite, overwrite=overwrite)


def write(found: Audit) -> Path:
    """OUT/audit.html: the verdict, the numbers, what falls first, pictures, and what to do next."""
    from advtune.report.audit import page

    write_atomic(found.out / PAGE, page(found))
    return found.out / PAGE


def command(args: argparse.Namespace) -> list[str]:
    """The audit that was asked for, as a command without --limit, --overwrite and --json."""
    words = ["advtune", "audit"]
    for each in build().verbs()["audit"].arguments:
        value = getattr(args, each.dest, each.default)
        if each.option_strings and each.dest not in ("limit", "overwrite", "json") and value != each.default:
            flag = each.option_strings[0]
            several = value if isinstance(value, list) else [value]
            words += [flag] if value is True else [word for one in several for word in (flag, str(one))]
    return words


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for what is wrong without opening anything."""
    tuning = (("--shots", args.shots), ("--epochs", args.epochs), ("-o", args.options), ("-a", args.attack_options))
    for flag, given in tuning:
        if given and args.fix is None:
            raise UserError(f"{flag} says how to tune; add --fix METHOD, or leave it out")
    if args.shots is not None and args.shots < 1:
        raise UserError(f"--shots {args.shots}: at least 1 image a class is needed")
    check(Path(args.out), asked_eps(args), args.fix, args.options, args.attack_options, args.overwrite)


def asked_eps(args: argparse.Namespace) -> float:
    return fill(AutoAttack(), [f"eps={args.eps}"], "audit").eps


def run(args: argparse.Namespace, model: VLM, task: Task, how: dict[str, Any]) -> None:
    """The verb: audit, write the page, say what was found."""
    try:
        found = audit(
            model, task, args.out, eps=asked_eps(args), fix=args.fix, shots=args.shots or SHOTS, epochs=args.epochs,
            options=args.options, attack=args.attack_options, batch_size=args.batch_size, seed=args.seed,
            overwrite=args.overwrite, again=command(args), **how,
        )  # fmt: skip
    except KeyboardInterrupt:
        rest = ", without --overwrite," if args.overwrite else ""
        raise KeyboardInterrupt(f"the same command{rest} goes on where this audit was") from None
    told(found, write(found), args.json)


def told(found: Audit, page: Path, as_json: bool) -> None:
    """Print what was found: rows as JSON, or a table and the verdict."""
    if as_json:
        print("\n".join(row.to_json() for row in found.rows))
        return
    from advtune.report.verdict import verdict
    from advtune.terminal import evaluated

    evaluated([side.auto for side in found.sides])
    print("\n" + "\n".join(f"{title}. {text}" for title, text in verdict(found)) + f"\n\nwritten: {page}")
