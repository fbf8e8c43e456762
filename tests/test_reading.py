"""Reading files: regular ones, JSON, and errors of others as one line with the file's name."""

import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError
from jaxldm.reading import MAX_JSON_BYTES, parse_json, read_bytes, read_json, reading, shown

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(entries=st.dictionaries(st.text(), VALUES))
def test_what_json_writes_is_read(entries):
    assert parse_json(json.dumps(entries), "a.json") == entries


@given(content=st.binary(max_size=60) | st.text(alphabet='{}[]":,0e-\\ud8"', max_size=60).map(str.encode))
def test_any_bytes_are_an_object_or_one_line(content):
    try:
        assert isinstance(parse_json(content, "a.json"), dict)
    except CheckpointError as error:
        assert "a.json" in str(error) and "\n" not in str(error) and len(str(error)) < 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        ('{"a": 1e999}', "1e999 is out of range"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": 1, "b": {}, "a": 2}', "'a' occurs twice"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        ("[1]", "does not hold a JSON object"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_refused(tmp_path, text, words):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=words) as caught:
        read_json(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_infinity_is_read_as_diffusers_writes_it():
    assert parse_json('{"lambda_min_clipped": -Infinity}', "a") == {"lambda_min_clipped": -float("inf")}


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    start = time.monotonic()
    for path, words in ((tmp_path / "pipe", "pipe or device"), (tmp_path, "is a folder, not a")):
        with pytest.raises(CheckpointError, match=words):
            read_json(path)
    with pytest.raises(CheckpointError, match="pipe or device"):
        read_bytes("/dev/zero", 10)
    with pytest.raises(DataError, match=r"there is no picture .*nowhere"):
        read_bytes(tmp_path / "nowhere", 10, "picture", DataError)
    with pytest.raises(CheckpointError, match="embedded null"):
        read_json(tmp_path / "a\0b")
    assert time.monotonic() - start < 1


def test_no_more_is_read_than_a_file_of_its_kind_has(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(CheckpointError, match=f"more than the {MAX_JSON_BYTES} bytes"):
        read_json(path)


def test_errors_of_others_become_one_line_with_the_name():
    class PanicException(BaseException):  # as Rust's panics come to Python
        pass

    errors = (KeyError("x"), RecursionError(), MemoryError(), PanicException("a\nb"), ValueError("y" * 999))
    for error in errors:
        with pytest.raises(CheckpointError, match="a file: it cannot be read") as caught, reading("a file"):
            raise error
        assert len(str(caught.value)) < 410 and "\n" not in str(caught.value)
        assert caught.value.__cause__ is error


def test_own_errors_keep_their_kind_and_get_the_name_once():
    with pytest.raises(CheckpointError, match=r"^a file: too small$"), reading("a file"):
        raise CheckpointError("too small")
    with pytest.raises(CheckpointError, match=r"^a file is too small$"), reading("a file"):
        raise CheckpointError("a file is too small")
    with pytest.raises(InvalidArgumentError, match=r"^scale$"), reading("a file"):
        raise InvalidArgumentError("scale")
    for other in (KeyboardInterrupt, NameError, ImportError):  # no fault of a file
        with pytest.raises(other), reading("a file"):
            raise other


def test_values_are_shown_in_part():
    assert shown([1, 2]) == "[1, 2]" and len(shown("x" * 10_000)) == 60
