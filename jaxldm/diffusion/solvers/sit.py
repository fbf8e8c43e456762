"""SiT's stochastic samplers: the reverse SDE with a diffusion of one's choice (Ma et al. 2024)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.arguments import checked, number, optional, text
from jaxldm.diffusion.paths import Path
from jaxldm.diffusion.predictions import implied_noise
from jaxldm.diffusion.solvers.flow import rates
from jaxldm.diffusion.solvers.solver import Row, Solver, State, noise_like, path_of, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import InvalidArgumentError, one_of

METHODS = ("euler", "heun", "stochastic_heun")
DIFFUSIONS = ("SBDM", "sigma", "linear", "decreasing", "increasing-decreasing", "constant")
LAST_STEPS = ("none", "mean", "tweedie", "euler")


@checked(diffusion=text, last_step=optional(text), norm=number(0))
@equal_by_call
def sit_sde(
    method: str = "euler", diffusion: str = "sigma", norm: float = 1.0, last_step: str | None = "mean"
) -> Solver:
    """SiT's reverse SDE with a diffusion of one's choice: dx = (v - D s) dt + sqrt(2 D) dW.

    Ma et al. 2024, equation 5, with w = 2 D; time runs from noise to data.
    v = alpha' x_0 + sigma' eps is the velocity, s = -eps / sigma the score. Every D >= 0 leaves x_t
    distributed as it should be: 0 is the ODE, a larger one forgets more of the errors made before.

    Args:
        method: "euler": Euler-Maruyama, x - h (v - D s) + sqrt(2 D h) z for a step of length h. Weak order 1.
            "heun": the authors' Heun, all the noise first, then a deterministic step of Heun's. Two
            evaluations, and still weak order 1 (order 2 where D = 0).
            "stochastic_heun": the trapezoid rule for the drift and for D. Two evaluations, weak order 2.
        diffusion: D, see `diffusion_coefficient`.
        norm: a factor on D, 0 or more. With 0 the methods are `flow_euler` and `flow_heun`.
        last_step: how to arrive at the clean row, in one evaluation: "mean" is Euler-Maruyama without its
            noise, "tweedie" takes x_0 itself, "euler" follows the ODE, "none" (or None) keeps the noise.

    Raises:
        UnknownNameError: another method, diffusion or last step.
        InvalidArgumentError: a negative norm; a denoiser that does not know its path.
    """
    one_of("method", method, METHODS)
    # The authors' code spells one of them with two c.
    diffusion = one_of("diffusion", diffusion.replace("incc", "inc"), DIFFUSIONS)
    last_step = one_of("last step", last_step or "none", LAST_STEPS)
    if not 0 <= norm < float("inf"):
        raise InvalidArgumentError(f"sit_sde needs a norm of 0 or more, not {norm}")

    def step(state, denoise, grid, i, keys):
        path, here, there = path_of(denoise, "sit_sde"), row(grid, i), row(grid, i + 1)
        x, h, z = state.x, here.t - there.t, noise_like(keys, state.x) if norm > 0 else 0.0
        D = norm * diffusion_coefficient(diffusion, path, here, there)
        D_there = norm * diffusion_coefficient(diffusion, path, there, here)
        noise = jnp.sqrt((D + D_there if method == "stochastic_heun" else 2 * D) * h) * z
        arrives = there.sigma == 0
        # From pure noise SBDM's D is infinite: nothing stays of x but its x_0.
        forgets = (here.alpha == 0) & (diffusion == "SBDM") & (norm > 0)

        if method == "heun":
            x = x + jnp.where(arrives | forgets, 0, noise)
        x_0 = denoise(x, here.t)
        first = drift(x, x_0, path, here, there, D)

        def trapezoid(x):
            euler = x + h * first + (noise if method == "stochastic_heun" else 0)
            second = drift(euler, denoise(euler, there.t), path, there, here, D_there)
            return x + h / 2 * (first + second)

        mean = x + h * first
        if method != "euler":
            mean = jax.lax.cond(arrives | forgets, lambda x: mean, trapezoid, x)
        last = {
            "none": mean + jnp.sqrt(2 * D * h) * z,
            "mean": mean,
            "tweedie": x_0,
            "euler": x + h * drift(x, x_0, path, here, there, 0.0),
        }[last_step]
        x_s = jnp.where(arrives, last, mean if method == "heun" else mean + noise)
        return State(jnp.where(forgets, there.alpha * x_0 + there.sigma * z, x_s)), x_0

    return Solver(State, step)


def diffusion_coefficient(diffusion: str, path: Path, here: Row, other: Row) -> Float[Array, " ..."]:
    """D at row `here`, per unit of the path's time; Ma et al. 2024, table 2, as w / 2.

    With u = (t - t_clean) / (t_noisy - t_clean), which is 1 minus the authors' time:

        "SBDM": sigma sigma' - sigma^2 alpha'/alpha, half of g(t)^2 of the forward SDE (Song et al. 2021). It
            is infinite at pure noise, and stiff near it: steps h with h D > sigma^2 overshoot.
        "sigma": sigma.
        "linear": u.
        "decreasing": (1 - cos(pi u))^2 / 4.
        "increasing-decreasing": sin^2(pi u).
        "constant": 1, stiff near the clean row: end where sigma^2 is above h, or well before.

    All but the first are per unit of u. The authors' code multiplies the cosine of "decreasing" by the norm,
    which leaves noise at the clean end unless the norm is 1; here the norm multiplies all of it.
    """
    if diffusion == "SBDM":
        alpha_rate, sigma_rate = rates(path, here, other)
        alpha = jnp.where(here.alpha == 0, 1, here.alpha)
        # Never below 0, which only rounding could make it.
        return jnp.maximum(here.sigma * (sigma_rate - here.sigma * alpha_rate / alpha), 0)
    span = path.t_noisy - path.t_clean
    u = (here.t - path.t_clean) / span
    per_unit = {
        "sigma": here.sigma,
        "linear": u,
        "decreasing": (1 - jnp.cos(jnp.pi * u)) ** 2 / 4,
        "increasing-decreasing": jnp.sin(jnp.pi * u) ** 2,
        "constant": jnp.ones_like(u),
    }
    return per_unit[diffusion] / span


def drift(x, x_0, path, here, other, D) -> Any:
    """-v + D s at row `here`: where x goes per unit of time, as time runs from noise to data."""
    alpha_rate, sigma_rate = rates(path, here, other)
    epsilon = implied_noise(x_0, x, here.alpha, here.sigma)
    return -alpha_rate * x_0 - (sigma_rate + D / jnp.where(here.sigma == 0, 1, here.sigma)) * epsilon
