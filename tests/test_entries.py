"""Entries of files as typed values."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxldm.entries import Bounds, build, read_value
from jaxldm.errors import CheckpointError, InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 3


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    depth: Annotated[int, Bounds(1, 100)] = 2
    scale: float = 1.0
    sizes: tuple[int, ...] = ()
    pair: int | tuple[int, int] = 1
    inner: Inner | None = None
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    kind: Literal["a", "b"] = "a"
    on: bool = False

    def __post_init__(self):
        if self.name == "bad":
            raise InvalidArgumentError("name must not be 'bad'")
        1 // self.scale


WHOLE = {
    "name": "x",
    "depth": 5,
    "scale": 2,
    "sizes": [1, 2],
    "pair": [3, 4],
    "inner": {"width": 7},
    "options": {"a": 1.5},
    "kind": "b",
    "on": True,
}


def test_a_dataclass_of_entries():
    made = build(Outer, WHOLE, "a.json")
    assert made == Outer("x", 5, 2, (1, 2), (3, 4), Inner(7), {"a": 1.5}, "b", True)
    assert build(Outer, {"name": "x"}, "a.json") == Outer("x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, "a.json: name must be a string, not 3"),
        ({"depth": True}, "a.json: depth must be a whole number from 1 to 100, not True"),
        ({"depth": 0}, "a.json: depth must be a whole number from 1 to 100, not 0"),
        ({"depth": 10**30}, "a.json: depth must be a whole number from 1 to 100, not 1000"),
        ({"depth": 2.0}, "a.json: depth must be a whole number from 1 to 100, not 2.0"),
        ({"scale": math.inf}, "a.json: scale must be a number, not inf"),
        ({"scale": "1"}, "a.json: scale must be a number, not '1'"),
        ({"sizes": 3}, "a.json: sizes must be a list of whole numbers, not 3"),
        ({"sizes": [1, None]}, r"a.json: sizes\[1\] must be a whole number, not None"),
        ({"pair": [1, 2, 3]}, "a.json: pair must be a whole number or a list of whole numbers, not"),
        ({"pair": [1, "2"]}, r"a.json: pair\[1\] must be a whole number, not '2'"),
        ({"inner": []}, r"a.json: inner must be an object or null, not \[\]"),
        ({"inner": {"width": "7"}}, "a.json: inner: width must be a whole number, not '7'"),
        ({"inner": {"widht": 7}}, "a.json: inner has an unknown key 'widht'; did you mean 'width'?"),
        ({"options": {"a": "x"}}, "a.json: options.a must be a number, not 'x'"),
        ({"kind": "c"}, "a.json: kind must be 'a' or 'b', not 'c'"),
        ({"on": 1}, "a.json: on must be true or false, not 1"),
        ({"dpeth": 3}, "a.json has an unknown key 'dpeth'; did you mean 'depth'?"),
        ({"zzzz": 3}, "a.json has an unknown key 'zzzz'; known: depth, inner"),
        ({"name": "bad"}, "a.json does not describe a Outer: name must not be 'bad'"),
        ({"scale": 0}, "a.json does not describe a Outer: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(changes, message):
    with pytest.raises(CheckpointError, match=message):
        build(Outer, WHOLE | changes, "a.json")


def test_a_missing_key_and_no_object():
    with pytest.raises(CheckpointError, match=r"a\.json lacks name"):
        build(Outer, {}, "a.json")
    with pytest.raises(CheckpointError, match=r"a\.json must be an object, not \[\]"):
        build(Outer, [], "a.json")


def test_bounds_that_allow_infinity():
    assert read_value(-math.inf, Annotated[float, Bounds()], "x") == -math.inf
    with pytest.raises(CheckpointError, match="of 0 or more"):
        read_value(-math.inf, Annotated[float, Bounds(0)], "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(entries=st.dictionaries(st.sampled_from([*WHOLE, "other"]), JSON))
def test_any_entries_build_or_are_refused_in_one_line(entries):
    try:
        assert isinstance(build(Outer, entries, "a.json"), Outer)
    except CheckpointError as error:
        assert "a.json" in str(error) and "\n" not in str(error) and len(str(error)) < 400
