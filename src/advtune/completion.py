"""Scripts that complete `advtune` in bash, zsh and fish, made by shtab from the parser and the registries."""

from __future__ import annotations

from advtune.arguments import build
from advtune.errors import UserError

PLACES = ("out", "tensorboard", "source", "dirs", "first", "second", "model")  # folders, or files in them


def script(shell: str) -> str:
    """The script for "bash", "zsh" or "fish": verbs, options, and every name known to this version.

    Raises UserError when shtab is missing.
    """
    try:
        import shtab
    except ImportError:
        raise UserError("completion needs its package: pip install 'advtune[completion]'") from None
    parser, known = build(), names()
    for verb in parser.verbs().values():
        for each in verb.arguments:
            if each.dest in known and not each.choices:
                each.choices = known[each.dest]
            if each.dest in PLACES:
                each.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell))


def names() -> dict[str, list[str]]:
    """The names that an argument takes, by its `dest`."""
    from advtune.attacks import ATTACKS
    from advtune.data.catalog import names as sets
    from advtune.defences import DEFENCES
    from advtune.listing import HUB_BACKBONES
    from advtune.methods import METHODS
    from advtune.protocols import PROTOCOLS
    from advtune.report.published import papers

    tuned = [name for name in METHODS if name != "zero-shot"]
    return {
        "method": tuned, "fix": tuned, "methods": list(METHODS), "study": list(PROTOCOLS), "data": list(sets()),
        "train_on": list(sets()), "attack": [*ATTACKS, "none"], "defence": list(DEFENCES),
        "backbone": ["mini", *HUB_BACKBONES], "against": list(papers()),
    }  # fmt: skip
