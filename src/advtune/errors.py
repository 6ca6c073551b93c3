"""The one exception that is the user's to mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A bad input. The message is one line that says what is wrong and what to do; the CLI exits with 2."""


def near(word: object, known: Iterable[str]) -> str:
    """A hint at what may have been meant, with what there is."""
    names = list(known)
    close = difflib.get_close_matches(str(word), names, n=1)
    return (f"did you mean {close[0]}? " if close else "") + f"known: {', '.join(names)}"
