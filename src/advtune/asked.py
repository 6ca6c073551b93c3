"""What a verb's flags ask for: attacks, a model, a task. torch is imported inside a function."""

from __future__ import annotations

import argparse
from typing import Any

from advtune import distributed
from advtune.errors import UserError, near


def attacks(args: argparse.Namespace) -> list[Any]:
    """The attack asked for; of several eps, one for each, ascending."""
    from advtune.attacks import ATTACKS, check_measures
    from advtune.edits import TEXTUAL
    from advtune.options import fill

    if args.attack in (None, "none"):
        for flag, given in (("-a", args.attack_options), ("--source", args.source), ("--checks", args.checks)):
            if given:
                raise UserError(f"{flag} goes with an attack; name it with --attack pgd")
        return [None]
    if args.attack == "transfer":
        raise UserError("transfer: name the attack, and with --source DIR the model to make the images on")
    check_measures(args.attack)
    known = ATTACKS | TEXTUAL
    if args.attack not in known:
        raise UserError(f"unknown attack {args.attack!r}; {near(args.attack, known)}")
    rest = [option for option in args.attack_options if not option.replace(" ", "").startswith("eps=")]
    given = [option.partition("=")[2].split(",") for option in args.attack_options if option not in rest]
    if len(given) != 1 or len(given[0]) == 1:
        return [fill(known[args.attack], args.attack_options, f"attack {args.attack}")]
    found = [fill(known[args.attack], [*rest, f"eps={eps}"], f"attack {args.attack}") for eps in given[0]]
    if len({attack.eps for attack in found}) < len(found):
        raise UserError(f"attack {args.attack}: eps={','.join(given[0])} names a radius twice")
    return sorted(found, key=lambda attack: attack.eps)


def opened(args: argparse.Namespace, name: str) -> tuple[Any, Any, dict[str, Any]]:
    """The model, the task and the keyword arguments that tune and evaluate share."""
    from advtune import runs
    from advtune.data.templates import read_templates
    from advtune.evaluation import task_for

    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: at least 1 image is needed")
    resolution = args.resolution
    if resolution not in (None, "native"):
        if not resolution.isdecimal() or int(resolution) < 1:
            raise UserError(f"--resolution {resolution!r} is neither a number of pixels nor native")
        resolution = int(resolution)
    name += "" if args.image_size is None else f"@{args.image_size}"
    with distributed.in_turn():
        model = runs.load(name, args.device, args.precision, args.compile)
        task = task_for(model, args.data, args.classes, read_templates(args.template), args.subset)
    return model, task, dict(part=args.part, limit=args.limit, resolution=resolution, on_bad=args.on_bad_image)
