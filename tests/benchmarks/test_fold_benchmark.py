"""The fold's benchmark times the solvers that it says, on the same work, and writes what it measured."""

import json

import jax
import numpy as np

from experiments.benchmarks import fold
from jaxldm import diffusion as D


def test_every_solver_of_one_evaluation_a_step_is_timed():
    same = {"euler", "dpmpp_1s"}  # the step of ddim
    counts = {
        name: D.evaluation_counter(D.solvers.make(name), fold.PATH, 4)(4)
        for name in set(D.solvers.SOLVERS) - same
    }
    once = {name for name, count in counts.items() if count == 4}
    assert set(fold.ONE_EVALUATION) == once


def test_it_runs_small_and_writes_what_it_measured(tmp_path, capsys):
    fold.main(fold.Fold(quick=True, networks=("tiny-dit",), output_dir=tmp_path))
    figures = json.loads((tmp_path / "quick" / "fold.json").read_text())
    text = (tmp_path / "quick" / "fold.md").read_text()
    assert [row["solver"] for row in figures["ratios"]] == ["ddim", "dpmpp_2m"]
    for row in figures["ratios"]:
        low, median, high = row["ratio_quartiles"][row["solver"]]
        assert 0 < low <= median <= high
        assert f"{median:.3f} ({low:.3f} to {high:.3f})" in text
    (compilation,) = figures["compilations"]
    assert all(seconds > 0 for values in compilation["compile_seconds"].values() for seconds in values)
    assert "written to" in capsys.readouterr().out


def test_the_bare_calls_are_a_loop_over_the_same_times():
    options = fold.Fold(num_images=2, num_inference_steps=3)
    times = []

    def apply(params, x, t):
        jax.debug.callback(lambda t: times.append(np.asarray(t)), t)
        return 0.1 * x

    network = fold.Network("any", (1, 1, 1), {}, apply)
    for run in (fold.bare_calls(network, options), fold.fold(network, "ddim", options)):
        run()
        jax.effects_barrier()
    assert len(times) == 6
    np.testing.assert_array_equal(times[:3], times[3:])
