"""Restart sampling: go back up in noise, again and again, and solve the ODE down (Xu et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxldm.arguments import checked, count, number, optional, refuse, several
from jaxldm.diffusion.grids import A_GRID, Grid
from jaxldm.diffusion.paths import A_PATH, Path
from jaxldm.diffusion.solvers.heun import heun
from jaxldm.diffusion.solvers.solver import A_SOLVER, Solver, add_noise, noise_like, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import InvalidArgumentError
from jaxldm.exact import MAX_STEPS


class Restart(NamedTuple):
    """One interval of Xu et al. 2023, in sigma / alpha: from `lowest` back to `highest`, `times` times.

    Attributes:
        lowest: t_min; the run turns back at the grid's row that is nearest to it.
        highest: t_max > t_min, where it turns down again.
        num_steps: N_restart, the steps down each time.
        times: K.
    """

    lowest: float
    highest: float
    num_steps: int
    times: int = 1


def A_RESTART(name: str, value: Any) -> Restart:
    """A `Restart`, or a tuple of its four numbers."""
    if not isinstance(value, tuple) or len(value) != 4:
        raise refuse(name, "a D.Restart(lowest, highest, num_steps, times)", value)
    restart = Restart(*(check(name, item) for check, item in zip(RESTART, value, strict=True)))
    if restart.num_steps * restart.times > MAX_STEPS:
        raise refuse(name, f"of at most {MAX_STEPS} steps in all, num_steps * times", value)
    return restart


RESTART = number(), number(), count(1), count(1)


@checked(solver=optional(A_SOLVER), s_noise=number(0))
@equal_by_call
def restart(solver: Solver | None = None, s_noise: float = 1.0) -> Solver:
    """Restart sampling (Xu et al. 2023): noise where the grid rises, a solver's step where it falls.

    From row t up to the noisier row s of a grid from `restart_grid`, by the path's own forward transition,

        x_s = (alpha_s / alpha_t) x_t + sqrt(sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2) z,

    without an evaluation: such a step returns x_t as its x_0. Noise shrinks the errors made before, which the
    ODE alone carries along. On a grid that only falls this is `solver`.

    Args:
        solver: of the steps down, `heun()` where none is given, as in the paper. A multistep solver starts
            again after each rise.
        s_noise: standard deviation of the added noise.

    Raises:
        InvalidArgumentError: a negative s_noise.

    >>> from jaxldm import diffusion as D
    >>> path = D.EDM()
    >>> grid = D.restart_grid(path, D.make_grid(path, 18), [D.Restart(0.06, 0.3, num_steps=3, times=2)])
    >>> solver = D.solvers.restart(D.solvers.heun())
    """
    solver = heun() if solver is None else solver

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)

        def rise(state):
            x = add_noise(state.x, here, there, s_noise * noise_like(keys, state.x))
            return solver.init(x), state.x

        rises = there.sigma * here.alpha > here.sigma * there.alpha
        return jax.lax.cond(rises, rise, lambda state: solver.step(state, denoise, grid, i, keys), state)

    return solver._replace(step=step)


@checked(path=A_PATH, grid=A_GRID, restarts=several(A_RESTART), rho=number(above=0))
def restart_grid(path: Path, grid: Grid, restarts: Sequence[Restart], *, rho: float = 7.0) -> Grid:
    """The grid with all restarts put in: K times back to t_max and N_restart steps down to t_min.

    The rows down are spaced as in Karras et al. 2022, equation 5, in sigma / alpha, as the authors do.
    Pad and cut it as any other grid.

    Args:
        path: of the grid.
        grid: from `make_grid`, without padding.
        restarts: `Restart(lowest, highest, num_steps, times)`, in sigma / alpha, in any order.
        rho: of the Karras spacing.

    Raises:
        InvalidArgumentError: a padded grid, an interval that does not rise or that leaves the path, no steps.

    >>> from jaxldm import diffusion as D
    >>> grid = D.at_sigmas(D.EDM(), [8.0, 4.0, 2.0, 1.0])
    >>> D.restart_grid(D.EDM(), grid, [D.Restart(2.0, 4.0, num_steps=1, times=2)]).sigma
    array([8., 4., 2., 4., 2., 4., 2., 1., 0.], dtype=float32)
    """
    if grid.num_steps is not None:
        raise InvalidArgumentError("put the restarts in before padding the grid")
    columns = np.stack([np.asarray(column, np.float64) for column in grid[:3]])
    with np.errstate(divide="ignore"):
        ratio = columns[2] / columns[1]
        noisiest = path.sigma(path.t_noisy) / path.alpha(path.t_noisy)
    # Of each row: itself, and what is put in behind it.
    pieces = [[columns[:, k : k + 1]] for k in range(columns.shape[1])]
    for lowest, highest, num_steps, times in restarts:
        turn = int(np.argmin(np.abs(np.where(ratio > 0, ratio, np.inf) - lowest)))
        if not (ratio[turn] < highest <= noisiest * (1 + 1e-6) and np.isfinite(highest)):
            raise InvalidArgumentError(
                f"a restart must rise within the path, which ends at {noisiest:g}: this one goes from "
                f"{ratio[turn]:g}, the grid's sigma / alpha nearest to {lowest:g}, to {highest:g}"
            )
        ramp = np.linspace(highest ** (1 / rho), ratio[turn] ** (1 / rho), num_steps + 1)[:-1] ** rho
        t = np.minimum(path.time(ramp), path.t_noisy)
        down = np.stack([t, path.alpha(t), path.sigma(t)])
        pieces[turn] += [down, columns[:, turn : turn + 1]] * times
    rows = np.concatenate([piece for of_row in pieces for piece in of_row], axis=1)
    return Grid(*rows.astype(grid.t.dtype), start=grid.start)
