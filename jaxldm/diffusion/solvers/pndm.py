"""PNDM: pseudo linear multistep and pseudo Runge-Kutta (Liu, Ren, Lin and Zhao 2022)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxldm.arguments import checked, flag
from jaxldm.diffusion.grids import steps_in
from jaxldm.diffusion.predictions import LEVEL_COEFFICIENTS, implied_noise
from jaxldm.diffusion.solvers.multistep import MultistepState, begin, difference, remember
from jaxldm.diffusion.solvers.solver import Row, Solver, is_needed, move, path_of, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import one_of

COMBINES = ("epsilon", "v_prediction")
# Adams-Bashforth on even steps, of order 1 to 4, the latest answer first.
ADAMS_BASHFORTH = (
    (1, 0, 0, 0),
    (3 / 2, -1 / 2, 0, 0),
    (23 / 12, -16 / 12, 5 / 12, 0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@checked(skip_prk_steps=flag)
@equal_by_call
def pndm(skip_prk_steps: bool = True, combine: str = "epsilon") -> Solver:
    """Liu et al. 2022: a classical method averages eps, and the DDIM step ("transfer part") carries it over.

        eps' = (55 eps_i - 59 eps_{i-1} + 37 eps_{i-2} - 9 eps_{i-3}) / 24
        x_s = alpha_s x_0' + sigma_s eps',    x_0' = (x_t - sigma_t eps') / alpha_t

    The weights are those of even steps whatever the grid is, so the method is of second order (their
    theorem); `lms` has weights that know the grid. How the first steps find their past:

    PLMS (`skip_prk_steps=True`, as latent diffusion samples): Adams-Bashforth of order 2, 3 and then 4 after
    a first step by Heun's average of eps at both its ends. That end is then evaluated a second time, at the
    corrected x: N steps take N + 1 evaluations. One step alone is Euler's.

    F-PNDM (`skip_prk_steps=False`, their Algorithm 2): the first three steps are Runge-Kutta steps of four
    evaluations, two of them halfway in t: N steps take N + 9.

    Steps from pure noise (where no eps' moves x_0') and steps onto the clean row (where eps is
    undefined) take neither average. A run that is cut and continued starts again.

    Args:
        skip_prk_steps: see above.
        combine: which answers are averaged. "epsilon" is the paper's. "v_prediction" averages the velocities
            of different times and turns the result into eps with the alpha and sigma of one of them, as
            diffusers does for networks that predict v; that is of first order only.

    Raises:
        UnknownNameError: another combine.
        InvalidArgumentError: when sampling with Runge-Kutta steps, a denoiser that does not know its path.
    """
    one_of("combine", combine, COMBINES)
    coefficients = LEVEL_COEFFICIENTS[combine]

    def output(x_0, x, at):
        """What is averaged, a x_0 + b eps."""
        a, b = coefficients(at.alpha, at.sigma)
        return a * x_0 + b * implied_noise(x_0, x, at.alpha, at.sigma)

    def step(state, denoise, grid, i, keys):
        x, here, there = state.x, row(grid, i), row(grid, i + 1)
        x_0 = denoise(x, here.t)
        answer = output(x_0, x, here)
        pure_noise = (here.alpha == 0) & (combine == "epsilon")
        # d x_0 / d output; no change of eps moves x_0 at pure noise.
        alpha = jnp.where(pure_noise, 1, here.alpha)
        a, b = coefficients(alpha, here.sigma)
        factor = jnp.where(pure_noise, 0, here.sigma / (alpha * b - here.sigma * a))

        def transfer(change, to):
            """From x to row `to`, with the answer changed by that much."""
            return move(x, x_0 - factor * change, here, to)

        def change_at(x, at):
            return output(denoise(x, at.t), x, at) - answer

        def multistep():
            weights = jnp.asarray(ADAMS_BASHFORTH, x.dtype)[jnp.minimum(state.taken, 3)]
            return transfer(difference(list(weights), answer, state.past), there)

        def heun():
            return transfer(change_at(transfer(0.0, there), there) / 2, there)

        def runge_kutta():
            path = path_of(denoise, "pndm with Runge-Kutta steps")
            t = (here.t + there.t) / 2
            middle = Row(t, path.alpha(t), path.sigma(t))
            second = change_at(transfer(0.0, middle), middle)
            third = change_at(transfer(second, middle), middle)
            fourth = change_at(transfer(third, there), there)
            return transfer((2 * second + 2 * third + fourth) / 6, there)

        starts = (there.sigma > 0) & (here.sigma > 0) & ~pure_noise
        if skip_prk_steps:
            first, start = starts & (state.taken == 0) & (i < steps_in(grid) - 1), heun
        else:
            first, start = starts & (state.taken < 3), runge_kutta
        started = jax.lax.cond(is_needed(denoise, first), start, lambda: x)
        x = jnp.where(first, started, multistep())
        return MultistepState(x, remember(answer, state.past), state.taken + 1), x_0

    return Solver(lambda x: begin(x, 3), step)
