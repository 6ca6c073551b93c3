"""Flags that several verbs have."""

from __future__ import annotations

import argparse

DATA_HELP = "a name from `advtune list data`, folder:PATH, parquet:PATH, csv:PATH or hf:OWNER/NAME[:CONFIG]"
BACKBONE_HELP = (
    "mini, a folder (Hugging Face CLIP or SigLIP, open_clip), OpenAI's .pt, a hub id (openai/clip-vit-base-patch32, "
    "hf-hub:ID), with +FILE another image tower; or a run folder, to tune on top of an already robust tower"
)
TEMPLATE_HELP = "text template with one {{}} (default: {}); several, a .txt or `ensemble`: averaged"
SIZE_HELP = "side of the backbone's images: positions interpolated"


def images(text: str) -> int | None:
    """A number of images, or none for `all`."""
    try:
        return None if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of images nor all") from None


def machine(p: argparse.ArgumentParser, compile: bool = True) -> None:
    p.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 (default: auto)")
    p.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of the towers")
    p.add_argument("--deterministic", action="store_true", help="the same bits every time, on a GPU, too; slower")
    if compile:
        p.add_argument("--compile", action="store_true",
                       help="image tower through torch.compile, worth its minute in long runs")  # fmt: skip


def shared(p: argparse.ArgumentParser, part: str, attack_help: str, limit: int | None = None) -> None:
    """What train, evaluate and audit take: a backbone, the data, which part of it, an attack, the machine."""
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
    machine(p)
