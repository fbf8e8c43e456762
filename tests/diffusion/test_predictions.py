import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from every_prediction import predictions_on
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError, UnknownNameError

PATHS = {
    "vp": D.VP(D.linear_betas()),
    "zero_snr": D.VP(D.rescale_zero_terminal_snr(D.linear_betas())),
    "edm": D.EDM(),
    "flow": D.Flow(),
    "gvp": D.Interpolant("gvp"),
    "gamma": D.Interpolant("linear", gamma=(0.01, 0.1)),
}
EVERY = [
    pytest.param(prediction, id=f"{prediction.name}-{name}")
    for name, path in PATHS.items()
    for prediction in predictions_on(path)
]
every_prediction = pytest.mark.parametrize("prediction", EVERY)
KEY = jax.random.key(0)


def noised(seed, alpha, sigma, shape=(3, 2, 2, 1)):
    x_0, epsilon = np.random.default_rng(seed).standard_normal((2, *shape))
    return x_0, epsilon, alpha * x_0 + sigma * epsilon


def inside(path, part):
    return path.t_min + part * (path.t_noisy - path.t_min)


@every_prediction
@given(part=st.floats(0.01, 0.99), seed=st.integers(0, 2**32 - 1))
def test_round_trips(prediction, part, seed):
    path = prediction.path
    t = inside(path, part)
    x_0, epsilon, x_t = noised(seed, path.alpha(t), path.sigma(t))
    output = prediction.target(x_0, epsilon, t)
    np.testing.assert_allclose(prediction.to_x0(output, x_t, t), x_0, atol=1e-9)
    np.testing.assert_allclose(D.from_x0(prediction, x_0, x_t, t), output, atol=1e-9)
    # And from any prediction to any other, by way of x_0.
    for other in predictions_on(path):
        converted = D.from_x0(other, prediction.to_x0(output, x_t, t), x_t, t)
        np.testing.assert_allclose(converted, other.target(x_0, epsilon, t), atol=1e-9)


@every_prediction
def test_one_time_per_image(prediction):
    path = prediction.path
    t = inside(path, np.array([0.1, 0.5, 0.8]))
    alpha, sigma = (of(t).reshape(3, 1, 1, 1) for of in (path.alpha, path.sigma))
    x_0, epsilon, x_t = noised(0, alpha, sigma)
    together = prediction.target(x_0, epsilon, t)
    for k in range(3):
        alone = slice(k, k + 1)
        np.testing.assert_allclose(
            together[alone], prediction.target(x_0[alone], epsilon[alone], t[k]), rtol=1e-12
        )
    device = prediction.to_x0(jnp.asarray(together), jnp.asarray(x_t), jnp.asarray(t))
    # In float32 x_0 = (x_t - sigma eps) / alpha keeps as many digits as alpha / sigma leaves.
    np.testing.assert_allclose(device, x_0, atol=1e-5 * max(1, np.max(sigma / alpha)))


def test_v_is_that_of_diffusers():
    path, reference = PATHS["vp"], diffusers.DDPMScheduler()
    timesteps = np.array([0, 400, 999])
    x_0, epsilon, _ = noised(1, 1, 0)
    expected = reference.get_velocity(
        torch.from_numpy(x_0), torch.from_numpy(epsilon), torch.from_numpy(timesteps)
    )
    ours = D.v(path).target(x_0, epsilon, timesteps)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_v_is_the_derivative_along_the_angle(x64):
    x_0, epsilon, _ = noised(2, 1, 0)
    path, t = PATHS["vp"], 300.0
    angle = np.arctan2(path.sigma(t), path.alpha(t))
    derivative = jax.jvp(lambda a: jnp.cos(a) * x_0 + jnp.sin(a) * epsilon, (angle,), (1.0,))[1]
    np.testing.assert_allclose(D.v(path).target(x_0, epsilon, t), derivative)


@pytest.mark.parametrize("name", ["edm", "flow", "gvp", "gamma"])
def test_velocity_is_the_derivative_along_the_path(x64, name):
    x_0, epsilon, _ = noised(3, 1, 0)
    path, t = PATHS[name], jnp.float64(0.3)
    derivative = jax.jvp(lambda t: path.alpha(t) * x_0 + path.sigma(t) * epsilon, (t,), (jnp.float64(1.0),))[
        1
    ]
    np.testing.assert_allclose(D.velocity(path).target(x_0, epsilon, t), derivative)
    if name == "flow":
        np.testing.assert_allclose(D.flow(path).target(x_0, epsilon, t), derivative)


def test_edm_is_table_1():
    """x_0 = c_skip x + c_out F(c_in x, c_noise), each written out (Karras et al. 2022)."""
    prediction, d = D.edm(D.EDM(), 0.7), 0.7
    t = np.array([0.002, 0.3, 80.0], np.float32)
    x, output, _ = noised(4, 1, 0)
    s = t.astype(np.float64).reshape(3, 1, 1, 1)
    expected = d**2 / (s**2 + d**2) * x + s * d / np.sqrt(s**2 + d**2) * output
    np.testing.assert_allclose(prediction.to_x0(output, x, t.astype(np.float64)), expected, rtol=1e-10)
    seen, noise = prediction.precondition(jnp.asarray(x, jnp.float32), jnp.asarray(t))
    np.testing.assert_allclose(seen, x / np.sqrt(s**2 + d**2), rtol=1e-5)
    np.testing.assert_allclose(noise, np.log(t) / 4, rtol=1e-6)
    assert np.isfinite(prediction.precondition(jnp.ones((1, 2)), jnp.zeros(1))[1]).all()


@every_prediction
@given(part=st.floats(0.01, 0.99))
def test_how_an_error_of_the_output_moves_x0(prediction, part):
    t = inside(prediction.path, part)
    slope = prediction.to_x0(1.0, 0.3, t) - prediction.to_x0(0.0, 0.3, t)
    assert prediction.gain(t) == pytest.approx(abs(slope), rel=1e-6)


@pytest.mark.parametrize("maker", [D.x0, D.v, D.flow, D.velocity])
@pytest.mark.parametrize("path", [PATHS["zero_snr"], PATHS["flow"], PATHS["gvp"]])
def test_finite_where_nothing_is_left_of_the_image(maker, path):
    if maker is D.velocity and path.num_train_timesteps is not None:
        return
    x_0, epsilon, x_t = noised(4, 0, 1)
    prediction, t = maker(path), path.t_noisy
    output = prediction.target(x_0, epsilon, t)
    np.testing.assert_allclose(prediction.to_x0(output, x_t, t), x_0, atol=1e-12)
    assert np.isfinite(prediction.gain(t))


@every_prediction
def test_finite_where_no_noise_is_left(prediction):
    x_0, _, x_t = noised(5, 1, 0)
    t = prediction.path.t_clean
    output = D.from_x0(prediction, x_0, x_t, t)
    assert np.isfinite(output).all()
    np.testing.assert_allclose(prediction.to_x0(output, x_t, t), x_0, atol=1e-12)


@every_prediction
def test_the_exact_network_gives_the_exact_denoiser(x64, prediction):
    """`denoiser` is the inverse of the exact output, whatever the network's input is scaled by."""
    path = prediction.path
    exact = D.gaussian_denoiser(path, 0.3, 0.5)
    x, t = jnp.linspace(-2, 2, 12).reshape(3, 4), jnp.asarray(inside(path, np.array([0.1, 0.5, 0.9])))
    seen, network_t = prediction.precondition(x, t)

    def network(given, given_t):
        np.testing.assert_array_equal(given, seen)
        np.testing.assert_array_equal(given_t, network_t)
        return D.from_x0(prediction, exact(x, t), x, t)

    np.testing.assert_allclose(D.denoiser(network, prediction)(x, t), exact(x, t), rtol=1e-8, atol=1e-10)

    def with_variance(given, given_t):
        output = network(given, given_t)
        return jnp.concatenate([output, jnp.zeros_like(output)], axis=-1)

    learned = D.denoiser(with_variance, prediction, learned_variance=True)
    np.testing.assert_allclose(learned(x, t), exact(x, t), rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(learned.with_variance(x, t)[1], 0.5)


def test_equal_calls_give_equal_values():
    for name in D.PREDICTIONS:
        path = D.EDM() if name == "edm" else D.ContinuousVP()
        again = D.EDM(sigma_max=80) if name == "edm" else D.ContinuousVP(beta_max=20)
        first, second = D.prediction(name, path), D.prediction(name, again)
        assert first == second and hash(first) == hash(second) and first.name == name
        assert first != D.prediction(
            name, D.EDM(sigma_max=9) if name == "edm" else D.ContinuousVP(beta_max=9)
        )
    assert D.edm(D.EDM(), 0.7) != D.edm(D.EDM()) and D.v(D.Flow()) != D.flow(D.Flow())


@pytest.mark.parametrize("path", [PATHS["zero_snr"], PATHS["flow"]])
def test_epsilon_is_refused_where_the_path_ends_in_noise(path):
    with pytest.raises(InvalidArgumentError, match="v_prediction"):
        D.epsilon(path)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: D.velocity(PATHS["vp"]), "v_prediction"),
        (lambda: D.velocity(D.Cosine()), "stands still at its noisy end"),
        (lambda: D.edm(PATHS["vp"]), "got a vp path"),
        (lambda: D.edm(PATHS["edm"], 0.0), "sigma_data > 0"),
        (lambda: D.prediction("flow", PATHS["flow"], sigma_data=0.5), "no option 'sigma_data'"),
        (lambda: D.denoiser(lambda x, t: x, "epsilon"), "prediction must be a prediction"),
        (
            lambda: D.diffusion_loss(KEY, lambda x, t, c: x, "epsilon", jnp.ones((2, 3))),
            "prediction must be a prediction",
        ),
        (
            lambda: D.denoiser(lambda x, t: jnp.tile(x, 2), D.v(PATHS["vp"]))(jnp.ones((2, 4, 4, 3)), 5.0),
            r"learned_variance=True",
        ),
        (
            lambda: D.denoiser(lambda x, t: x, D.v(PATHS["vp"]), learned_variance=True)(
                jnp.ones((2, 3)), 5.0
            ),
            r"must have the shape \(2, 6\), got \(2, 3\)",
        ),
        (
            lambda: D.Denoiser(lambda x, t: x[:1], PATHS["vp"])(jnp.ones((2, 3)), 5.0),
            "must have the shape of x",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(InvalidArgumentError, match=words):
        make()


def test_unknown_prediction():
    with pytest.raises(UnknownNameError, match="choose one of epsilon, sample"):
        D.prediction("eps", PATHS["vp"])


def test_epsilon_is_refused_where_float32_holds_no_x_0():
    """abar of these betas is 1e-67; the other predictions draw."""
    path = D.VP(np.linspace(1e-4, 0.3, 1000))
    with pytest.raises(InvalidArgumentError, match="nothing in float32"):
        D.epsilon(path)
    denoise = D.denoiser(lambda x, t: jnp.sin(x), D.v(path))
    grid = D.make_grid(path, 5, spacing="trailing")
    x = D.initial_noise(jax.random.key(0), (1, 2, 2, 1), grid)
    for solver in (D.solvers.dpmpp_2m(), D.solvers.unipc(), D.solvers.dpm_2m()):
        assert np.isfinite(D.sample(jax.random.key(0), denoise, solver, grid, x)).all()
