"""Feynman-Kac steering: particles that multiply or die out by their reward as they are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real, ScalarLike

from jaxldm.arguments import a_key, array, checked, count, number, optional, refuse
from jaxldm.diffusion.compiling import traced
from jaxldm.diffusion.denoiser import A_DENOISER
from jaxldm.diffusion.grids import A_GRID, Grid, steps_in
from jaxldm.diffusion.guidance import check_scale
from jaxldm.diffusion.sampling import Keys, begin, image_keys, sample_step
from jaxldm.diffusion.search.candidates import (
    best_of,
    candidate_keys,
    mapped_axes,
    pick,
    round_keys,
    run,
    seen,
    with_candidates,
)
from jaxldm.diffusion.search.resampling import effective_sample_size, systematic_resampling
from jaxldm.diffusion.search.verifiers import A_VERIFIER, check_verifier
from jaxldm.diffusion.solvers.solver import A_SOLVER, Solver
from jaxldm.errors import InvalidArgumentError, one_of

# NaN and infinite rewards count as this, so that weights stay finite.
_WORST = 1e4
_LARGEST_SCALE = 1e30  # of which products with rewards are finite


class Potential(NamedTuple):
    """How the rewards on the way become potentials (Singhal et al. 2025, section 3.1).

    Attributes:
        start: what a particle remembers before its first reward.
        step: (memory, reward) -> (log G / lambda, memory).
    """

    start: float
    step: Callable[[Any, Any], tuple[Any, Any]]


def _max(memory, reward):
    best = jnp.maximum(memory, reward)
    return best, best


POTENTIALS = {
    # exp(lambda (r_t - r_before)): up or down with each reward.
    "difference": Potential(0.0, lambda memory, reward: (reward - memory, reward)),
    # exp(lambda max of the rewards so far): what was promising once stays so.
    "max": Potential(-_WORST, _max),
    # exp(lambda sum of the rewards so far): those that were good all the way.
    "sum": Potential(0.0, lambda memory, reward: (memory + reward, memory + reward)),
}


class Particles(NamedTuple):
    """What steering drew: particles of p(x) exp(lambda r(x)), by their weights.

    Attributes:
        x_0: [B, H, W, C], the particle of the highest reward of each image.
        score: [B], its reward.
        candidates: [N, B, H, W, C].
        scores: [N, B], their rewards.
        log_weights: [N, B]; exp of them adds up to 1 for each image. `systematic_resampling` of them gives
            particles of equal weight.
        resamplings: [B], how often the particles of an image were resampled.
    """

    x_0: Float[Array, "B ..."]
    score: Float[Array, " B"]
    candidates: Float[Array, "N B ..."]
    scores: Float[Array, "N B"]
    log_weights: Float[Array, "N B"]
    resamplings: Int[Array, " B"]


class _State(NamedTuple):
    """Of all particles [N, B]: the solver's state, what potentials remember, log weights since the last
    resampling, and the logarithm of all potentials so far.
    """

    solver: Any
    memory: Any
    log_weights: Any
    log_potentials: Any
    resamplings: Any


@checked(grid=A_GRID, first=number(0, 1), last=number(0, 1), every=count(1))
def steering_steps(
    grid: Grid, first: float = 0.2, last: float = 0.8, every: int = 1
) -> Bool[np.ndarray, " steps"] | Bool[Array, " steps"]:
    """In which steps particles are weighed: one truth value for each step of the grid.

    Early estimates are blurred, so that their rewards say little; late ones come when all is settled.

    Args:
        grid: from `make_grid`; may be padded.
        first: the part of the steps before which none is weighed.
        last: the part after which none is.
        every: of all steps, each such one.

    Raises:
        InvalidArgumentError: what chooses none of several steps, so that nothing would be steered.

    >>> from jaxldm import diffusion as D
    >>> D.search.steering_steps(D.make_grid(D.Flow(), 5), first=0.2, last=0.8).tolist()
    [False, True, True, True, False]
    """
    steps = steps_in(grid)
    xp = jnp if traced(steps) else np
    i = xp.arange(grid.t.shape[0] - 1, dtype=xp.int32)
    place = i.astype(xp.float32) / xp.asarray(steps, xp.float32)
    chosen = (place >= first) & (place < last) & (i % every == 0)
    if not traced(steps) and steps > 1 and not np.asarray(chosen).any():
        raise InvalidArgumentError(
            f"first={first:g}, last={last:g} and every={every} choose none of {int(steps)} steps: first must "
            "be below last, and every small enough for a step between them"
        )
    return chosen


@checked(
    key=a_key,
    denoise=A_DENOISER,
    solver=A_SOLVER,
    grid=A_GRID,
    x_T=with_candidates,
    reward=A_VERIFIER,
    reward_scale=array(axes=(0, 1)),
    steer_at=optional(array("any", "[steps]", axes=1)),
    threshold=array(axes=0),
)
def steer(
    key: Keys,
    denoise: Callable[[Any, Any], Any],
    solver: Solver,
    grid: Grid,
    x_T: Float[Any, "N B ..."],
    reward: Callable[[Any], Any],
    *,
    reward_scale: ScalarLike | Real[Any, " B"] = 1.0,
    potential: str = "difference",
    steer_at: Bool[Any, " steps"] | None = None,
    threshold: ScalarLike = 0.5,
) -> Particles:
    """Draws from p(x) exp(lambda r(x)) by N particles for each image (Singhal et al. 2025, Algorithm 1).

    As the particles are drawn, the reward of the denoiser's x_0 gives each a weight; where the effective
    number of particles falls below threshold * N, they are resampled (`systematic_resampling`), and
    duplicates part by the noise of the next step. At the end the weights are divided by what was counted on
    the way, so that all together they are exp(lambda r) of the final image, whichever the potential. It costs
    N runs, and a call of the reward in each of the steps weighed. Nothing leaves the device on the way.

    A step's x_0 is known after that step, so that the image behind the step is resampled: no evaluation is
    added.

    Args:
        key: one key, or one per image [B].
        denoise: (x, t) -> x_0 for B images.
        solver: one that draws noise, such as `ddpm()`, `ddim(eta=1.0)`, `dpmpp_2m_sde()`.
        grid: from `make_grid`.
        x_T: [N, B, H, W, C], from `candidate_noise`.
        reward: r, x_0 [B, H, W, C] -> [B]. NaN and infinity count as -10 000 or 10 000.
        reward_scale: lambda, not negative, a number or one per image [B]; may be traced. 0 is plain sampling.
        potential: of `POTENTIALS`: "difference", "max" or "sum".
        steer_at: which steps are weighed, [steps]; None: `steering_steps(grid)`. May be traced.
        threshold: in [0, 1]; 0 never resamples (importance sampling), 1 in each step weighed. May be traced.

    Raises:
        InvalidArgumentError: a solver that draws no noise; steps that do not fit the grid; numbers out of
            range; a reward that gives another shape, or NaN for all particles of an image.
        UnknownNameError: another potential.

    >>> import jax
    >>> from jaxldm import diffusion as D
    >>> key, path = jax.random.key(0), D.Flow()
    >>> grid = D.make_grid(path, 8)
    >>> x_T = D.search.candidate_noise(key, (2, 8, 8, 1), grid, num_candidates=4)
    >>> bright = lambda images: images.mean((1, 2, 3))
    >>> denoise, solver = D.gaussian_denoiser(path), D.solvers.ddpm()
    >>> found = D.search.steer(key, denoise, solver, grid, x_T, bright, reward_scale=9.0)
    >>> found.x_0.shape, found.log_weights.shape
    ((2, 8, 8, 1), (4, 2))
    """
    one_of("potential", potential, POTENTIALS)
    check_scale("reward_scale", reward_scale, _LARGEST_SCALE)
    check_scale("threshold", threshold, 1.0)
    grid, x_T = begin(denoise, grid, x_T, axes=2)
    num, batch = x_T.shape[:2]
    steer_at = _steps_to_steer(steer_at, grid)
    check_verifier(reward, x_T[0], "reward")
    keys = image_keys(key, batch)
    _check_draws_noise(solver, denoise, grid, keys, x_T[0])
    if np.shape(reward_scale) not in ((), (batch,)):
        raise refuse("reward_scale", f"one number, or one for each of {batch} images", reward_scale)
    xp = jnp if traced(reward_scale) else np
    scale = xp.broadcast_to(xp.asarray(reward_scale, x_T.dtype), (batch,))
    search = _steered(denoise, solver, reward, POTENTIALS[potential])
    threshold = jnp.asarray(threshold, x_T.dtype)
    particles = run(search, candidate_keys(keys, num, batch), keys, grid, x_T, scale, steer_at, threshold)
    return seen(particles, particles.scores, "reward")


def _steered(denoise, solver, reward, potential) -> Callable[..., Particles]:
    """The program: (keys [N, B], keys [B], grid, x_T, lambda [B], steer_at, threshold) -> particles."""

    def rewards(x_0):
        found = jax.vmap(reward)(x_0).astype(x_0.dtype)
        return found, jnp.nan_to_num(found, nan=-_WORST, posinf=_WORST, neginf=-_WORST)

    def search(keys, own_keys, grid, x_T, scale, steer_at, threshold):
        shape = x_T.shape[:2]

        def weigh(state, x_0, i):
            step, memory = potential.step(state.memory, rewards(x_0)[1])
            log_g = scale[None] * step
            state = state._replace(
                memory=memory,
                log_weights=state.log_weights + log_g,
                log_potentials=state.log_potentials + log_g,
            )
            return _resample(state, round_keys(own_keys, i), threshold, shape)

        def step(state, axes, i):
            one = lambda keys, state: sample_step(keys, denoise, solver, grid, state, i)  # noqa: E731
            return jax.vmap(one, in_axes=(0, axes), out_axes=(axes, 0))(keys, state)

        axes = mapped_axes(solver.init, lambda state, axes: step(state, axes, jnp.int32(0)), x_T)

        def advance(state, i):
            moved, x_0 = step(state.solver, axes, i)
            state = state._replace(solver=moved)
            return jax.lax.cond(steer_at[i], weigh, lambda state, x_0, i: state, state, x_0, i)

        def body(state, i):
            if grid.num_steps is None:
                return advance(state, i), None
            return jax.lax.cond(i < grid.num_steps, advance, lambda state, i: state, state, i), None

        zeros = jnp.zeros(shape, x_T.dtype)
        state = _State(
            jax.vmap(solver.init, out_axes=axes)(x_T),
            jnp.full(shape, potential.start, x_T.dtype),
            zeros,
            zeros,
            jnp.zeros(shape[1:], jnp.int32),
        )
        state, _ = jax.lax.scan(body, state, jnp.arange(grid.t.shape[0] - 1, dtype=jnp.int32))
        x = state.solver.x
        scores, final = rewards(x)
        log_weights = state.log_weights + scale[None] * final - state.log_potentials
        return Particles(*best_of(x, scores), jax.nn.log_softmax(log_weights, axis=0), state.resamplings)

    return search


def _resample(state: _State, keys: Any, threshold: Any, shape: tuple[int, ...]) -> _State:
    """The particles of those images resampled of which too few count."""
    size = jax.vmap(effective_sample_size, in_axes=1)(state.log_weights)
    needed = size < threshold * shape[0]
    drawn = jax.vmap(systematic_resampling, (0, 1), 1)(keys, state.log_weights)
    index = jnp.where(needed[None], drawn, jnp.arange(shape[0], dtype=drawn.dtype)[:, None])
    solver, memory, log_potentials = pick((state.solver, state.memory, state.log_potentials), index, shape)
    return _State(
        solver,
        memory,
        jnp.where(needed[None], 0, state.log_weights),
        log_potentials,
        state.resamplings + needed.astype(jnp.int32),
    )


def _steps_to_steer(steer_at: Any, grid: Grid) -> Any:
    """A truth value for each step of the grid."""
    steps = grid.t.shape[0] - 1
    chosen = jnp.asarray(steering_steps(grid) if steer_at is None else steer_at)
    if chosen.dtype != bool or chosen.shape != (steps,):
        raise InvalidArgumentError(
            f"steer_at must be truth values, one for each of {steps} steps, got {chosen.dtype}"
            f"{list(chosen.shape)}: write D.search.steering_steps(grid)"
        )
    return chosen


def _check_draws_noise(solver: Solver, denoise: Any, grid: Grid, keys: Any, x: Any) -> None:
    """Raises `InvalidArgumentError` for a solver whose step ignores its keys: duplicates would stay such."""

    def step(keys, x):
        return solver.step(solver.init(x), denoise, grid, np.int32(0), keys)[0].x

    program = jax.make_jaxpr(step)(keys, x).jaxpr
    if not any(used is program.invars[0] for equation in program.eqns for used in equation.invars):
        raise InvalidArgumentError(
            "solver must draw noise, or particles that are duplicates would stay so: write D.solvers.ddpm(), "
            "D.solvers.ddim(eta=1.0) or D.solvers.dpmpp_2m_sde()"
        )
