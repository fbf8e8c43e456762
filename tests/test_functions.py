"""What is said of functions and calls: makers without their call, answers that are none, other names."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm import few_steps, models, training
from jaxldm.arguments import checked, count
from jaxldm.errors import InvalidArgumentError, SignatureError, Table, UnknownNameError
from jaxldm.functions import returned

pytestmark = pytest.mark.unchecked  # wrong types are what is tried here
KEY, X, TIMES = jax.random.key(0), np.ones((4, 4, 4, 1), np.float32), np.full(4, 0.5, np.float32)
GRID, FLOW = D.make_grid(D.Flow(), 1), D.flow(D.Flow())


def identity(x, t, condition=None):
    return x


def drawn(network):
    return D.sample(KEY, D.denoiser(network, FLOW), D.solvers.ddim(), GRID, X)


def loss(network=identity, **options):
    return D.diffusion_loss(KEY, network, FLOW, X, **options)


def consistency(f=identity, **options):
    return few_steps.consistency_loss(f, identity, X, TIMES, X, TIMES, **options)


def mean_flow(u, condition=None):
    return few_steps.mean_flow_loss(u, X, X, TIMES, TIMES, condition)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: drawn(lambda x, t: None), "the network must return an array, got None: is a return missing"),
        (lambda: drawn(lambda x, t: (x, {})), "got a tuple of 2: return one of them"),
        (lambda: D.sample(KEY, lambda x, t: None, D.solvers.ddim(), GRID, X), "denoise must return an array"),
        (lambda: loss(lambda x, t, c: {"sample": x}), "the network must return an array, got {'sample'"),
        (
            lambda: loss(weight=lambda log_snr: None),
            r"weight must return an array \[4\] or one number, got None",
        ),
        (lambda: loss(time=lambda key, shape, path: 0.5), r"time must return an array \[4\], got 0\.5"),
        (lambda: consistency(lambda x, t: x[..., :0]), r"f must return an array \[4, 4, 4, 1\], got one of"),
        (lambda: consistency(distance=lambda error: error), r"distance must return an array \[4\]"),
        (lambda: mean_flow(lambda z, r, t, c: None), r"u must return an array \[4, 4, 4, 1\], got None"),
        (
            lambda: D.classifier_guidance(
                D.gaussian_denoiser(D.Flow()), lambda x, t: jnp.ones((4, 10)), guidance_scale=1.0
            )(X, 0.5),
            r"one number for each image, \[4\], got shape \[4, 10\]",
        ),
    ],
)
def test_an_answer_that_is_none(call, words):
    """A network without a return, or with Flax's pair; a shape that would be broadcast in silence."""
    with pytest.raises(InvalidArgumentError, match=words):
        call()


def test_numbers_are_answers_where_any_shape_will_do():
    assert returned("weight", 1.0) == 1.0 and returned("x", X, X.shape) is X
    assert float(loss(weight=lambda log_snr: 1.0)[0]) >= 0


@pytest.mark.parametrize(
    "call",
    [
        lambda condition: loss(condition=condition),
        lambda condition: loss(condition={"labels": np.ones(4), "text": condition}),
        lambda condition: D.classifier_free_guidance(identity, condition, 0.0, 2.0)(X, TIMES),
        lambda condition: D.classifier_free_guidance(identity, condition, 0.0, 1.0)(X, TIMES),
        lambda condition: mean_flow(lambda z, r, t, c: z, condition),
        lambda condition: D.guided_logits(
            lambda tokens, c: jnp.zeros((*tokens.shape, 4)), condition, 0.0, 2.0
        )(np.zeros((4, 2), np.int32)),
    ],
)
def test_a_condition_has_a_row_for_each_image(call):
    with pytest.raises(InvalidArgumentError, match=r"condition has 3 rows, (x|x_0|tokens) has 4"):
        call(np.ones(3, np.float32))
    call(np.ones(4, np.float32))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: loss(weight=D.min_snr), r"got the function min_snr: write D\.min_snr\(5\.0\)"),
        (lambda: loss(time=D.logit_normal), r"write D\.logit_normal\(0\.0, 1\.0\)"),
        (lambda: loss(time=D.uniform), r"write D\.uniform\(\)"),
        (lambda: consistency(distance=few_steps.pseudo_huber), r"write few_steps\.pseudo_huber\(c\)"),
        (
            lambda: loss(lambda x, t: x),
            r"network must be a function \(x_t, t, condition\).*got one of \(x, t\)",
        ),
    ],
)
def test_a_function_of_other_arguments_says_which(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: D.make_grid(D.Flow(), steps=5), "did you mean 'num_inference_steps'"),
        (lambda: D.make_grid(D.Flow()), "missing a required argument: 'num_inference_steps'"),
        (lambda: D.sample(KEY, identity, D.solvers.ddim(), GRID, X, steps=5), "it has no argument .steps."),
        (lambda: D.training_times("mode", skale=1.0), "no option 'skale'; it has: scale"),
        (
            lambda: dataclasses.replace(training.RECIPES["smoke"], epochs=3),
            r"replace\(old\.\w+, epochs=\.\.\.\)",
        ),
        (lambda: dataclasses.replace(training.RECIPES["smoke"], sed=3), "did you mean 'seed'"),
        (lambda: models.DiTConfig(depht=3), "DiTConfig has no field 'depht'.*did you mean 'depth'"),
        (lambda: D.Flow(shfit=3.0), "did you mean 'shift'"),
    ],
)
def test_a_call_with_other_names(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()


def test_a_type_error_inside_of_a_function_stays_one():
    @checked(steps=count(1))
    def run(steps):
        return steps + None

    with pytest.raises(TypeError) as inside:
        run(3)
    with pytest.raises(TypeError) as outside:
        run(3, 4)
    assert not isinstance(inside.value, SignatureError) and isinstance(outside.value, SignatureError)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: training.RECIPES["mini_ldm"], "unknown recipe 'mini_ldm'.*did you mean 'mini-ldm'"),
        (lambda: D.solvers.SOLVERS["DDIM"], "did you mean 'ddim'"),
        (lambda: D.solvers.make("euler_a"), "did you mean 'euler_ancestral'"),
        (lambda: D.PREDICTIONS["eps"], "did you mean 'epsilon'"),
        (lambda: models.build("tiny-dit", dtype="fp16"), "float16"),
        (lambda: models.build("Tiny_DiT"), "did you mean 'tiny-dit'"),
    ],
)
def test_names_of_other_programs_and_in_other_letters(call, words):
    with pytest.raises(UnknownNameError, match=words):
        call()


def test_a_table_is_a_dictionary():
    table = Table("colour", {"red": 1})
    table |= {"blue": 2}
    assert (table, type(table), table.get("green"), "green" in table) == (
        {"red": 1, "blue": 2},
        Table,
        None,
        False,
    )
    for other in (pickle.loads(pickle.dumps(table)), copy.deepcopy(table)):
        with pytest.raises(KeyError, match="unknown colour 'green': choose one of red, blue"):
            other["green"]
