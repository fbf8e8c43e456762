"""What a call of a pipeline refuses before anything else, whatever the family."""

import copy
import dataclasses
import pickle

import jax
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm import models, pipelines
from jaxldm.errors import InvalidArgumentError, JaxldmError, SignatureError, UnknownNameError
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
        ({"prompt": "a cat"}, InvalidArgumentError, r"prompt is a text, .* write class_labels=\[3\]"),
        ({"negative_prompt": "a"}, InvalidArgumentError, "negative_prompt is a text"),
        ({"own": {}}, UnknownNameError, "unknown argument of ClassToImage 'own'"),
        ({"pipe": None}, SignatureError, "multiple values for argument 'pipe'"),
        ({"steps": 5}, UnknownNameError, "did you mean 'num_inference_steps'"),
        ({"solver": "DDIM"}, UnknownNameError, "did you mean 'ddim'"),
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


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda pipe: pipe(class_labels=[1]), r"key must be a key, got None: write jax\.random\.key\(0\)"),
        (lambda pipe: pipe(KEY, [1], [2]), "too many positional arguments"),
        (lambda pipe: pipe(KEY, [1], class_labels=[1]), "multiple values for argument 'class_labels'"),
        (lambda pipe: pipe.warm_up([1], compile_only=True), "warm_up gives compile_only itself"),
        (lambda pipe: pipe.warm_up([1], key=KEY), "warm_up gives key itself"),
        (lambda pipe: pipe.grid(512), "size must be"),
        (lambda pipe: pipe.encode_prompts([1], skip=3), "unknown option of the texts of ClassToImage 'skip'"),
        (lambda pipe: pipe.decode(np.zeros((1, 4, 4, 1)), batch=2), "did you mean 'batch_size'"),
    ],
)
def test_what_a_pipeline_gives_itself_and_what_it_lacks(pipe, call, words):
    with pytest.raises(JaxldmError, match=words):
        call(pipe)


def test_a_pipeline_is_pickled_and_copied_with_its_family(pipe):
    for other in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe), copy.copy(pipe)):
        assert other.family is pipe.family and other.denoiser.module == pipe.denoiser.module
        assert not any(row.difference for row in pipelines.compare(pipe, other))
    mine = dataclasses.replace(pipe, family=pipe.family._replace(name="mine"))
    assert copy.deepcopy(mine).family is mine.family
    with pytest.raises(InvalidArgumentError, match=r"'mine' cannot be found again.*pipelines\.save"):
        pickle.dumps(mine)


def test_old_keys_are_the_new_ones():
    assert check_call(jax.random.PRNGKey(3), (), {})[0] == jax.random.key(3)
