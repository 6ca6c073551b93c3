"""`key=value` into a field of a frozen dataclass, typed and checked; `4/255` is a float."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, Union

from advtune.errors import UserError, near, suggest

T = TypeVar("T")

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
FLOAT = re.compile(rf"({NUMBER})(?:\s*/\s*({NUMBER}))?", re.ASCII)
INT = re.compile(r"[+-]?\d+", re.ASCII)
BOOLS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
LONGEST = 100  # letters of a number; Python and a regular expression take long over more
EXAMPLES = {int: "3", float: "0.5", bool: "true", str: "word"}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] = (),
    reconstructed: bool = False,
    pixel: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field that the command line can set.

    `choices`: the only values allowed (for a tuple: of each item). `reconstructed`: no public source gives
    this value; it is our choice. `pixel`: a distance in pixels of [0, 1], so it lies in [0, 1).
    `low`, `high`: the least and the greatest number allowed.
    """
    facts = {"help": help, "choices": tuple(choices), "reconstructed": reconstructed}
    facts |= {"pixel": pixel, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=facts)


def fill(instance: T, given: Iterable[str] | Mapping[str, Any], what: str) -> T:
    """`instance` with the fields in `given` replaced: texts `key=value`, or a mapping of texts or values.

    `what` names it in errors ("method capt"). Raises UserError for an unknown or repeated key, a missing
    "=", a value of the wrong type or outside its choices.
    """
    return fill_many([instance], given, what)[0]


def fill_many(instances: Sequence[Any], given: Iterable[str] | Mapping[str, Any], what: str) -> list[Any]:
    """`fill` over several dataclasses: each key goes to the first that has it."""
    changes: list[dict[str, Any]] = [{} for _ in instances]
    for key, value in pairs(given, what).items():
        place = next((i for i, each in enumerate(instances) if key in _fields(each)), None)
        if place is None:
            raise UserError(_unknown(key, [name for each in instances for name in _fields(each)], what))
        changes[place][key] = _value(instances[place], key, value, what)
    filled = []
    for each, change in zip(instances, changes, strict=True):
        try:
            filled.append(dataclasses.replace(each, **change))
        except UserError:
            raise
        except ValueError as error:  # raised by a __post_init__: the values do not go together
            raise UserError(f"{what}: {error}") from error
    return filled


def check(instance: Any, what: str) -> None:
    """Raises UserError when a field of an instance built in Python breaks the rules of `fill`.

    A dataclass calls it in `__post_init__` so that `PGD(eps=4)` fails like `eps=4`.
    """
    for name in _fields(instance):
        value = getattr(instance, name)
        if not isinstance(value, str):  # a text is already what it should be, never something to parse
            _value(instance, name, value, what)
        elif _kinds(instance, name)[0] is not str:
            raise UserError(_wrong(f"{what}: {name}", value, _hint(instance, name)))
        else:
            _allowed(value, _fields(instance)[name].metadata, f"{what}: {name}")


def describe(cls_or_instance: Any) -> list[dict[str, Any]]:
    """The options as data: name, type, default (an instance's own value), help, choices, reconstructed."""
    rows = []
    for name, field in _fields(cls_or_instance).items():
        default = field.default
        if not isinstance(cls_or_instance, type):
            default = getattr(cls_or_instance, name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        rows.append(
            {
                "name": name,
                "type": _type_text(_hint(cls_or_instance, name)),
                "default": None if default is dataclasses.MISSING else _plain(default),
                "help": field.metadata.get("help", ""),
                "choices": list(field.metadata.get("choices", ())),
                "reconstructed": field.metadata.get("reconstructed", False),
            }
        )
    return rows


def as_options(instance: Any) -> dict[str, Any]:
    """The fields as JSON-ready values; a nested dataclass becomes a dict, a tuple a list."""
    return {name: _plain(getattr(instance, name)) for name in _fields(instance)}


def parse_float(text: str) -> float:
    """A finite number written `0.5`, `1e-3` or `4/255`; not nan, not inf. Raises ValueError."""
    found = FLOAT.fullmatch(text.strip()) if len(text) <= LONGEST else None
    if not found:
        raise ValueError(f"{_shown(text)} is not a number")
    below = float(found[2] or 1)
    value = float(found[1]) / below if below else math.inf
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return value


def parse_eps(text: str | float, what: str = "eps") -> float:
    """A distance between pixels of [0, 1], as a float in [0, 1): `4/255`, never `4`. Raises UserError."""
    return _pixel(_scalar(float, text, what), what)


def _pixel(value: float, name: str) -> float:
    if 0 <= value < 1:
        return value
    n = int(value) if value == int(value) and 0 < value < 255 else 4
    raise UserError(f"{name}={value:g} is not in [0, 1); pixels are floats in [0, 1]: write {n}/255")


def pairs(given: Iterable[str] | Mapping[str, Any], what: str) -> dict[str, Any]:
    """Texts `key=value`, or a mapping, as a dict. `what` names it in errors. Raises UserError for a text that is not
    one, and for a key given twice."""
    if isinstance(given, Mapping):
        return dict(given)
    found: dict[str, Any] = {}
    for pair in [given] if isinstance(given, str) or not isinstance(given, Iterable) else given:
        if not isinstance(pair, str):
            raise UserError(f"{what}: {_shown(pair)} is not an option; write key=value")
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key:
            raise UserError(f"{what}: {_shown(pair)} is not an option; write key=value")
        if key in found:
            raise UserError(f"{what}: {key} is given twice; give it once")
        found[key] = value
    return found


def _unknown(key: str, known: list[str], what: str) -> str:
    return f"{what}: no option {_shown(key)}; {near(key, known) if known else 'it has no options'}"


def _fields(thing: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(thing) if field.init}


def _hint(thing: Any, name: str) -> Any:
    return _hints(thing if isinstance(thing, type) else type(thing))[name]


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _kinds(thing: Any, name: str) -> tuple[Any, bool]:
    """The annotation without its `| None`, and whether None is allowed."""
    hint = _hint(thing, name)
    if typing.get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return (kinds[0] if len(kinds) == 1 else hint), len(kinds) < len(typing.get_args(hint))


def _value(thing: Any, name: str, value: Any, what: str) -> Any:
    kind, optional = _kinds(thing, name)
    field, label = _fields(thing)[name], f"{what}: {name}"
    if optional and (value is None or (isinstance(value, str) and value.strip().lower() == "none")):
        return None
    if typing.get_origin(kind) is tuple:
        parsed = items = _items(kind, value, label)
    elif kind in EXAMPLES:
        parsed = _scalar(kind, value, label)
        items = (parsed,)
    elif isinstance(value, str) or value is None or (isinstance(kind, type) and _foreign(kind, value)):
        raise UserError(f"{label} takes a {_type_text(kind)}, which is set in Python, not {_shown(value)}")
    else:
        return value
    for item in items:
        _allowed(item, field.metadata, label)
    return parsed


def _foreign(kind: type, value: Any) -> bool:
    """A Protocol cannot be asked with isinstance unless it says so; it is left to the type checker."""
    return not getattr(kind, "_is_protocol", False) and not isinstance(value, kind)


def _allowed(item: Any, facts: Mapping[str, Any], label: str) -> None:
    """Raises UserError for an item outside its field's choices, bounds or the range of pixels."""
    choices, low, high = (facts.get(key) for key in ("choices", "low", "high"))
    if choices and item not in choices:
        listed = list(map(str, choices))
        text = f"{label}={_shown(item)} is not one of {', '.join(listed)}; {suggest(item, listed)}"
        raise UserError(text.rstrip("; "))
    if facts.get("pixel"):
        _pixel(item, label)
    if low is not None and item < low:
        raise UserError(f"{label}={item} is too low; write {low:g} or more")
    if high is not None and item > high:
        raise UserError(f"{label}={item} is too high; write {high:g} or less")


def _items(kind: Any, value: Any, label: str) -> tuple[Any, ...]:
    """A tuple from `a,b` or a list; `tuple[X, ...]` has any length, `tuple[X, Y]` has two items."""
    kinds = typing.get_args(kind)
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")] if value.strip() else []
    open_ended = len(kinds) == 2 and kinds[1] is Ellipsis
    if not isinstance(value, (list, tuple)) or (not open_ended and len(value) != len(kinds)):
        raise UserError(_wrong(label, value, kind))
    wanted = [kinds[0]] * len(value) if open_ended else list(kinds)
    if any(item == "" for item in value):
        raise UserError(_wrong(label, ",".join(map(str, value)), kind))
    return tuple(_scalar(each, item, label) for each, item in zip(wanted, value, strict=True))


def _scalar(kind: type, value: Any, label: str) -> Any:
    if kind is str and isinstance(value, str):
        return value
    if isinstance(value, str):
        text = value.strip()
        if kind is bool and text.lower() in BOOLS:
            return BOOLS[text.lower()]
        if kind is int and len(text) <= LONGEST and INT.fullmatch(text):
            return int(text)
        if kind is float:
            try:
                return parse_float(text)
            except ValueError:
                raise UserError(_wrong(label, value, kind)) from None
    elif isinstance(value, bool) or kind is bool:  # a bool is an int to Python; here it is neither
        if isinstance(value, bool) and kind is bool:
            return value
    elif kind is int and isinstance(value, int):
        return value
    elif kind is float and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max:  # not nan
        return float(value)
    raise UserError(_wrong(label, value, kind))


def _wrong(label: str, value: Any, kind: Any) -> str:
    example = ",".join(EXAMPLES.get(k, EXAMPLES[str]) for k in _item_kinds(kind))
    article = "an" if _type_text(kind)[0] in "aeiou" else "a"
    return f"{label}={_shown(value)} is not {article} {_type_text(kind)}; write for example {example}"


def _item_kinds(kind: Any) -> list[Any]:
    args = [arg for arg in typing.get_args(kind) if arg is not type(None)]
    if typing.get_origin(kind) is tuple:
        return [args[0], args[0]] if args[-1] is Ellipsis else args
    return _item_kinds(args[0]) if args else [kind]


def _type_text(kind: Any) -> str:
    if isinstance(kind, type) and not typing.get_args(kind):
        return "None" if kind is type(None) else kind.__name__
    return str(kind).replace("typing.", "")


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) or not value.isprintable() or not value else value
    return text if len(text) <= 60 else text[:57] + "..."


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_options(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
