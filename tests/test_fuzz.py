"""No parser ends in a traceback: UserError in one line, or what its docstring names, whatever it is fed."""

import random
import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from advtune.errors import LONGEST, UserError
from fuzz import Parser, Told, changed, feed, fuzz, inputs, parsers

PLACE = tempfile.TemporaryDirectory(prefix="advtune-fuzz-")  # for as long as the tests run
PARSERS = parsers(Path(PLACE.name))
ALL = list(HealthCheck)
THEIRS = 50  # inputs of Hypothesis
TEXT = st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)


def made_for(parser):
    """Inputs of the kinds that a parser takes: whatever Hypothesis thinks of, and changes that it can make smaller."""
    kinds = {str: TEXT, bytes: st.binary(max_size=60)}
    wild = st.one_of(*{type(value): kinds.get(type(value), JSON) for value in parser.valid}.values())
    seeds, valid = st.integers(0, 2**32), st.sampled_from(parser.valid)
    return wild | st.builds(lambda seed, value: changed(random.Random(seed), value), seeds, valid)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_a_parser_refuses_in_one_line_or_takes(parser):
    told = Told()
    for value in inputs(parser, parser.quick, random.Random(parser.name)):
        feed(parser, value, told)
    assert not told.failures
    assert told.refused < told.inputs == parser.quick, "a parser that takes nothing is not tested"

    @settings(
        max_examples=min(THEIRS, parser.quick),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=ALL,
    )
    @given(made_for(parser))
    def one(value):
        feed(parser, value, told)
        assert not told.failures

    one()
    assert told.inputs >= parser.quick + min(THEIRS, parser.quick)


@pytest.mark.slow
def test_a_hundred_thousand_inputs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = fuzz()
    assert {name: each.failures[:3] for name, each in told.items() if each.failures} == {}
    assert {parser.name: parser.count for parser in PARSERS} == {name: each.inputs for name, each in told.items()}
    assert sum(each.inputs for each in told.values()) >= 100_000
    assert len(told) >= 25


def test_what_goes_wrong_is_seen():
    def broken(value):
        if "=" in value:
            raise KeyError(value)
        if "\0" in value:
            raise MemoryError
        raise ValueError(value)

    told, parser = Told(), Parser("broken", broken, ["a=b"], 10)
    for value in ("a=b", "\0", "x"):
        feed(parser, value, told)
    assert [type(error) for _, error in told.failures] == [KeyError, MemoryError, ValueError]
    lines = Told()
    feed(Parser("long", lambda _: (_ for _ in ()).throw(Long("a\nb")), [""], 1), "", lines)
    assert len(lines.failures) == 1


class Long(UserError):
    """A refusal that is not one line."""

    def __init__(self, message):
        Exception.__init__(self, message)


def test_a_message_is_one_line_of_bounded_length():
    error = UserError("begin\n\x1b[31m" + "x" * 10**6 + " the end: do this")
    assert str(error).startswith(r"begin\n\x1b[31mxxx") and str(error).endswith(" the end: do this")
    assert len(str(error)) < LONGEST + 10
    assert str(UserError("naïve 日本")) == "naïve 日本"
