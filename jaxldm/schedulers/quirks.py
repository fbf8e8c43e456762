"""What diffusers does otherwise in its runs, behind one switch: `from_config(..., reference_quirks=True)`.

`docs/where-jaxldm-differs.md` lists the differences. Here is how each is drawn: rows that stand still or do
not belong together, times of the network that are not its own, and steps of `reference_solvers`. What
depends on the number of steps is compiled into the run, so that another number compiles again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from jaxldm import diffusion as D
from jaxldm.diffusion import levels
from jaxldm.diffusion.grids import check_count, rows_at
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.schedulers.grids import GridRule
from jaxldm.schedulers.reference_path import linspace, rounded_times
from jaxldm.schedulers.reference_solvers import (
    euler_maruyama,
    in_whole_run,
    pndm_by_evaluations,
    score_ve_of_diffusers,
    strided,
    without_x0_at_noise,
)
from jaxldm.schedulers.runs import Runs
from jaxldm.schedulers.table import ENDS_NOISY, LEVELS, SCHEDULERS, SPACINGS

# `counts` of `in_whole_run`, where it is not "steps".
_COUNTS = {"lms": "rows", **dict.fromkeys(("dpmpp_2s", "dpmpp_3s", "dpm_2s", "dpm_3s"), "pairs")}
# Our option -> the solvers that have it, and its value in diffusers.
OPTIONS: dict[str, dict[str, Any]] = {
    "ddim": {"keeps_epsilon": True},
    "dpmpp_3m": {"parabola": "half"},
    "dpmpp_3m_sde": {"parabola": "diffusers"},
    "dpm_3m": {"parabola": "half"},
}
# How the names begin of those whose steps are of x / alpha in diffusers, and scale what the network gets.
SCALED = ("Euler", "Heun", "KDPM2", "LMS", "DPMSolverSDE", "EDM", "CMStochastic")


@dataclasses.dataclass(frozen=True)
class Quirks(Runs):
    """How a scheduler of diffusers makes a run.

    Attributes:
        scheduler: its class.
        solver: our name.
        rounding: what becomes of the times that the network gets: None, "round" or "floor".
        flow_of: with `use_flow_sigmas` the path of the file's betas, which such a run still looks at.
        combine: see `D.solvers.pndm`.
        runge_kutta: whether PNDM begins with Runge-Kutta steps.
        labels: None, or the rule of the times that the network gets, which are not those of the levels.
        langevin: of `ScoreSdeVeScheduler`, (snr, Langevin steps).
    """

    scheduler: str
    solver: str
    rounding: str | None = None
    flow_of: D.VP | None = None
    combine: str = "epsilon"
    runge_kutta: bool = False
    labels: GridRule | None = None
    langevin: tuple[float, int] | None = None

    def run(self, sampler: Any, rule: GridRule, path: D.Path, count: int) -> tuple[Any, D.Grid]:
        """(sampler, rows) of N steps.

        Args:
            sampler: a `Sampler`.
            rule: of the rows.
            path: with its shift.
            count: N.
        """
        check_count(path, count)
        if self.flow_of is not None:
            flow = cast(D.Flow, path)
            t, last = self._flow_levels(rule, flow, count)
            steps = round(1 / flow.t_min)
            sampler = _with_times(sampler, t, np.floor(t * steps) / steps)
            return sampler, rows_at(path, np.append(t, last))
        if self.labels is not None:
            t = rule.times(path, count + 1)
            return _with_times(sampler, t[:-1], self.labels.times(path, count)), rows_at(path, t)
        if self.solver == "predictor_corrector" and self.scheduler == "ScoreSdeVeScheduler":
            return self._of_score(sampler, rule, cast(D.EDM, path), count)
        t = rule.times(path, count)
        total = path.num_train_timesteps
        if self.solver == "pndm" and total is not None:
            t, runge_kutta = self._evaluations(t, total // count)
            solver = pndm_by_evaluations(total // count, runge_kutta, self.combine)
            sampler = sampler._replace(solver=solver, num_steps=count)
        elif self.scheduler == "DDIMScheduler" and self.solver == "ddim" and total is not None:
            sampler = sampler._replace(solver=strided(sampler.solver, total // count), num_steps=count)
        elif self.rounding is not None and rule.levels is not None:
            sampler = _with_times(sampler, t, rounded_times(cast(D.VP, path), rule, count, self.rounding))
        last = path.t_clean if rule.final == "clean" else path.t_min
        if rule.level_min is not None and last >= 0 and self.scheduler == "UniPCMultistepScheduler":
            last = t[-1]  # which repeats its own, where Euler adds that of the betas
        return sampler, rows_at(path, np.append(t, last))

    def cut_by_strength(self, rows: D.Grid, count: int, strength: float, *, round_up: bool) -> D.Grid:
        """The rows of image-to-image: as many are left out as of N steps, where PNDM has more.

        N strength is the product of binary floats: of 50 steps at 0.58 28 are taken.
        """
        D.cut_by_strength(D.cut(rows, 0, count), strength, round_up=round_up)  # refuses what leaves no step
        taken = count * strength
        return D.cut(rows, int(count - taken) if round_up else count - max(int(taken), 1))

    def part(self, sampler: Any, whole: D.Grid) -> Any:
        """The sampler of a part of the run whose rows these are."""
        if self.solver == "pndm":  # which begins wherever it is put
            return sampler
        columns = tuple(tuple(np.asarray(column).tolist()) for column in whole[:3])
        solver = in_whole_run(sampler.solver, columns, _COUNTS.get(self.solver, "steps"))
        return sampler._replace(solver=solver, num_steps=len(whole.t) - 1)

    def shift_of_levels(self, path: D.Path) -> float | None:
        """That of its own, once more: of a flow path."""
        return path.default_shift if isinstance(path, D.Flow) else None

    def _of_score(self, sampler: Any, rule: GridRule, path: D.EDM, count: int) -> tuple[Any, D.Grid]:
        """Levels even in their logarithm, taken by the digits of t, while the network gets the level of t."""
        ratio = path.sigma_max / path.sigma_min
        eps = np.log(cast(float, rule.level_min) / path.sigma_min) / np.log(ratio)
        times = linspace(1.0, eps, count)
        at = (times * np.float32(count - 1)).astype(int)
        logs = linspace(np.log(path.sigma_min), np.log(path.sigma_max), count)
        even = np.exp(logs[:1] if count == 1 else logs).astype(np.float64)
        here, there = even[at], np.where(at == 0, 0, even[at - 1])
        rows = rows_at(path, np.append(np.geomspace(path.sigma_max, path.sigma_min, count), 0))
        solver = score_ve_of_diffusers(
            (tuple(here.tolist()), tuple(there.tolist())), *cast(tuple[float, int], self.langevin)
        )
        sampler = _with_times(sampler, rows.t[:-1].astype(np.float64), path.sigma_min * ratio**times)
        return sampler._replace(solver=solver), rows

    def _evaluations(
        self, t: Float[np.ndarray, " N"], stride: int
    ) -> tuple[Float[np.ndarray, " M"], tuple[int, ...]]:
        """The timesteps of all evaluations of PNDM, and those of them that are of Runge-Kutta steps."""
        if not self.runge_kutta:
            return np.concatenate([t[:2], t[1:]]), ()
        if len(t) < 4:
            raise InvalidArgumentError(
                f"num_inference_steps={len(t)}, and PNDMScheduler with Runge-Kutta steps needs 4 or more"
            )
        pairs = np.stack([t[:4], t[:4] + stride // 2], axis=1)[:, ::-1].reshape(-1)[1:]
        evaluations = np.concatenate([pairs[:1], np.repeat(pairs[1:-1], 2), pairs[-1:]])
        return np.concatenate([evaluations, t[3:]]), tuple(int(value) for value in evaluations)

    def _flow_levels(self, rule: GridRule, path: D.Flow, count: int) -> tuple[Float[np.ndarray, " N"], float]:
        """N levels of a flow path, and the last."""
        betas = cast(D.VP, self.flow_of)
        even = np.linspace(1, path.t_min, count + 1)
        if rule.levels is not None:  # karras, between the ends of the betas
            noisy, clean = levels.noise_level(betas, np.array([betas.t_noisy, betas.t_min]))
            ratio = levels.karras_levels(noisy, clean, count)
            t = ratio / (1 + ratio)
        elif self.scheduler == "UniPCMultistepScheduler":
            t = _shifted(even[:-1], path.shift)
            t = t if rule.shift_terminal is None else levels.stretched(path, t, rule.shift_terminal)
            t[0] -= 1e-6 if abs(t[0] - 1) < 1e-6 else 0
        else:
            t = _shifted(1 - even, path.shift)[:0:-1]
        if rule.final == "clean" and self.scheduler not in ENDS_NOISY:
            return t, 0.0
        own = self.scheduler in (*ENDS_NOISY, "UniPCMultistepScheduler")
        return t, float(t[-1] if own else levels.noise_level(betas, betas.t_min))


def _shifted(t: Float[np.ndarray, " N"], shift: float) -> Float[np.ndarray, " N"]:
    return shift * t / (1 + (shift - 1) * t)


def _with_times(sampler: Any, t: Float[np.ndarray, " N"], network_times: Float[np.ndarray, " N"]) -> Any:
    times = tuple(t.tolist()), tuple(network_times.tolist())
    return sampler._replace(network_times=times, num_steps=len(t))


def quirks_of(
    config: Mapping[str, Any], scheduler: str, solver: str, options: Mapping[str, Any], betas: D.VP | None
) -> Quirks:
    """The quirks of a run.

    Args:
        config: of the file.
        scheduler: the class that spaces the rows.
        solver: our name.
        options: of the solver.
        betas: with `use_flow_sigmas` the path of the file's betas.

    Raises:
        CheckpointError: a combination of which diffusers makes nothing but NaN.
    """
    with_levels = [entry for entry in ("use_exponential_sigmas", "use_beta_sigmas") if config.get(entry)]
    if config.get("use_karras_sigmas") and scheduler != "UniPCMultistepScheduler":
        with_levels.append("use_karras_sigmas")
    if betas is not None and with_levels:
        raise CheckpointError(
            f"scheduler_config.json has use_flow_sigmas and {with_levels[0]}, of which diffusers draws NaN: "
            "leave reference_quirks out"
        )
    rounding = None
    if SCHEDULERS[scheduler].rows == "open":
        rounds = config.get("use_karras_sigmas") or config.get("use_lu_lambdas")
        # DPMSolverMultistepScheduler means to keep their fractions on cosine betas, and cuts them off.
        cosine = config.get("beta_schedule") == "squaredcos_cap_v2"
        rounds = rounds and not (cosine and scheduler == "DPMSolverMultistepScheduler")
        rounding = "round" if rounds else "floor"
    skips, labels = options.get("skip_prk_steps", True), None
    if scheduler == "EulerDiscreteScheduler" and config.get("interpolation_type") == "log_linear":
        spacing = SPACINGS["fractional"][config.get("timestep_spacing", "linspace")]
        offset = config.get("steps_offset", 0)
        with_levels = any(config.get(entry) for entry in LEVELS.values())
        labels = None if with_levels else GridRule(spacing=spacing, steps_offset=offset)
    combine = options.get("combine", "epsilon")
    langevin = (options["snr"], options["correct_steps"]) if "snr" in options else None
    return Quirks(scheduler, solver, rounding, betas, combine, not skips, labels, langevin)


def changed_grid(grid: GridRule, scheduler: str, *, is_shifted: bool) -> GridRule:
    """The rule of the rows with what diffusers does otherwise."""
    if scheduler == "TCDScheduler":
        return dataclasses.replace(grid, final="sigma_min")
    if scheduler.startswith("FlowMatch") and is_shifted:
        return dataclasses.replace(grid, shift_t_min_twice=True)
    return grid


def changed_sampler(sampler: Any, config: Mapping[str, Any], scheduler: str, *, own_solver: bool) -> Any:
    """The sampler with what diffusers does otherwise, whatever the number of steps."""
    path: Any = sampler.path
    if scheduler == "ScoreSdeVpScheduler" and own_solver:
        sampler = sampler._replace(solver=euler_maruyama())
    if scheduler == "IPNDMScheduler" and own_solver:
        sampler = sampler._replace(solver=without_x0_at_noise(sampler.solver))
    rows, spacing = SCHEDULERS[scheduler].rows, config.get("timestep_spacing", "linspace")
    if rows in ("score", "consistency") or (rows == "fractional" and spacing != "leading"):
        return sampler
    return sampler._replace(
        initial_scale=float(np.hypot(path.sigma_max, 1)) if isinstance(path, D.EDM) else 1.0
    )
