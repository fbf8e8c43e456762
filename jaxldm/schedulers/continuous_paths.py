"""Files of schedulers of continuous paths that are no flow: score-based, consistency and audio models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxldm import diffusion as D
from jaxldm.diffusion.paths import per_image
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import CheckpointError
from jaxldm.schedulers.entries import PLACE
from jaxldm.schedulers.grids import GridRule

# Of "consistency": the network's time is 1000 ln(sigma) / 4, as the authors' program rescales it.
_TIME_SCALE = 250.0


def read_continuous_vp(name: str, config: Mapping[str, Any]) -> tuple[D.Prediction, GridRule, None]:
    """ScoreSdeVpScheduler."""
    path = D.ContinuousVP(
        beta_min=config.get("beta_min", 0.1),
        beta_max=config.get("beta_max", 20.0),
        t_min=config.get("sampling_eps", 1e-3),
    )
    grid = GridRule(spacing=config.get("_spacing", "linspace"))
    return D.prediction(config.get("_prediction_type", "epsilon"), path), grid, None


def read_cosine(name: str, config: Mapping[str, Any]) -> tuple[D.Prediction, GridRule, None]:
    """DDPMWuerstchenScheduler."""
    path = D.Cosine(offset=config.get("s", 0.008), scaler=config.get("scaler", 1.0))
    grid = GridRule(spacing=config.get("_spacing"), final=config.get("_final", "sigma_min"))
    return D.prediction(config.get("_prediction_type", "epsilon"), path), grid, None


def read_consistency(name: str, config: Mapping[str, Any]) -> tuple[D.Prediction, GridRule, None]:
    """CMStochasticIterativeScheduler: a consistency model, whose run ends at sigma_min."""
    path = D.EDM(sigma_min=config.get("sigma_min", 0.002), sigma_max=config.get("sigma_max", 80.0))
    grid = GridRule(
        spacing="consistency",
        original_steps=config.get("num_train_timesteps", 40),
        rho=config.get("rho", 7.0),
        final="sigma_min",
    )
    return consistency(path, float(config.get("sigma_data", 0.5))), grid, None


def read_score(name: str, config: Mapping[str, Any]) -> tuple[D.Prediction, GridRule, None]:
    """ScoreSdeVeScheduler: levels from sigma_max to sigma_min (sigma_max / sigma_min)^sampling_eps."""
    path = D.EDM(sigma_min=config.get("sigma_min", 0.01), sigma_max=config.get("sigma_max", 1348.0))
    eps = config.get("sampling_eps", 1e-5)
    if not eps < 1:
        raise CheckpointError(f"{PLACE} has sampling_eps {eps:g}: it must be less than 1")
    last = path.sigma_min * (path.sigma_max / path.sigma_min) ** eps
    return score(path), GridRule(levels="exponential", level_min=last), None


def read_gvp(name: str, config: Mapping[str, Any]) -> tuple[D.Prediction, GridRule, None]:
    """IPNDMScheduler: alpha = cos(pi t / 2), of which the network predicts v (Dance Diffusion)."""
    if config.get("trained_betas") is not None:
        raise CheckpointError(
            f"{PLACE} has trained_betas, which {name} takes for the rows of every run: they are not "
            "known here, leave them out and name a number of steps"
        )
    return D.v(D.Interpolant("gvp")), GridRule(spacing="sine_squared"), None


@equal_by_call
def consistency(path: D.EDM, sigma_data: float = 0.5) -> D.Prediction:
    """The output is F of a consistency model on EDM's path (Song et al. 2023, appendix C); d = sigma_data.

        x_0 = c_skip x + c_out F(c_in x, 250 ln t),  c_skip = d^2 / ((t - sigma_min)^2 + d^2),
        c_out = d (t - sigma_min) / sqrt(t^2 + d^2),  c_in = 1 / sqrt(t^2 + d^2)

    so that x_0 = x at sigma_min. The formula is that of `few_steps.edm_consistency_model`.
    """
    low = path.sigma_min

    def coefficients(t):
        rest = t - low
        return sigma_data**2 / (rest**2 + sigma_data**2), sigma_data * rest / (t**2 + sigma_data**2) ** 0.5

    def precondition(x_t, t):
        t = jnp.asarray(t)
        time = _TIME_SCALE * jnp.log(jnp.maximum(t, jnp.finfo(t.dtype).tiny))
        return x_t / per_image((t**2 + sigma_data**2) ** 0.5, x_t), time

    def to_x0(output, x_t, t):
        skip, out = coefficients(t)
        return per_image(skip, x_t) * x_t + per_image(out, x_t) * output

    def target(x_0, epsilon, t):
        skip, out = coefficients(t)
        x_t = x_0 + per_image(t, x_0) * epsilon
        return (x_0 - per_image(skip, x_0) * x_t) / per_image(out, x_0)

    return D.Prediction(
        "consistency", path, precondition, to_x0, target, lambda t: abs(coefficients(t)[1]), sigma_data
    )


@equal_by_call
def score(path: D.Path) -> D.Prediction:
    """The output is the gradient of log p(x_t), -eps / sigma: x_0 = (x_t + sigma^2 output) / alpha."""

    def to_x0(output, x_t, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        return (x_t + per_image(sigma**2, x_t) * output) / per_image(alpha, x_t)

    def target(x_0, epsilon, t):
        sigma = path.sigma(t)
        return -epsilon / per_image(np.where(sigma == 0, 1, sigma), epsilon)

    return D.Prediction(
        "score",
        path,
        lambda x_t, t: (x_t, t),
        to_x0,
        target,
        lambda t: path.sigma(t) ** 2 / path.alpha(t),
    )
