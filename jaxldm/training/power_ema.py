"""Moving averages of power-function profiles, and any profile from those that were kept, afterwards.

An average of the profile gamma weighs the parameters of update t, out of T so far, by t^gamma: its length is
a constant share of the training, whatever T is. This relative length sigma is the standard deviation of the
weights as a share of T. Of checkpoints that hold two such averages, any other one is nearly a weighted sum.

Source: Karras et al. 2024 (EDM2, arXiv:2312.02696), section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm.arguments import number, several

LONGEST = 12**-0.5  # the relative length of the average of all updates, gamma = 0
A_LENGTH = number(above=0, below=LONGEST)
SOME_LENGTHS = several(A_LENGTH, "relative lengths such as (0.05, 0.1)")


def gamma_of(relative_length: float) -> float:
    """gamma of the profile t^gamma, from its relative length.

        sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))

    Source: appendix C. The largest root of a cubic.
    """
    inverse = relative_length**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real[np.abs(roots.imag) < 1e-9].max())


def name_of(relative_length: float) -> str:
    """Its entry in `TrainState.averages`."""
    return f"{relative_length:g}"


def update_power_ema(average: Any, params: Any, gamma: float, step: int | Int[Array, ""]) -> Any:
    """The average after one more update, `step` being finished already.

        average <- beta average + (1 - beta) params,  beta = (1 - 1 / t)^(gamma + 1),  t = step + 1

    so the first update forgets the beginning. 1 - beta is computed to float32 rounding, however long the
    training is. Source: appendix C.
    """
    t = jnp.asarray(step, jnp.float32) + 1.0
    new = -jnp.expm1((gamma + 1.0) * jnp.log1p(-1.0 / t))
    return step_towards(average, params, new)


def step_towards(average: Any, params: Any, share: Float[Array, ""]) -> Any:
    """average + share (params - average), in float32 at least; each average keeps its dtype."""

    def step(old, new):
        dtype = jnp.promote_types(old.dtype, jnp.float32)
        wide, new = old.astype(dtype), new.astype(dtype)
        return (wide + share * (new - wide)).astype(old.dtype)

    return jax.tree.map(step, average, params)


def profile_product(t_a: Any, gamma_a: Any, t_b: Any, gamma_b: Any) -> Float[np.ndarray, "..."]:
    """The integral of the product of two profiles, of T = t_a and T = t_b. Source: appendix C."""
    t_a, gamma_a, t_b, gamma_b = (np.asarray(value, np.float64) for value in (t_a, gamma_a, t_b, gamma_b))
    power = np.where(t_a < t_b, gamma_b, -gamma_a)
    above = (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** power
    return np.asarray(above / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b)))


def profile_weights(
    steps: Sequence[int], gammas: Sequence[float], step: int, gamma: float
) -> Float[np.ndarray, " K"]:
    """The weights of K averages, of these steps and profiles, whose sum is nearest to another; they sum to 1.

    Least squares of the profiles, in float64. Source: appendix C.
    """
    t, g = np.asarray(steps, np.float64), np.asarray(gammas, np.float64)
    products = profile_product(t[:, None], g[:, None], t[None, :], g[None, :])
    wanted = profile_product(t, g, float(step), gamma)
    weights = np.linalg.lstsq(products, wanted, rcond=None)[0]
    return weights / weights.sum()
