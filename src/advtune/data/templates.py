"""Templates around a class name: one, or several whose texts are averaged, as one text with bars between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from advtune.errors import UserError
from advtune.untrusted import read_bytes

BETWEEN = " | "
NAME = "ensemble"
ENSEMBLE = (
    "a photo of a {}.",
    "a close photo of one {}.",
    "a {} seen from far away.",
    "a dim, grainy photo of a {}.",
    "a sharp, bright photo of a {}.",
    "part of a {}.",
    "a drawing of a {}.",
)


def parts(template: str) -> list[str]:
    """The templates of a text, each with one {}: that itself, or what stands between its bars."""
    found = template.split(BETWEEN)
    return found if all(each.count("{}") == 1 for each in found) else [template]


def filled(classes: Sequence[str], template: str) -> list[str]:
    """The texts of all classes, template by template."""
    return [each.replace("{}", name) for each in parts(template) for name in classes]


def check_template(template: str) -> None:
    """Raises UserError unless every template of a text holds {} once and no other brace."""
    for each in parts(template):
        if each.count("{}") != 1 or set("{}") & set(each.replace("{}", "")):
            raise UserError(f"the template {each!r} must hold exactly one {{}} and no other brace")


def read_templates(given: Sequence[str] | None) -> str | None:
    """What --template was given as one text: templates, text files (.txt) with one a line, or `ensemble`.

    Raises UserError for a file that cannot be read or has none, and for one template twice.
    """
    if not given:
        return None
    found: list[str] = []
    for each in given:
        if each == NAME:
            found += ENSEMBLE
        elif each.endswith(".txt") and "{}" not in each:
            found += _lines(Path(each))
        else:
            found += parts(each)
    if twice := next((each for each in found if found.count(each) > 1), None):
        raise UserError(f"the template {twice[:60]!r} is given twice; leave one out")
    if odd := next((each for each in found if len(found) > 1 and each.count("{}") != 1), None):
        raise UserError(f"the template {odd[:60]!r} must hold exactly one {{}}")
    return BETWEEN.join(found)


def listed(given: Sequence[str]) -> tuple[str, ...]:
    """What --template was given, template by template. Raises UserError as `read_templates` and `check_template`."""
    text = read_templates(given)
    if text is None:
        return ()
    check_template(text)
    return tuple(parts(text))


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in read_bytes(file).decode().splitlines()]
    except OSError as error:
        raise UserError(f"--template: cannot read {file}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"--template: {file} is no text file; write one template a line") from None
    found = [line for line in lines if line]
    if wrong := next((line for line in found if line.count("{}") != 1 or BETWEEN in line), None):
        raise UserError(f"--template: {file}: the line {wrong[:60]!r} must hold exactly one {{}}, and no bar")
    if not found:
        raise UserError(f"--template: {file} has no template; write one a line, each with one {{}}")
    return found
