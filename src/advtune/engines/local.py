"""A study in this process, one run after the other; models and images are loaded once for all of them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advtune.grid import Bench, Report
    from advtune.protocols import Run


@dataclass(frozen=True)
class Local:
    """What `advtune study` does where nothing else is asked for."""

    def __call__(self, todo: Mapping[int, Run], bench: Bench) -> Generator[Report, None, None]:
        from advtune.grid import in_turn

        return in_turn(todo, bench)
