"""The sampling loop that joins a denoiser, a solver and a grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, UInt32

from jaxldm.arguments import a_key, array, checked, count, flag, function, optional, refuse, several
from jaxldm.diffusion.checks import check_channels_last, check_path_of_grid
from jaxldm.diffusion.compiling import compile_once, jit_disabled, traced
from jaxldm.diffusion.denoiser import A_DENOISER
from jaxldm.diffusion.grids import A_GRID, Grid, steps_in
from jaxldm.diffusion.listeners import report
from jaxldm.diffusion.paths import at_least_float32
from jaxldm.diffusion.solvers.solver import A_SOLVER, Solver, noise_like
from jaxldm.errors import InvalidArgumentError
from jaxldm.exact import LARGEST_INT32
from jaxldm.functions import returned
from jaxldm.indices import check_indices
from jaxldm.memory import check_fits

# One key, or one per image; of either kind of JAX.
Keys = PRNGKeyArray | Key[Array, " B"] | UInt32[Array, "B words"]
# Step i of an image draws from fold_in(image key, i); its first noise from a number that no step reaches.
_INITIAL_NOISE = 2**32 - 1


@checked(key=a_key, batch_size=count(1))
def image_keys(key: Keys, batch_size: int) -> Key[Array, " B"]:
    """One key per image: image k gets fold_in(key, k), whatever the batch size. An array of B keys is kept.

    Raises:
        InvalidArgumentError: no key at all, or an array of keys of another length.
    """
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))
    if key.shape != (batch_size,):
        raise InvalidArgumentError(f"give one key, or one per image: {key.shape} keys, {batch_size} images")
    return key


def a_shape(name: str, value: Any) -> tuple[int, ...]:
    """The shape of images: [B, H, W, C], or [B, ...]."""
    wanted = "the shape of images, such as (4, 8, 8, 1)"
    shape = several(count(1), wanted)(name, value)
    if not shape:
        raise refuse(name, wanted, value)
    check_fits(
        4 * math.prod(shape), f"{name}={list(shape)} needs", "draw fewer images at a time, or smaller ones"
    )
    return shape


@checked(shape=a_shape, grid=A_GRID)
def initial_noise(key: Keys, shape: tuple[int, ...], grid: Grid) -> Float[Array, "B ..."]:
    """sigma[0] N(0, 1) of shape [B, H, W, C]: where a run over the grid starts; float32 (x64: float64).

    Args:
        key: one key, or one per image [B]; image k depends on its own key alone, whatever B is.
        shape: [B, H, W, C].
        grid: its first row sets the scale.
    """
    keys = jax.vmap(jax.random.fold_in, (0, None))(image_keys(key, shape[0]), np.uint32(_INITIAL_NOISE))
    sigma = jnp.asarray(grid.sigma)
    return sigma[0] * noise_like(keys, jnp.zeros(shape, sigma.dtype))


@checked(
    denoise=A_DENOISER,
    solver=A_SOLVER,
    grid=A_GRID,
    x_T=array("real", "[B, ...]", axes=(1, 64), filled=True),
    return_trajectory=flag,
    return_predictions=flag,
    callback=optional(function("(row number, x)")),
    progress=optional(function("(steps done, steps in all)")),
)
def sample(
    key: Keys,
    denoise: Callable[[Any, Any], Any],
    solver: Solver,
    grid: Grid,
    x_T: Float[Array, "B ..."],
    *,
    return_trajectory: bool = False,
    return_predictions: bool = False,
    callback: Callable[[Any, Any], None] | None = None,
    progress: Callable[[Any, Any], None] | None = None,
) -> Any:
    """The sampling loop: from x_T [B, H, W, C] over the rows of the grid to its last, as one `jax.lax.scan`.

    jit, vmap, pmap, shard_map and grad all work; the arithmetic is float32 or wider, whatever the network
    computes in. With grids padded to one length, another seed, scale or number of steps compiles nothing new.
    Outside of jit, neither do another callback, another solver from an equal call, nor other weights of the
    same shapes: see `compile_once`. With a callback or progress the loop then runs on the host, over one
    compiled step; inside of jit both are part of the program, unless they are listeners (`listening`).

    Args:
        key: one key (image k uses fold_in(key, k)) or one per image [B]. The noise of step i of image k
            depends on (key of image k, grid.start + i) alone, not on the batch, nor on where a grid was cut.
        denoise: (x, t) -> x_0, from `denoiser` or your own.
        solver: from `jaxldm.diffusion.solvers`.
        grid: from `make_grid`, on the path of the denoiser.
        x_T: the start, from `initial_noise`, or a noised image.
        return_trajectory: also return x at every row, [N + 1, B, H, W, C], x_T first.
        return_predictions: also return the x_0 that every step starts from, denoise(x_i, t_i), [N, B, H, W,
            C]. In padded steps it is the last x, in steps that only add noise (`restart`) the noisy x. It
            costs no evaluation.
        callback: called on the host after each step with (row number, x), for pictures.
        progress: called on the host after each step with (steps done, steps in all), for progress bars: no
            image leaves the device. See `bar_progress`.

    Returns:
        x at the last row; with `return_trajectory` or `return_predictions` a tuple: x, then the trajectory,
        then the predictions, those that were asked for.

    Raises:
        InvalidArgumentError: a solver that is a name or a function that makes one, images with their channels
            first, or a grid that belongs to another path than the denoiser's (where its rows can be seen).

    >>> import jax
    >>> from jaxldm import diffusion as D
    >>> key, path = jax.random.key(0), D.Flow()
    >>> grid = D.make_grid(path, 20)
    >>> x_T = D.initial_noise(key, (4, 8, 8, 1), grid)
    >>> D.sample(key, D.gaussian_denoiser(path), D.solvers.ddim(), grid, x_T).shape
    (4, 8, 8, 1)
    """
    grid, x_T = begin(denoise, grid, x_T)
    keys = image_keys(key, x_T.shape[0])

    def scan(keys, grid, x_T):
        def advance(state, i):
            state, x_0 = sample_step(keys, denoise, solver, grid, state, i)
            report(callback, jnp.asarray(grid.start + i, jnp.uint32), state.x)
            report(progress, i + 1, steps_in(grid))
            return state, (x_0 if return_predictions else None)

        def skip(state, i):
            return state, (state.x if return_predictions else None)

        def body(state, i) -> tuple[Any, Any]:
            if grid.num_steps is None:
                state, x_0 = advance(state, i)
            else:  # rows behind num_steps are padding: no network is called for them
                state, x_0 = jax.lax.cond(i < grid.num_steps, advance, skip, state, i)
            return state, (state.x if return_trajectory else None, x_0)

        rows = jnp.arange(grid.t.shape[0] - 1, dtype=jnp.int32)
        state, (trajectory, predictions) = jax.lax.scan(body, solver.init(x_T), rows)
        if return_trajectory:
            trajectory = jnp.concatenate([x_T[None], trajectory])
        return state.x, trajectory, predictions

    if traced(keys, grid, x_T):
        results = scan(keys, grid, x_T)
    elif callback is None and progress is None:
        results = compile_once(scan, keys, grid, x_T)(keys, grid, x_T)
    else:
        wanted = (return_trajectory, return_predictions)
        results = _loop_on_the_host(keys, denoise, solver, grid, x_T, callback, progress, wanted)
        results = scan(keys, grid, x_T) if results is None else results
    x, *rest = (value for value in results if value is not None)
    return (x, *rest) if rest else x


def begin(denoise: Any, grid: Grid, x_T: Any, axes: int = 1) -> tuple[Grid, Any]:
    """(grid, x_T) of x_T's type, float32 or wider, after what a sampling loop checks before it compiles.

    Args:
        denoise: whose path must be the grid's, where it has one.
        axes: how many there are in front of the images [H, W, C].
    """
    x_T = at_least_float32(jnp.asarray(x_T))
    check_channels_last(x_T.shape[axes - 1 :])
    check_path_of_grid(getattr(denoise, "path", None), grid)
    return _in_type(grid, x_T.dtype), x_T


def _in_type(grid: Grid, dtype: Any) -> Grid:
    """The grid as arrays of this type on the device."""
    columns: list[Any] = [jnp.asarray(column, dtype) for column in grid[:3]]
    return Grid(*columns, num_steps=grid.num_steps, start=grid.start)


def a_state(name: str, value: Any) -> Any:
    """The state of a solver."""
    if not hasattr(getattr(value, "x", None), "dtype"):
        raise refuse(name, "the state of a solver", value, "solver.init(x_T)")
    return value


@checked(
    keys=a_key,
    denoise=A_DENOISER,
    solver=A_SOLVER,
    grid=A_GRID,
    state=a_state,
    i=array("whole", axes=0, low=0, high=LARGEST_INT32),
)
def sample_step(
    keys: Key[Array, " B"],
    denoise: Callable[[Any, Any], Any],
    solver: Solver,
    grid: Grid,
    state: Any,
    i: Int[Any, ""] | int,
) -> tuple[Any, Float[Array, "B ..."]]:
    """(state, x_0) after step i of `sample`: for a sampling loop of one's own.

    Args:
        keys: one per image [B], from `image_keys`.
        denoise: (x, t) -> x_0.
        solver: gives the first state, solver.init(x_T).
        grid: from `make_grid`.
        state: of the solver; state.x is the image at row i.
        i: the number of the row, int32; may be traced.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import diffusion as D
    >>> path, solver = D.Flow(), D.solvers.ddim()
    >>> grid, keys = D.make_grid(path, 4), D.image_keys(jax.random.key(0), 2)
    >>> exact = D.gaussian_denoiser(path)
    >>> step = jax.jit(lambda state, i: D.sample_step(keys, exact, solver, grid, state, i))
    >>> state = solver.init(D.initial_noise(keys, (2, 8, 8, 1), grid))
    >>> for i in range(4):
    ...     state, x_0 = step(state, jnp.int32(i))
    """
    if keys.shape != state.x.shape[:1]:
        raise refuse("keys", f"one for each of {len(state.x)} images", keys, "D.image_keys(key, batch_size)")
    check_indices("i", i, grid.t.shape[0] - 1, where="the steps of the grid")
    grid = _in_type(grid, state.x.dtype)
    number = jnp.asarray(grid.start + i, jnp.uint32)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    if not hasattr(denoise, "path"):
        denoise = _in_type_of_x(denoise)
    try:
        return solver.step(state, denoise, grid, i, step_keys)
    except AttributeError as error:
        own = jax.eval_shape(solver.init, state.x)
        if jax.tree.structure(own) == jax.tree.structure(state):
            raise
        raise refuse("state", "that of this solver", state, "solver.init(x_T)") from error


def _in_type_of_x(denoise: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A plain function whose x_0 has x's shape and type, though a network may answer in bfloat16."""

    def function(x, t):
        x_0 = jnp.asarray(returned("denoise", denoise(x, t)))
        if x_0.shape != x.shape:
            raise InvalidArgumentError(
                f"denoise(x, t) must have the shape of x, {list(x.shape)}, got {list(x_0.shape)}"
            )
        return x_0.astype(x.dtype)

    return function


def _loop_on_the_host(keys, denoise, solver, grid, x_T, callback, progress, wanted) -> Any:
    """(x, trajectory, predictions) of `sample`, or None where the step cannot be compiled by itself."""

    def step(keys, grid, state, i):
        return sample_step(keys, denoise, solver, grid, state, i)

    state, total = solver.init(x_T), int(steps_in(grid))
    run = compile_once(step, keys, grid, state, np.int32(0))
    if run is step and not jit_disabled():
        return None
    trajectory, predictions = [x_T], []
    for i in range(total):
        state, x_0 = run(keys, grid, state, np.int32(i))
        trajectory += [state.x] * wanted[0]
        predictions += [x_0] * wanted[1]
        if callback is not None:
            callback(np.uint32(grid.start + i), state.x)
        if progress is not None:
            jax.block_until_ready(state.x)
            progress(i + 1, total)
    padding = [state.x] * (grid.t.shape[0] - 1 - total)
    trajectory = jnp.stack(trajectory + padding) if wanted[0] else None
    return state.x, trajectory, (jnp.stack(predictions + padding) if wanted[1] else None)


def a_bar(name: str, value: Any) -> Any:
    """A bar of tqdm."""
    if not hasattr(value, "update") or not hasattr(value, "n"):
        raise refuse(name, "a bar such as tqdm.tqdm()", value)
    return value


@checked(bar=a_bar)
def bar_progress(bar: Any) -> Callable[[Any, Any], None]:
    """What `sample(..., progress=)` calls, from a bar of tqdm: the bar is the caller's, to open and to close.

    It sets the bar to the number of steps done, and never back, so that calls from several devices, or of
    several runs under `vmap`, count once. Between two runs of one compiled function call `bar.reset()`.

    Args:
        bar: with `n`, `total`, `update(steps)` and `refresh()`, as tqdm's.

    >>> import jax, tqdm
    >>> from jaxldm import diffusion as D
    >>> key, path = jax.random.key(0), D.Flow()
    >>> grid = D.make_grid(path, 20)
    >>> x_T = D.initial_noise(key, (1, 8, 8, 1), grid)
    >>> with tqdm.tqdm(disable=True) as bar:
    ...     report = D.bar_progress(bar)
    ...     x_0 = D.sample(key, D.gaussian_denoiser(path), D.solvers.ddim(), grid, x_T, progress=report)
    """

    def progress(done, total):
        if bar.total != int(total):
            bar.total = int(total)
            bar.refresh()
        bar.update(max(int(done) - bar.n, 0))

    return progress
