"""The benchmark of saving: what it counts as next to a save, and that it runs small to its table."""

import json

import numpy as np
import pytest

from experiments.benchmarks import saving


@pytest.mark.parametrize(("in_a_row", "saved"), [(1, [10, 20]), (2, [10, 11, 20, 21])])
def test_the_rhythm_of_saves(in_a_row, saved):
    plan = saving.plan_of(10, 2, in_a_row)
    assert [step for step in range(1, plan.num_steps + 1) if step % plan.save_every == 0] == saved
    assert plan.num_steps == 29 and plan.save_every > 0


def test_the_update_after_a_save_is_the_one_that_is_stalled():
    """Of updates 2 to 29: compiling at first, 3 s behind the first save, slow ones while it is written."""
    seconds, waiting = np.ones(28), np.full(28, 0.02)
    seconds[0], waiting[0] = 60.0, 50.0  # update 2
    seconds[11 - 2] = 3.0
    seconds[[12 - 2, 13 - 2]] = 1.5
    seconds[21 - 2] = 1.25
    figures = saving.figures_of(seconds, [10, 20], waiting)
    assert (figures["saves"], figures["median"], figures["longest"], figures["in_steps"]) == (2, 1, 3, 3)
    assert figures["steps_per_save"] == pytest.approx((2 + 0.5 + 0.5 + 0.25) / 2)
    assert figures["waiting"] == pytest.approx(24 * 0.02 / (24 + 3.25))
    assert figures["after_saves"] == [9, 19]


def test_it_runs_small_and_writes_what_it_measured(tmp_path, capsys):
    saving.main(saving.Saving(quick=True, output_dir=tmp_path))
    assert sorted(path.name for path in (tmp_path / "quick").iterdir()) == ["saving.json", "saving.md"]
    one, two = json.loads((tmp_path / "quick" / "saving.json").read_text())["rows"]
    assert (one["in_a_row"], one["saves"], two["in_a_row"], two["saves"]) == (1, 1, 2, 2)
    for row in (one, two):
        assert len(row["seconds"]) == 14 and len(row["after_saves"]) == row["saves"]
        assert row["longest"] == pytest.approx(max(row["seconds"][n] for n in row["after_saves"]), abs=1e-3)
        assert row["longest"] > 0 and 0 <= row["waiting"] <= 1
    assert "| 2 | 2 |" in (tmp_path / "quick" / "saving.md").read_text()
    assert "in steps" in capsys.readouterr().out
