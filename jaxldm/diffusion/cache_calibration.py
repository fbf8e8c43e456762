"""What TeaCache and MagCache have to know of a model: measured in one run that computes every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxldm.arguments import a_key, array, checked, count, flag, function, several
from jaxldm.diffusion.cached_sampling import cached, cached_denoiser
from jaxldm.diffusion.caching import MODULATED_INPUT, Cache, Decision, Residuals, relative_change
from jaxldm.diffusion.compiling import compile_once
from jaxldm.diffusion.denoiser import Denoiser
from jaxldm.diffusion.grids import A_GRID, Grid, steps_in
from jaxldm.diffusion.sampling import Keys, image_keys, sample_step
from jaxldm.diffusion.solvers.solver import A_SOLVER, Solver
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import InvalidArgumentError, shown


class Calibration(NamedTuple):
    """Of each step of a run, how it differs from the step before; the first step has no such number (0).

    Attributes:
        input_changes: [N], relative change of the modulated input of the first block; 0 of a U-Net.
        residual_changes: [N], relative change of what the blocks add.
        ratios: [N], |r_i| / |r_(i - 1)|, the norms of a token's residual, averaged over the tokens.
    """

    input_changes: Float[np.ndarray, " N"]
    residual_changes: Float[np.ndarray, " N"]
    ratios: Float[np.ndarray, " N"]


class _Watched(NamedTuple):
    """An array, and a number of each step so far."""

    value: Any
    log: Any


@equal_by_call
def _watch(num_steps: int, signal: str | None) -> Decision:
    def init(value):
        return _Watched(None if signal is None else jnp.zeros_like(value), jnp.zeros(num_steps))

    def decide(settings, state, i, value):
        if signal is None:
            return jnp.bool_(True), state
        log = state.log.at[i].set(jnp.where(i == 0, 0, relative_change(value, state.value)))
        return jnp.bool_(True), _Watched(value, log)

    return Decision(init, decide, signal)


@equal_by_call
def _watch_residuals(num_steps: int) -> Residuals:
    def init(residual):
        return _Watched(jax.tree.map(jnp.zeros_like, residual), jnp.zeros((2, num_steps)))

    def update(settings, history, i, residual):
        new, old = (jax.tree.leaves(tree)[0] for tree in (residual, history.value))
        numbers = jnp.stack([relative_change(new, old), _ratio(new, old)])
        return _Watched(residual, history.log.at[:, i].set(jnp.where(i == 0, 0, numbers)))

    return Residuals(init, update, lambda settings, history, i: history.value)


def _ratio(new: Float[Array, "... C"], old: Float[Array, "... C"]) -> Float[Array, ""]:
    """The mean over tokens of |new| / |old|."""
    sizes = [jnp.linalg.norm(value.astype(jnp.float32), axis=-1) for value in (new, old)]
    return jnp.mean(jnp.where(sizes[1] == 0, 1, sizes[0] / jnp.where(sizes[1] == 0, 1, sizes[1])))


@checked(
    key=a_key,
    network=function("(cache, memory, i, x, t, *condition) -> (output, memory)"),
    build=function("(network) -> denoiser"),
    solver=A_SOLVER,
    grid=A_GRID,
    x_T=array("real", "[B, ...]", axes=(1, 64), filled=True),
    blocks=flag,
)
def calibrate_cache(
    key: Keys,
    network: Callable[..., tuple[Any, Any]],
    build: Callable[[Callable[..., Any]], Denoiser],
    solver: Solver,
    grid: Grid,
    x_T: Float[Array, "B ..."],
    *,
    blocks: bool = True,
) -> Calibration:
    """Watch one run that computes every step: what `caching.teacache` and `caching.magcache` are made from.

    Args:
        key: as in `sample`.
        network, build: as in `cached_denoiser`.
        solver, grid, x_T: as in `sample`; a few images will do.
        blocks: False for a U-Net, of which no input of a first block is seen.

    >>> import jax
    >>> from jaxldm import diffusion as D, models
    >>> dit, path, key = models.build("tiny-dit", depth=2), D.Flow(), jax.random.key(0)
    >>> network = models.caching_network(dit, models.init(dit, key))
    >>> build, grid = lambda network: D.denoiser(network, D.v(path)), D.make_grid(path, 5)
    >>> x_T = D.initial_noise(key, (1, 28, 28, 1), grid)
    >>> found = D.calibrate_cache(key, network, build, D.solvers.ddim(), grid, x_T)
    >>> cache = D.caching.teacache(D.fit_teacache(found, degree=1), threshold=0.1)
    """
    num_steps = int(steps_in(grid))
    signal = MODULATED_INPUT if blocks else None
    cache = Cache({}, _watch(num_steps, signal), _watch_residuals(num_steps))
    denoise = cached_denoiser(network, build, cache)
    watching = cached(solver, denoise)

    def run(keys, grid, x_T):
        def step(i, state):
            return sample_step(keys, denoise, watching, grid, state, i)[0]

        memory = jax.lax.fori_loop(jnp.int32(0), jnp.int32(num_steps), step, watching.init(x_T)).memory
        return memory.decision.log, jnp.stack([history.log for history in memory.runs.values()])

    columns: list[Any] = [jnp.asarray(column) for column in grid[:3]]
    arguments = image_keys(key, x_T.shape[0]), Grid(*columns), jnp.asarray(x_T)
    inputs, residuals = (np.asarray(log) for log in compile_once(run, *arguments)(*arguments))
    return Calibration(inputs, *residuals.mean(axis=0))


def _calibrations(name: str, value: Any) -> tuple[Calibration, ...]:
    """One calibration or several."""
    each = (value,) if isinstance(value, Calibration) else value
    found = several(lambda name, one: one, "a calibration from D.calibrate_cache")(name, each)
    if not found or not all(isinstance(one, Calibration) for one in found):
        raise InvalidArgumentError(
            f"{name} must be a calibration from D.calibrate_cache, or several, got {shown(value)}"
        )
    return found


@checked(calibrations=_calibrations, degree=count(1, 8))
def fit_teacache(calibrations: Any, degree: int = 4) -> Float[np.ndarray, " _"]:
    """TeaCache's polynomial of a model: from the change of the blocks' input to that of what they add.

    By least squares over the steps of all runs (Liu et al. 2024, section 3.3).

    Args:
        calibrations: from `calibrate_cache`, one or several.
        degree: of the polynomial, 4 in the paper; fewer than the steps.

    Returns:
        The coefficients, the highest power first.

    Raises:
        InvalidArgumentError: fewer steps than coefficients, or runs of a U-Net.
    """
    inputs, outputs = (
        np.concatenate([np.asarray(getattr(one, name), np.float64)[1:] for one in calibrations])
        for name in ("input_changes", "residual_changes")
    )
    if len(inputs) <= degree:
        raise InvalidArgumentError(
            f"degree={degree} needs more than {degree} changes, and the calibrations have {len(inputs)}: "
            "give runs of more steps, or a lower degree"
        )
    if not (np.isfinite(inputs).all() and np.isfinite(outputs).all()):
        raise InvalidArgumentError(
            "the calibrations have changes that are not finite: of a network of zeros?"
        )
    if not inputs.any():
        raise InvalidArgumentError(
            "the calibrations have no changes of an input: they are of a U-Net, which TeaCache is not for; "
            "write D.caching.magcache(found.ratios)"
        )
    return np.polyfit(inputs, outputs, degree)
