"""Euler's method, and its ancestral form (Karras et al. 2022; k-diffusion)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.arguments import checked, number
from jaxldm.diffusion.solvers.ddim import ddim
from jaxldm.diffusion.solvers.solver import Row, Solver, State, divide, move, noise_like, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import one_of

ANCESTRAL_FORMS = ("karras", "rectified_flow")


@equal_by_call
def euler() -> Solver:
    """Euler's method for d(x/alpha) / d(sigma/alpha) = eps: first order, one evaluation a step.

    The step x_s / alpha_s = x_t / alpha_t + (sigma_s/alpha_s - sigma_t/alpha_t) eps is DDIM's x_s = alpha_s
    x_0 + sigma_s eps. On EDM's path it is Euler in sigma (Karras et al. 2022, Algorithm 1 without its
    correction); on the flow path it is Euler in t, x_s = x_t + (s - t) (eps - x_0).
    """
    return ddim(eta=0.0)


@checked(eta=number(0), s_noise=number(0))
@equal_by_call
def euler_ancestral(eta: float = 1.0, s_noise: float = 1.0, form: str = "karras") -> Solver:
    """k-diffusion's `sample_euler_ancestral` on every path: a longer Euler step, and noise back up.

    The step goes down to a ratio r_down = kept r_s below r_s = sigma_s / alpha_s, and fresh noise raises it
    to row s again, so that x_s = alpha_s x_0 + sigma_s (kept eps + fresh z), kept^2 + fresh^2 = 1: on every
    path the noise in x_s is sigma_s, as the row says.

        karras:          fresh = min(1, eta sqrt(1 - (r_s / r_t)^2))
        rectified_flow:  u_down = u_s (1 + eta (u_s / u_t - 1)),   u = sigma / (alpha + sigma) = r / (1 + r)

    With eta = 1 the first is DDPM's posterior, with eta below 1 it is DDIM(eta). The second divides the flow
    path's time instead of r: ComfyUI's `sample_euler_ancestral_RF`, LTX-Video's default. No noise is added on
    arrival at the clean row.

    Args:
        eta: 0 is Euler's method and draws no noise; above 1 `kept` falls to 0 and stays there.
        s_noise: multiplies the fresh noise.
        form: "karras" or "rectified_flow".

    Raises:
        InvalidArgumentError: eta or s_noise below 0.
        UnknownNameError: another form.
    """
    one_of("form", form, ANCESTRAL_FORMS)

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        x_0 = denoise(state.x, here.t)
        if eta == 0:
            return State(move(state.x, x_0, here, there)), x_0
        kept, fresh = ancestral_split(here, there, eta, form)
        mean = move(state.x, x_0, here, there._replace(sigma=kept * there.sigma))
        return State(mean + s_noise * fresh * there.sigma * noise_like(keys, mean)), x_0

    return Solver(State, step)


def ancestral_split(
    here: Row, there: Row, eta: float, form: str
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(kept, fresh): the noise at row `there` that stays, and that is drawn again; their squares add up to 1.

    Written without 1 - (1 - small), which float32 loses, and finite at both ends of a path.
    """
    if form == "karras":
        q = divide(there.sigma * here.alpha, here.sigma * there.alpha, 0.0)
        kept = jnp.sqrt(jnp.maximum((1 - eta) * (1 + eta) + (eta * q) ** 2, 0))
        return kept, jnp.minimum(eta * jnp.sqrt((1 - q) * (1 + q)), 1)
    u_here, u_there = (at.sigma / (at.alpha + at.sigma) for at in (here, there))
    further = eta * (1 - divide(u_there, u_here, 0.0))  # how far below row s the step goes, as a part of u_s
    further = jnp.minimum(further, 1)
    left = 1 - u_there * (1 - further)
    kept = divide((1 - further) * (1 - u_there), left, 0.0)
    return kept, jnp.sqrt(divide(further, left, 0.0) * (1 + kept))
