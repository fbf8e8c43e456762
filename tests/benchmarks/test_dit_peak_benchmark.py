"""The shares of the peak are those of what was timed, of one architecture on both sides."""

import json

import pytest

from experiments.benchmarks import card_torch, dit_peak, torch_common
from jaxldm import models


def test_a_share_is_the_rate_of_a_step_next_to_the_quickest_products():
    row = {
        "row": "256, 4, 32",
        "operations": 120e9,
        "milliseconds": {"jaxldm": 1000.0, "eager": 1500.0, "PyTorch, products": 120.0},
        "fastest": {"jaxldm": 1.0, "eager": 1.0, "jaxldm, products": 110.0, "PyTorch, products": 100.0},
        "ratio_quartiles": {"eager": [1.4, 1.5, 1.6], "PyTorch, products": [0.1, 0.1, 0.1]},
    }
    (found,), peak = dit_peak.with_shares([row], of_products=20e9)
    assert peak == pytest.approx(200e9)
    assert found["of_peak"] == pytest.approx({"jaxldm": 0.6, "eager": 0.4})
    line = dit_peak.cells_of(found)
    assert line == ["256, 4, 32", "120", "1.00", "1.50", "", "60%", "40%", "", "1.50 (1.40 to 1.60)", ""]
    assert len(line) == len(dit_peak.HEAD)


def test_both_sides_have_the_same_parameters():
    module = dit_peak.network(128, 2)
    theirs = torch_common.random_module(module.config, "float32", torch_common.device())
    assert models.count_params(module) == sum(parameter.numel() for parameter in theirs.parameters())
    assert len(theirs.transformer_blocks) == 2 and theirs.transformer_blocks[0].attn1.heads == 2


def test_it_runs_small_and_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(card_torch.BACKEND, "name", "eager")  # without a C++ compiler
    dit_peak.main(dit_peak.DitPeak(quick=True, output_dir=tmp_path))
    result = json.loads((tmp_path / "quick" / "dit_peak.json").read_text())
    (row,) = result["rows"]
    assert list(row["of_peak"]) == list(dit_peak.SIDES)
    rate = row["operations"] / row["milliseconds"]["jaxldm"] * 1e3
    assert rate == pytest.approx(
        row["of_peak"]["jaxldm"] * result["peak, 10^9 operations per second"] * 1e9, rel=0.1
    )
    assert "| 32, 1, 8 |" in (tmp_path / "quick" / "dit_peak.md").read_text()
    assert "torch.compile / jaxldm" in capsys.readouterr().out
