"""What used to pass silently, or with another program's error: see also `experiments/faults/misuse.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError, UnknownNameError

pytestmark = pytest.mark.unchecked  # wrong types are what is tried here
KEY = jax.random.key(0)
# Paths whose sigma has an infinite slope at the clean end, or none that differentiation sees.
STEEP = {
    "continuous vp": D.ContinuousVP(),
    "vp interpolant": D.Interpolant("vp"),
    "linear with gamma": D.Interpolant("linear", gamma=(0.0, 0.1)),
    "flow": D.Flow(),
}


@pytest.mark.parametrize("name", STEEP)
def test_velocity_has_its_limit_at_the_clean_row(name):
    """x_0 = x_t there, whatever the network says."""
    path = STEEP[name]
    prediction, x = D.velocity(path), np.linspace(-1, 1, 4)
    for t in (path.t_clean, jnp.full(4, path.t_clean)):
        np.testing.assert_array_equal(prediction.to_x0(np.full(4, 3.0), x, t), x.astype(np.asarray(t).dtype))
        np.testing.assert_array_equal(prediction.gain(t), 0)


@pytest.mark.parametrize("path", [D.Flow(), D.Interpolant("linear"), D.Interpolant("gvp")])
def test_time_has_a_gradient_at_the_clean_end(path):
    gradient = jax.grad(path.time)
    slopes = [float(gradient(jnp.float32(ratio))) for ratio in (0.0, 1e-30, 1e-3)]
    np.testing.assert_allclose(slopes, slopes[-1], rtol=3e-3)
    assert float(gradient(jnp.float32(jnp.inf))) == 0


def test_a_plain_denoiser_may_answer_in_bfloat16():
    grid, x_T = D.make_grid(D.Flow(), 2), jnp.ones((1, 4, 4, 1))
    for name in D.solvers.SOLVERS:
        denoise = D.Denoiser(lambda x, t: (0.5 * x).astype(jnp.bfloat16), D.Flow())
        plain = denoise if name in NEED_A_PATH else denoise.function
        run = jax.eval_shape(lambda x: D.sample(KEY, plain, D.solvers.make(name), grid, x), x_T)  # noqa: B023
        assert run.dtype == jnp.float32


NEED_A_PATH = (
    "dpmpp_sde",
    "heun",
    "dpm2",
    "dpm2_ancestral",
    "pndm",
    "tcd",
    "flow_euler",
    "flow_heun",
    "sit_sde",
    "restart",
)


def test_channels_first_is_recognised_on_oblong_images_too():
    grid = D.make_grid(D.Flow(), 1)
    for shape in ((1, 3, 32, 32), (1, 4, 64, 96), (1, 16, 24, 24)):
        with pytest.raises(InvalidArgumentError, match=r"looks like \[B, C, H, W\]"):
            D.sample(KEY, D.gaussian_denoiser(D.Flow()), D.solvers.ddim(), grid, jnp.ones(shape))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: D.solvers.make("math:sqrt"), InvalidArgumentError, "cannot be made so"),
        (lambda: D.solvers.make("..math:sqrt"), InvalidArgumentError, "package.module:function"),
        (lambda: D.solvers.make(["ddim"]), UnknownNameError, "did you mean 'ddim'"),
        (lambda: D.solvers.make("restart", solver=[1]), InvalidArgumentError, "solver must be a solver"),
        (lambda: D.epsilon("path"), InvalidArgumentError, "path must be a path such as"),
        (lambda: D.VP.named("linear", "1000"), InvalidArgumentError, "num_train_timesteps must be"),
        (lambda: D.VP.named("linear", 1000.0), InvalidArgumentError, "write num_train_timesteps=1000"),
        (lambda: D.VP.named("linear", beta_start="x"), InvalidArgumentError, "beta_start must be"),
        (lambda: D.make_grid(D.Flow(), 5, "traling"), UnknownNameError, "did you mean 'trailing'"),
        (
            lambda: D.leading(D.VP.named("linear"), 1000, offset=1),
            InvalidArgumentError,
            "ask for 999 or fewer",
        ),
        (
            lambda: D.diffusion_loss(
                KEY, lambda x, t, c: x, D.v(D.Flow()), np.zeros((1, 2, 2, 1), np.float32), noise_offset=np.inf
            ),
            InvalidArgumentError,
            "noise_offset must be",
        ),
        (lambda: jax.jit(D.solvers.ddim)(0.5), InvalidArgumentError, "known before anything is compiled"),
    ],
)
def test_misuse(call, error, words):
    with pytest.raises(error, match=words):
        call()
