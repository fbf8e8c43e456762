import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

VP, EDM, FLOW = D.VP(D.linear_betas()), D.EDM(), D.Flow()
ZERO_SNR = D.VP(D.rescale_zero_terminal_snr(D.linear_betas()))
GVP = D.Interpolant("gvp", gamma=(0.001, 0.1))
KEY = jax.random.key(5)
MEAN, STD = 0.3, 0.6
every_path = pytest.mark.parametrize(
    "path", [VP, ZERO_SNR, EDM, FLOW, GVP], ids=["vp", "zero_snr", "edm", "flow", "gvp"]
)
X_0 = jnp.asarray(MEAN + STD * np.random.default_rng(6).standard_normal((2000, 4, 4, 2)), jnp.float32)


def exact(prediction):
    """The network that answers E[x_0 | x_t] in the given prediction, from its preconditioned input."""
    path = prediction.path
    denoise = D.gaussian_denoiser(path, MEAN, STD)

    def network(x, t, condition):
        if prediction.name == "edm":  # c_in x and ln(t) / 4 are what it is given
            t = jnp.exp(4 * t)
            x = x * jnp.sqrt(t**2 + 0.5**2).reshape(-1, 1, 1, 1)
        return D.from_x0(prediction, denoise(x, t), x, t)

    return network


def training_times(path):
    """Quadrature points of the training distribution of t, all of equal weight."""
    middles = (np.arange(4000) + 0.5) / 4000
    edm = np.exp(stats.norm(-1.2, 1.2).ppf(middles))
    return {"vp": np.arange(1000.0), "flow": middles, "gvp_interpolant": middles, "edm": edm}[path.name]


def predictions_on(path):
    names = ["sample", "v_prediction", "flow"]
    names += [] if path.zero_terminal_snr else ["epsilon"]
    names += [] if path.num_train_timesteps is not None else ["velocity"]
    names += ["edm"] if path is EDM else []
    return [D.prediction(name, path) for name in names]


def every_loss(path, x_0, scales, **options):
    """The loss of `scale` times the exact answer, for each prediction: [(prediction, [scales])]."""

    def loss(prediction, scale):
        network = exact(prediction)
        return float(
            D.diffusion_loss(KEY, lambda x, t, c: scale * network(x, t, c), prediction, x_0, **options)[0]
        )

    return [
        (prediction, [loss(prediction, scale) for scale in scales]) for prediction in predictions_on(path)
    ]


@every_path
def test_the_exact_denoiser_reaches_the_least_loss(path):
    t = training_times(path)
    alpha, sigma = path.alpha(t), path.sigma(t)
    least = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)  # Var[x_0 | x_t]
    for prediction, (below, loss, above) in every_loss(path, X_0, [0.95, 1.0, 1.05]):
        per_time = least / prediction.gain(t) ** 2
        # Two sources of chance: which t are drawn, and the 32 squared errors averaged per image.
        error = np.sqrt((np.var(per_time) + np.mean(2 * per_time**2) / 32) / len(X_0))
        assert float(loss) == pytest.approx(per_time.mean(), abs=4 * error), prediction.name
        assert below > loss and above > loss, prediction.name


@every_path
def test_min_snr_weighs_x0_the_same_for_every_prediction(path):
    losses = {
        prediction.name: loss for prediction, (loss,) in every_loss(path, X_0, [1.0], weight=D.min_snr(5.0))
    }
    # That weight is min(SNR, gamma) on the error of x_0, by hand.
    seen = {}

    def spy(x, t, condition):
        seen["t"], seen["x"] = t, x
        return x

    D.diffusion_loss(KEY, spy, D.x0(path), X_0)
    squares = jnp.mean((D.gaussian_denoiser(path, MEAN, STD)(seen["x"], seen["t"]) - X_0) ** 2, (1, 2, 3))
    snr = (path.alpha(seen["t"]) / path.sigma(seen["t"])) ** 2
    assert losses == pytest.approx(
        dict.fromkeys(losses, float(jnp.mean(jnp.minimum(snr, 5.0) * squares))), rel=1e-4
    )
    assert len(losses) == len(predictions_on(path))


def test_edm_network_trained_by_the_loss_is_the_one_that_sampling_preconditions():
    sigma_data = 0.5
    exact_denoise = D.gaussian_denoiser(EDM, MEAN, STD)

    def best(x, noise, condition=None):
        """The F whose preconditioned denoiser is exact, from what F is told: c_in x and ln(sigma)/4."""
        sigma = jnp.exp(4 * noise)
        total = sigma**2 + sigma_data**2
        shape = (-1, 1, 1, 1)
        x = x * jnp.sqrt(total).reshape(shape)
        skipped = (sigma_data**2 / total).reshape(shape) * x
        return (exact_denoise(x, sigma) - skipped) / (sigma * sigma_data / jnp.sqrt(total)).reshape(shape)

    sigma = jnp.array([0.01, 0.7, 30.0])
    np.testing.assert_allclose(
        D.denoiser(best, D.edm(D.EDM(), sigma_data))(X_0[:3], sigma),
        exact_denoise(X_0[:3], sigma),
        rtol=1e-4,
        atol=1e-4,
    )
    losses = {
        scale: float(D.diffusion_loss(KEY, lambda *a, s=scale: s * best(*a), D.edm(EDM, sigma_data), X_0)[0])
        for scale in (0.9, 1.0, 1.1)
    }
    sigma = training_times(EDM)
    least = np.mean(STD**2 * (sigma**2 + sigma_data**2) / ((STD**2 + sigma**2) * sigma_data**2))
    assert losses[1.0] == pytest.approx(least, rel=0.03)
    assert losses[1.0] < min(losses[0.9], losses[1.1])


def test_published_min_snr_weights():
    t = np.arange(1000)
    snr = VP.alpha(t) ** 2 / VP.sigma(t) ** 2
    on_x0 = D.min_snr(5.0)(jnp.asarray(np.log(snr), jnp.float32))
    for prediction, divisor in ((D.x0(VP), 1), (D.epsilon(VP), snr), (D.v(VP), snr + 1)):
        weight = on_x0 * prediction.gain(jnp.asarray(t, jnp.float32)) ** 2
        np.testing.assert_allclose(weight, np.minimum(snr, 5) / divisor, rtol=2e-5)
    assert D.min_snr(5.0)(-jnp.inf) == 0 and D.min_snr(5.0)(jnp.inf) == 5


@pytest.mark.parametrize(("k", "gamma"), [(1.0, 1.0), (1.0, 0.5), (0.1, 2.0)])
def test_p2_on_the_noise_is_the_published_weight(k, gamma):
    """1 / (k + SNR)^gamma, and no weight on the noise at all for gamma = 0."""
    t = np.arange(1000)
    snr = VP.alpha(t) ** 2 / VP.sigma(t) ** 2
    gain = D.epsilon(VP).gain(jnp.asarray(t, jnp.float32)) ** 2
    log_snr = jnp.asarray(np.log(snr), jnp.float32)
    np.testing.assert_allclose(D.p2(k, gamma)(log_snr) * gain, (k + snr) ** -gamma, rtol=1e-4)
    np.testing.assert_allclose(D.p2(k, 0.0)(log_snr) * gain, 1, rtol=1e-4)
    assert D.p2(k, gamma)(jnp.float32(-jnp.inf)) == 0
    assert np.isfinite(D.p2(k, gamma)(jnp.float32(jnp.inf)))
    assert D.p2()(jnp.float32(jnp.inf)) == 1


def test_a_learned_log_variance_is_the_logarithm_of_the_mean_error():
    """The minimiser of error / exp(u) + u at each noise is u = ln E[error]: known for Gaussian data."""
    prediction, steps = D.v(VP), 10
    t = jnp.asarray(np.linspace(50, 950, steps).astype(int), jnp.float32)
    times = lambda key, shape, path: jnp.tile(t, shape[0] // steps)  # noqa: E731
    log_snr = 2 * (jnp.log(VP.alpha(t)) - jnp.log(VP.sigma(t)))

    def loss(table, key):
        u = lambda seen: table[jnp.argmin(jnp.abs(seen[:, None] - log_snr[None]), 1)]  # noqa: E731
        return D.diffusion_loss(key, exact(prediction), prediction, X_0, time=times, log_variance=u)

    def newton(table, key):  # the second derivative at the least is 1 / steps
        gradient, aux = jax.grad(loss, has_aux=True)(table, key)
        return table - steps * gradient, aux["mse"]

    keys = jax.random.split(KEY, 30)
    table, mse = jax.jit(lambda start: jax.lax.scan(newton, start, keys))(jnp.zeros(steps))
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    least = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2) / prediction.gain(t) ** 2
    np.testing.assert_allclose(table, np.log(least), atol=4 * (2 / (200 * 32)) ** 0.5)
    plain = D.diffusion_loss(keys[-1], exact(prediction), prediction, X_0, time=times)[1]["mse"]
    assert float(mse[-1]) == pytest.approx(float(plain), rel=1e-6)  # the plain error is not touched


def test_a_weight_of_ones_own_is_a_function_of_log_snr():
    """SNR as the weight on x_0 is no weight on eps (Ho et al. 2020)."""
    prediction = D.epsilon(VP)
    network = exact(prediction)
    plain, _ = D.diffusion_loss(KEY, network, prediction, X_0)
    weighted, aux = D.diffusion_loss(KEY, network, prediction, X_0, weight=jnp.exp)
    assert float(weighted) == pytest.approx(float(plain), rel=1e-5) and aux["mse"] == plain


def test_the_distribution_of_t_is_an_argument():
    seen = {}

    def spy(x, t, condition):
        seen["t"] = t
        return x

    D.diffusion_loss(KEY, spy, D.flow(FLOW), X_0, time=D.logit_normal(2.0, 0.5))
    assert stats.kstest(np.log(seen["t"] / (1 - seen["t"])), stats.norm(2.0, 0.5).cdf).pvalue > 1e-3
    D.diffusion_loss(KEY, spy, D.flow(FLOW), X_0, time=lambda key, shape, path: jnp.full(shape, 0.25))
    assert (seen["t"] == 0.25).all()


def test_noise_offset_moves_the_noise_and_stays_in_the_target():
    seen = {}

    def knows_the_noise(x, t, condition):
        seen["epsilon"] = x / VP.sigma(t).reshape(-1, 1, 1, 1)  # the images below are black
        return seen["epsilon"]

    black = jnp.zeros_like(X_0)
    loss, _ = D.diffusion_loss(KEY, knows_the_noise, D.epsilon(VP), black, noise_offset=0.5)
    assert loss < 1e-9
    means = seen["epsilon"].mean((1, 2))  # one number per image and channel
    assert float(means.var()) == pytest.approx(0.5**2 + 1 / 16, rel=0.08)
    assert abs(float(jnp.corrcoef(means.T)[0, 1])) < 0.08  # its own per channel
    D.diffusion_loss(KEY, knows_the_noise, D.epsilon(VP), black)
    assert float(seen["epsilon"].mean((1, 2)).var()) == pytest.approx(1 / 16, rel=0.08)


def test_one_time_per_example():
    seen = []

    def spy(x, t, condition):
        seen.append(t)
        return x

    D.diffusion_loss(KEY, spy, D.epsilon(VP), X_0)
    assert seen[0].shape == (2000,) and len(set(np.asarray(seen[0]))) > 800


def test_condition_dropout():
    seen = {}

    def spy(x, t, condition):
        seen.update(condition)
        return x

    condition = {"label": jnp.arange(2000) % 10, "text": jnp.ones((2000, 3))}
    D.diffusion_loss(
        KEY,
        spy,
        D.epsilon(VP),
        X_0,
        condition,
        null_condition={"label": 10, "text": 0.0},
        condition_dropout=0.2,
    )
    dropped = np.asarray(seen["label"] == 10)
    assert dropped.mean() == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 2000) ** 0.5)
    np.testing.assert_array_equal(seen["label"][~dropped], condition["label"][~dropped])
    np.testing.assert_array_equal(
        seen["text"], np.repeat(1.0 - dropped[:, None], 3, 1)
    )  # both leaves together
    D.diffusion_loss(KEY, spy, D.epsilon(VP), X_0, condition)
    np.testing.assert_array_equal(seen["label"], condition["label"])


def test_loss_is_float32_below_a_bfloat16_network():
    def low(x, t, condition):
        assert x.dtype == t.dtype == jnp.float32
        return x.astype(jnp.bfloat16)

    loss, aux = D.diffusion_loss(KEY, low, D.epsilon(VP), X_0.astype(jnp.bfloat16))
    assert loss.dtype == aux["mse"].dtype == jnp.float32


def test_the_same_key_gives_the_same_loss_and_another_another():
    def loss(key):
        return D.diffusion_loss(key, exact(D.epsilon(VP)), D.epsilon(VP), X_0)[0]

    losses = [float(loss(jax.random.key(k))) for k in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"noise_offset": -0.1}, "noise_offset"),
        (
            {"condition_dropout": 1.5, "condition": jnp.zeros(2), "null_condition": 1.0},
            "condition_dropout must be",
        ),
        ({"condition_dropout": 0.1, "condition": jnp.zeros(2)}, "null_condition"),
        ({"condition_dropout": 0.1, "null_condition": 1.0}, "null_condition"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(InvalidArgumentError, match=words):
        D.diffusion_loss(KEY, lambda x, t, c: x, D.epsilon(VP), X_0[:2], **options)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: D.min_snr(0.0), "gamma"),
        (
            lambda: D.diffusion_loss(KEY, lambda x, t, c: x, D.v(VP), np.zeros((2, 4, 4, 3), np.uint8)),
            r"of uint8: write x / 127\.5 - 1 of 8-bit images",
        ),
        (
            lambda: D.diffusion_loss(KEY, lambda x, t, c: jnp.tile(x, 2), D.v(VP), X_0[:2]),
            r"must have the shape \(2, 4, 4, 2\), got \(2, 4, 4, 4\)",
        ),
    ],
)
def test_what_would_train_something_else_is_refused(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()
