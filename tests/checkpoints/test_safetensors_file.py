import json

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxldm.checkpoints.safetensors_file import (
    open_safetensors,
    read_safetensors,
    safetensors_bytes,
    safetensors_chunks,
)
from jaxldm.errors import CheckpointError

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "U16": torch.uint16,
    "C64": torch.complex64,
    "BOOL": torch.bool,
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_the_torch_writer(tmp_path, dtype):
    values = torch.tensor([[0.0, 1.0, -1.5], [2.0, 240.0, 0.25]]).abs().to(DTYPES[dtype])
    safetensors.torch.save_file({"x": values, "none": values[:0]}, tmp_path / "a.safetensors")
    read = read_safetensors(tmp_path / "a.safetensors")
    assert read["x"].shape == (2, 3) and read["none"].shape == (0, 3)
    assert read["x"].tobytes() == values.flatten().view(torch.uint8).numpy().tobytes()
    if dtype not in ("BOOL", "C64"):
        np.testing.assert_array_equal(read["x"].astype(np.float32), values.to(torch.float32).numpy())
    back = safetensors.torch.load(safetensors_bytes(read))
    assert back["x"].dtype == DTYPES[dtype]
    assert torch.equal(back["x"].view(torch.uint8), values.view(torch.uint8))


def test_tensors_are_read_when_they_are_used_and_not_before(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(4), "b": torch.ones(3)}, path, metadata={"by": "hand"})
    contents = open_safetensors(path)
    assert contents.metadata == {"by": "hand"}
    assert {name: tensor.shape for name, tensor in contents.tensors.items()} == {"a": (4,), "b": (3,)}
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(7).tobytes())
    np.testing.assert_array_equal(np.asarray(contents.tensors["b"]), [1, 1, 7])
    array = np.asarray(contents.tensors["a"])
    assert not array.flags.writeable
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="has changed while it was read"):
        np.asarray(contents.tensors["b"])


def test_pieces_are_asked_for_one_by_one():
    asked = []

    class Noted:
        shape, dtype = (2,), np.dtype(np.float32)

        def __init__(self, name):
            self.name = name

        def __array__(self, dtype=None, copy=None):
            asked.append(self.name)
            return np.zeros(2, np.float32)

    pieces = safetensors_chunks({name: Noted(name) for name in "abc"})
    seen = [list(asked) for _ in pieces]
    assert seen == [[], ["a"], ["a", "b"], ["a", "b", "c"]]


@st.composite
def files(draw):
    """A header of up to three tensors, right or wrong by a little, and some bytes behind it."""
    entries, end = {}, 0
    for name in draw(st.lists(st.sampled_from("abc"), unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        dtype, size = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("U8", 1), ("F8_E8M0", 1)]))
        begin, end = end, end + int(np.prod(shape, dtype=int)) * size
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    if entries and draw(st.booleans()):
        entry = entries[draw(st.sampled_from(sorted(entries)))]
        wrong = [
            {"dtype": "F7"},
            {"shape": [*entry["shape"], 2]},
            {"shape": [-1]},
            {"shape": 3},
            {"data_offsets": [entry["data_offsets"][0] + 1, entry["data_offsets"][1] + 1]},
            {"data_offsets": entry["data_offsets"][::-1]},
            {"data_offsets": [0, entry["data_offsets"][1] - entry["data_offsets"][0]]},
            {"data_offsets": [0]},
            {"data_offsets": [0.0, 4.0]},
        ]
        entry |= draw(st.sampled_from(wrong))
    metadata = draw(st.sampled_from([None, {}, {"format": "pt"}, {"format": 1}, "text"]))
    header = json.dumps(entries if metadata is None else {"__metadata__": metadata, **entries}).encode()
    header += b" " * draw(st.integers(0, 2))
    data = bytes(max(0, end + draw(st.sampled_from([0, 0, 0, 1, -1]))))
    return len(header).to_bytes(8, "little") + header + data


@settings(max_examples=300)
@given(content=files())
def test_what_the_library_of_the_format_takes_and_nothing_else(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    path.write_bytes(content)
    try:
        theirs = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError:
        with pytest.raises(CheckpointError, match=r"a\.safetensors .*damaged"):
            read_safetensors(path)
        return
    ours = read_safetensors(path)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert list(tensor.shape) == theirs[name]["shape"] and tensor.tobytes() == bytes(theirs[name]["data"])


def with_header(header: str, data: bytes = bytes(8)) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


def entry(first: int, last: int, dtype: str = "F32", shape: tuple = (1,)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [first, last]})


DAMAGE = {
    "overlap": (f'{{"a": {entry(0, 4)}, "b": {entry(0, 4)}}}', "'b' .*overlaps 'a'"),
    "gap": (f'{{"a": {entry(4, 8)}}}', "'a' .*leaves a gap after the header"),
    "past the end": (f'{{"a": {entry(0, 400, shape=(100,))}}}', "claims 400 bytes of tensors, 8 follow"),
    "too few": (f'{{"a": {entry(0, 4)}}}', "claims 4 bytes of tensors, 8 follow"),
    "twice": (f'{{"a": {entry(0, 4)}, "a": {entry(4, 8)}}}', "'a' occurs twice"),
    "size": (f'{{"a": {entry(0, 8)}}}', r"'a', F32 \[1\], has 8 bytes instead of 4"),
    "backwards": (f'{{"a": {entry(8, 4)}}}', "'a'.* has -4 bytes"),
    "dtype": (f'{{"a": {entry(0, 8, "F4")}}}', "'a' is of dtype 'F4'"),
    "dtype that is none": ('{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}', "dtype"),
    "truth for a number": ('{"a": {"dtype": "U8", "shape": [true], "data_offsets": [0, 1]}}', "not counts"),
    "no entry": ('{"a": 3}', "'a' is not a dtype, a shape and two offsets"),
    "deep": ('{"a": ' + "[" * 100_000, "nested too deeply"),
    "list": ("[1, 2]", "not a JSON object"),
    "axes": (f'{{"a": {entry(0, 8, shape=(1,) * 33 + (2,))}}}', "'a' has 34 axes; at most 32"),
    "huge": (f'{{"a": {entry(0, 8, shape=(10**99,) * 30)}}}', "'a' are not counts"),
    "empty and huge": (f'{{"a": {entry(0, 0, shape=(0, 10**9))}}}', r"'a' is empty, but \[0, 1000000000\]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_header_is_explained(tmp_path, damage):
    header, words = DAMAGE[damage]
    (tmp_path / "a.safetensors").write_bytes(with_header(header))
    with pytest.raises(CheckpointError, match=rf"(?s)a\.safetensors \(.*damaged.*{words}"):
        read_safetensors(tmp_path / "a.safetensors")


def test_other_things_under_that_name(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_safetensors(path)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="pickle file"):
        open_safetensors(path)
    path.write_bytes(b"\x80\x02}q\x00X\x01\x00\x00\x00aK\x01s.")
    with pytest.raises(CheckpointError, match="pickle file"):
        open_safetensors(path)


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle(tmp_path):
    path = tmp_path / "a.safetensors"
    header = f'{{"a": {entry(0, 8, shape=(2,))}}}'.ljust(640)
    path.write_bytes(with_header(header))
    assert path.read_bytes().startswith(b"\x80\x02")
    assert open_safetensors(path).tensors["a"].shape == (2,)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
def test_the_way_out_of_a_pickle_works(tmp_path, monkeypatch, suffix):
    tensors = {"a": torch.randn(2, 3).T, "b": torch.arange(3)}
    torch.save(
        {"state_dict": tensors, "epoch": 3} if suffix == ".ckpt" else tensors, tmp_path / f"old{suffix}"
    )
    with pytest.raises(CheckpointError, match="can run any program") as caught:
        open_safetensors(tmp_path / f"old{suffix}")
    monkeypatch.chdir(tmp_path)
    exec(str(caught.value).split("PyTorch:")[1].strip(), {"torch": torch, "safetensors": safetensors})
    read = read_safetensors(tmp_path / "old.safetensors")
    np.testing.assert_array_equal(read["a"], tensors["a"].numpy())
    np.testing.assert_array_equal(read["b"], tensors["b"].numpy())
