"""Misuse of the Python API: it works, or it is refused in one line that names the argument."""

import pytest

from experiments.faults import misuse
from jaxldm import diffusion as D

pytestmark = pytest.mark.unchecked  # wrong types are what is tried here


def test_misuse_is_refused_in_one_line():
    result = misuse.run(300, seed=0)
    assert result.count == 300 and not result.faults


def test_the_lines_are_for_people():
    """A few whole messages: what is allowed, what was given, what to write instead."""
    rows = {(row.call, row.argument, row.value): row.message for row in misuse.outcomes(MESSAGES)}
    assert rows == MESSAGES


MESSAGES = {
    ("D.denoiser", "prediction", "'x'"): (
        "prediction must be a prediction such as D.epsilon(path), D.prediction('epsilon', path), got 'x'"
    ),
    ("D.solvers.ddim", "eta", "'1'"): (
        "eta must be a number in [0, 1] (0 is deterministic, 1 is DDPM), got '1'"
    ),
    ("D.sample", "solver", "'x'"): (
        "solver must be a solver such as D.solvers.ddim(), got 'x': write D.solvers.make('x')"
    ),
    ("D.sample", "key", "1"): "key must be a key, got 1: write jax.random.key(1)",
    ("D.sample", "grid", "None"): "grid must be a grid such as D.make_grid(path, 50), got None",
    ("D.make_grid", "num_inference_steps", "1.5"): (
        "num_inference_steps must be a whole number of at least 1, got 1.5"
    ),
    ("pipe", "solver", "['x']"): ("unknown solver ['x']: choose one of " + ", ".join(D.solvers.names())),
}
