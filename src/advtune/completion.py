"""Scripts that complete `advtune` in bash, zsh and fish, made by shtab from the parser and the registries."""

from __future__ import annotations

from typing import Any

from advtune.arguments import build
from advtune.errors import UserError

PLACES = ("out", "tensorboard", "source", "dirs", "first", "second", "tuned", "images", "csv", "figures", "classes")
EITHER = ("model", "backbone", "study")  # a name, or a file or folder


def script(shell: str) -> str:
    """The script for "bash", "zsh" or "fish": verbs, options, and every name known to this version.

    Raises UserError when shtab is missing.
    """
    try:
        import shtab
    except ImportError:
        raise UserError("completion needs its package: pip install 'advtune[completion]'") from None
    parser, known = build(), names()
    for name, verb in parser.verbs().items():
        for each in verb.arguments:
            words = ["zero-shot"] if (name, each.dest) == ("evaluate", "model") else known.get(each.dest, [])
            if each.dest in PLACES:
                each.complete = shtab.FILE  # type: ignore[attr-defined]
            elif each.dest in EITHER:
                each.complete = either(f"{name}_{each.dest}", words)  # type: ignore[attr-defined]
            elif words and not each.choices:
                each.choices = words
    return str(shtab.complete(parser, shell))


def either(name: str, words: list[str]) -> dict[str, Any]:
    """What shtab takes for an argument that is one of some words, or a path."""
    known, call = " ".join(words), f"_advtune_{name}_or_file"
    bash = f'{call}() {{ compgen -W "{known}" -- "$1"; compgen -f -- "$1"; }}'
    zsh = f"{call}() {{ _alternative 'names:name:({known})' 'files:file:_files'; }}"
    fish = f"{known} (__fish_complete_path (commandline -ct))"
    return {"bash": call, "zsh": call, "fish": fish, "preamble": {"bash": bash, "zsh": zsh}}


def names() -> dict[str, list[str]]:
    """The names that an argument takes, by its `dest`."""
    from advtune.attacks import ATTACKS
    from advtune.data.catalog import names as sets
    from advtune.defences import DEFENCES
    from advtune.edits import TEXTUAL
    from advtune.listing import HUB_BACKBONES
    from advtune.methods import METHODS
    from advtune.protocols import PROTOCOLS
    from advtune.report.published import papers

    backbones = ["mini", *HUB_BACKBONES]
    tuned = [name for name in METHODS if name != "zero-shot"]
    return {
        "method": tuned, "fix": tuned, "methods": list(METHODS), "study": list(PROTOCOLS), "data": list(sets()),
        "train_on": list(sets()), "attack": [*ATTACKS, *TEXTUAL, "none"], "defence": list(DEFENCES),
        "backbone": backbones, "model": backbones, "against": list(papers()),
    }  # fmt: skip
