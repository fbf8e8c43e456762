"""The benchmark of a mean flow's step times each variant and writes the ratios."""

import json

from experiments.benchmarks import mean_flow_step


def test_it_runs_small_and_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mean_flow_step, "MEAN_FLOWS", {"mean flow": mean_flow_step.MEAN_FLOWS["mean flow"]})
    mean_flow_step.main(mean_flow_step.MeanFlowStep(quick=True, batch_size=2, output_dir=tmp_path))
    (row,) = json.loads((tmp_path / "quick" / "mean_flow_step.json").read_text())["rows"]
    assert row["milliseconds"].keys() == {"flow", "mean flow"}
    low, middle, high = row["ratio_quartiles"]["mean flow"]
    assert 0 < low <= middle <= high
    assert "| dit-b-2, batch 2, float32 |" in (tmp_path / "quick" / "mean_flow_step.md").read_text()
    assert "mean flow / flow" in capsys.readouterr().out
