"""Rows against the whole run and against fewer steps of the same seconds, and what is drawn of them."""

import pytest

from experiments.less_compute import comparison, dynamic, smaller


def row(name, kind, seconds, distance):
    return {"name": name, "kind": kind, "seconds": seconds, "distance": distance}


FEW = comparison.FEWER_STEPS
OTHERS = [row("25 steps", FEW, 0.02, 2.4), row("half", "pruned", 0.03, 2.1)]


@pytest.mark.parametrize("kind", [FEW, "full"])
def test_rows_are_compared_with_the_whole_run_and_with_fewer_steps_of_their_seconds(kind):
    """Whether the whole run counts as one of fewer steps, as in one script, or is a kind of its own."""
    whole, few, pruned, later = comparison.with_comparison(
        [row("whole", kind, 0.04, 2.0), *OTHERS, row("trained further", "full", 0.08, 1.8)]
    )
    assert whole["worse"] == 0 and whole["speedup"] == 1 and whole["baseline"] == 2.0
    assert pruned["speedup"] == pytest.approx(4 / 3) and pruned["worse"] == pytest.approx(0.05)
    assert pruned["baseline"] == pytest.approx(2.2)  # half way between 25 and all steps
    assert few["baseline"] == few["distance"] and later["baseline"] == 2.0  # nothing is extrapolated


def test_a_plot_has_a_line_for_each_kind(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(comparison, "save_figure", lambda path, figure: kept.append(figure))
    comparison.plot(tmp_path / "it.png", "digits", [row("whole", FEW, 0.04, 2.0), *OTHERS], "ms", 1e3)
    axes = kept[0].axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines[:-1]}
    assert lines == {FEW: [[20.0, 2.4], [40.0, 2.0]], "pruned": [[30.0, 2.1]]}
    assert axes.get_xlabel() == "ms"


def test_costs_are_given_in_the_units_of_the_tables():
    of_one = smaller.in_units({"parameters": 2_000_000, "macs": 3_000_000, "seconds": 0.03})
    assert (of_one["millions"], of_one["mega"], of_one["milliseconds"]) == (2, 3, 30)
    figures = {"gmacs": 0.5, "parameters": 3_000_000, "milliseconds": 20.0}
    half = dynamic.in_units(figures, {**figures, "gmacs": 1.0})
    assert (half["share"], half["millions"], half["seconds"]) == (0.5, 3, 0.02)
    assert [dynamic.kind_of(name) for name in ("DyDiT, 0.5, tokens", "DiT of two blocks")] == [
        "DyDiT, tokens",
        "DiT of two blocks",
    ]
