"""Grids: where a sampler stops, as plain arrays, noisiest row first.

A grid is data: cut it (image-to-image, a base model and a refiner), reverse it (inversion), pad it (another
number of steps without compiling again), or edit a column with `grid._replace(...)`; no solver needs to know.
The functions of `spacings` make them, one for each spacing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm.arguments import checked, instance, optional
from jaxldm.arguments import count as a_count
from jaxldm.diffusion.paths import Path
from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.exact import MAX_STEPS

FINALS = ("clean", "sigma_min")


class Grid(NamedTuple):
    """Rows (t, alpha, sigma), noisiest first; N + 1 rows make N steps.

    Attributes:
        t: [N + 1], the time that the network is given.
        alpha: [N + 1].
        sigma: [N + 1]; the last row is (t_clean, 1, 0) unless the grid was made with `final="sigma_min"` or
            cut.
        num_steps: None, or in a padded grid the number of valid steps (the rows behind them are skipped).
        start: the number of this grid's first row in the grid it was cut from. Noise depends on it, so that
            the second part of a cut run draws the numbers that the whole run would have drawn.
    """

    t: Float[np.ndarray, " rows"]
    alpha: Float[np.ndarray, " rows"]
    sigma: Float[np.ndarray, " rows"]
    num_steps: Int[Any, ""] | int | None = None
    start: Int[Any, ""] | int = 0


def A_GRID(name: str, value: Any) -> Any:
    """A grid whose columns are of one length."""
    value = instance(Grid, "a grid such as D.make_grid(path, 50)")(name, value)
    shapes = [np.shape(column) for column in value[:3]]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1 or shapes[0][0] < 1:
        raise InvalidArgumentError(f"the columns of {name} must be [N + 1] numbers each, got shapes {shapes}")
    return value


def grid_of_times(path: Path, t: Float[np.ndarray, " N"], final: str = "clean") -> Grid:
    """The rows of a path at N values of t, float64 on the host, and the last row.

    Args:
        path: any.
        t: noisiest first.
        final: "clean" adds the row alpha = 1, sigma = 0; "sigma_min" adds the row at `path.t_min`, unless t
            ends there.

    Raises:
        InvalidArgumentError: times that are not finite, outside the path, or not strictly falling.
        UnknownNameError: another final.
    """
    one_of("final", final, FINALS)
    if final == "clean":
        t = np.append(t, path.t_clean)
    elif t[-1] != path.t_min:
        t = np.append(t, path.t_min)
    _check_times(path, t)
    return rows_at(path, t)


def rows_at(path: Path, t: Float[np.ndarray, " rows"]) -> Grid:
    """The rows of a path at these t, whatever they are, in float32 (float64 with x64)."""
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    return Grid(*(column.astype(dtype) for column in (t, path.alpha(t), path.sigma(t))))


def check_count(path: Path, count: Any) -> None:
    """Raises `InvalidArgumentError` unless N is a whole number of at least 1 that the path has."""
    count = a_count(1, MAX_STEPS)("num_inference_steps", count)
    if path.num_train_timesteps is not None and count > path.num_train_timesteps:
        raise InvalidArgumentError(
            f"num_inference_steps={count} is more than the {path.num_train_timesteps} "
            "timesteps of this path: ask for that many or fewer"
        )


def _check_times(path: Path, t: Float[np.ndarray, " N"]) -> None:
    if not np.isfinite(t).all():
        raise InvalidArgumentError("the grid holds times that are not finite (NaN or infinity)")
    if t.max() > path.t_noisy or t.min() < path.t_clean:
        raise InvalidArgumentError(
            f"the grid leaves the {path.name} path: its times run from {t.max():g} to "
            f"{t.min():g}, the path's from {path.t_noisy:g} to {path.t_clean:g}"
        )
    if not (np.diff(t) < 0).all():
        raise InvalidArgumentError(
            "the grid must fall strictly, from the noisiest row to the cleanest, with "
            f"no row twice; its times: {np.array2string(t, precision=4, threshold=9)}. Fewer steps, "
            "or another spacing, keep the rows apart"
        )


@checked(grid=A_GRID, max_steps=a_count(1, MAX_STEPS))
def pad(grid: Grid, max_steps: int) -> Grid:
    """Repeats the last row until the grid has `max_steps` steps; `sample` skips the repeated rows.

    Grids padded to one length have one shape, so that a compiled `sample` serves every number of steps.

    Raises:
        InvalidArgumentError: the grid has more steps already, or is padded already.
    """
    steps = len(grid.t) - 1
    if grid.num_steps is not None:
        raise InvalidArgumentError("this grid is padded already: pad once, after cutting")
    if steps > max_steps:
        raise InvalidArgumentError(f"a grid of {steps} steps does not fit into max_steps={max_steps}")
    columns = [np.pad(column, (0, max_steps - steps), mode="edge") for column in grid[:3]]
    return Grid(*columns, num_steps=np.int32(steps), start=grid.start)


def step_after(grid: Grid, t: Float[Array, " B"]) -> Float[Array, " B"]:
    """How far the step that begins at t goes, in units of t: for networks that take it (`step_size`).

    t must be that of a row; between two rows it is the step of the nearest.
    """
    times = jnp.asarray(grid.t, t.dtype)
    row = jnp.argmin(jnp.abs(times[None, :-1] - t[:, None]), axis=1)
    return times[row] - times[row + 1]


@checked(grid=A_GRID, first=a_count(0), last=optional(a_count(0)))
def cut(grid: Grid, first: int = 0, last: int | None = None) -> Grid:
    """Rows `first` to `last`, both included. Sampling one part and then the next equals sampling the whole.

    `cut(grid, 0, k)` stops early, `cut(grid, k)` goes on from there or starts image-to-image at row k.

    Raises:
        InvalidArgumentError: fewer than two rows are left, rows that do not exist, or a padded grid.
    """
    if grid.num_steps is not None:
        raise InvalidArgumentError("cut the grid before padding it")
    last = len(grid.t) - 1 if last is None else last
    if not 0 <= first < last < len(grid.t):
        raise InvalidArgumentError(f"cannot cut rows {first} to {last} out of rows 0 to {len(grid.t) - 1}")
    return Grid(*(column[first : last + 1] for column in grid[:3]), start=grid.start + first)


@checked(grid=A_GRID)
def reverse(grid: Grid) -> Grid:
    """The grid from its cleanest row to its noisiest: DDIM inversion. Make it with `final="sigma_min"`.

    At the clean row the noise in an image cannot be seen, so inversion should start at `sigma_min`.
    """
    if grid.num_steps is not None:
        raise InvalidArgumentError("reverse the grid before padding it")
    return Grid(*(column[::-1] for column in grid[:3]))


@checked(grid=A_GRID)
def steps_in(grid: Grid) -> Int[Any, ""] | int:
    """The number of valid steps, N: an int, or an int32 scalar of a padded grid."""
    return grid.t.shape[0] - 1 if grid.num_steps is None else grid.num_steps
