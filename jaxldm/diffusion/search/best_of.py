"""Best of N: draw N images for each, and keep the one that the verifier likes best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Float

from jaxldm.arguments import a_key, checked
from jaxldm.diffusion.denoiser import A_DENOISER
from jaxldm.diffusion.grids import A_GRID, Grid
from jaxldm.diffusion.sampling import Keys, begin, sample
from jaxldm.diffusion.search.candidates import (
    Found,
    best_of,
    candidate_keys,
    run,
    seen,
    with_candidates,
)
from jaxldm.diffusion.search.verifiers import A_VERIFIER, check_verifier
from jaxldm.diffusion.solvers.solver import A_SOLVER, Solver


@checked(
    key=a_key, denoise=A_DENOISER, solver=A_SOLVER, grid=A_GRID, x_T=with_candidates, verifier=A_VERIFIER
)
def best_of_n(
    key: Keys,
    denoise: Callable[[Any, Any], Any],
    solver: Solver,
    grid: Grid,
    x_T: Float[Any, "N B ..."],
    verifier: Callable[[Any], Any],
) -> Found:
    """Draws N images for each of B, and returns the one of the highest score (random search, Ma et al. 2025).

    An image that the verifier takes with probability p is found with probability 1 - (1 - p)^N. It costs N
    runs of the network, and N calls of the verifier. A verifier rewards what it is wrong about as well:
    measure what comes out by another one.

    Args:
        key: one key, or one per image [B]; candidate n uses `candidate_keys(key, N, B)[n]`.
        denoise: (x, t) -> x_0 for B images.
        solver: from `jaxldm.diffusion.solvers`.
        grid: from `make_grid`.
        x_T: [N, B, H, W, C], from `candidate_noise`.
        verifier: x_0 [B, H, W, C] -> scores [B]. A candidate with a score of NaN is never chosen.

    Raises:
        InvalidArgumentError: a verifier that gives another shape, or NaN for all candidates of an image.

    >>> import jax
    >>> from jaxldm import diffusion as D
    >>> key, path = jax.random.key(0), D.Flow()
    >>> grid = D.make_grid(path, 4)
    >>> x_T = D.search.candidate_noise(key, (2, 8, 8, 1), grid, num_candidates=3)
    >>> bright = lambda images: images.mean((1, 2, 3))
    >>> found = D.search.best_of_n(key, D.gaussian_denoiser(path), D.solvers.ddim(), grid, x_T, bright)
    >>> bool((found.score == found.scores.max(0)).all())
    True
    """
    grid, x_T = begin(denoise, grid, x_T, axes=2)
    check_verifier(verifier, x_T[0])

    def search(keys, grid, x_T):
        x_0 = jax.vmap(lambda keys, x: sample(keys, denoise, solver, grid, x))(keys, x_T)
        return best_of(x_0, jax.vmap(verifier)(x_0))

    found = run(search, candidate_keys(key, *x_T.shape[:2]), grid, x_T)
    return seen(found, found.scores)
