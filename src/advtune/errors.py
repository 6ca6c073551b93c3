"""The one exception that is the user's to mend, and what they may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from advtune.untrusted import visible

LONGEST = 1200  # letters of a message


def suggest(word: object, known: Iterable[str], n: int = 1) -> str:
    """`did you mean tecoa?` for a word that is close to one of those known (or to up to n), else nothing.

    Case and `_` for `-` are no difference.
    """
    names = {_folded(name): name for name in known}
    close = difflib.get_close_matches(_folded(str(word)), names, n=n)
    return f"did you mean {' or '.join(names[each] for each in close)}?" if close else ""


def near(word: object, known: Iterable[str]) -> str:
    """A hint at what may have been meant, with what there is."""
    names = list(dict.fromkeys(known))
    return f"{suggest(word, names)} known: {', '.join(names) or 'none'}".strip()


def _folded(name: str) -> str:
    return name.casefold().replace("_", "-")


class UserError(ValueError):
    """A bad input. The message is one line that says what is wrong and what to do; the CLI exits with 2.

    It may quote what a stranger wrote: control characters are written out, and the middle of a long one is left out.
    """

    def __init__(self, message: object) -> None:
        text = visible(str(message))
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}")
