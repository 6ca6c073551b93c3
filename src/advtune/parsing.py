"""argparse whose errors are one line that says what may have been meant. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from advtune.errors import near, suggest


def parse(parser: Parser, given: Sequence[str]) -> argparse.Namespace:
    """The arguments as argparse has them; a misspelt --option is named first, before what is missing through it."""
    verb = parser.verbs().get(given[0]) if given else None
    for text in given[1:] if verb else ():
        name = text.partition("=")[0]
        if text == "--":
            break
        if verb and text.startswith("--") and " " not in text and not verb.has(name):
            verb.error(f"no option {name}; {suggest(name, verb.flags())}".rstrip("; "))
    return parser.parse_args(given)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that keeps its arguments in sight, for hints and for shell completion."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments: list[argparse.Action] = []
        super().__init__(*args, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        self.arguments.append(action)
        return action

    def add_subparsers(self, **kwargs: Any) -> Any:
        action = super().add_subparsers(**kwargs)
        self.arguments.append(action)
        return action

    def verbs(self) -> dict[str, Parser]:
        """The parsers of the verbs, by name."""
        found = [each.choices for each in self.arguments if isinstance(each.choices, dict)]
        return found[0] if found else {}

    def flags(self) -> list[str]:
        """Every --option."""
        return [flag for each in self.arguments for flag in each.option_strings if flag.startswith("--")]

    def has(self, name: str) -> bool:
        """Whether it is an option, or the beginning of one."""
        return any(flag.startswith(name) for flag in self.flags())

    def error(self, message: str) -> NoReturn:
        """One line, and out with 2."""
        end = "" if message.endswith("?") else ";"
        self.exit(2, f"{self.prog}: error: {message}{end} see: {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = f"{action.option_strings[0]}: " if action.option_strings else ""
            noun = f"{action.metavar.lower()} " if isinstance(action.metavar, str) and not what else ""
            self.error(f"{what}unknown {noun}{value!r}; {near(value, map(str, action.choices))}")
