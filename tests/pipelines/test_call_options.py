"""What a call of a pipeline refuses before anything else, whatever the family."""

import jax
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm import models, pipelines
from jaxldm.errors import InvalidArgumentError, UnknownNameError
from jaxldm.pipelines.options import check_call

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def pipe():
    module = models.build("tiny-dit", sample_size=4, in_channels=1, hidden_size=8, depth=1, num_heads=2)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), models.shapes(module))
    return pipelines.class_to_image(pipelines.Network(module, params), D.v(D.VP.named("linear")))


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"num_images": 3.0}, InvalidArgumentError, "write num_images=3"),
        ({"key": None}, InvalidArgumentError, r"write jax\.random\.key\(0\)"),
        ({"key": 7}, InvalidArgumentError, r"write jax\.random\.key\(7\)"),
        ({"solver": ["ddim"]}, UnknownNameError, "did you mean 'ddim'"),
        ({"solver": D.solvers.ddim}, InvalidArgumentError, r"write ddim\(\)"),
        ({"progress": lambda done: None}, InvalidArgumentError, r"progress must be a function \(steps done"),
        ({"class_labels": [0.5]}, ValueError, "class labels must be whole numbers"),
        ({"class_labels": [-1]}, ValueError, r"class labels must be in \[0, 9\]"),
        ({"guidance_scale": "7"}, InvalidArgumentError, "guidance_scale must be a finite number"),
        ({"guidance_scale": np.inf}, InvalidArgumentError, "guidance_scale must be a finite number"),
        ({"timesteps": "karras"}, InvalidArgumentError, "timesteps must be an array"),
        ({"in_flight": 2}, InvalidArgumentError, "give batch_size"),
        ({"devices": ["cpu"]}, InvalidArgumentError, r"one of jax\.devices\(\)"),
        ({"latents": [[1], [1, 2]]}, InvalidArgumentError, "latents must be"),
    ],
)
def test_wrong_types_and_ranges(pipe, options, error, words):
    with pytest.raises(error, match=words):
        pipe(**{"key": KEY, "class_labels": [1]} | options)


def test_a_pipeline_inside_of_a_transformation_says_what_to_write(pipe):
    calls = (
        lambda: jax.jit(lambda: pipe(KEY, [1]))(),
        lambda: jax.jit(pipe)(KEY),
        lambda: jax.vmap(lambda key: pipe(key, [1]))(jax.random.split(KEY, 2)),
        lambda: jax.grad(lambda w: pipe(KEY, [1], guidance_scale=w).sum())(2.0),
    )
    for call in calls:
        with pytest.raises(InvalidArgumentError, match=r"cannot be inside jit, vmap or grad.*D\.sample"):
            call()


def test_old_keys_are_the_new_ones():
    assert check_call(jax.random.PRNGKey(3), (), {})[0] == jax.random.key(3)
