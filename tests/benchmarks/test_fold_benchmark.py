"""The fold's benchmark times the solvers that it says, on the same work, and writes what it measured."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm import diffusion as D

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks"))
import fold


def evaluations(name: str, steps: int) -> int:
    calls = []

    def function(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return 0.5 * x

    denoise = D.Denoiser(function, fold.PATH)
    grid = D.make_grid(fold.PATH, steps)
    D.sample(jax.random.key(0), denoise, D.solvers.make(name), grid, jnp.ones((1, 1))).block_until_ready()
    jax.effects_barrier()
    return len(calls)


def test_every_solver_of_one_evaluation_a_step_is_timed():
    same = {"euler", "dpmpp_1s"}  # the step of ddim
    once = {name for name in set(D.solvers.SOLVERS) - same if evaluations(name, 4) == 4}
    assert set(fold.ONE_EVALUATION) == once


def test_it_runs_small_and_writes_what_it_measured(tmp_path, capsys):
    fold.main(fold.Fold(quick=True, networks=("tiny-dit",), output_dir=tmp_path))
    figures = json.loads((tmp_path / "fold.json").read_text())
    text = (tmp_path / "fold.md").read_text()
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
