"""Search over paths: half-drawn images branch, and the best branches go on (Ma et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxldm.arguments import a_key, checked, count
from jaxldm.diffusion.compiling import traced
from jaxldm.diffusion.denoiser import A_DENOISER
from jaxldm.diffusion.grids import A_GRID, Grid, steps_in
from jaxldm.diffusion.sampling import Keys, a_shape, begin, sample_step
from jaxldm.diffusion.search.candidates import (
    Found,
    candidate_keys,
    mapped_axes,
    pick,
    rank,
    round_keys,
    run,
    seen,
    with_candidates,
)
from jaxldm.diffusion.search.verifiers import A_VERIFIER, check_verifier
from jaxldm.diffusion.solvers.solver import A_SOLVER, Solver, add_noise, noise_like, row
from jaxldm.errors import InvalidArgumentError


@checked(
    key=a_key,
    denoise=A_DENOISER,
    solver=A_SOLVER,
    grid=A_GRID,
    x_T=with_candidates,
    verifier=A_VERIFIER,
    num_children=count(1),
    first=count(1),
    back=count(1),
    forward=count(2),
)
def search_over_paths(
    key: Keys,
    denoise: Callable[[Any, Any], Any],
    solver: Solver,
    grid: Grid,
    x_T: Float[Any, "N B ..."],
    verifier: Callable[[Any], Any],
    *,
    num_children: int,
    first: int,
    back: int = 1,
    forward: int = 2,
) -> Found:
    """N paths, each of which branches into M after every few steps; the best N of N M go on (Ma et al. 2025).

    From row `first` on, in rounds: M times noise is added to each of N images, `back` rows up the grid; each
    child goes `forward` rows down; the verifier sees its x_0, and keeps N of them. It costs
    N first + N M forward rounds evaluations, with rounds = ceil((steps - first) / (forward - back)). A solver
    that remembers steps starts again in each round.

    Args:
        key: one key, or one per image [B].
        denoise: (x, t) -> x_0 for B images.
        solver: from `jaxldm.diffusion.solvers`; deterministic in the paper.
        grid: from `make_grid`.
        x_T: [N, B, H, W, C], from `candidate_noise`.
        verifier: x_0 [B, H, W, C] -> scores [B]. Before the end x_0 is the denoiser's estimate, which is
            blurred at high noise: let `first` be late enough.
        num_children: M.
        first: the row where the search begins, below the number of steps.
        back: rows that noise is added over, at most `first`.
        forward: rows down in a round, more than `back`.

    Returns:
        The N survivors, best first.

    Raises:
        InvalidArgumentError: rows that do not fit the grid or each other; a verifier that gives another
            shape, or NaN for all survivors of an image.
    """
    grid, x_T = begin(denoise, grid, x_T, axes=2)
    steps, (num, batch) = grid.t.shape[0] - 1, x_T.shape[:2]
    last = steps if traced(grid) else int(steps_in(grid))
    if not back <= first < last:
        raise InvalidArgumentError(
            f"first must be a row from back={back} to {last - 1} of a grid of {last} steps, got {first}"
        )
    if forward <= back:
        raise InvalidArgumentError(f"forward must be more than back={back}, got {forward}")
    check_verifier(verifier, x_T[0])
    a_shape("num_children and x_T", (num_children, *x_T.shape))

    def search(keys, grid, x_T):
        sample_rows = _sampler(denoise, solver, grid)

        def one_round(carry, j):
            here = first + j * (forward - back)
            own = round_keys(keys, j)

            def branch(x, scores):
                x = jnp.repeat(x, num_children, axis=0)
                x = add_noise(x, row(grid, here), row(grid, here - back), jax.vmap(noise_like)(own, x))
                state, x_0 = sample_rows(own, x, here - back, forward)
                scores = jax.vmap(verifier)(x_0).astype(x.dtype)
                return pick((state.x, scores), rank(scores, num), scores.shape)

            return jax.lax.cond(here < steps_in(grid), branch, lambda *same: same, *carry), None

        x = sample_rows(keys[:num], x_T, 0, first)[0].x
        rounds = -(-(steps - first) // (forward - back))
        carry = x, jnp.full((num, batch), jnp.nan, x.dtype)
        (x, scores), _ = jax.lax.scan(one_round, carry, jnp.arange(rounds, dtype=jnp.int32))
        return Found(x[0], scores[0], x, scores)

    found = run(search, candidate_keys(key, num * num_children, batch), grid, x_T)
    return seen(found, found.scores)


def _sampler(denoise: Any, solver: Solver, grid: Grid) -> Callable[[Any, Any, Any, int], tuple[Any, Any]]:
    """(keys [N, B], x [N, B, ...], first row, number of steps) -> (state, x_0), x_0 what the verifier sees.

    Steps behind the last row are skipped.
    """

    def mapped(keys, state, axes, i):
        one = lambda keys, state: sample_step(keys, denoise, solver, grid, state, i)  # noqa: E731
        return jax.vmap(one, in_axes=(0, axes), out_axes=(axes, 0))(keys, state)

    def advance(keys, state, axes, x_0, i):
        def step(state, x_0):
            state, x_0 = mapped(keys, state, axes, i)
            return state, jnp.where(i + 1 == steps_in(grid), state.x, x_0)

        return jax.lax.cond(i < steps_in(grid), step, lambda *same: same, state, x_0)

    def sample_rows(keys, x, start, count):
        axes = mapped_axes(solver.init, lambda state, axes: mapped(keys, state, axes, jnp.int32(0)), x)

        def body(carry, i):
            state, x_0 = carry
            return advance(keys, state, axes, x_0, i), None

        rows = start + jnp.arange(count, dtype=jnp.int32)
        return jax.lax.scan(body, (jax.vmap(solver.init, out_axes=axes)(x), x), rows)[0]

    return sample_rows
