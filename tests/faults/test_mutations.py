"""Mutated files, in short: the long form is `python -m experiments.faults.mutations`."""

import random
import tempfile
from pathlib import Path

import pytest

from experiments.faults import mutations
from experiments.faults.mutators import mutate
from experiments.faults.readers import Reader, readers, write_files
from jaxldm.errors import CheckpointError, DataError

COUNT = 250


def test_every_reader_reads_its_files_as_they_are():
    with tempfile.TemporaryDirectory() as folder:
        for number, reader in enumerate(readers().values()):
            own = Path(folder) / str(number)
            write_files(own, reader.files)
            if "moments.npz" in reader.files:  # of four features, and not of FID's 2048
                with pytest.raises(DataError, match="not of FID's network"):
                    reader.call(own)
            else:
                reader.call(own)


def test_mutated_files_are_read_or_refused_in_one_line():
    result = mutations.run(COUNT, seed=0)
    assert result.count == COUNT
    assert not result.faults, "\n".join(result.faults[:10])


def raising(error):
    def call(folder):
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (raising(KeyError("x")), "KeyError"),
        (raising(BaseException("a panic")), "a panic"),
        (raising(CheckpointError("a\nb")), "line breaks"),
        (raising(CheckpointError("a" * 500)), "500 characters"),
        (lambda folder: [None for _ in iter(int, 1)], "TooSlow"),
    ],
)
def test_a_reader_at_fault_is_found(tmp_path, monkeypatch, call, words):
    monkeypatch.setattr(mutations, "SECONDS", 0.3)
    with mutations._limits():
        fault = mutations.read(Reader({}, call, 1.0), tmp_path)
    assert fault is not None and words in fault
    assert mutations.read(Reader({}, raising(CheckpointError("not a model")), 1.0), tmp_path) is None


def test_memory_that_a_reader_takes_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(mutations, "_peak", iter([2**30, 4 * 2**30]).__next__)
    assert mutations.read(Reader({}, lambda folder: None, 1.0), tmp_path) == "3.0 GiB of memory"


def test_a_mutation_is_the_same_again_and_changes_the_file():
    changed = 0
    for reader in readers().values():
        for name, content in reader.files.items():
            first, second = (mutate(random.Random(7), name, content) for _ in range(2))
            assert first == second
            changed += first[1] != content
    assert changed > 60
