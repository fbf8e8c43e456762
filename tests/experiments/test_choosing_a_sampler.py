"""The script that draws digits by every solver, at its smallest, on a random network."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "experiments" / "choosing_a_sampler"))
import digits

from jaxldm.errors import CheckpointError


def test_digits(random_run, tmp_path, capsys):
    out = tmp_path / "out"
    digits.main(digits.Digits(random_run("smoke-dit"), quick=True, guidance_scales=(2.0,), output_dir=out))
    rows = json.loads((out / "digits.json").read_text())
    asked = [(row["solver"], row["steps"], row["evaluations"]) for row in rows]
    assert asked == [("reference", 10, 10), ("ddim", 2, 2), ("ddim", 5, 5), ("ddpm", 2, 2), ("ddpm", 5, 5)]
    distances = [row["distance"] for row in rows]
    assert distances[1] > distances[2] > 0  # more steps, nearer to the reference; noise has none to compare
    assert [distance is None for distance in distances] == [True, False, False, True, True]
    assert "| ddpm |" in capsys.readouterr().out and (out / "digits-solvers.png").exists()


def test_without_a_run_it_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        digits.main(digits.Digits(tmp_path / "missing", output_dir=tmp_path))
