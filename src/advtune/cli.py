"""The command line: verbs only. torch is imported inside a verb, so that --help is instant."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import advtune
from advtune.errors import UserError

DESCRIPTION = "Adversarially robust tuning of CLIP-style models, and evaluation that can be believed."
EPILOG = """\
a first run, offline, on what is in the package:
  advtune train capt --data fashion-mnist-mini --shots 16 --epochs 5 --out runs/capt
  advtune evaluate runs/capt --data fashion-mnist-mini --limit 200 --attack pgd -a eps=1/255 -a steps=20
  advtune report runs/capt

your own images (one folder a class) and your own CLIP:
  advtune train tecoa --backbone openai/clip-vit-base-patch32 --data folder:photos --out runs/photos
"""
DATA_HELP = "a name from `advtune list data`, folder:PATH, parquet:PATH, csv:PATH or hf:OWNER/NAME[:CONFIG]"
BACKBONE_HELP = (
    "mini, a folder in Hugging Face CLIP format, a hub id (openai/clip-vit-base-patch32), or a run folder "
    "to tune on top of an already robust tower"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 when done, 2 on bad input (one line on stderr), 130 when interrupted."""
    parser = build()
    args = parser.parse_args(arguments)
    warnings.showwarning = _show_warning
    try:
        args.verb(args)
    except UserError as error:
        print(f"advtune: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    except OSError as error:
        print(f"advtune: error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("advtune: interrupted; a training run goes on with --resume", file=sys.stderr)
        return 130
    return 0


def build() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="advtune",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"advtune {advtune.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _train(verbs)
    _evaluate(verbs)
    _report(verbs)
    _list(verbs)
    _demo(verbs)
    return parser


def _train(verbs: Any) -> None:
    p = verbs.add_parser("train", help="tune a backbone with a method", description="Tune a backbone with a method.")
    p.add_argument("method", metavar="METHOD", help="tecoa, pmg-aft, capt, apd; see `advtune list methods`")
    p.add_argument("--out", required=True, metavar="DIR", help="run folder to write")
    p.add_argument("--shots", type=int, metavar="K", help="training images a class (default: all)")
    p.add_argument("--epochs", type=int, metavar="N", help="passes over the images (default: the paper's)")
    p.add_argument(
        "-o", dest="options", action="append", default=[], metavar="KEY=VALUE",
        help="a field of the method or its recipe: -o lam=2 -o lr=0.01",
    )  # fmt: skip
    p.add_argument("--resume", action="store_true", help="go on with an interrupted run, to the same bits")
    p.add_argument("--overwrite", action="store_true", help="replace an existing DIR")
    _shared(p, "train", "training attack's field: -a eps=4/255 -a steps=3")
    p.set_defaults(verb=train)


def _evaluate(verbs: Any) -> None:
    p = verbs.add_parser(
        "evaluate",
        help="clean and robust accuracy of a run or of zero-shot",
        description="Clean and robust accuracy. DIR on another data set is cross-dataset evaluation.",
    )
    p.add_argument("model", metavar="DIR|METHOD", help="a run folder, or zero-shot with --backbone")
    p.add_argument("--attack", metavar="NAME", help="pgd; none for clean accuracy only")
    p.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default 64)")
    p.add_argument("--out", metavar="DIR", help="folder whose results.jsonl gets the row (default: the run folder)")
    p.add_argument("--json", action="store_true", help="print the whole row as JSON")
    _shared(p, "test", "attack's field: -a eps=1/255 -a steps=100")
    p.set_defaults(verb=evaluate)


def _shared(p: argparse.ArgumentParser, part: str, attack_help: str) -> None:
    p.add_argument("--data", required=True, metavar="SPEC", help=DATA_HELP)
    p.add_argument("--backbone", default=None, metavar="B", help=BACKBONE_HELP + " (default: mini)")
    p.add_argument("-a", dest="attack_options", action="append", default=[], metavar="KEY=VALUE", help=attack_help)
    p.add_argument("--seed", type=int, default=0, metavar="S", help="seed of shots, prompts and noise (default 0)")
    p.add_argument("--limit", type=int, metavar="N", help="only N images, class-balanced")
    p.add_argument("--part", default=part, choices=("train", "fit", "val", "test", "all"),
                   help=f"part of the data; fit and val are disjoint parts of train (default {part})")  # fmt: skip
    p.add_argument("--classes", metavar="JSON|NAMES", help="other class names: a JSON file, or names with commas")
    p.add_argument("--template", metavar="TEXT", help="text template with one {} (default: the data set's)")
    p.add_argument("--resolution", metavar="N|native", help="side of the attacked image (default: the model's)")
    p.add_argument("--on-bad-image", default="fail", choices=("fail", "skip"), help="on a corrupt image (default fail)")
    p.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 (default: auto)")
    p.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of the towers")


def _report(verbs: Any) -> None:
    p = verbs.add_parser("report", help="tables from result rows", description="Tables from run folders' rows.")
    p.add_argument("dirs", nargs="+", metavar="DIR", help="run folders, folders of run folders, or results.jsonl")
    p.add_argument("--format", default="markdown", choices=("markdown", "csv", "latex", "json"))
    p.add_argument("--out", metavar="FILE", help="write there instead of printing")
    p.set_defaults(verb=report)


def _list(verbs: Any) -> None:
    p = verbs.add_parser("list", help="what there is: methods, attacks, data, backbones", description="What there is.")
    p.add_argument("what", choices=("methods", "attacks", "data", "backbones"))
    p.add_argument("--json", action="store_true")
    p.set_defaults(verb=list_)


def _demo(verbs: Any) -> None:
    p = verbs.add_parser(
        "demo",
        help="all four methods on the embedded default, in minutes",
        description="Tune the embedded backbone with every method on the embedded images, attack it, show a table.",
    )
    p.add_argument("--out", default="runs/demo", metavar="DIR", help="folder to write (default runs/demo)")
    p.add_argument("--seed", type=int, default=0, metavar="S")
    p.set_defaults(verb=demo)


def train(args: argparse.Namespace) -> None:
    from advtune import checkpoint
    from advtune import train as training

    checkpoint.claim(Path(args.out), args.resume, args.overwrite)
    training.configure(args.method, args.options, args.attack_options)
    backbone, task, how = _opened(args, args.backbone or "mini")
    training.tune(
        args.method, backbone, task, shots=args.shots, seed=args.seed, epochs=args.epochs,
        options=args.options, attack=args.attack_options, out=args.out,
        resume=args.resume, overwrite=args.overwrite, **how,
    )  # fmt: skip
    follow = shlex.join(["advtune", "evaluate", args.out, "--data", args.data, "--attack", "pgd"])
    follow += " -a eps=1/255 -a steps=100"
    print(f"{args.out}: tuned; next: {follow}")


def evaluate(args: argparse.Namespace) -> None:
    from advtune import results, runs
    from advtune.attacks import ATTACKS
    from advtune.evaluation import evaluate as run
    from advtune.methods import METHODS
    from advtune.options import fill

    attack = None
    if args.attack not in (None, "none"):
        if args.attack not in ATTACKS:
            raise UserError(f"unknown attack {args.attack!r}; known: {', '.join(ATTACKS)}")
        attack = fill(ATTACKS[args.attack](), args.attack_options, f"attack {args.attack}")
    elif args.attack_options:
        raise UserError("-a sets a field of an attack; name it with --attack pgd")
    name = args.model
    if name == "zero-shot":
        name = args.backbone or "mini"
    elif name in METHODS and not Path(name).exists():
        raise UserError(f"{name} has to be tuned first: advtune train {name} --data {args.data} --out DIR")
    elif args.backbone:
        raise UserError("--backbone goes with zero-shot; a run folder knows its own")
    elif not runs.is_run(name):
        raise UserError(f"{name}: not a finished run folder (config.json and delta.safetensors), and not zero-shot")
    out = Path(args.out) if args.out else (Path(args.model) if args.model != "zero-shot" else None)
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give --out a folder")
    model, task, how = _opened(args, name)
    row = run(model, task, attack, batch_size=args.batch_size, seed=args.seed, **how)
    if out is not None:
        results.append(out / runs.RESULTS, row)
    print(row.to_json() if args.json else sentence(row))


def _opened(args: argparse.Namespace, name: str) -> tuple[Any, Any, dict[str, Any]]:
    """The model, the task and the keyword arguments that tune and evaluate share."""
    from advtune import runs
    from advtune.evaluation import task_for

    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: at least 1 image is needed")
    resolution = args.resolution
    if resolution not in (None, "native"):
        if not resolution.isdecimal() or int(resolution) < 1:
            raise UserError(f"--resolution {resolution!r} is neither a number of pixels nor native")
        resolution = int(resolution)
    model = runs.load(name, args.device, args.precision)
    task = task_for(model, args.data, args.classes, args.template)
    return (
        model,
        task,
        dict(part=args.part, limit=args.limit, resolution=resolution, on_bad=args.on_bad_image),
    )


def sentence(row: Any) -> str:
    """A row as two lines for a person."""

    def percent(a: dict[str, Any]) -> str:
        return f"{100 * a['accuracy']:5.1f} %  [{100 * a['low']:.1f}, {100 * a['high']:.1f}]  n={a['n']}"

    lines = [f"{row.method} on {row.data['name']} ({row.data['part']}): clean  {percent(row.clean)}"]
    if row.robust is not None:
        from fractions import Fraction

        eps = Fraction(row.attack["eps"]).limit_denominator(1020)
        facts = f"{row.attack['name']} eps={eps} steps={row.attack.get('steps')}"
        lines.append(f"robust under {facts}: {percent(row.robust)}")
    if row.backbone.get("notice"):
        lines.append(f"note: {row.backbone['notice']}")
    return "\n".join(lines)


def report(args: argparse.Namespace) -> None:
    from advtune.report import render
    from advtune.results import read, write_atomic

    files: list[Path] = []
    for name in map(Path, args.dirs):
        found = [name] if name.is_file() else sorted(name.rglob("results.jsonl"))
        if not found:
            raise UserError(
                f"{name}: no results.jsonl; evaluate first: advtune evaluate {name} --data ... --attack pgd"
            )
        files += found
    text = render(read(*files), args.format)
    if args.out:
        write_atomic(args.out, text)
    else:
        print(text, end="" if text.endswith("\n") else "\n")


def list_(args: argparse.Namespace) -> None:
    from advtune.listing import listing

    facts = listing(args.what)
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    from advtune.listing import show

    show(args.what, facts)


def demo(args: argparse.Namespace) -> None:
    from advtune.demo import run

    run(Path(args.out), args.seed)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"advtune: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
