import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxldm import diffusion as D
from jaxldm.diffusion.predictions import x0_error_per_output_error
from jaxldm.errors import InvalidArgumentError

VP, EDM, FLOW = D.vp_path(D.linear_betas()), D.edm_path(), D.flow_path()
ZERO_SNR = D.vp_path(D.rescale_zero_terminal_snr(D.linear_betas()))
KEY = jax.random.key(5)
MEAN, STD = 0.3, 0.6
every_path = pytest.mark.parametrize("path", [VP, ZERO_SNR, EDM, FLOW], ids=["vp", "zero_snr", "edm", "flow"])
X_0 = jnp.asarray(MEAN + STD * np.random.default_rng(6).standard_normal((2000, 4, 4, 2)), jnp.float32)


def exact(path, prediction):
    """The network that answers E[x_0 | x_t] in the given prediction."""
    denoise = D.gaussian_denoiser(path, MEAN, STD)

    def network(x, t, condition):
        return D.from_x0(prediction, denoise(x, t), x, path.alpha(t), path.sigma(t))

    return network


def training_times(path):
    """Quadrature points of the training distribution of t, all of equal weight."""
    middles = (np.arange(4000) + 0.5) / 4000
    return {"vp": np.arange(1000.0), "flow": middles, "edm": np.exp(stats.norm(-1.2, 1.2).ppf(middles))}[
        path.name
    ]


def predictions_on(path):
    return D.PREDICTIONS[1:] if path.zero_terminal_snr else D.PREDICTIONS


def every_loss(path, x_0, scales, **options):
    """The loss of `scale` times the exact answer, for each prediction: {prediction: [scales]}."""

    def loss(prediction, scale):
        network = exact(path, prediction)
        return float(
            D.diffusion_loss(
                KEY, lambda x, t, c: scale * network(x, t, c), path, x_0, prediction=prediction, **options
            )[0]
        )

    return {prediction: [loss(prediction, scale) for scale in scales] for prediction in predictions_on(path)}


@every_path
def test_the_exact_denoiser_reaches_the_least_loss(path):
    t = training_times(path)
    alpha, sigma = path.alpha(t), path.sigma(t)
    least = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)  # Var[x_0 | x_t]
    for prediction, (below, loss, above) in every_loss(path, X_0, [0.95, 1.0, 1.05]).items():
        per_time = least / x0_error_per_output_error(prediction, alpha, sigma) ** 2
        # Two sources of chance: which t are drawn, and the 32 squared errors averaged per image.
        error = np.sqrt((np.var(per_time) + np.mean(2 * per_time**2) / 32) / len(X_0))
        assert float(loss) == pytest.approx(per_time.mean(), abs=4 * error), prediction
        assert below > loss and above > loss, prediction


@every_path
def test_min_snr_weighs_x0_the_same_for_every_prediction(path):
    losses = {name: loss for name, (loss,) in every_loss(path, X_0, [1.0], min_snr_gamma=5.0).items()}
    # That weight is min(SNR, gamma) on the error of x_0, by hand.
    seen = {}

    def spy(x, t, condition):
        seen["t"], seen["x"] = t, x
        return x

    D.diffusion_loss(KEY, spy, path, X_0, prediction="sample")
    squares = jnp.mean((D.gaussian_denoiser(path, MEAN, STD)(seen["x"], seen["t"]) - X_0) ** 2, (1, 2, 3))
    snr = (path.alpha(seen["t"]) / path.sigma(seen["t"])) ** 2
    assert losses == pytest.approx(
        dict.fromkeys(losses, float(jnp.mean(jnp.minimum(snr, 5.0) * squares))), rel=1e-4
    )
    assert set(losses) == set(predictions_on(path))


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
        D.edm_preconditioned(best, sigma_data)(X_0[:3], sigma),
        exact_denoise(X_0[:3], sigma),
        rtol=1e-4,
        atol=1e-4,
    )
    losses = {
        scale: float(
            D.diffusion_loss(KEY, lambda *a, s=scale: s * best(*a), EDM, X_0, sigma_data=sigma_data)[0]
        )
        for scale in (0.9, 1.0, 1.1)
    }
    sigma = training_times(EDM)
    least = np.mean(STD**2 * (sigma**2 + sigma_data**2) / ((STD**2 + sigma**2) * sigma_data**2))
    assert losses[1.0] == pytest.approx(least, rel=0.03)
    assert losses[1.0] < min(losses[0.9], losses[1.1])
    with pytest.raises(InvalidArgumentError, match="edm_path"):
        D.diffusion_loss(KEY, best, VP, X_0, sigma_data=0.5)


def test_published_min_snr_weights():
    t = np.arange(1000)
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    snr = alpha**2 / sigma**2
    alpha, sigma = jnp.asarray(alpha, jnp.float32), jnp.asarray(sigma, jnp.float32)
    for prediction, divisor in (("sample", 1), ("epsilon", snr), ("v_prediction", snr + 1)):
        np.testing.assert_allclose(
            D.min_snr_weight(prediction, alpha, sigma, 5.0), np.minimum(snr, 5) / divisor, rtol=1e-5
        )
    assert D.min_snr_weight("v_prediction", 0.0, 1.0, 5.0) == 0
    assert D.min_snr_weight("sample", 1.0, 0.0, 5.0) == 5


def test_noise_offset_moves_the_noise_and_stays_in_the_target():
    seen = {}

    def knows_the_noise(x, t, condition):
        seen["epsilon"] = x / VP.sigma(t).reshape(-1, 1, 1, 1)  # the images below are black
        return seen["epsilon"]

    black = jnp.zeros_like(X_0)
    loss, _ = D.diffusion_loss(KEY, knows_the_noise, VP, black, noise_offset=0.5)
    assert loss < 1e-9
    means = seen["epsilon"].mean((1, 2))  # one number per image and channel
    assert float(means.var()) == pytest.approx(0.5**2 + 1 / 16, rel=0.08)
    assert abs(float(jnp.corrcoef(means.T)[0, 1])) < 0.08  # its own per channel
    D.diffusion_loss(KEY, knows_the_noise, VP, black)
    assert float(seen["epsilon"].mean((1, 2)).var()) == pytest.approx(1 / 16, rel=0.08)


def test_one_time_per_example():
    seen = []

    def spy(x, t, condition):
        seen.append(t)
        return x

    D.diffusion_loss(KEY, spy, VP, X_0)
    assert seen[0].shape == (2000,) and len(set(np.asarray(seen[0]))) > 800


def test_condition_dropout():
    seen = {}

    def spy(x, t, condition):
        seen.update(condition)
        return x

    condition = {"label": jnp.arange(2000) % 10, "text": jnp.ones((2000, 3))}
    D.diffusion_loss(
        KEY, spy, VP, X_0, condition, null_condition={"label": 10, "text": 0.0}, condition_dropout=0.2
    )
    dropped = np.asarray(seen["label"] == 10)
    assert dropped.mean() == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 2000) ** 0.5)
    np.testing.assert_array_equal(seen["label"][~dropped], condition["label"][~dropped])
    np.testing.assert_array_equal(
        seen["text"], np.repeat(1.0 - dropped[:, None], 3, 1)
    )  # both leaves together
    D.diffusion_loss(KEY, spy, VP, X_0, condition)
    np.testing.assert_array_equal(seen["label"], condition["label"])


def test_loss_is_float32_below_a_bfloat16_network():
    def low(x, t, condition):
        assert x.dtype == t.dtype == jnp.float32
        return x.astype(jnp.bfloat16)

    loss, aux = D.diffusion_loss(KEY, low, VP, X_0.astype(jnp.bfloat16))
    assert loss.dtype == aux["mse"].dtype == jnp.float32


def test_the_same_key_gives_the_same_loss_and_another_another():
    def loss(key):
        return D.diffusion_loss(key, exact(VP, "epsilon"), VP, X_0)[0]

    losses = [float(loss(jax.random.key(k))) for k in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"min_snr_gamma": 0.0}, "min_snr_gamma"),
        ({"noise_offset": -0.1}, "noise_offset"),
        ({"condition_dropout": 1.5, "condition": jnp.zeros(2), "null_condition": 1.0}, "probability"),
        ({"condition_dropout": 0.1, "condition": jnp.zeros(2)}, "null_condition"),
        ({"condition_dropout": 0.1, "null_condition": 1.0}, "null_condition"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(InvalidArgumentError, match=words):
        D.diffusion_loss(KEY, lambda x, t, c: x, VP, X_0[:2], **options)
