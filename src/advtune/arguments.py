"""The command line's arguments, with the help that teaches them. Imports nothing heavy."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

import advtune
from advtune.engines import flags
from advtune.examples import AUDIT, COMPLETION, DESCRIPTION, EPILOG, EXAMPLES, EXPORT, STUDY
from advtune.parsing import Parser

DATA_HELP = "a name from `advtune list data`, folder:PATH, parquet:PATH, csv:PATH or hf:OWNER/NAME[:CONFIG]"
BACKBONE_HELP = (
    "mini, a folder (Hugging Face CLIP or SigLIP, open_clip), OpenAI's .pt, a hub id (openai/clip-vit-base-patch32, "
    "hf-hub:ID), with +FILE another image tower; or a run folder, to tune on top of an already robust tower"
)
TEMPLATE_HELP = "text template with one {{}} (default: {}); several, a .txt or `ensemble`: averaged"
SIZE_HELP = "side of the backbone's images: positions interpolated"


def build() -> Parser:
    """The parser; `args.verb` names the verb."""
    parser = Parser(prog="advtune", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"advtune {advtune.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _train(verbs)
    _evaluate(verbs)
    _audit(verbs)
    _study(verbs)
    _report(verbs)
    _compare(verbs)
    _predict(verbs)
    _export(verbs)
    _serve(verbs)
    _known(verbs)
    _demo(verbs)
    _completion(verbs)
    for name, each in parser.verbs().items():
        each.example = EXAMPLES.get(name, "")
        if each.example and not each.epilog:
            each.epilog = "for example:\n  " + " \\\n      ".join(
                textwrap.wrap(each.example, 70, break_on_hyphens=False)
            )
    return parser


def _train(verbs: Any) -> None:
    p = verbs.add_parser("train", help="tune a backbone with a method", description="Tune a backbone with a method.")
    p.add_argument("method", metavar="METHOD", help="capt, apd, pmg-aft, tecoa, fap, ...: see `advtune list methods`")
    p.add_argument("--out", required=True, metavar="DIR", help="run folder to write")
    p.add_argument("--shots", type=int, metavar="K", help="training images a class (default: all)")
    p.add_argument("--epochs", type=int, metavar="N", help="passes over the images (default: the paper's)")
    p.add_argument(
        "-o", dest="options", action="append", default=[], metavar="KEY=VALUE",
        help="a field of the method or its recipe: -o lam=2 -o lr=0.01",
    )  # fmt: skip
    p.add_argument("--resume", action="store_true", help="go on with an interrupted run, to the same bits")
    p.add_argument("--overwrite", action="store_true", help="replace an existing DIR")
    p.add_argument("--micro-batch", type=int, metavar="N", help="images at once, for the same gradient in less memory")
    p.add_argument("--checkpoint-activations", action="store_true", help="keep few activations, compute them twice")
    p.add_argument("--tensorboard", metavar="DIR", help="also write the curves of the loss terms there")
    p.add_argument("--json", action="store_true", help="print the run, its settings and last losses as JSON")
    _shared(p, "train", "training attack's field: -a eps=4/255 -a steps=3; another attack: -a name=n-fgsm, name=free")
    p.set_defaults(verb="train")


def _evaluate(verbs: Any) -> None:
    p = verbs.add_parser(
        "evaluate",
        help="clean and robust accuracy of a run or of zero-shot",
        description="Clean and robust accuracy. DIR on another data set is cross-dataset evaluation. An evaluation "
        "that was interrupted goes on where it was when the same command is given again.",
    )
    p.add_argument("model", metavar="DIR|METHOD", help="a run folder, or zero-shot with --backbone")
    p.add_argument("--attack", metavar="NAME", help="autoattack, pgd, ... (`advtune list attacks`); none: clean only")
    p.add_argument("--source", metavar="DIR|B", help="transfer: make the adversarial images on this other model")
    p.add_argument("--defence", metavar="NAME", help="a step before the model, attacked through: jpeg, noise")
    p.add_argument("--checks", action="store_true", help="look for signs that it is too high (autoattack: always)")
    p.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default 64)")
    p.add_argument("--out", metavar="DIR", help="folder whose results.jsonl gets the row (default: the run folder)")
    p.add_argument("--json", action="store_true", help="print the whole row as JSON")
    _shared(p, "test", "attack's field: -a eps=1/255 -a steps=100; several eps make a curve: -a eps=0,1/255,4/255")
    p.set_defaults(verb="evaluate")


def _audit(verbs: Any) -> None:
    p = verbs.add_parser(
        "audit",
        help="how robust is this model? one page; --fix: before and after",
        description="Measure a model and write FOLDER/audit.html: a verdict, clean accuracy, PGD-20 at eps 0 to 8/255, "
        "AutoAttack at one eps with its checks, the classes that fall first, pictures, what to do next. With --fix it "
        "tunes, too, and shows before and after. What FOLDER has of the same settings is used; what was interrupted "
        "goes on.",
        epilog=AUDIT,
    )
    p.add_argument("--out", default="runs/audit", metavar="FOLDER", help="folder to write (default runs/audit)")
    p.add_argument("--eps", default="1/255", metavar="N/255", help="the change to withstand (default 1/255)")
    p.add_argument("--fix", nargs="?", const="tecoa", metavar="METHOD",
                   help="tune with it (see `advtune list methods`; --fix alone: tecoa) and measure again")  # fmt: skip
    p.add_argument("--shots", type=int, metavar="K", help="with --fix: training images a class (default 16)")
    p.add_argument("--epochs", type=int, metavar="N", help="with --fix: passes over them (default: the paper's)")
    p.add_argument("-o", dest="options", action="append", default=[], metavar="KEY=VALUE",
                   help="with --fix: a field of the method or its recipe: -o lr=0.001")  # fmt: skip
    p.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default 64)")
    p.add_argument("--overwrite", action="store_true", help="use nothing that FOLDER has: measure and tune anew")
    p.add_argument("--json", action="store_true", help="print the rows as JSON")
    _shared(p, "test", "with --fix: training attack's field: -a eps=2/255", limit=200)
    p.set_defaults(verb="audit")


def _study(verbs: Any) -> None:
    p = verbs.add_parser(
        "study",
        help="a protocol of runs: methods, sets, shots, seeds; resumable",
        description="Tune and evaluate every method on every set, with every number of shots and seed, as a protocol "
        "says. What is done is skipped, what was interrupted goes on, what fails is reported and does not "
        "stop the rest.",
        epilog=STUDY,
    )
    p.add_argument("study", metavar="PROTOCOL|FILE", help="few-shot, base-to-new, cross-dataset, domain-shift, "
                   "transfer, eps-curve; or a study file (.toml)")  # fmt: skip
    p.add_argument("--out", metavar="DIR", help="folder of the study: a run folder for each run")
    p.add_argument("--methods", nargs="+", metavar="M", help="see `advtune list methods`; zero-shot is run once a set")
    p.add_argument("--data", nargs="+", metavar="SPEC", help="sets tested on: " + DATA_HELP)
    p.add_argument("--train-on", metavar="SPEC", help="the set tuned on, where the protocol tests on others")
    p.add_argument("--shots", nargs="+", metavar="K", help="training images a class, or all (default: the protocol's)")
    p.add_argument("--seeds", nargs="+", type=int, metavar="S", help="of the training (default 0)")
    p.add_argument("--epochs", type=int, metavar="N", help="passes over the images (default: the papers')")
    p.add_argument("--limit", type=int, metavar="N", help="only N test images, class-balanced")
    p.add_argument("--train-limit", type=int, metavar="N", help="only N training images, class-balanced")
    p.add_argument("--template", action="append", metavar="TEXT|FILE", help=TEMPLATE_HELP.format("each set's"))
    p.add_argument("--backbone", metavar="B", help=BACKBONE_HELP + " (default: mini)")
    p.add_argument("--image-size", type=int, metavar="N", help=SIZE_HELP)
    p.add_argument("--attack", nargs="+", metavar="NAME", help="of the evaluation; none: clean (default pgd)")
    p.add_argument("--eps", nargs="+", metavar="N/255", help="of the evaluation (default 1/255; eps-curve: 1 2 4 8)")
    p.add_argument("-a", dest="attack_options", action="append", metavar="KEY=VALUE",
                   help="field of each evaluation attack that has it: -a steps=20")  # fmt: skip
    p.add_argument("-o", dest="options", action="append", metavar="KEY=VALUE",
                   help="field of every method or its recipe: -o lr=0.01; of one: -o tecoa.lr=0.01")  # fmt: skip
    p.add_argument("--train-attack", nargs="+", metavar="KEY=VALUE", help="fields of the training attack: eps=4/255")
    p.add_argument("--extend", action="store_true", help="let this study take another's place in DIR; runs stay")
    p.add_argument("--dry-run", action="store_true", help="print the runs and what they cost; writes nothing")
    p.add_argument("--json", action="store_true", help="print the rows (with --dry-run: the runs) as JSON")
    p.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default 64)")
    _machine(p)
    flags.add(p)
    p.set_defaults(verb="study")


def images(text: str) -> int | None:
    """A number of images, or none for `all`."""
    try:
        return None if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of images nor all") from None


def _machine(p: argparse.ArgumentParser, compile: bool = True) -> None:
    p.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 (default: auto)")
    p.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of the towers")
    p.add_argument("--deterministic", action="store_true", help="the same bits every time, on a GPU, too; slower")
    if compile:
        p.add_argument("--compile", action="store_true",
                       help="image tower through torch.compile, worth its minute in long runs")  # fmt: skip


def _shared(p: argparse.ArgumentParser, part: str, attack_help: str, limit: int | None = None) -> None:
    p.add_argument("--data", required=True, metavar="SPEC", help=DATA_HELP)
    p.add_argument("--backbone", default=None, metavar="B", help=BACKBONE_HELP + " (default: mini)")
    p.add_argument("--image-size", type=int, metavar="N", help=SIZE_HELP)
    p.add_argument("-a", dest="attack_options", action="append", default=[], metavar="KEY=VALUE", help=attack_help)
    p.add_argument("--seed", type=int, default=0, metavar="S", help="seed of shots, prompts and noise (default 0)")
    p.add_argument("--limit", type=images, default=limit, metavar="N",
                   help=f"only N images, class-balanced (default {limit or 'all'})")  # fmt: skip
    p.add_argument("--part", default=part, choices=("train", "fit", "val", "test", "all"),
                   help=f"part of the data; fit and val are disjoint parts of train (default {part})")  # fmt: skip
    p.add_argument("--subset", default="all", choices=("all", "base", "new"),
                   help="base: the first half of the classes, rounded up; new: the others (default all)")  # fmt: skip
    p.add_argument("--classes", metavar="JSON|NAMES", help="other class names: a JSON file, or names with commas")
    p.add_argument("--template", action="append", metavar="TEXT|FILE", help=TEMPLATE_HELP.format("the data set's"))
    p.add_argument("--resolution", metavar="N|native", help="side of the attacked image (default: the model's)")
    p.add_argument("--on-bad-image", default="fail", choices=("fail", "skip"), help="on a corrupt image (default fail)")
    _machine(p)


def _report(verbs: Any) -> None:
    p = verbs.add_parser(
        "report",
        help="tables, figures or a page from result rows",
        description="Tables, figures or one self-contained page (html) from run folders' rows. Nothing is downloaded; "
        "the page's gallery attacks a handful of images with the models of the run folders.",
    )
    p.add_argument("dirs", nargs="*", metavar="DIR", help="run folders, folders of run folders, or results.jsonl")
    p.add_argument("--against", metavar="PAPER", help="a paper's published numbers beside ours, and what differs: fap")
    p.add_argument("--format", choices=("markdown", "csv", "latex", "json", "html"),
                   help="default: tables on a terminal, else markdown")  # fmt: skip
    p.add_argument("--json", action="store_const", dest="format", const="json", help="the same as --format json")
    p.add_argument("--out", metavar="FILE", help="write there instead of printing")
    p.add_argument("--figures", metavar="FOLDER", help="write the figures there, too, as .pdf and .png")
    p.add_argument("--no-gallery", dest="gallery", action="store_false", help="a page without attacked images")
    p.set_defaults(verb="report")


def _compare(verbs: Any) -> None:
    p = verbs.add_parser(
        "compare",
        help="two methods on the same images: is the difference real?",
        description="McNemar's exact test and a bootstrap interval of the difference, on the images that both saw.",
    )
    for side in ("first", "second"):
        p.add_argument(side, metavar="DIR", help=f"run folder, folder of one method's seeds, or results.jsonl ({side})")
    p.add_argument("--json", action="store_true", help="print the comparisons as JSON")
    p.set_defaults(verb="compare")


def _predict(verbs: Any) -> None:
    p = verbs.add_parser(
        "predict",
        help="what is on these images: labels and probabilities",
        description="Labels and probabilities for images. One that cannot be read is named on stderr and skipped; the "
        "exit status is 1 then.",
    )
    _model(p)
    p.add_argument("images", nargs="+", metavar="IMAGE", help="files, or folders with all that is below them")
    p.add_argument("--csv", metavar="FILE", help="write a table there: path, label, probability, the next classes")
    p.add_argument("--json", action="store_true", help="print a line of JSON for each image")
    p.add_argument("--top", type=int, default=5, metavar="K", help="classes named for each image (default 5)")
    p.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default 64)")
    _machine(p, compile=False)
    p.set_defaults(verb="predict")


def _export(verbs: Any) -> None:
    p = verbs.add_parser(
        "export",
        help="a folder for transformers, ONNX or the hub, with a model card",
        description="Write what was tuned in a form that others load, with a model card.",
        epilog=EXPORT,
    )
    _model(p)
    p.add_argument("--to", required=True, choices=("huggingface", "onnx", "prompts"), help="see below")
    p.add_argument("--out", required=True, metavar="FOLDER", help="folder to write; it must be new or empty")
    p.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to this repository of the Hugging Face hub")
    p.add_argument("--private", action="store_true", help="make that repository private, if it is new")
    p.add_argument("--json", action="store_true", help="print what was written as JSON")
    p.set_defaults(verb="export")


def _model(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="DIR|B", help="a run folder, or a backbone: mini, a folder, a hub id")
    p.add_argument("--classes", metavar="JSON|NAMES", help="class names: a JSON file, or names with commas "
                   "(default: those the run was tuned on)")  # fmt: skip
    p.add_argument("--template", action="append", metavar="TEXT|FILE", help=TEMPLATE_HELP.format("the run's"))


def _serve(verbs: Any) -> None:
    p = verbs.add_parser(
        "serve",
        help="a local web page: attack a picture, see what the models say",
        description="A local web page: choose a picture and an attack, see what undefended and tuned model say.",
    )
    p.add_argument(
        "model", nargs="?", metavar="DIR|BACKBONE",
        help="a run, a folder of runs, or a backbone alone (default: runs/demo, or TeCoA tuned at once)",
    )  # fmt: skip
    p.add_argument("--data", metavar="SPEC", help=f"example pictures and class names (default: the run's): {DATA_HELP}")
    p.add_argument("--port", type=int, default=7860, metavar="N", help="0: any that is free (default 7860)")
    p.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default 127.0.0.1)")
    p.add_argument("--no-browser", dest="browser", action="store_false", help="do not open a browser")
    p.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 (default: auto)")
    p.set_defaults(verb="serve")


def _known(verbs: Any) -> None:
    p = verbs.add_parser("list", help="what there is: methods, attacks, data, backbones", description="What there is.")
    p.add_argument("what", choices=("methods", "attacks", "data", "backbones"), help="what to show")
    p.add_argument("--json", action="store_true", help="print all that is known of them as JSON")
    p.set_defaults(verb="list")
    p = verbs.add_parser("backbone", help="what a backbone is, and whether every tensor fits",
                         description="What a backbone is; exit status 2 when it cannot be used.")  # fmt: skip
    p.add_argument("what", choices=("inspect",), help="say all that its files say; nothing in them is run")
    p.add_argument("model", metavar="ID|DIR", help=BACKBONE_HELP.partition("; or")[0] + "; or a run folder")
    p.add_argument("--json", action="store_true", help="print it as one JSON object")
    p.set_defaults(verb="backbone")


def _demo(verbs: Any) -> None:
    p = verbs.add_parser(
        "demo",
        help="four methods on the embedded default, in minutes",
        description="Tune the embedded backbone with TeCoA, PMG-AFT, CAPT and APD, attack it, show a table.",
    )
    p.add_argument("--out", default="runs/demo", metavar="DIR", help="folder to write (default runs/demo)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="seed of shots and prompts (default 0)")
    p.add_argument("--json", action="store_true", help="print the rows as JSON")
    p.set_defaults(verb="demo")


def _completion(verbs: Any) -> None:
    p = verbs.add_parser(
        "completion",
        help="the script that completes commands in your shell",
        description="Print a script that completes verbs, options and names. Load it in each new shell:",
        epilog=COMPLETION,
    )
    p.add_argument("shell", choices=("bash", "zsh", "fish"), help="yours")
    p.set_defaults(verb="completion")
