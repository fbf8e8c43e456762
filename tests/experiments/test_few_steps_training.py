"""A small network trained by a loss of few steps comes to the map that the loss teaches."""

import json

import jax
import numpy as np
import pytest

from experiments.few_steps import minimisers, plane
from jaxldm import diffusion as D

OPTIMIZED = True
# Method -> (data, updates, what its error falls below); the whole table is in experiments/few_steps.
SHORT = {
    "consistency distillation": (plane.GAUSSIAN, 400, 0.1),
    "reflow": (plane.GAUSSIAN, 400, 0.1),
    "mean flow": (plane.GAUSSIAN, 800, 0.1),
    # Above it: a critic that is too slow (7 % after 5000 updates), a normalised tangent (11 % after 20000).
    "distribution matching, one step": (plane.GAUSSIAN, 1500, 0.04),
    "sCM, training": (plane.MIXTURE, 2000, 0.09),
}


@pytest.fixture(autouse=True)
def loose_promotion():
    """The schedules of optax need JAX's own defaults, as users have them."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", SHORT)
def test_training_comes_to_the_exact_map(name):
    data, updates, bound = SHORT[name]
    row = minimisers.measure(minimisers.METHODS[name](data), 0, updates)
    assert row["after"] < bound < row["before"] / 3


def test_the_exact_maps_and_distances():
    path = D.Flow()
    noise = plane.noise_at(path)[:64]
    exact = plane.GAUSSIAN.solve(path, noise)
    np.testing.assert_allclose(exact, plane.MEAN + plane.STD * noise, rtol=1e-6)
    one = plane.GAUSSIAN._replace(denoiser=lambda path: D.gaussian_denoiser(path, plane.MEAN, plane.STD))
    with jax.enable_x64(True):
        np.testing.assert_allclose(plane.follow(one.denoiser, path, noise.astype(float)), exact, atol=1e-5)
    assert plane.map_error(exact, exact) == 0
    assert plane.map_error(exact.mean(0) + 0 * exact, exact) == pytest.approx(1)
    samples = np.asarray(plane.GAUSSIAN.draw(jax.random.key(3), 4096))
    floor = plane.distribution_error(samples, plane.GAUSSIAN)
    spread = np.sqrt(np.mean((samples - samples.mean(0)) ** 2))
    moved = plane.distribution_error(samples + np.array([0.3 * spread, 0.0]), plane.GAUSSIAN)
    assert floor < 0.05 and moved == pytest.approx(0.3 / np.sqrt(2), abs=0.05)


def test_a_row_is_added_to_those_of_other_methods(tmp_path, capsys):
    figures = {"judged": "map", "before": 1.0, "after": 0.01, "seconds": 2.0, "updates": 10}
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "minimisers.json").write_text(
        json.dumps([{"method": "drifting", "data": "mixture", **figures}])
    )
    options = minimisers.Minimisers(methods=("reflow",), data=("Gaussian",), quick=True, output_dir=tmp_path)
    minimisers.main(options)
    table = (tmp_path / "quick" / "minimisers.md").read_text()
    assert table.index("| reflow | Gaussian | map |") < table.index(
        "| drifting | mixture | map | 100% | 1.00% |"
    )
