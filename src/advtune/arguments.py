"""The command line's arguments, with the help that teaches them. Imports nothing heavy."""

from __future__ import annotations

import textwrap
from typing import Any

import advtune
from advtune import after
from advtune.engines import flags as engines
from advtune.examples import AUDIT, DESCRIPTION, EPILOG, EXAMPLES, STUDY
from advtune.flags import BACKBONE_HELP, DATA_HELP, SIZE_HELP, TEMPLATE_HELP, machine, shared
from advtune.parsing import Parser


def build() -> Parser:
    """The parser; `args.verb` names the verb."""
    parser = Parser(prog="advtune", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"advtune {advtune.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _train(verbs)
    _evaluate(verbs)
    _audit(verbs)
    _study(verbs)
    after.report(verbs)
    after.compare(verbs)
    after.interpolate(verbs)
    after.predict(verbs)
    after.export(verbs)
    after.serve(verbs)
    after.known(verbs)
    after.demo(verbs)
    after.completion(verbs)
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
    shared(p, "train", "training attack's field: -a eps=4/255 -a steps=3; another attack: -a name=n-fgsm, name=free")
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
    shared(p, "test", "attack's field: -a eps=1/255 -a steps=100; several eps make a curve: -a eps=0,1/255,4/255")
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
    shared(p, "test", "with --fix: training attack's field: -a eps=2/255", limit=200)
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
    machine(p)
    engines.add(p)
    p.set_defaults(verb="study")
