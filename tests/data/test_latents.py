"""The latents cache is used when it fits, and made again when it is stale, cut short or corrupted."""

import errno
import os

import numpy as np
import pytest

from jaxldm.data import cached, fingerprint
from jaxldm.errors import StorageError

PARAMS = {"encoder": {"kernel": np.arange(6.0).reshape(2, 3), "bias": np.zeros(3)}}


class Encoder:
    """Counts its calls."""

    calls = 0

    def __call__(self):
        self.calls += 1
        return {"mean": np.arange(12.0).reshape(3, 4) + self.calls, "label": np.arange(3)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "latents.npz"


def test_the_second_call_reads_what_the_first_one_wrote(path):
    encoder = Encoder()
    first, second = cached(path, "key", encoder), cached(path, "key", encoder)
    assert encoder.calls == 1 and first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_another_key_makes_it_again_and_replaces_it(path):
    encoder = Encoder()
    cached(path, "old", encoder)
    assert cached(path, "new", encoder)["mean"][0, 0] == 2
    cached(path, "new", encoder)
    assert encoder.calls == 2


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_made_again(path, share):
    encoder = Encoder()
    cached(path, "key", encoder)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert cached(path, "key", encoder)["mean"][0, 0] == 2
    assert cached(path, "key", encoder)["mean"][0, 0] == 2


def test_a_flipped_bit_in_the_numbers_is_noticed(path):
    encoder = Encoder()
    numbers = cached(path, "key", encoder)["mean"].tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(numbers) + 5] ^= 1
    path.write_bytes(content)
    assert cached(path, "key", encoder)["mean"][0, 0] == 2


def test_a_full_disk_keeps_the_older_file_and_leaves_nothing_behind(path, monkeypatch):
    cached(path, "old", Encoder())
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        cached(path, "new", Encoder())
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_the_fingerprint_sees_values_names_shapes_types_and_strings():
    changed = {"encoder": {**PARAMS["encoder"], "bias": np.array([0.0, 0.0, 1e-12])}}
    renamed = {"encoder": {"kernel": PARAMS["encoder"]["kernel"], "offset": np.zeros(3)}}
    reshaped = {"encoder": {"kernel": np.arange(6.0).reshape(3, 2), "bias": np.zeros(3)}}
    retyped = {"encoder": {"kernel": PARAMS["encoder"]["kernel"], "bias": np.zeros(6, np.float32)}}
    prints = [fingerprint(tree, "mini") for tree in (PARAMS, changed, renamed, reshaped, retyped)]
    prints += [
        fingerprint(PARAMS, "maxi"),
        fingerprint(PARAMS, "mini", 1.0),
        fingerprint(PARAMS, "mini", 2.0),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(PARAMS, "mini") == prints[0]
