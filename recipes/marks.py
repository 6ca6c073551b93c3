"""What the pages made from rows share: the text between two marks of a page written anew, and tables in Markdown."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from advtune.report.table import group_by
from advtune.results import write_atomic


def renew(page: Path, kinds: Mapping[str, Callable[..., str]], check: bool) -> None:
    """Write anew what follows each line `<!-- KIND WORD ... -->` of a page, to `<!-- end -->`: what the kind makes of
    the words. check: write nothing; exit with a message when something else stands there."""
    mark = re.compile(rf"(<!-- ({'|'.join(kinds)})((?: [^ >]+)*) -->\n).*?(<!-- end -->)", re.DOTALL)
    old = page.read_text()
    new = mark.sub(lambda found: f"{found[1]}\n{kinds[found[2]](*found[3].split())}\n\n{found[4]}", old)
    if not check:
        write_atomic(page, new)
    elif new != old:
        sys.exit(f"{page} is not what the rows give; run: python {sys.argv[0]}")


def markdown(cells: list[list[str]], words: int) -> str:
    """Rows of text, the first of them the head, as a table; after so many columns of words come numbers."""
    rule = ["---"] * words + ["---:"] * (len(cells[0]) - words)
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], rule, *cells[1:]])


def points(numbers: Mapping[str, Any]) -> str:
    """A difference of fractions in points, with its interval."""
    low, high = 100 * numbers["low"], 100 * numbers["high"]
    return f"{100 * numbers['difference']:+.1f} \\[{low:.1f}, {high:.1f}\\]"


def by(items: Sequence[Any], *keys: str | Callable[[Any], Any]) -> list[tuple[tuple[Any, ...], list[Any]]]:
    """Items in groups of equal keys, a key being a function or a name in a line."""
    found = group_by(items, lambda item: tuple(item[key] if isinstance(key, str) else key(item) for key in keys))
    return list(found.items())
