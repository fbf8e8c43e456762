"""Inpainting by a network that was not trained for it: RePaint (Lugmayr et al. 2022)."""

from __future__ import annotations

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxldm.arguments import array, checked, count, optional
from jaxldm.diffusion.grids import A_GRID, Grid
from jaxldm.diffusion.solvers.restart import restart
from jaxldm.diffusion.solvers.solver import A_SOLVER, Solver, noise_like, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import InvalidArgumentError
from jaxldm.exact import MAX_STEPS
from jaxldm.pixels import check_not_pixels

# Folded into the key of a step; no solver reaches this number for its own noises.
_KNOWN_NOISE = 2**32 - 2


@checked(solver=A_SOLVER, image=array("any"), mask=array("any"), noise=optional(array("any")))
@equal_by_call
def inpaint(
    solver: Solver,
    image: Float[ArrayLike, " ..."],
    mask: Float[ArrayLike, " ..."],
    noise: Float[ArrayLike, " ..."] | None = None,
) -> Solver:
    """A solver that puts the known part of an image back after each step (Lugmayr et al. 2022, Algorithm 1).

        x_s = m (alpha_s image + sigma_s z) + (1 - m) x_s(solver)

    Where the grid rises, noise is added instead, as by `restart`, and the solver starts again: a grid from
    `resampling_grid` goes back and forth, so that both parts come to agree. A mask of ones gives the image
    itself; a mask of zeros, on a grid that falls, is the solver as it is.

    Args:
        solver: any; the paper's is `ddpm()`.
        image: x_0 where it is known, [B, H, W, C] or [H, W, C]; its other numbers must be finite.
        mask: m, 1 where the image is known and 0 where it is to be drawn; broadcast to the image, so one of
            [H, W, 1] will do.
        noise: z of every step, [B, H, W, C], as diffusers' inpainting pipelines have it; None: drawn in each.

    Raises:
        InvalidArgumentError: a mask outside [0, 1], an image that is not finite, or shapes that do not fit.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import diffusion as D
    >>> path, key = D.Flow(), jax.random.key(0)
    >>> grid = D.resampling_grid(D.make_grid(path, 20), jump_length=5, resamplings=3)
    >>> left_half = (jnp.arange(8) < 4).astype(jnp.float32)[None, :, None]
    >>> solver = D.inpaint(D.solvers.ddpm(), jnp.ones((8, 8, 1)), left_half)
    >>> x_0 = D.sample(key, D.gaussian_denoiser(path), solver, grid, D.initial_noise(key, (2, 8, 8, 1), grid))
    >>> bool((x_0[:, :, :4] == 1).all())
    True
    """
    _check_known(image, mask)

    def step(state, denoise, grid, i, keys):
        (state, x_0), there = solver.step(state, denoise, grid, i, keys), row(grid, i + 1)
        x = state.x
        known, m = (_fit(name, value, x) for name, value in (("image", image), ("mask", mask)))
        if noise is None:
            z = noise_like(jax.vmap(jax.random.fold_in, (0, None))(keys, np.uint32(_KNOWN_NOISE)), x)
        else:
            z = _fit("noise", jnp.asarray(noise, x.dtype), x)
        return state._replace(x=m * (there.alpha * known + there.sigma * z) + (1 - m) * x), x_0

    return restart(solver._replace(step=step))


@checked(grid=A_GRID, jump_length=count(1), resamplings=count(1))
def resampling_grid(grid: Grid, jump_length: int = 10, resamplings: int = 10) -> Grid:
    """The grid with RePaint's jumps back up: its rows fall, rise `jump_length` rows, and fall again.

    Every `jump_length` rows, counted from the last row before the end, the run is taken `resamplings` times
    in all (Lugmayr et al. 2022, section 4.2 and figure 9; 10 and 10 in the paper, for 250 steps). A jump is
    one row of the new grid, because noise added in one go is noise added in j steps.

    Only `inpaint` and `restart` know how to rise: other solvers need a grid that falls.

    Args:
        grid: falling, of N steps, not padded: pad the result.
        jump_length: j, from 1 to N - 1.
        resamplings: r, 1 or more; 1 leaves the grid as it is.

    Raises:
        InvalidArgumentError: a padded grid, or numbers out of range.

    >>> from jaxldm import diffusion as D
    >>> D.resampling_grid(D.make_grid(D.Flow(), 5), jump_length=2, resamplings=2).t
    array([1. , 0.8, 0.6, 1. , 0.8, 0.6, 0.4, 0.2, 0.6, 0.4, 0.2, 0. ],
          dtype=float32)
    """
    steps = len(grid.t) - 1
    if grid.num_steps is not None:
        raise InvalidArgumentError("make the resampling grid before padding it")
    if not 1 <= jump_length < steps:
        raise InvalidArgumentError(
            f"jump_length must be from 1 to {steps - 1}, below the {steps} steps, not {jump_length}"
        )
    if not resamplings >= 1:
        raise InvalidArgumentError(f"resamplings must be at least 1 (no jump), not {resamplings}")
    if resamplings * len(grid.t) > MAX_STEPS:
        raise InvalidArgumentError(
            f"resamplings={resamplings} of {len(grid.t)} rows: more than {MAX_STEPS} steps"
        )
    last = steps - 1  # the cleanest row that is not yet the end
    left = dict.fromkeys(range(last, jump_length - 1, -jump_length), resamplings - 1)
    rows, at = [0], 0
    while at < steps:
        if left.get(at, 0) > 0:
            left[at] -= 1
            at -= jump_length
        else:
            at += 1
        rows.append(at)
    return Grid(*(column[np.array(rows)] for column in grid[:3]), start=grid.start)


def _check_known(image: Float[ArrayLike, " ..."], mask: Float[ArrayLike, " ..."]) -> None:
    if not isinstance(mask, jax.core.Tracer):
        numbers = np.asarray(mask, np.float64)
        if not ((numbers >= 0) & (numbers <= 1)).all():
            raise InvalidArgumentError("a mask holds numbers from 0 (to be drawn) to 1 (known)")
    if not isinstance(image, jax.core.Tracer) and not np.isfinite(np.asarray(image, np.float64)).all():
        raise InvalidArgumentError("the image to inpaint must be finite: put 0 where it is not known")
    check_not_pixels("image", image, drawn=True)


def _fit(name: str, value: Float[ArrayLike, " ..."], x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    try:
        return jnp.broadcast_to(jnp.asarray(value, x.dtype), x.shape)
    except ValueError as error:
        raise InvalidArgumentError(
            f"the {name} to inpaint has shape {np.shape(value)}, which does not fit x of shape {x.shape}"
        ) from error
