"""Predictor and corrector: steps of the reverse SDE with Langevin steps before them (Song et al. 2021)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxldm.arguments import checked, count, number
from jaxldm.diffusion.paths import per_image
from jaxldm.diffusion.predictions import implied_noise
from jaxldm.diffusion.solvers.solver import Solver, State, divide, noise_like, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import one_of

FORMS = ("exact", "published")
MAX_CORRECT_STEPS = 100


@checked(snr=number(0), correct_steps=count(0, MAX_CORRECT_STEPS))
@equal_by_call
def predictor_corrector(snr: float = 0.15, correct_steps: int = 1, form: str = "exact") -> Solver:
    """Song et al. 2021, algorithms 1 to 3: Langevin steps at row t, then a step of the reverse SDE to row s.

        x <- x + e g + sqrt(2 e) z,   e = 2 (snr sigma_t)^2,   g = (alpha_t x_0 - x) / sigma_t^2
        x_s = (alpha_s / alpha_t) q^2 x + alpha_s (1 - q^2) x_0 + n z,   n = sigma_s sqrt(1 - q^2)

    q = r_s / r_t, r is sigma / alpha, and g the score. Without Langevin steps this is `euler_ancestral`.
    Weak order 1; `correct_steps` + 1 evaluations a step.

    Args:
        snr: the ratio of signal to noise of a Langevin step.
        correct_steps: Langevin steps at each row.
        form: "exact", or "published", that of the paper: e = 2 (snr |z| / |g|)^2, the same for an image of
            many numbers and biased for one of few, and "reverse diffusion" (appendix E), n = alpha_s
            sqrt(r_t^2 - r_s^2), which needs about a thousand rows. At pure noise and onto the clean row n is
            the exact one.

    Raises:
        UnknownNameError: another form.
        InvalidArgumentError: a negative snr; fewer than 0 or more than 100 Langevin steps.
    """
    one_of("form", form, FORMS)

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        x, x_0 = state.x, denoise(state.x, here.t)
        first = x_0
        for k in range(correct_steps):
            g, z = -implied_noise(x_0, x, here.alpha, here.sigma) / here.sigma, noise_like(folded(keys, k), x)
            length = here.sigma if form == "exact" else divide(norms(z), norms(g), 0.0)
            x = langevin_step(x, g, z, snr * length)
            x_0 = denoise(x, here.t)
        q = divide(there.sigma * here.alpha, here.sigma * there.alpha, 0.0)
        kept, rest = there.sigma / here.sigma * q, (1 - q) * (1 + q)
        std = there.sigma * jnp.sqrt(rest)
        if form == "published":
            std = jnp.where(q == 0, std, divide(std, q, 0.0))
        z = noise_like(folded(keys, correct_steps), x)
        return State(kept * x + there.alpha * rest * x_0 + std * z), first

    return Solver(State, step)


def langevin_step(x: Any, g: Any, z: Any, root: Any) -> Float[Array, "B ..."]:
    """x + e g + sqrt(2 e) z, with e = 2 root^2: a number, or one for each image [B]."""
    return x + per_image(2 * root**2, x) * g + per_image(2 * root, x) * z


def norms(x: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """The length of each image."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))


def folded(keys: Key[Array, " B"], k: int) -> Key[Array, " B"]:
    """The keys of the k-th noise of a step."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, np.uint32(k))
