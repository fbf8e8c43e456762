"""The benchmark of compile times builds what it says and writes what it measured."""

import json

import pytest

from experiments.benchmarks import compile_time
from jaxldm import models


@pytest.mark.parametrize("name", compile_time.NETWORKS)
def test_rows_are_the_presets_with_and_without_scan(name):
    for scan in (True, False):
        config = compile_time.make_module(name, scan, compile_time.CompileTime()).config
        assert (config.scan, config.dtype) == (scan, "bfloat16")
        assert compile_time.make_module(name, scan, compile_time.CompileTime(dtype="float32")).config == (
            models.build(name, scan=scan).config
        )


def test_it_runs_small_and_writes_what_it_measured(tmp_path, capsys):
    compile_time.main(compile_time.CompileTime(quick=True, networks=("dit-xl-2",), output_dir=tmp_path))
    figures = json.loads((tmp_path / "quick" / "compile_time.json").read_text())
    text = (tmp_path / "quick" / "compile_time.md").read_text()
    assert [row["scan"] for row in figures["rows"]] == [True, False]
    blocks = models.count_params("dit-xl-2") - models.count_params(models.build("dit-xl-2", depth=2))
    for row in figures["rows"]:
        assert row["parameters"] == models.count_params("dit-xl-2") - blocks
        assert row["weight_bytes"] == 2 * row["parameters"]
        assert row["trace_seconds"] > 0 and row["compile_seconds"] > 0 and row["temporary_bytes"] > 0
        assert f"| {row['compile_seconds']:.1f} |" in text
    assert "one scan" in text and "written out" in text
    assert "written to" in capsys.readouterr().out
