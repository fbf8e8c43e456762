"""The exercises of lecture 43 run to their end with tiny settings; each checks what it shows by itself."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "experiments" / "lecture43"))
import e4_dpmpp_on_dit
import e10_interpolants

from jaxldm.errors import InvalidArgumentError


def test_interpolants(tmp_path, capsys):
    e10_interpolants.main(
        e10_interpolants.Interpolants(output_dir=tmp_path, num_samples=2000, num_inference_steps=20)
    )
    shown = capsys.readouterr().out
    assert "FAIL" not in shown and shown.count("PASS") == 25
    assert (tmp_path / "interpolants.png").stat().st_size > 0


def test_dpmpp_on_dit(random_run, tmp_path, capsys):
    options = e4_dpmpp_on_dit.DPMppOnDiT(
        random_run("smoke-dit"), tmp_path, (("dpmpp_2m", 4), ("dpmpp_2m", 2)), num_images=20
    )
    e4_dpmpp_on_dit.main(options)
    shown = capsys.readouterr().out
    assert "| dpmpp_2m | 4 |" in shown and "| dpmpp_2m | 2 |" in shown
    assert (tmp_path / "solvers.png").exists()


def test_without_a_run_it_says_how_to_make_one(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"tiny_dit\.py"):
        e4_dpmpp_on_dit.main(e4_dpmpp_on_dit.DPMppOnDiT(tmp_path / "missing"))
