"""The README's Python is run as it is printed, and its commands are commands that exist."""

import pathlib
import re
import shlex

import chex
import jax
import numpy as np
import pytest

from jaxldm import cli, models
from jaxldm import diffusion as D

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("#")[0] for line in README.splitlines() if re.match(r"jaxldm \w+ ", line)]


def test_the_example_of_sample_runs():
    names = {}
    exec(PYTHON[0], names)
    chex.assert_shape(names["x_0"], (4, 8, 8, 1))
    chex.assert_tree_all_finite(names["x_0"])


def test_the_example_of_a_solver_is_ddim():
    names = {}
    exec(next(code for code in PYTHON if "def plain_ddim" in code), names)
    path = D.Flow()
    grid = D.make_grid(path, 7)
    denoise = D.gaussian_denoiser(path, mean=0.3, std=0.5)
    key = jax.random.key(1)
    x_T = D.initial_noise(key, (2, 4, 4, 1), grid)
    ours, theirs = (
        D.sample(key, denoise, solver, grid, x_T) for solver in (names["plain_ddim"](), D.solvers.ddim())
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.abs(np.asarray(ours) - np.asarray(x_T)).max() > 0.1


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line):
    """Everything but the work itself: options are known and values can be read."""
    assert cli.parse(shlex.split(line)[1:]) is not None


def test_size_that_the_picture_is_captioned_with():
    total = models.count_params("mini-unet") + models.count_params("mini-autoencoder")
    assert 1.65e6 < total < 1.75e6, "the README says 1.7 million"
