"""Beta schedules against diffusers, and against closed forms where diffusers has none or errs."""

import diffusers
import numpy as np
import pytest
from diffusers.schedulers import scheduling_ddpm
from scipy import stats
from scipy.special import expit, logit

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

SCHEDULES = {
    "linear": (
        D.linear_betas(1000, 1e-4, 0.02),
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    ),
    "linear_short": (
        D.linear_betas(300, 5e-4, 0.05),
        {"beta_schedule": "linear", "beta_start": 5e-4, "beta_end": 0.05, "num_train_timesteps": 300},
    ),
    "scaled_linear": (
        D.scaled_linear_betas(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (D.cosine_betas(), {"beta_schedule": "squaredcos_cap_v2"}),
    "sigmoid": (D.sigmoid_betas(), {"beta_schedule": "sigmoid"}),
    "sigmoid_short": (
        D.sigmoid_betas(300, 5e-4, 0.05),
        {"beta_schedule": "sigmoid", "beta_start": 5e-4, "beta_end": 0.05, "num_train_timesteps": 300},
    ),
    "laplace": (D.laplace_betas(square_root=True), {"beta_schedule": "laplace"}),
    "given": (D.linear_betas(50, 0.01, 0.1), {"trained_betas": np.linspace(0.01, 0.1, 50).tolist()}),
}


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_diffusers(name, rescale):
    betas, config = SCHEDULES[name]
    reference = diffusers.DDPMScheduler(**config, rescale_betas_zero_snr=rescale)
    betas = D.rescale_zero_terminal_snr(betas) if rescale else betas
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, reference.betas, rtol=1e-3 if rescale else 1e-6, atol=2e-7)
    path, steps = D.VP(betas), np.arange(len(betas))
    # The reference multiplies in float32: its small alphas_cumprod are off by some 1e-5 of themselves.
    np.testing.assert_allclose(path.alpha(steps) ** 2, reference.alphas_cumprod, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(path.sigma(steps) ** 2, 1 - reference.alphas_cumprod, rtol=1e-3, atol=3e-7)


def test_exponential_betas_are_those_of_diffusers():
    reference = scheduling_ddpm.betas_for_alpha_bar(1000, alpha_transform_type="exp")
    np.testing.assert_allclose(D.exponential_betas(), reference, rtol=1e-6)
    np.testing.assert_allclose(D.exponential_betas(100, 5.0), -np.expm1(-0.05), rtol=1e-12)


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_alphas_cumprod_fall_along_a_sigmoid(tau):
    """Jabri et al.: an affine map of alphas_cumprod is a sigmoid, whose logit is linear in t."""
    alphas_cumprod = np.cumprod(1 - D.sigmoid_alphas_betas(200, tau=tau))[:-1]  # the last beta is clipped
    low, high = expit(-3 / tau), expit(3 / tau)
    t = np.arange(1, 200) / 200
    np.testing.assert_allclose(
        logit(high - alphas_cumprod * (high - low)), (-3 + 6 * t) / tau, rtol=1e-7, atol=1e-7
    )
    assert D.sigmoid_alphas_betas(200, tau=tau)[-1] == 0.999


@pytest.mark.parametrize("mu, b", [(0.0, 0.5), (-1.0, 1.5)])
def test_the_log_snr_of_the_laplace_schedule_is_laplace(mu, b):
    alphas_cumprod = np.cumprod(1 - D.laplace_betas(500, mu, b, max_beta=0.9999999))[:-1]
    t = np.arange(1, 500) / 500
    np.testing.assert_allclose(logit(alphas_cumprod), stats.laplace.ppf(1 - t, mu, b), rtol=1e-9, atol=1e-9)


def test_the_reference_takes_a_root_too_many():
    """Its alpha_bar is the paper's alpha, sqrt(SNR / (1 + SNR)): its log-SNR is not Laplace."""
    reference = diffusers.DDPMScheduler(beta_schedule="laplace").alphas_cumprod.double().numpy()
    ours = np.cumprod(1 - D.laplace_betas())
    at = slice(100, 900)
    np.testing.assert_allclose(reference[at] ** 2, ours[at], rtol=3e-3)
    assert np.abs(reference[at] - ours[at]).max() > 0.2


@pytest.mark.parametrize(
    "betas", [D.linear_betas(), D.scaled_linear_betas(), D.cosine_betas(), D.sigmoid_alphas_betas()]
)
def test_zero_terminal_snr_shifts_and_scales_the_root(betas):
    root = np.sqrt(np.cumprod(1 - betas))
    rescaled = np.sqrt(np.cumprod(1 - D.rescale_zero_terminal_snr(betas)))
    assert rescaled[-1] == 0
    assert rescaled[0] == pytest.approx(root[0], rel=1e-12)
    slopes = np.diff(rescaled) / np.diff(root)  # an affine map has one slope
    np.testing.assert_allclose(slopes, root[0] / (root[0] - root[-1]), rtol=1e-6)
    assert D.VP(D.rescale_zero_terminal_snr(betas)).zero_terminal_snr
    assert not D.VP(betas).zero_terminal_snr


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: D.linear_betas(1000, -1e-4), "beta"),
        (lambda: D.linear_betas(1), "from 2"),
        (lambda: D.sigmoid_alphas_betas(start=1.0, end=1.0), "start < end"),
        (lambda: D.sigmoid_alphas_betas(tau=0.0), "tau > 0"),
        (lambda: D.laplace_betas(b=0.0), "b must be > 0"),
        (lambda: D.betas_from_alpha_bar(lambda t: t), "beta"),
    ],
)
def test_impossible_betas_are_refused(make, words):
    with pytest.raises(InvalidArgumentError, match=words), np.errstate(divide="ignore"):
        make()
