"""`key=value` into fields: every parser rule, and that an error says what to do in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from advtune.errors import UserError
from advtune.options import as_options, check, describe, fill, fill_many, option, parse_eps, parse_float


@dataclass(frozen=True)
class Inner:
    scale: float = option(2.0, "inner scale")


@dataclass(frozen=True)
class Settings:
    eps: float = option(1 / 255, "radius", pixel=True)
    step_size: float | None = option(None, "step", pixel=True)
    steps: int = option(10, "steps", low=1, high=1000)
    weight: float = option(1.0, "weight", reconstructed=True)
    fast: bool = option(False, "fast")
    keep: str = option("best", "what is kept", choices=("best", "last"))
    name: str | None = option(None, "a name")
    scales: tuple[float, ...] = option((1.0,), "scales")
    pair: tuple[int, str] = option((1, "a"), "two things")
    plain: int = 7
    inner: Inner = option(Inner(), "nested")  # noqa: RUF009
    derived: int = field(default=0, init=False)


@dataclass(frozen=True)
class Recipe:
    lr: float = option(0.1, "learning rate")
    steps: int = option(5, "recipe steps")

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError("lr must not be negative")


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("eps=4/255", 4 / 255),
        ("eps=0", 0.0),
        ("eps=0.5", 0.5),
        ("step_size=none", None),
        ("step_size=1/255", 1 / 255),
        ("steps=20", 20),
        ("weight=1e-3", 1e-3),
        ("weight=-2.5", -2.5),
        ("weight=.5", 0.5),
        ("weight= 1 / 4 ", 0.25),
        ("weight=3", 3.0),
        *[(f"fast={text}", True) for text in ("true", "yes", "on", "1", "True")],
        *[(f"fast={text}", False) for text in ("false", "no", "off", "0", "NO")],
        ("keep=last", "last"),
        ("name=a=b", "a=b"),
        ("name=None", None),
        ("name=", ""),
        ("scales=1,1/2, 0.25", (1.0, 0.5, 0.25)),
        ("scales=", ()),
        ("pair=2,b", (2, "b")),
        ("plain=8", 8),
    ],
)
def test_texts(pair: str, value: object) -> None:
    found = getattr(fill(Settings(), [pair], "attack s"), pair.partition("=")[0])
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("eps=4", "write 4/255"),
        ("eps=1", "write 1/255"),
        ("eps=8.0", "write 8/255"),
        ("eps=255/255", "[0, 1)"),
        ("eps=-1/255", "write 4/255"),
        ("step_size=2", "write 2/255"),
        ("steps=0", "write 1 or more"),
        ("steps=1001", "write 1000 or less"),
        ("steps=2.0", "is not an int; write for example 3"),
        ("steps=4/2", "is not an int"),
        ("weight=heavy", "is not a float; write for example 0.5"),
        ("weight=nan", "is not a float"),
        ("weight=inf", "is not a float"),
        ("weight=1e999", "is not a float"),
        ("weight=1/0", "is not a float"),
        ("weight=1/2/3", "is not a float"),
        ("weight=1_0", "is not a float"),
        ("weight=none", "is not a float"),
        ("weight=", "is not a float"),
        ("fast=maybe", "is not a bool; write for example true"),
        ("keep=first", "is not one of best, last"),
        ("scales=1,,2", "write for example 0.5,0.5"),
        ("scales=1,x", "is not a float"),
        ("pair=1", "write for example 3,word"),
        ("pair=1,b,c", "write for example 3,word"),
        ("inner=3", "set in Python"),
        ("wieght=1", "did you mean weight? known: eps, step_size, steps,"),
        ("step-size=1/255", "did you mean step_size?"),
        ("derived=1", "no option derived"),
        ("steps", "write key=value"),
        ("=3", "write key=value"),
        ("steps\n=x\ny", "write"),
    ],
)
def test_bad_texts(pair: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        fill(Settings(), [pair], "attack s")
    message = str(caught.value)
    assert says in message and message.startswith("attack s: ") and "\n" not in message


def test_repeated_key() -> None:
    with pytest.raises(UserError, match="steps is given twice"):
        fill(Settings(), ["steps=1", "steps=1"], "attack s")


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("eps", 4 / 255, 4 / 255),
        ("eps", "4/255", 4 / 255),
        ("weight", 2, 2.0),
        ("fast", True, True),
        ("step_size", None, None),
        ("scales", [1, 0.5], (1.0, 0.5)),
        ("inner", Inner(3.0), Inner(3.0)),
    ],
)
def test_values(key: str, value: object, kept: object) -> None:
    found = getattr(fill(Settings(), {key: value}, "s"), key)
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eps", 4),
        ("eps", 1.0),
        ("eps", True),
        ("eps", float("nan")),
        ("weight", float("inf")),
        ("weight", None),
        ("steps", 3.0),
        ("steps", True),
        ("steps", 0),
        ("fast", 1),
        ("keep", "first"),
        ("keep", 3),
        ("scales", 1.0),
        ("scales", [float("nan")]),
        ("inner", 3),
    ],
)
def test_bad_values(key: str, value: object) -> None:
    with pytest.raises(UserError):
        fill(Settings(), {key: value}, "s")


def test_check_gives_the_same_rules_to_python() -> None:
    check(Settings(), "s")
    check(Settings(name="4"), "s")
    with pytest.raises(UserError, match=r"s: eps=4 .* write 4/255"):
        check(Settings(eps=4), "s")
    for bad in (Settings(keep="first"), Settings(steps="3"), Settings(steps=0)):  # type: ignore[arg-type]
        with pytest.raises(UserError):
            check(bad, "s")


def test_fill_leaves_the_original() -> None:
    before = Settings()
    assert fill(before, {}, "s") == before
    assert fill(before, ["steps=3"], "s") != before == Settings()


def test_fill_many_gives_a_key_to_the_first_that_has_it() -> None:
    settings, recipe = fill_many([Settings(), Recipe()], ["steps=3", "lr=0.5"], "method m")
    assert (settings.steps, recipe.steps, recipe.lr) == (3, 5, 0.5)
    with pytest.raises(UserError, match=r"did you mean lr\? known: eps, .*, inner, lr$"):
        fill_many([Settings(), Recipe()], ["lrr=1"], "method m")


def test_post_init_errors_are_the_users() -> None:
    with pytest.raises(UserError, match="recipe r: lr must not be negative"):
        fill(Recipe(), ["lr=-1"], "recipe r")


def test_describe_and_as_options() -> None:
    facts = {each["name"]: each for each in describe(Settings)}
    assert "derived" not in facts
    assert facts["weight"]["reconstructed"] and not facts["eps"]["reconstructed"]
    assert facts["step_size"]["type"] == "float | None" and facts["scales"]["type"] == "tuple[float, ...]"
    assert facts["keep"]["choices"] == ["best", "last"] and facts["keep"]["help"] == "what is kept"
    assert facts["plain"]["default"] == 7 and facts["plain"]["help"] == ""
    assert {each["name"]: each["default"] for each in describe(Settings(steps=3))}["steps"] == 3
    options = as_options(Settings())
    assert json.loads(json.dumps(options)) == options
    assert options["inner"] == {"scale": 2.0} and options["pair"] == [1, "a"]
    rest = {key: value for key, value in options.items() if key != "inner"}
    assert fill(Settings(), rest, "s") == Settings()


def test_parsers() -> None:
    assert parse_float("4/255") == 4 / 255 and parse_eps("8/255") == 8 / 255 and parse_eps(0) == 0
    for bad in (4, "4", "nan", "x", None, -0.1):
        with pytest.raises(UserError):
            parse_eps(bad)  # type: ignore[arg-type]


def test_importing_does_not_import_torch() -> None:
    code = (
        "import sys, advtune.options, advtune.results, advtune.report; "
        "print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]
