"""argparse whose errors are one line that says what may have been meant. Imports nothing heavy."""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from advtune.errors import near, suggest

MISSING = "the following arguments are required: "  # how argparse begins


def parse(parser: Parser, given: Sequence[str]) -> argparse.Namespace:
    """The arguments as argparse has them; a misspelt --option is named first, before what is missing through it."""
    verb = parser.verbs().get(given[0]) if given else None
    for text in given[1:] if verb else ():
        name = text.partition("=")[0]
        if text == "--":
            break
        if verb and text.startswith("--") and " " not in text and not verb.has(name):
            verb.error(f"no option {name}; {meant(verb, name)}".rstrip("; "))
    if not verb and given and given[0].startswith("--") and not parser.has(given[0]):
        parser.error(f"no option {given[0]} before the verb; write advtune VERB {given[0]}")
    args, beyond = parser.parse_known_args(given)
    if beyond:
        (verb or parser).error(f"nothing takes {' '.join(beyond)}")
    return args


def meant(verb: Parser, name: str) -> str:
    """What an --option that is not there may have been: another, or a field that goes behind -o or -a."""
    word = name.lstrip("-")
    key = word.replace("-", "_")
    for flag, fields in verb.fields().items():
        if key in fields:
            return f"write {flag} {fields[key]}={'1/255' if key == 'eps' else 'VALUE'}"
    hint = suggest(word, [flag.lstrip("-") for flag in verb.flags()])
    return hint.replace("mean ", "mean --")


class Help(argparse.HelpFormatter):
    """Sentences as wide as the terminal; lines that are indented stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for kept, group in itertools.groupby(text.splitlines(), lambda line: not line or line[0] == " "):
            part = list(group)
            lines += part if kept else textwrap.wrap(" ".join(part), width, break_on_hyphens=False)
        return "\n".join(indent + line for line in lines)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that keeps its arguments in sight, for hints and for shell completion. `example`: a command
    to copy, told when something is missing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments: list[argparse.Action] = []
        self.example = ""
        super().__init__(*args, **{"formatter_class": Help, **kwargs})

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

    def fields(self) -> dict[str, dict[str, str]]:
        """What -o and -a take, by flag, where there are such flags; `attack` is the training attack's `name`."""
        flags = {flag for each in self.arguments for flag in each.option_strings}
        if "-a" not in flags:
            return {}
        from advtune.attacks import ATTACKS, TRAINING
        from advtune.edits import TEXTUAL
        from advtune.methods import METHODS
        from advtune.options import describe

        attacks = (TRAINING if "-o" in flags else ATTACKS | TEXTUAL).values()
        of = {"-o": [part for kind in METHODS.values() for part in (kind.recipe, kind)], "-a": attacks}
        found = {
            flag: {each["name"]: each["name"] for thing in things for each in describe(thing)}
            for flag, things in of.items()
            if flag in flags
        }
        found["-a"] |= {"attack": "name"} if "-o" in flags else {}
        return found

    def error(self, message: str) -> NoReturn:
        """One line, and out with 2."""
        if message.startswith(MISSING):
            message = self._missing(message.removeprefix(MISSING).split(", "))
        end = "" if message.endswith("?") else ";"
        self.exit(2, f"{self.prog}: error: {message}{end} see: {self.prog} --help\n")

    def _missing(self, names: list[str]) -> str:
        choices = {each.dest: each.choices for each in self.arguments if each.choices and not each.option_strings}
        said = [f"one of {', '.join(map(str, choices[name]))}" if name in choices else name for name in names]
        example = f"; for example: {self.example}" if self.example else ""
        return f"missing: {', '.join(said)}{example}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = f"{action.option_strings[0]}: " if action.option_strings else ""
            noun = f"{action.metavar.lower()} " if isinstance(action.metavar, str) and not what else ""
            self.error(f"{what}unknown {noun}{value!r}; {near(value, map(str, action.choices))}")
