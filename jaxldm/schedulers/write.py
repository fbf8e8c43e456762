"""From path, prediction and grid to the entries of a scheduler_config.json that diffusers opens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxldm import diffusion as D
from jaxldm.arguments import checked, instance, optional, text
from jaxldm.diffusion.predictions import A_PREDICTION
from jaxldm.errors import InvalidArgumentError, one_of, shown
from jaxldm.schedulers.grids import GridRule
from jaxldm.schedulers.read import BETAS, PREDICTIONS, from_config
from jaxldm.schedulers.scheduler import DynamicShift
from jaxldm.schedulers.table import ALGORITHMS, LEVELS, OF_EPSILON, OWN, SCHEDULER_OF, SCHEDULERS, SPACINGS


@checked(
    prediction=A_PREDICTION,
    dynamic_shift=optional(instance(DynamicShift, "a schedulers.DynamicShift(...)")),
    solver=optional(text),
)
def to_config(
    prediction: D.Prediction,
    grid: GridRule | None = None,
    *,
    dynamic_shift: DynamicShift | None = None,
    solver: str | None = None,
) -> dict[str, Any]:
    """The entries of scheduler_config.json, in the words of diffusers, which opens it as a scheduler.

    Args:
        prediction: path and prediction. What no scheduler of diffusers has (interpolants, paths of your own,
            an EDM path without preconditioning) is written as a "PathScheduler", in words of this library.
        grid: which scheduler is named depends on it; None is the path's default.
        dynamic_shift: of a flow path.
        solver: on a discrete path, name the scheduler of this solver; None: whichever spaces its rows so.

    Raises:
        InvalidArgumentError: rows in place of a rule, a grid that no scheduler of diffusers has, or not that
            of the solver.
        UnknownNameError: a solver that no scheduler of diffusers has.

    >>> from jaxldm import diffusion as D
    >>> config = to_config(D.v(D.VP.named("cosine")))
    >>> config["_class_name"], config["beta_schedule"], config["timestep_spacing"]
    ('DDIMScheduler', 'squaredcos_cap_v2', 'trailing')
    """
    if grid is not None and not isinstance(grid, GridRule):
        raise InvalidArgumentError(
            f"grid must be a rule for any number of steps, as GridRule(spacing='leading'), not {shown(grid)}"
        )
    path, grid = prediction.path, _spelled_out(GridRule() if grid is None else grid, prediction.path)
    if type(path) is D.VP:
        config = _betas(path) | _discrete_grid(grid, solver)
        config["prediction_type"] = PREDICTIONS.get(prediction.name, prediction.name)
    elif type(path) is D.EDM and prediction.name == "edm":
        config = _edm(path, prediction, grid)
    elif type(path) is D.EDM and prediction.name == "consistency":
        config = _consistency(path, prediction, grid)
    elif prediction.name == "score":
        raise InvalidArgumentError(
            "the file of a score-based model is not written: keep the scheduler_config.json that it came with"
        )
    elif type(path) is D.Flow:
        config = _flow(path, prediction, grid, dynamic_shift)
    elif type(path) is D.ContinuousVP:
        config = _continuous_vp(path, prediction, grid)
    elif type(path) is D.Cosine:
        config = _cosine(path, prediction, grid)
    else:
        config = {"_class_name": OWN, "path": D.path_to_dict(path)} | D.prediction_to_dict(prediction)
        config |= {"grid": grid.options()}
    _check_read_again(config, prediction, grid, dynamic_shift)
    return config


def _spelled_out(grid: GridRule, path: D.Path) -> GridRule:
    """The rule with the path's default spacing by its name."""
    if grid.spacing is not None or grid.levels is not None:
        return grid
    default = {"levels": "karras"} if isinstance(path, D.EDM) else {"spacing": "trailing"}
    return dataclasses.replace(grid, **default)


def _check_read_again(config, prediction, grid, dynamic_shift) -> None:
    """Whatever the file cannot say shows in what it is read as."""
    again = from_config(config)
    path = prediction.path
    if _spelled_out(again.grid, path) != grid:
        options = ", ".join(f"{name}={value!r}" for name, value in grid.options().items())
        raise InvalidArgumentError(
            f"no scheduler of diffusers spaces the rows of the {path.name} path with {options}: leave them "
            "out of the file, and pass them to make_grid"
        )
    if again.dynamic_shift != dynamic_shift:
        raise InvalidArgumentError(f"a dynamic shift needs a flow path, but this is a {path.name} path")
    if again.prediction != prediction:
        raise InvalidArgumentError(
            f"{prediction.name} on this {path.name} path cannot be written into scheduler_config.json"
        )


def _betas(path: D.VP) -> dict[str, Any]:
    config = {
        "num_train_timesteps": path.num_train_timesteps,
        "rescale_betas_zero_snr": path.zero_terminal_snr,
        "clip_sample": False,
    }
    if path.schedule is None:
        return config | {"trained_betas": list(path.betas)}
    if path.schedule.name in BETAS:
        return config | path.schedule.ends() | {"beta_schedule": BETAS[path.schedule.name]}
    betas = path.schedule._replace(zero_terminal_snr=False).make()
    return config | {"trained_betas": betas.tolist(), "_betas": path.schedule.name}


def _discrete_grid(grid: GridRule, solver: str | None) -> dict[str, Any]:
    """The entries about the grid, and the scheduler that has them."""
    if solver is not None:
        name = SCHEDULER_OF[one_of("solver with a scheduler in diffusers", solver, SCHEDULER_OF)]
        families = [SCHEDULERS[name].rows]
    elif grid.spacing == "lcm":
        name, families = "LCMScheduler", ["lcm"]
    else:
        name, families = None, list(SPACINGS)
    if families == ["lcm"]:
        return {"_class_name": name, "original_inference_steps": grid.original_steps}
    spacing = grid.spacing or "trailing"
    family = next((family for family in families if _spaces(family, spacing, grid)), families[0])
    defaults = {
        "whole": "DDIMScheduler",
        "fractional": "EulerDiscreteScheduler",
        "open": "DPMSolverMultistepScheduler",
    }
    theirs = {ours: theirs for theirs, ours in SPACINGS[family].items()}
    config = {
        "_class_name": name or defaults[family],
        "timestep_spacing": theirs.get(spacing, "trailing"),
        "steps_offset": grid.steps_offset,
    }
    algorithms = [algorithm for algorithm, ours in ALGORITHMS.get(name or "", {}).items() if ours == solver]
    if algorithms:
        chosen = algorithms[-1 if solver == "dpm_sde" else 0]  # of second order
        config |= dict(zip(("algorithm_type", "solver_order"), chosen, strict=True))
        if solver == "dpmpp_3m_sde":  # its own default, which is not that of a file
            config["solver_type"] = "heun"
    if solver in OF_EPSILON and grid.final == "clean":
        raise InvalidArgumentError(
            f"solver={solver!r} ends at the last noise level in diffusers: give GridRule(final='sigma_min')"
        )
    if family == "whole":
        return config | {"set_alpha_to_one": grid.final == "clean"}
    config["final_sigmas_type"] = "zero" if grid.final == "clean" else "sigma_min"
    if grid.lambda_min is not None:
        config["lambda_min_clipped"] = grid.lambda_min
    return config | _levels(grid, "use_exponential_sigmas" if family == "fractional" else "use_lu_lambdas")


def _spaces(family: str, spacing: str, grid: GridRule) -> bool:
    """Whether schedulers of that family may space their rows so."""
    respaces = "open" if grid.spacing is None else "fractional"
    return (
        spacing in SPACINGS[family].values()
        and (grid.levels is None or family == respaces)
        and (grid.lambda_min is None or family == "open")
    )


def _levels(grid: GridRule, log_snr: str = "use_lu_lambdas") -> dict[str, Any]:
    """The entry of the rule for the noise levels; "uniform_log_snr" is "exponential" under another name."""
    if grid.levels not in LEVELS:
        return {}
    return {log_snr if grid.levels == "uniform_log_snr" else LEVELS[grid.levels]: True}


def _edm(path: D.EDM, prediction: D.Prediction, grid: GridRule) -> dict[str, Any]:
    config = {
        "_class_name": "EDMEulerScheduler",
        "sigma_data": prediction.sigma_data,
        "sigma_min": path.sigma_min,
        "sigma_max": path.sigma_max,
        "prediction_type": "epsilon",
        "sigma_schedule": grid.levels,
        "rho": grid.rho,
    }
    return config | ({"final_sigmas_type": "sigma_min"} if grid.final == "sigma_min" else {})


def _consistency(path: D.EDM, prediction: D.Prediction, grid: GridRule) -> dict[str, Any]:
    return {
        "_class_name": "CMStochasticIterativeScheduler",
        "num_train_timesteps": grid.original_steps,
        "sigma_data": prediction.sigma_data,
        "sigma_min": path.sigma_min,
        "sigma_max": path.sigma_max,
        "rho": grid.rho,
    }


def _flow(
    path: D.Flow, prediction: D.Prediction, grid: GridRule, dynamic_shift: DynamicShift | None
) -> dict[str, Any]:
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": round(1 / path.t_min),
        "shift": path.shift,
        "_prediction_type": prediction.name,
        "_spacing": grid.spacing,
    }
    if 1 / config["num_train_timesteps"] != path.t_min:
        config["_t_min"] = path.t_min
    if dynamic_shift is not None:
        keys = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
        config |= dict(zip(keys, dynamic_shift, strict=True)) | {"use_dynamic_shifting": True}
    config |= {} if grid.levels == "uniform_log_snr" else _levels(grid)
    config |= {} if grid.shift_terminal is None else {"shift_terminal": grid.shift_terminal}
    return config | ({"_shift_t_min_twice": True} if grid.shift_t_min_twice else {})


def _continuous_vp(path: D.ContinuousVP, prediction: D.Prediction, grid: GridRule) -> dict[str, Any]:
    return {
        "_class_name": "ScoreSdeVpScheduler",
        "beta_min": path.beta_min,
        "beta_max": path.beta_max,
        "sampling_eps": path.t_min,
        "_prediction_type": prediction.name,
        "_spacing": grid.spacing,
    }


def _cosine(path: D.Cosine, prediction: D.Prediction, grid: GridRule) -> dict[str, Any]:
    config: Mapping[str, Any] = {
        "_class_name": "DDPMWuerstchenScheduler",
        "s": path.offset,
        "scaler": path.scaler,
    }
    own = {"_prediction_type": prediction.name, "_final": grid.final, "_spacing": grid.spacing}
    usual = {"_prediction_type": "epsilon", "_final": "sigma_min", "_spacing": "trailing"}
    return config | {entry: value for entry, value in own.items() if usual[entry] != value}
