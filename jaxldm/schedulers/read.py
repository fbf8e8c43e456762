"""From the entries of a scheduler_config.json, and perhaps the name of another solver, to a `Scheduler`."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any, cast

from jaxldm import diffusion as D
from jaxldm.arguments import checked, flag, number, optional
from jaxldm.diffusion.values import equal_by_call
from jaxldm.entries import build
from jaxldm.errors import CheckpointError, InvalidArgumentError, JaxldmError, UnknownNameError, one_of, shown
from jaxldm.reading import reading, reason
from jaxldm.schedulers.continuous_paths import (
    read_consistency,
    read_continuous_vp,
    read_cosine,
    read_gvp,
    read_score,
)
from jaxldm.schedulers.entries import PLACE, typed, with_defaults
from jaxldm.schedulers.grids import TIMES, GridRule
from jaxldm.schedulers.inverse import Inverse, as_its_base
from jaxldm.schedulers.quirks import OPTIONS, changed_grid, changed_sampler, quirks_of
from jaxldm.schedulers.reference_path import reference_path
from jaxldm.schedulers.refusals import check_solver_entries
from jaxldm.schedulers.scheduler import DynamicShift, Sampler, Scheduler
from jaxldm.schedulers.table import (
    A_CONFIG,
    DISCRETE,
    ENDS_CLEAN,
    ENDS_NOISY,
    INVERSES,
    LEVELS,
    OWN,
    OWN_OF_0_1,
    SCHEDULER_OF,
    SCHEDULERS,
    SOLVER_TYPES,
    SPACINGS,
    VARIANCES,
    class_name,
    default_solver,
)

# Our name of a beta schedule -> its name in diffusers, whose "laplace" is alphas_cumprod's root.
BETAS = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "sigmoid": "sigmoid",
    "laplace_root": "laplace",
}
PREDICTIONS = {"flow": "flow_prediction"}  # the names that differ
# Entries of EulerDiscreteScheduler alone; the first choice is what all others do.
_OF_EULER = {"timestep_type": ("discrete", "continuous"), "interpolation_type": ("linear", "log_linear")}
_DIGITS = "_digits"  # of `from_config` alone, no entry of a file: the betas in float32, as diffusers has them


def a_solver_or_name(name: str, value: Any) -> Any:
    """A solver, or its name."""
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        raise UnknownNameError(name, value, D.solvers.names())
    return value if isinstance(value, str) else D.solvers.A_SOLVER(name, value)


@checked(
    config=A_CONFIG,
    solver=optional(a_solver_or_name),
    eta=optional(number(0)),
    stops_early=flag,
    reference_quirks=flag,
)
def from_config(
    config: Mapping[str, Any],
    solver: str | D.Solver | None = None,
    *,
    eta: float | None = None,
    stops_early: bool = False,
    reference_quirks: bool = False,
) -> Scheduler:
    """The path, prediction, grid and solver of the entries of a scheduler_config.json.

        scheduler = schedulers.from_config(json.load(file))
        denoise, grid = scheduler.sampler.denoiser(network), scheduler.make_grid(50)

    The grid is the one that the named scheduler would use. Another solver's name has the meaning of
    `OtherScheduler.from_config(scheduler.config)` in diffusers: betas and prediction stay, and the grid is
    the one that the other scheduler makes of the same file.

    Args:
        config: the entries.
        solver: a name that `D.solvers.make` takes, a `Solver` of your own on the file's grid, or None for the
            scheduler that the file names, with its options.
        eta: for the solvers that have this option.
        stops_early: the run ends before the clean row, so that the solver need not lower its order there.
        reference_quirks: draw what diffusers draws, also where it errs (`docs/where-jaxldm-differs.md`), with
            the solvers that it has. The runs are then those of `Scheduler.run`.

    Raises:
        UnknownNameError: no such solver.
        CheckpointError: a scheduler, or an option that changes the path or the grid, that is not known here.
        InvalidArgumentError: eta for a solver without it, or for one of your own.

    >>> config = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "steps_offset": 1}
    >>> from_config(config).grid.options()
    {'spacing': 'leading', 'steps_offset': 1}
    """
    if isinstance(solver, str) and solver not in D.solvers.SOLVERS:  # of another package, or no solver at all
        solver, eta = D.solvers.make(solver, **({} if eta is None else {"eta": eta})), None
    if solver is None and str(config.get("_class_name")) in INVERSES:
        return _inverse(config, reference_quirks=reference_quirks)
    with reading(PLACE):
        config = typed(config)
        named = class_name(config)
        config["_class_name"] = named
        if isinstance(solver, D.Solver):
            if eta is not None:
                raise InvalidArgumentError(
                    "eta is an option of the solvers by name: build yours with it instead"
                )
            own = with_defaults(config, named, names_it=True)
            prediction, grid, shift = _read(own)
            return Scheduler(Sampler(prediction, solver, **_x0_options(own)), grid, shift)
        if solver is None:
            check_solver_entries(config, named)
        name = default_solver(config) if solver is None else solver
        options = _solver_options(config, name, as_other=reference_quirks)
        options |= OPTIONS.get(name, {}) if reference_quirks else {}
        if stops_early:
            if "lower_order_final" in inspect.signature(D.solvers.SOLVERS[name]).parameters:
                options["lower_order_final"] = False
            options.pop("euler_at_final", None)
            options.pop("final_noise", None)
        options |= {} if eta is None else {"eta": eta}
        own = config if solver is None else _config_of(config, name)
        own = with_defaults(own, own["_class_name"], names_it=own["_class_name"] == named)
        own |= {_DIGITS: reference_quirks}
        prediction, grid, shift = _read(own)
        if "interval" in options:
            options["interval"] = interval_of_noise(own, prediction.path)
        sampler = Sampler(
            prediction,
            D.solvers.make(name, **options),
            learned_variance=options.get("variance") == "learned" or _has_learned_variance(own),
            timestep_scaling=_timestep_scaling(config, name, prediction.path),
            **_x0_options(own),
        )
        scheduler = Scheduler(sampler, grid, shift)
        return _with_quirks(scheduler, own, name, options, solver) if reference_quirks else scheduler


def _inverse(config: Mapping[str, Any], *, reference_quirks: bool) -> Scheduler:
    """From an image to its noise."""
    name = config["_class_name"]
    with reading(PLACE):
        base = as_its_base(typed(config), name)
    made = from_config(base, reference_quirks=reference_quirks)
    if name != "DDIMInverseScheduler":
        return dataclasses.replace(made, quirks=Inverse())
    sampler = made.sampler._replace(solver=D.solvers.ddim_inverse(1))
    as_ddim = (sampler.prediction.name, sampler.threshold) if reference_quirks else None
    return dataclasses.replace(made, sampler=sampler, quirks=Inverse(as_ddim))


def _with_quirks(
    scheduler: Scheduler, config: Mapping[str, Any], name: str, options: Mapping[str, Any], given: str | None
) -> Scheduler:
    """The scheduler as diffusers has it, of a file with its entries and the name of a solver."""
    of = config["_class_name"]
    if of not in SCHEDULERS:  # a path that diffusers does not know
        return scheduler
    betas = read_betas(config) if config.get("use_flow_sigmas") and SCHEDULERS[of].rows in DISCRETE else None
    return Scheduler(
        changed_sampler(scheduler.sampler, config, of, own_solver=given is None),
        changed_grid(scheduler.grid, of, is_shifted=scheduler.dynamic_shift is None),
        scheduler.dynamic_shift,
        quirks_of(config, of, name, options, betas),
    )


def _config_of(config: Mapping[str, Any], solver: str) -> Mapping[str, Any]:
    """The same entries, under the name of the scheduler that spaces the rows for this solver."""
    name = class_name(config)
    if name not in SCHEDULERS or SCHEDULERS[name].rows not in DISCRETE or solver not in SCHEDULER_OF:
        return config
    return {**config, "_class_name": SCHEDULER_OF[solver]}


def _solver_options(config: Mapping[str, Any], solver: str, *, as_other: bool = False) -> dict[str, Any]:
    """What the file says about its own solver; another solver has its own defaults.

    Args:
        as_other: or what its scheduler takes from the same file, as in diffusers.
    """
    scheduler = class_name(config)
    as_other = as_other and scheduler in SCHEDULERS and SCHEDULERS[scheduler].rows in DISCRETE
    if as_other and solver in SCHEDULER_OF:
        scheduler = SCHEDULER_OF[solver]
    if scheduler == "DDPMWuerstchenScheduler" and solver == "ddpm":
        return {"final_noise": False}
    if scheduler == "CMStochasticIterativeScheduler" and solver == "lcm":
        return {"from_t_min": True, "s_noise": config.get("s_noise", 1.0)}
    if scheduler == "ScoreSdeVeScheduler" and solver == "predictor_corrector":
        options = {"snr": config.get("snr", 0.15), "correct_steps": config.get("correct_steps", 1)}
        return {**options, "form": "published"}
    entries = SCHEDULERS[scheduler].options.get(solver, {}) if scheduler in SCHEDULERS else {}
    if not entries or not (as_other or solver == default_solver(config)):
        return {}
    options = {ours: config.get(*entry) for ours, entry in entries.items()}
    if "solver_type" in options:
        kind = options["solver_type"]
        options["solver_type"] = SOLVER_TYPES.get(scheduler, {}).get(kind, kind)
    if "variance" in options:
        if options["variance"] is None and scheduler == "DDPMScheduler":
            options["variance"] = "fixed_small"  # which it computes for none
        if options["variance"] not in VARIANCES:
            known = ", ".join(VARIANCES)
            raise CheckpointError(
                f"scheduler_config.json has variance_type {shown(options['variance'])}; known: {known}"
            )
        options["variance"] = VARIANCES[options["variance"]]
    return {ours: tuple(value) if isinstance(value, list) else value for ours, value in options.items()}


def interval_of_noise(config: Mapping[str, Any], path: D.Path) -> tuple[float, float]:
    """The noise levels between which SASolverScheduler adds noise: at the whole timesteps 200 to 800."""
    below, above = (0.5, 0.5) if config.get("use_karras_sigmas") else (0.0, 0.999)  # as it rounds them
    total = 1 if path.num_train_timesteps is not None else config.get("num_train_timesteps", 1000)
    low, high = (200 - below) / total, (800 + above) / total
    times = [min(t, path.t_noisy) for t in (low, high)]
    levels = [float(path.sigma(t) / path.alpha(t)) if path.alpha(t) > 0 else math.inf for t in times]
    return levels[0] * (1 - 1e-6), math.inf if high > path.t_noisy else levels[1] * (1 + 1e-6)


def _has_learned_variance(config: Mapping[str, Any]) -> bool:
    """Whether the file of a DPM-Solver says so: it then leaves the second half of the output alone."""
    reads_it = class_name(config) in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler")
    return reads_it and config.get("variance_type") in ("learned", "learned_range")


def _timestep_scaling(config: Mapping[str, Any], solver: str, path: D.Path) -> float | None:
    """Of the boundary condition of a consistency model; without timesteps it has none."""
    if solver != "lcm" or path.num_train_timesteps is None:
        return None
    return float(config.get("timestep_scaling", 10.0))


def _x0_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says is done to x_0, which models of pixels need."""
    if config.get("thresholding") and config.get("_class_name") != "TCDScheduler":
        percentile = config.get("dynamic_thresholding_ratio", 0.995)
        return {"threshold": (float(percentile), float(config.get("sample_max_value", 1.0)))}
    if config.get("clip_denoised") and config.get("_class_name") == "CMStochasticIterativeScheduler":
        return {"threshold": (-1.0, 1.0), "clips": True}
    known = SCHEDULERS.get(class_name(config))
    if config.get("clip_sample") and known is not None and known.clips:
        bound = float(config.get("clip_sample_range", 1.0))
        return {"threshold": (-bound, bound), "clips": True}
    return {}


def _read(config: Mapping[str, Any]) -> tuple[D.Prediction, GridRule, DynamicShift | None]:
    """What the file says about path, prediction and grid, or `CheckpointError`."""
    name = class_name(config)
    for entry, known in _OF_EULER.items():
        known = known if name == "EulerDiscreteScheduler" else known[:1]
        if config.get(entry, known[0]) not in known:
            choices = " and ".join(map(repr, known))
            raise CheckpointError(f"{PLACE} has {entry} {shown(config[entry])}, known for {name}: {choices}")
    try:
        read = _readers()[name if name in (OWN, OWN_OF_0_1) else SCHEDULERS[name].rows]
        prediction, grid, shift = read(name, config)
        return prediction, _of_known_spacing(grid), shift
    except CheckpointError:
        raise
    except (JaxldmError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        text = str(error) if isinstance(error, JaxldmError) else reason(error)
        raise CheckpointError(f"{PLACE} does not describe a scheduler known here: {text}") from error


def _readers() -> dict[str, Any]:
    return {
        **dict.fromkeys(DISCRETE, _read_discrete),
        "edm": _read_edm,
        "flow": _read_flow,
        "continuous_vp": read_continuous_vp,
        "cosine": read_cosine,
        "consistency": read_consistency,
        "score": read_score,
        "gvp": read_gvp,
        OWN: _read_own,
        OWN_OF_0_1: _read_own_of_0_1,
    }


def _read_discrete(name, config):
    if config.get("use_flow_sigmas"):
        return _read_flow_sigmas(name, config)
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        return _read_continuous(config)
    prediction = D.prediction(_prediction_name(config, "epsilon"), read_betas(config))
    grid, path = _read_discrete_grid(name, config), prediction.path
    most = float("inf") if path.zero_terminal_snr else path.sigma(path.t_noisy) / path.alpha(path.t_noisy)
    if (grid.level_max or 0) > most * (1 + 1e-6):
        raise CheckpointError(f"{PLACE} has sigma_max {grid.level_max:g}, but its betas end at {most:g}")
    return prediction, grid, None


def _read_continuous(config):
    """Noise levels beyond the betas, of which the network gets ln(sigma) / 4 (CosXL): EDM's, with the other
    sign and sigma_data = 1.
    """
    levels, ends = _read_levels(config), {name: config.get(name) for name in ("sigma_min", "sigma_max")}
    if levels is None or None in ends.values() or _keeps_noise(config):
        raise CheckpointError(
            f"{PLACE} has timestep_type 'continuous' with v_prediction, known with use_karras_sigmas (or "
            "use_exponential_sigmas or use_beta_sigmas), sigma_min, sigma_max, and final_sigmas_type 'zero'"
        )
    return _negative(D.edm(D.EDM(**ends), 1.0)), GridRule(levels=levels), None


def _read_flow_sigmas(name, config):
    """The flow path of a file of DEIS, DPM-Solver or UniPC, also for the scheduler of another solver."""
    shift = _dynamic_shift(config)
    if shift is not None and shift.kind != "exponential" and not name.startswith("UniPC"):
        raise CheckpointError(
            f"{PLACE} has time_shift_type {shown(shift.kind)} with use_flow_sigmas, known for {name}: "
            "'exponential'"
        )
    grid = GridRule(
        levels=_read_levels(config),
        shift_terminal=(config.get("shift_terminal") or None) if name.startswith("UniPC") else None,
        final="sigma_min" if name.startswith(("DPMSolver", "UniPC")) and _keeps_noise(config) else "clean",
    )
    path = D.Flow(shift=config.get("flow_shift", 1.0))
    return D.prediction(_prediction_name(config, "flow"), path), grid, shift


def _dynamic_shift(config: Mapping[str, Any]) -> DynamicShift | None:
    """The shift by the size of the image, where a file says so."""
    if not config.get("use_dynamic_shifting"):
        return None
    return DynamicShift(
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("time_shift_type", "exponential"),
    )


def _keeps_noise(config: Mapping[str, Any]) -> bool:
    return config.get("final_sigmas_type") == "sigma_min"


def _prediction_name(config: Mapping[str, Any], default: str) -> str:
    theirs = config.get("prediction_type", default)
    names: dict[Any, Any] = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    return names.get(theirs, theirs)


def read_betas(config: Mapping[str, Any]) -> D.VP:
    """The discrete path of a file."""
    path = _read_betas(config)
    return reference_path(path, class_name(config), config) if config.get(_DIGITS) else path


def _read_betas(config: Mapping[str, Any]) -> D.VP:
    zero_terminal_snr = bool(config.get("rescale_betas_zero_snr"))
    steps, given = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if "_betas" in config:  # a schedule without a name in diffusers: its betas are given too
        return D.VP.named(config["_betas"], steps, zero_terminal_snr=zero_terminal_snr)
    if given is not None:
        path = D.VP(given)
        rescale = zero_terminal_snr and not path.zero_terminal_snr
        return D.VP(cast(Any, D.rescale_zero_terminal_snr(cast(Any, path.betas)))) if rescale else path
    names = {theirs: ours for ours, theirs in BETAS.items()}
    betas = names[one_of("beta_schedule", config.get("beta_schedule", "linear"), names)]
    # Its own defaults stand where the file is silent; the cosine schedule has no start and end.
    has_ends = betas in ("linear", "scaled_linear", "sigmoid")
    ends = {"beta_start": config.get("beta_start", 1e-4), "beta_end": config.get("beta_end", 0.02)}
    return D.VP.named(betas, steps, zero_terminal_snr=zero_terminal_snr, **(ends if has_ends else {}))


def _read_levels(config: Mapping[str, Any]) -> str | None:
    return next((ours for ours, theirs in LEVELS.items() if config.get(theirs)), None)


def _read_discrete_grid(name: str, config: Mapping[str, Any]) -> GridRule:
    known = SCHEDULERS[name]
    if known.rows == "lcm":
        return GridRule(spacing="lcm", original_steps=config.get("original_inference_steps", 50))
    names = SPACINGS[known.rows]
    default = "leading" if known.rows == "whole" else "linspace"
    spacing = names[one_of("timestep_spacing", config.get("timestep_spacing", default), names)]
    spacing = "linspace" if name == "UnCLIPScheduler" else spacing
    levels = None if known.rows == "whole" else _read_levels(config)
    options: dict[str, Any] = {"levels": levels}
    log_linear = config.get("interpolation_type") == "log_linear"
    if log_linear and levels is None:  # N + 1 of them, whatever the timesteps
        return GridRule(levels="uniform_log_snr", final="sigma_min")
    if levels is not None and name in ("EulerDiscreteScheduler", "UniPCMultistepScheduler"):
        options |= {f"level_{end}": config.get(f"sigma_{end}") for end in ("min", "max")}
    # Those, and levels of logarithms, respace the whole path, whatever their spacing.
    if levels is None or not (known.rows == "open" or log_linear):
        options["spacing"] = spacing
        if spacing.startswith("leading") and config.get("steps_offset"):
            options["steps_offset"] = config["steps_offset"]
        if (
            name.startswith(("DPMSolver", "SASolver"))
            and config.get("lambda_min_clipped", -math.inf) > -math.inf
        ):
            options["lambda_min"] = config["lambda_min_clipped"]
    # A scheduler made from another's config keeps that one's entries in its file, and ignores them.
    if known.rows == "whole":
        reads_it = name in ("DDIMScheduler", "PNDMScheduler")
        keeps_noise = reads_it and not config.get("set_alpha_to_one", known.ends_clean)
    else:
        keeps_noise = name in ENDS_NOISY or (_keeps_noise(config) and name not in ENDS_CLEAN)
    return GridRule(**options, final="sigma_min" if keeps_noise else "clean")


def _read_edm(name, config):
    kind = one_of("prediction_type", config.get("prediction_type", "epsilon"), ("epsilon", "v_prediction"))
    path = D.EDM(**{key: config[key] for key in ("sigma_min", "sigma_max") if key in config})
    grid = GridRule(
        levels=config.get("sigma_schedule", "karras"),
        rho=config.get("rho", 7.0),
        final="sigma_min" if config.get("final_sigmas_type", "zero") == "sigma_min" else "clean",
    )
    prediction = D.edm(path, float(config.get("sigma_data", 0.5)))
    return prediction if kind == "epsilon" else _negative(prediction), grid, None


@equal_by_call
def _negative(prediction: D.Prediction) -> D.Prediction:
    """The network's output has the other sign: EDM's with prediction_type "v_prediction"."""
    return prediction._replace(
        to_x0=lambda output, x_t, t: prediction.to_x0(-output, x_t, t),
        target=lambda x_0, epsilon, t: -prediction.target(x_0, epsilon, t),
    )


def _read_flow(name, config):
    mirrored = bool(config.get("invert_sigmas"))
    if mirrored and (name != "FlowMatchEulerDiscreteScheduler" or config.get("stochastic_sampling")):
        raise CheckpointError(
            f"{PLACE} has invert_sigmas, known for FlowMatchEulerDiscreteScheduler, "
            "without stochastic_sampling"
        )
    if config.get("scale_factors"):
        raise CheckpointError(f"{PLACE} has scale_factors, which is not known here")
    t_min = config.get("_t_min", 1 / config.get("num_train_timesteps", 1000))
    path = D.Flow(shift=config.get("shift", 1.0), t_min=t_min)
    shift = _dynamic_shift(config)
    # Pipelines with a static shift let the scheduler choose, evenly to its last t; the others start at 1 and
    # give N even values.
    grid = GridRule(
        spacing=config.get("_spacing", "linspace" if shift is None else "trailing"),
        levels=_read_levels(config),
        shift_terminal=config.get("shift_terminal") or None,
        shift_t_min_twice=bool(config.get("_shift_t_min_twice")),  # our own entry
    )
    prediction = D.prediction(config.get("_prediction_type", "flow"), path)
    return _mirrored(prediction) if mirrored else prediction, grid, shift


@equal_by_call
def _mirrored(prediction: D.Prediction) -> D.Prediction:
    """The network counts time from noise to data, 1 - t, and its output is the change along that (Mochi)."""
    return _negative(prediction)._replace(precondition=lambda x_t, t: (x_t, 1 - t))


def _read_own(name, config):
    options = {"sigma_data": config["sigma_data"]} if "sigma_data" in config else {}
    prediction = D.prediction(config["prediction"], D.path_from_dict(config["path"]), **options)
    grid = build(GridRule, config.get("grid", {}), f"{PLACE}: grid")
    return prediction, grid, None


def _of_known_spacing(grid: GridRule) -> GridRule:
    """The rule, unless its spacing would import a module: a file must not do that."""
    if grid.spacing is None or grid.spacing in TIMES or grid.spacing in D.SPACINGS:
        return grid  # at once: to look for those of installed packages takes milliseconds
    one_of("spacing", grid.spacing, dict.fromkeys((*TIMES, *D.spacing_names())))
    return grid


def _read_own_of_0_1(name, config):
    entries = {key: value for key, value in config.items() if not key.startswith("_")}
    return D.prediction_of_0_1(entries), GridRule(), None
