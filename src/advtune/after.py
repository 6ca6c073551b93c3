"""The arguments of the verbs that come after tuning: what is made of runs and their rows."""

from __future__ import annotations

import argparse
from typing import Any

from advtune.examples import COMPLETION, EXPORT
from advtune.flags import BACKBONE_HELP, DATA_HELP, TEMPLATE_HELP, machine


def report(verbs: Any) -> None:
    """`advtune report`."""
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


def compare(verbs: Any) -> None:
    """`advtune compare`."""
    p = verbs.add_parser(
        "compare",
        help="two methods on the same images: is the difference real?",
        description="McNemar's exact test and a bootstrap interval of the difference, on the images that both saw.",
    )
    for side in ("first", "second"):
        p.add_argument(side, metavar="DIR", help=f"run folder, folder of one method's seeds, or results.jsonl ({side})")
    p.add_argument("--json", action="store_true", help="print the comparisons as JSON")
    p.set_defaults(verb="compare")


def interpolate(verbs: Any) -> None:
    """`advtune interpolate`."""
    p = verbs.add_parser(
        "interpolate",
        help="between the original image tower and a tuned one: the trade-off",
        description="New runs between the image tower that a run began with (share 0) and the one it ended with (share "
        "1), without tuning: as a rule more clean accuracy for less robustness. Measure each as any other run.",
    )
    p.add_argument("tuned", metavar="DIR", help="a run folder of a method that tunes the image tower")
    p.add_argument("--share", required=True, nargs="+", metavar="S", help="how far to go, between 0 and 1: 0.25 0.5")
    p.add_argument("--out", required=True, metavar="DIR", help="run folder to write; of several shares, a folder each")
    p.add_argument("--overwrite", action="store_true", help="replace an existing DIR")
    p.add_argument("--json", action="store_true", help="print the new runs as JSON")
    p.set_defaults(verb="interpolate")


def predict(verbs: Any) -> None:
    """`advtune predict`."""
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
    machine(p, compile=False)
    p.set_defaults(verb="predict")


def export(verbs: Any) -> None:
    """`advtune export`."""
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


def serve(verbs: Any) -> None:
    """`advtune serve`."""
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


def known(verbs: Any) -> None:
    """`advtune list` and `advtune backbone`."""
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


def demo(verbs: Any) -> None:
    """`advtune demo`."""
    p = verbs.add_parser(
        "demo",
        help="four methods on the embedded default, in minutes",
        description="Tune the embedded backbone with TeCoA, PMG-AFT, CAPT and APD, attack it, show a table.",
    )
    p.add_argument("--out", default="runs/demo", metavar="DIR", help="folder to write (default runs/demo)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="seed of shots and prompts (default 0)")
    p.add_argument("--json", action="store_true", help="print the rows as JSON")
    p.set_defaults(verb="demo")


def completion(verbs: Any) -> None:
    """`advtune completion`."""
    p = verbs.add_parser(
        "completion",
        help="the script that completes commands in your shell",
        description="Print a script that completes verbs, options and names. Load it in each new shell:",
        epilog=COMPLETION,
    )
    p.add_argument("shell", choices=("bash", "zsh", "fish"), help="yours")
    p.set_defaults(verb="completion")
