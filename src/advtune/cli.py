"""The command line: verbs only. torch is imported inside a verb, so that --help is instant."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from advtune import distributed
from advtune.arguments import build
from advtune.asked import attacks, opened
from advtune.ending import ended, warned
from advtune.errors import UserError, near, suggest
from advtune.examples import start
from advtune.parsing import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 when done, 1 when a run of a study failed or an image was unreadable, 2 on bad input (one line
    on stderr) or a full disk, 130 when interrupted, 143 at SIGTERM. Without a verb it says how to begin."""
    given, parser = sys.argv[1:] if arguments is None else list(arguments), build()
    if not given:
        print(start(parser.verbs()), end="")
        return 0
    args = parse(parser, given)
    warnings.showwarning = warned
    warnings.filterwarnings("ignore", "Image size .* decompression bomb")  # such a picture is an error here
    return ended(VERBS[args.verb], args, given)


def train(args: argparse.Namespace) -> None:
    from advtune import checkpoint
    from advtune import train as training

    if distributed.leader():
        checkpoint.claim(Path(args.out), args.resume, args.overwrite)
    training.configure(args.method, args.options, args.attack_options)
    backbone, task, how = opened(args, args.backbone or "mini")
    training.tune(
        args.method, backbone, task, shots=args.shots, seed=args.seed, epochs=args.epochs,
        options=args.options, attack=args.attack_options, out=args.out,
        resume=args.resume, overwrite=args.overwrite, tensorboard=args.tensorboard, micro_batch=args.micro_batch,
        checkpoint_activations=args.checkpoint_activations, **how,
    )  # fmt: skip
    if not distributed.leader():
        return
    follow = shlex.join(["advtune", "evaluate", args.out, "--data", args.data, "--attack", "pgd"])
    follow += " -a eps=1/255 -a steps=100" + (f" --subset {args.subset}" if args.subset != "all" else "")
    if args.json:
        print(json.dumps(checkpoint.summary(Path(args.out)) | {"next": follow}))
        return
    print(f"{args.out}: tuned; next: {follow}")


def evaluate(args: argparse.Namespace) -> None:
    from advtune import runs
    from advtune.defences import DEFENCES
    from advtune.disk import check_writable
    from advtune.evaluation import evaluate_all
    from advtune.methods import METHODS
    from advtune.terminal import evaluated

    wanted = attacks(args)
    if args.defence is not None and args.defence not in DEFENCES:
        raise UserError(f"unknown defence {args.defence!r}; {near(args.defence, DEFENCES)}")
    name = args.model
    if name == "zero-shot":
        name = args.backbone or "mini"
    elif name in METHODS and not Path(name).exists():
        raise UserError(f"{name} has to be tuned first: advtune train {name} --data {args.data} --out DIR")
    elif args.backbone:
        raise UserError("--backbone goes with zero-shot; a run folder knows its own")
    elif not runs.is_run(name):
        hint = suggest(name, ["zero-shot", *(str(p) for p in Path(name).parent.glob("*") if runs.is_run(p))])
        what = "not a finished run folder (config.json and delta.safetensors), and not zero-shot"
        raise UserError(f"{name}: {what}; {hint}".rstrip("; "))
    out = Path(args.out) if args.out else (Path(args.model) if args.model != "zero-shot" else None)
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give --out a folder")
    if out is not None:
        check_writable(out / runs.RESULTS)
    model, task, how = opened(args, name)
    rows = evaluate_all(
        model, task, wanted, batch_size=args.batch_size, seed=args.seed, checks=args.checks or None,
        source=args.source, defence=DEFENCES.get(args.defence), out=out, resume=True, **how,
    )  # fmt: skip
    if not distributed.leader():
        return
    if args.json:
        print("\n".join(row.to_json() for row in rows))
        return
    evaluated(rows)


def audit(args: argparse.Namespace) -> None:
    from advtune.audit import check_flags, run

    check_flags(args)
    run(args, *opened(args, args.backbone or "mini"))


def study(args: argparse.Namespace) -> int:
    from advtune.engines.flags import again, chosen
    from advtune.study import from_flags, plan, run_study

    asked = from_flags(vars(args))
    if args.dry_run:
        from advtune.cost import estimate

        print(estimate(plan(asked), Path(args.out) if args.out else None, args.device, args.precision, args.json))
        return 0
    if not args.out:
        raise UserError("study: --out DIR is missing: the folder that gets the runs (--dry-run needs none)")
    outcome = run_study(
        asked, args.out, extend=args.extend, device=args.device, precision=args.precision,
        batch_size=args.batch_size, compile=args.compile, engine=chosen(args), only=args.run,
    )  # fmt: skip
    if args.json:
        print("".join(f"{row.to_json()}\n" for row in outcome.rows), end="")
    elif outcome.rows:
        from advtune.report import render
        from advtune.terminal import page

        text = re.sub(r"\n*<details>.*?</details>", "", render(outcome.rows, "markdown"), flags=re.DOTALL)
        page(text)
        print(f"\nEvery setting: {shlex.join(['advtune', 'report', args.out])}")
        if asked.paper:
            print(f"Beside the paper's: {shlex.join(['advtune', 'report', '--against', asked.paper, args.out])}")
    if outcome.failed:
        way = shlex.join(["advtune", *again(args)])
        print(f"advtune: {len(outcome.failed)} failed; mend what is wrong and try them again: {way}", file=sys.stderr)
    return 1 if outcome.failed else 0


def report(args: argparse.Namespace) -> None:
    from advtune.report import render, render_against
    from advtune.report.found import gather
    from advtune.results import files_in, write_atomic
    from advtune.terminal import page as show

    if not args.dirs and not args.against:
        raise UserError("report: name run folders, or a paper to hold them against: --against fap")
    if args.format == "html" and args.against:
        raise UserError("--against has no page; choose --format markdown, or leave --against out")
    if args.format == "html" and not args.out and sys.stdout.isatty():
        raise UserError("--format html: name the page's file: --out report.html")
    if args.format == "html" or args.figures:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a report downloads neither models nor data
    rows, folders = gather([file for name in args.dirs for file in files_in(Path(name))])
    if args.figures:
        from advtune.report.figures import write_figures

        files, missing = write_figures(rows, folders, Path(args.figures))
        print("\n".join([f"written: {', '.join(map(str, files))}", *missing]), file=sys.stderr)
    if args.format == "html":
        from advtune.report.html import page

        text = page(rows, folders, gallery=args.gallery)
    else:
        format = args.format or "markdown"
        text = render_against(rows, args.against, format) if args.against else render(rows, format)
    if args.out:
        write_atomic(args.out, text)
    elif args.format is None:
        show(text)
    else:
        print(text, end="" if text.endswith("\n") else "\n")


def compare(args: argparse.Namespace) -> None:
    from advtune.comparison import compare as run
    from advtune.comparison import render
    from advtune.results import files_in, read
    from advtune.terminal import page

    found = run(*(read(*files_in(Path(side))) for side in (args.first, args.second)))
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        page(render(found))


def interpolate(args: argparse.Namespace) -> None:
    from advtune.between import between

    made = between(args.tuned, args.share, args.out, overwrite=args.overwrite)
    print(json.dumps(made, indent=1) if args.json else "\n".join(made["lines"]))


def predict(args: argparse.Namespace) -> int:
    from advtune.data.templates import read_templates
    from advtune.predict import Classifier, find, run

    files = find(args.images)
    classifier = Classifier(
        args.model, args.classes, read_templates(args.template), device=args.device, precision=args.precision,
        batch_size=args.batch_size,
    )  # fmt: skip
    return 1 if run(classifier, files, args.top, args.csv, args.json) else 0


def export(args: argparse.Namespace) -> None:
    from advtune.data.templates import read_templates
    from advtune.export import export as write

    made = write(
        args.model, args.to, args.out, classes=args.classes, template=read_templates(args.template),
        push=args.push, private=args.private,
    )  # fmt: skip
    print(json.dumps(made, indent=1) if args.json else "\n".join(made["lines"]))


def serve(args: argparse.Namespace) -> None:
    from advtune.serve.server import serve as run

    run(args.model, data=args.data, host=args.host, port=args.port, browser=args.browser, device=args.device)


def list_(args: argparse.Namespace) -> None:
    from advtune.listing import listing

    facts = listing(args.what)
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    from advtune.terminal import listed

    listed(args.what, facts)


def backbone(args: argparse.Namespace) -> None:
    from advtune.inspecting import run

    run(args.model, args.json)


def demo(args: argparse.Namespace) -> None:
    from advtune.demo import run
    from advtune.report import render
    from advtune.terminal import page

    out, rows = Path(args.out), run(Path(args.out), args.seed)
    if args.json:
        print("".join(f"{row.to_json()}\n" for row in rows), end="")
        return
    page(render(rows, "markdown").partition("<details>")[0].rstrip())  # every setting is in the report
    print(f"\nwritten: {out / 'report.md'} and {out / 'clean-robust.png'}")


def completion(args: argparse.Namespace) -> None:
    from advtune.completion import script

    print(script(args.shell), end="")


VERBS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "train": train, "evaluate": evaluate, "audit": audit, "study": study, "report": report, "compare": compare,
    "interpolate": interpolate, "predict": predict, "export": export, "serve": serve, "list": list_,
    "backbone": backbone, "demo": demo, "completion": completion,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
