"""What a solver costs: how often a run of it calls the network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxldm.arguments import checked, count, several
from jaxldm.diffusion.denoiser import Denoiser
from jaxldm.diffusion.grids import pad
from jaxldm.diffusion.paths import A_PATH, Path
from jaxldm.diffusion.sampling import sample
from jaxldm.diffusion.solvers import A_SOLVER, Solver
from jaxldm.diffusion.spacings import make_grid
from jaxldm.errors import InvalidArgumentError
from jaxldm.exact import MAX_STEPS


@checked(solver=A_SOLVER, path=A_PATH, max_steps=count(1, MAX_STEPS))
def evaluation_counter(solver: Solver, path: Path, max_steps: int) -> Callable[[int], int]:
    """Returns a function: number of steps, at most `max_steps` -> how often the run calls the denoiser.

    The calls are counted while the solver runs on one number, compiled once for every number of steps.

    >>> from jaxldm import diffusion as D
    >>> count = D.evaluation_counter(D.solvers.heun(), D.VP.named("linear"), max_steps=10)
    >>> count(5), count(10)
    (9, 19)
    """
    calls = []

    def function(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return 0.5 * x

    @jax.jit
    def run(grid):
        x = jnp.ones((1, 1), grid.sigma.dtype)
        return sample(jax.random.key(0), Denoiser(function, path), solver, grid, x)

    @functools.cache
    def count(steps):
        calls.clear()
        run(pad(make_grid(path, steps), max_steps)).block_until_ready()
        jax.effects_barrier()
        return len(calls)

    return count


@checked(solver=A_SOLVER, path=A_PATH, budgets=several(count(1, MAX_STEPS)))
def steps_within(solver: Solver, path: Path, budgets: Sequence[int]) -> list[tuple[int, int]]:
    """Returns for each budget of evaluations the most steps that it pays for, as (steps, evaluations).

    One step is taken even where it costs more than the budget. The count depends on the path, too: a step
    from pure noise (alpha = 0), as the first one on a flow path, is Euler's in Heun's method.

    >>> from jaxldm import diffusion as D
    >>> D.steps_within(D.solvers.heun(), D.VP.named("linear"), [5, 10])
    [(3, 5), (5, 9)]
    """
    if not budgets:
        raise InvalidArgumentError("budgets is empty: give one number of evaluations or more")
    count, pairs = evaluation_counter(solver, path, max(budgets)), []
    for budget in budgets:
        low, high = 1, budget
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if count(middle) <= budget else (low, middle - 1)
        pairs.append((low, count(low)))
    return pairs
