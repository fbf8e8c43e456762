"""From a folder's scheduler_config.json and a solver's name to what a run needs: schedule, grid and solver.

A scheduler of diffusers is three of our things in one class. Naming another solver here is what
`OtherScheduler.from_config(pipe.scheduler.config)` is there: the betas and the prediction stay, the grid is
the one that the other scheduler makes of the same file.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of

# The scheduler of diffusers that makes the grid for a solver. Solvers that have none keep the folder's grid.
SCHEDULER_OF = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_ancestral": "KDPM2AncestralDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "deis": "DEISMultistepScheduler",
    "dpmpp_2s": "DPMSolverSinglestepScheduler",
    "dpmpp_1s": "DPMSolverMultistepScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_3m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "dpmpp_3m_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# Schedulers of other paths, which keep their own grid whatever the solver, and the one for our own schedule.
_OWN_GRID = {
    "EDMEulerScheduler": "euler",
    "EDMDPMSolverMultistepScheduler": "dpmpp_2m",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
    "FlowMatchHeunDiscreteScheduler": "flow_heun",
    "ScoreSdeVpScheduler": "ddim",
    "DDPMWuerstchenScheduler": "ddpm",
    "NoiseSchedule": "ddim",
}
_DPM_SOLVERS = {
    ("dpmsolver++", 1): "dpmpp_1s",
    ("dpmsolver++", 2): "dpmpp_2m",
    ("dpmsolver++", 3): "dpmpp_3m",
    ("sde-dpmsolver++", 2): "dpmpp_2m_sde",
    ("sde-dpmsolver++", 3): "dpmpp_3m_sde",
}
# Solver -> our option: (its key there, its default there). "heun" and the like are said alike in both.
_OPTIONS: dict[str, dict[str, tuple[str, Any]]] = {
    "pndm": {"skip_prk_steps": ("skip_prk_steps", False), "combine": ("prediction_type", "epsilon")},
    "deis": {"order": ("solver_order", 2), "lower_order_final": ("lower_order_final", True)},
    "dpmpp_2s": {"solver_type": ("solver_type", "midpoint")},
    "dpmpp_2m": {
        "solver_type": ("solver_type", "midpoint"),
        "lower_order_final": ("lower_order_final", True),
    },
    "unipc": {
        "order": ("solver_order", 2),
        "solver_type": ("solver_type", "bh2"),
        "lower_order_final": ("lower_order_final", True),
        "disable_corrector": ("disable_corrector", ()),
    },
}
_OPTIONS["ddpm"] = {"variance": ("variance_type", "fixed_small")}
_OPTIONS["dpmpp_3m"] = _OPTIONS["dpmpp_2m_sde"] = _OPTIONS["dpmpp_2m"]
# `variance_type` of DDPMScheduler -> ours; the logarithms there are another way to write the same.
_VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
    "learned_range": "learned",
}

_CLIPPING = ("DDPMScheduler", "DDIMScheduler", "LCMScheduler", "TCDScheduler")  # heed clip_sample


class Sampler(NamedTuple):
    """Solver and denoiser of a run, without its grid: what is compiled.

    Attributes:
      schedule: path and prediction.
      solver: two pure functions.
      timestep_scaling: of the boundary condition of a consistency model, or None for other models.
      threshold: (percentile, max_value) of `D.dynamic_threshold`, (low, high) of `D.static_threshold` where
        `clips`, or None.
      clips: which of the two.
      learned_variance: the solver asks the network for its variance.
    """

    schedule: D.NoiseSchedule
    solver: D.Solver
    timestep_scaling: float | None = None
    threshold: tuple[float, float] | None = None
    clips: bool = False
    learned_variance: bool = False

    def make_denoiser(self, predict: Callable[[Any, Any], Any]) -> Any:
        """`denoise(x, t) -> x_0` of a network's answers [N, h, w, c], or 2c channels with its variance."""
        denoise = self.schedule.make_denoiser(predict, learned_variance=self.learned_variance)
        if self.timestep_scaling is not None:
            denoise = D.consistency_function(denoise, self.timestep_scaling)
        if self.threshold is None:
            return denoise
        return (D.static_threshold if self.clips else D.dynamic_threshold)(denoise, *self.threshold)


class Plan(NamedTuple):
    """How a run walks: sampler, and arguments of `make_grid`: spacing, sigmas, ..."""

    sampler: Sampler
    grid_options: dict[str, Any]

    @property
    def schedule(self) -> D.NoiseSchedule:
        """Path and prediction."""
        return self.sampler.schedule

    @property
    def solver(self) -> D.Solver:
        """Two pure functions."""
        return self.sampler.solver


@functools.lru_cache
def named_solver(name: str, eta: float | None = None, **options: Any) -> D.Solver:
    """The solver of that name; the same object each time, so that the compiled function is found again.

    Raises:
      UnknownNameError: no such solver.
      InvalidArgumentError: an option that the solver does not have (eta, where it is None, is the solver's
        own), or a value out of its range.
    """
    return D.solvers.make(name, **options, **({} if eta is None else {"eta": eta}))


def make_plan(
    config: Mapping[str, Any],
    solver: str | D.Solver | None = None,
    *,
    eta: float | None = None,
    stops_early: bool = False,
) -> Plan:
    """The schedule, grid and solver that a scheduler_config.json and a solver stand for.

    Args:
      config: the entries of scheduler_config.json.
      solver: a name of `D.solvers.SOLVERS`, a `Solver` of your own on the folder's grid, or None for the
        scheduler that the folder names, with its options.
      eta: for the solvers that have this option.
      stops_early: the run ends before the clean row, so that the solver need not lower its order there.

    Raises:
      UnknownNameError: no such solver.
      CheckpointError: a scheduler that is not known here.
      InvalidArgumentError: eta for a solver without it, or for one of your own.
    """
    if isinstance(solver, D.Solver):
        if eta is not None:
            raise InvalidArgumentError("eta is an option of the solvers by name: build yours with it instead")
        schedule, grid_options = D.from_scheduler_config(config)
        return Plan(Sampler(schedule, solver, **_of_x0(config)), grid_options)
    name = default_solver(config) if solver is None else one_of("solver", solver, D.solvers.SOLVERS)
    options = _solver_options(config, name)
    if stops_early and "lower_order_final" in inspect.signature(D.solvers.SOLVERS[name]).parameters:
        options["lower_order_final"] = False
    if stops_early:
        options.pop("final_noise", None)
    own = _config_for(config, name)
    schedule, grid_options = D.from_scheduler_config(own)
    sampler = Sampler(
        schedule,
        named_solver(name, eta, **options),
        float(config.get("timestep_scaling", 10.0)) if name == "lcm" else None,
        learned_variance=options.get("variance") == "learned",
        **_of_x0(own),
    )
    return Plan(sampler, grid_options)


def default_solver(config: Mapping[str, Any]) -> str:
    """Our name of the solver that a scheduler_config.json names.

    Raises:
      CheckpointError: a scheduler, or an algorithm of it, that is not known here.

    >>> default_solver({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3})
    'dpmpp_3m'
    """
    scheduler = config.get("_class_name")
    if scheduler == "DPMSolverMultistepScheduler":
        asked = (config.get("algorithm_type", "dpmsolver++"), config.get("solver_order", 2))
        if asked not in _DPM_SOLVERS:
            raise CheckpointError(
                f"scheduler_config.json asks for {asked[0]} of order {asked[1]}, which is not known here: "
                f"name a solver, such as {', '.join(_DPM_SOLVERS.values())}"
            )
        return _DPM_SOLVERS[asked]
    names = {theirs: ours for ours, theirs in SCHEDULER_OF.items()} | _OWN_GRID
    if scheduler not in names:
        raise CheckpointError(
            f"scheduler_config.json has _class_name {scheduler!r}; known: {', '.join(names)}"
        )
    return names[scheduler]


def _config_for(config: Mapping[str, Any], solver: str) -> Mapping[str, Any]:
    if config.get("_class_name") in _OWN_GRID or solver not in SCHEDULER_OF:
        return config
    return {**config, "_class_name": SCHEDULER_OF[solver]}


def _solver_options(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the file says about its own solver; another solver has its own defaults."""
    scheduler = config.get("_class_name")
    if scheduler == "DDPMWuerstchenScheduler" and name == "ddpm":
        return {"final_noise": False}
    if scheduler in _OWN_GRID or name not in _OPTIONS or name != default_solver(config):
        return {}
    options = {ours: config.get(*there) for ours, there in _OPTIONS[name].items()}
    if name == "ddpm":
        options["variance"] = _VARIANCES[one_of("variance_type", options["variance"], _VARIANCES)]
    return {ours: tuple(value) if isinstance(value, list) else value for ours, value in options.items()}


def _of_x0(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says is done to x_0, which models of pixels need. Where it is silent nothing is done,
    although some schedulers of diffusers clip then: latents have no range.
    """
    if config.get("thresholding"):
        percentile = config.get("dynamic_thresholding_ratio", 0.995)
        return {"threshold": (float(percentile), float(config.get("sample_max_value", 1.0)))}
    if config.get("clip_sample") and config.get("_class_name") in _CLIPPING:
        bound = float(config.get("clip_sample_range", 1.0))
        return {"threshold": (-bound, bound), "clips": True}
    return {}
