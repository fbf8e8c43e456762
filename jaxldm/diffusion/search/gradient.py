"""Gradient ascent on a verifier as the image is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Real, ScalarLike

from jaxldm.arguments import array, checked, refuse
from jaxldm.diffusion.classifier_guidance import image_gradient
from jaxldm.diffusion.guidance import check_scale
from jaxldm.diffusion.paths import per_image
from jaxldm.diffusion.search.verifiers import A_VERIFIER, check_verifier
from jaxldm.diffusion.solvers.solver import A_SOLVER, Solver, row
from jaxldm.diffusion.values import equal_by_call


@checked(solver=A_SOLVER, verifier=A_VERIFIER, eta=array(axes=(0, 1)))
@equal_by_call
def gradient_ascent(
    solver: Solver, verifier: Callable[[Any], Any], eta: ScalarLike | Real[Any, " B"]
) -> Solver:
    """A solver that climbs before each step: x <- x + eta grad_x Quality(x_0(x)).

    The gradient goes through the denoiser, so a step costs one evaluation more, and its gradient. Bayes' rule
    with the same verifier is classifier guidance, `D.classifier_guidance(denoise, lambda x, t:
    verifier(denoise(x, t)), w)`: there x_0 moves, by w sigma^2 / alpha times the same gradient (universal
    guidance, Bansal et al. 2023).

    Args:
        solver: that takes the steps.
        verifier: Quality, x_0 [B, H, W, C] -> [B], differentiable. An image's score must depend on that image
            alone.
        eta: not negative, a number or one per image [B]; may be traced. 0 is the solver as it is.

    Raises:
        InvalidArgumentError: eta is NaN, infinite or negative; when it runs, a verifier of another shape.

    >>> import jax
    >>> from jaxldm import diffusion as D
    >>> key, path = jax.random.key(0), D.Flow()
    >>> grid = D.make_grid(path, 8)
    >>> x_T = D.initial_noise(key, (2, 8, 8, 1), grid)
    >>> bright = lambda images: images.sum((1, 2, 3))
    >>> solver = D.search.gradient_ascent(D.solvers.ddim(), bright, eta=0.1)
    >>> x_0 = D.sample(key, D.gaussian_denoiser(path), solver, grid, x_T)
    """
    check_scale("eta", eta, np.inf)
    size = jnp.asarray(eta)  # an argument of the program, where a Python number would be part of it

    def step(state, denoise, grid, i, keys):
        check_verifier(verifier, state.x)
        if size.shape not in ((), state.x.shape[:1]):
            raise refuse("eta", f"one number, or one for each of {len(state.x)} images", eta)
        t = row(grid, i).t
        gradient = image_gradient(lambda x: verifier(denoise(x, t)), state.x)
        moved = state.x + per_image(size.astype(state.x.dtype), state.x) * gradient
        return solver.step(state._replace(x=moved), denoise, grid, i, keys)

    return solver._replace(step=step)
