"""scheduler_config.json, the file that diffusers keeps beside a network: read and written.

It says two things at once: the path and prediction that the network was trained on (`NoiseSchedule`), and the
grid that its authors sample on (arguments of `make_grid`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxldm.diffusion.noise_schedule import NoiseSchedule
from jaxldm.errors import CheckpointError, InvalidArgumentError, JaxldmError, one_of

# Our name of a beta schedule -> its name there. "laplace" is alphas_cumprod's root there.
_BETAS = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "sigmoid": "sigmoid",
    "laplace_root": "laplace",
}
_PREDICTIONS = {"flow": "flow_prediction"}
# Schedulers of the discrete path by how they space t: (our name of their "linspace", of their "leading").
_SPACINGS = {"whole": ("linspace", "leading"), "fractional": ("linspace_fractional", "leading")}
_SPACINGS["open"] = ("linspace_open", "leading_open")
_DISCRETE = {
    "DDIMScheduler": "whole",
    "DDPMScheduler": "whole",
    "PNDMScheduler": "whole",
    "LCMScheduler": "whole",
    "TCDScheduler": "whole",
    "EulerDiscreteScheduler": "fractional",
    "EulerAncestralDiscreteScheduler": "fractional",
    "HeunDiscreteScheduler": "fractional",
    "KDPM2DiscreteScheduler": "fractional",
    "KDPM2AncestralDiscreteScheduler": "fractional",
    "LMSDiscreteScheduler": "fractional",
    "DPMSolverMultistepScheduler": "open",
    "DPMSolverSinglestepScheduler": "open",
    "DEISMultistepScheduler": "open",
    "UniPCMultistepScheduler": "open",
}
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_CONTINUOUS_VP = "ScoreSdeVpScheduler"
_COSINE = "DDPMWuerstchenScheduler"
_OURS = "NoiseSchedule"  # paths that no scheduler there walks
_SIGMAS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "uniform_log_snr": "use_lu_lambdas",
}


def from_scheduler_config(config: Mapping[str, Any]) -> tuple[NoiseSchedule, dict[str, Any]]:
    """(the schedule, what to pass to `make_grid`) of the entries of a scheduler_config.json.

        schedule, options = from_scheduler_config(json.load(file))
        grid = make_grid(schedule.make_path(), 50, **options)

    The grid is the one that the named scheduler would walk. Options of its solver (orders, thresholding,
    clipping) are not read.

    Raises:
      CheckpointError: a scheduler, or an option that changes the path or the grid, that is not known here.

    >>> from jaxldm import diffusion as D
    >>> config = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "steps_offset": 1}
    >>> from_scheduler_config(config)[1]
    {'spacing': 'leading', 'steps_offset': 1}
    """
    name = config.get("_class_name")
    known = [*_DISCRETE, *_EDM, *_FLOW, _CONTINUOUS_VP, _COSINE, _OURS]
    if name not in known:
        raise CheckpointError(f"scheduler_config.json has _class_name {name!r}; known: {', '.join(known)}")
    try:
        schedule, options = _read(name, config)
        schedule.make_denoiser(lambda x, t: x)  # a path and a prediction that go together
    except CheckpointError:
        raise
    except (JaxldmError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"scheduler_config.json does not describe a schedule known here: {error}"
        ) from error
    return schedule, options


def _read(name: str, config: Mapping[str, Any]) -> tuple[NoiseSchedule, dict[str, Any]]:
    for entry, plain in (("timestep_type", "discrete"), ("interpolation_type", "linear")):
        if config.get(entry, plain) != plain:
            raise CheckpointError(f"scheduler_config.json has {entry} {config[entry]!r}, known: {plain!r}")
    if name == _OURS:
        return NoiseSchedule(**{key: value for key, value in config.items() if not key.startswith("_")}), {}
    if name == _CONTINUOUS_VP:
        prediction, t_min = config.get("_prediction_type", "epsilon"), config.get("sampling_eps", 1e-3)
        return NoiseSchedule(
            "continuous_vp",
            prediction,
            beta_min=config.get("beta_min", 0.1),
            beta_max=config.get("beta_max", 20.0),
            t_min=t_min,
        ), {"spacing": config.get("_spacing", "linspace")}
    if name == _COSINE:
        offset, scaler = config.get("s", 0.008), config.get("scaler", 1.0)
        options = {"final": config.get("_final", "sigma_min")}
        options |= {"spacing": config["_spacing"]} if "_spacing" in config else {}
        prediction = config.get("_prediction_type", "epsilon")
        return NoiseSchedule("cosine", prediction, offset=offset, scaler=scaler), options
    if name in _EDM:
        return _read_edm(config)
    if name in _FLOW:
        return _read_flow(config)
    if config.get("use_flow_sigmas"):
        shift = float(config.get("flow_shift", 1.0))
        return NoiseSchedule("flow", _read_prediction(config, "flow"), shift=shift), _read_sigmas(config)
    return _read_betas(config), _read_discrete_grid(name, config)


def _read_prediction(config: Mapping[str, Any], otherwise: str) -> str:
    theirs = config.get("prediction_type", otherwise)
    return {theirs: ours for ours, theirs in _PREDICTIONS.items()}.get(theirs, theirs)


def _read_sigmas(config: Mapping[str, Any]) -> dict[str, Any]:
    for entry in ("sigma_min", "sigma_max"):
        if config.get(entry) is not None:
            raise CheckpointError(f"scheduler_config.json has a {entry} of its own, which is not known here")
    return next(({"sigmas": ours} for ours, theirs in _SIGMAS.items() if config.get(theirs)), {})


def _read_betas(config: Mapping[str, Any]) -> NoiseSchedule:
    prediction, rescale = _read_prediction(config, "epsilon"), bool(config.get("rescale_betas_zero_snr"))
    given = config.get("trained_betas")
    if "_betas" in config:  # a schedule that has no name there: its betas are given as well
        steps = config.get("num_train_timesteps", 1000)
        return NoiseSchedule("vp", prediction, config["_betas"], steps, zero_terminal_snr=rescale)
    if given is not None:
        betas = tuple(float(beta) for beta in given)
        return NoiseSchedule(
            "vp",
            prediction,
            num_train_timesteps=len(betas),
            zero_terminal_snr=rescale,
            trained_betas=betas,
        )
    names = {theirs: ours for ours, theirs in _BETAS.items()}
    betas = names[one_of("beta_schedule", config.get("beta_schedule", "linear"), names)]
    # Its own defaults stand where the file is silent; the cosine schedule has no start and end.
    has_ends = betas in ("linear", "scaled_linear", "sigmoid")
    start, end = (config.get("beta_start", 1e-4), config.get("beta_end", 0.02)) if has_ends else (None, None)
    return NoiseSchedule(
        "vp", prediction, betas, config.get("num_train_timesteps", 1000), start, end, rescale
    )


def _read_discrete_grid(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    family = _DISCRETE[name]
    if name in ("LCMScheduler", "TCDScheduler"):
        return {"spacing": "lcm", "original_steps": config.get("original_inference_steps", 50)}
    spacing = config.get("timestep_spacing", "leading" if family == "whole" else "linspace")
    linspace, leading = _SPACINGS[family]
    names = {"trailing": "trailing", "linspace": linspace, "leading": leading}
    spacing = names[one_of("timestep_spacing", spacing, names)]
    options = {} if family == "whole" else _read_sigmas(config)
    if not (options and family == "open"):  # these respace the whole path, whatever their spacing
        options = {"spacing": spacing} | options
        if spacing.startswith("leading") and config.get("steps_offset"):
            options["steps_offset"] = config["steps_offset"]
        if name.startswith("DPMSolver") and config.get("lambda_min_clipped", -math.inf) > -math.inf:
            options["lambda_min"] = config["lambda_min_clipped"]
    # A scheduler made from another's config keeps that one's entries in its file; it does not heed them.
    if family == "whole":
        clean_at_the_end = {"DDIMScheduler": True, "PNDMScheduler": False}  # where the file is silent
        keeps_noise = name in clean_at_the_end and not config.get("set_alpha_to_one", clean_at_the_end[name])
    else:
        keeps_noise = name == "DEISMultistepScheduler" or config.get("final_sigmas_type") == "sigma_min"
    return options | ({"final": "sigma_min"} if keeps_noise else {})


def _read_edm(config: Mapping[str, Any]) -> tuple[NoiseSchedule, dict[str, Any]]:
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise CheckpointError(
            f"EDM's preconditioning with prediction_type {config['prediction_type']!r} is not known here"
        )
    numbers = ("sigma_data", "sigma_min", "sigma_max")
    schedule = NoiseSchedule("edm", **{key: float(config[key]) for key in numbers if key in config})
    options = {"sigmas": config.get("sigma_schedule", "karras")}
    if config.get("rho", 7.0) != 7.0:
        options["rho"] = config["rho"]
    if config.get("final_sigmas_type", "zero") == "sigma_min":
        options["final"] = "sigma_min"
    return schedule, options


def _read_flow(config: Mapping[str, Any]) -> tuple[NoiseSchedule, dict[str, Any]]:
    if config.get("invert_sigmas"):
        raise CheckpointError("scheduler_config.json has invert_sigmas, which is not known here")
    schedule = NoiseSchedule(
        "flow",
        config.get("_prediction_type", "flow"),
        t_min=config.get("_t_min", 1 / config.get("num_train_timesteps", 1000)),
        time_distribution=config.get("_time_distribution", "uniform"),
        shift=float(config.get("shift", 1.0)),
    )
    # Pipelines with a static shift let the scheduler choose, evenly to its last t; the others start at 1 and
    # give N even values.
    options = {"spacing": config.get("_spacing", "linspace")}
    if config.get("use_dynamic_shifting"):
        keys = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
        schedule = dataclasses.replace(
            schedule,
            dynamic_shift=tuple(config.get(key, value) for key, value in keys.items()),
            dynamic_shift_kind=config.get("time_shift_type", "exponential"),
        )
        options = {"spacing": config.get("_spacing", "trailing")}
    options |= _read_sigmas(config)
    if config.get("shift_terminal"):
        options["shift_terminal"] = config["shift_terminal"]
    if config.get("_shift_t_min_twice"):  # our own entry, for those who want the rows of diffusers
        options["shift_t_min_twice"] = True
    return schedule, options


def to_scheduler_config(
    schedule: NoiseSchedule, grid_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The entries of scheduler_config.json, in the words of diffusers, which opens it as a scheduler.

    Args:
        schedule: the path and the prediction. An interpolant is written in our own words: diffusers has no
            scheduler for it.
        grid_options: arguments of `make_grid` to write down with it: spacing, sigmas, final, steps_offset,
            lambda_min, original_steps, shift_terminal, rho. Which scheduler is named depends on them.

    Raises:
        InvalidArgumentError: options that no scheduler of diffusers has.
        UnknownNameError: a path that does not exist.
    """
    options = dict(grid_options or {})
    schedule.make_path()  # refuses what cannot be one
    if schedule.path == "vp":
        config = _written_betas(schedule) | _written_discrete_grid(options)
    elif schedule.path == "edm":
        config = {
            "_class_name": _EDM[0],
            "sigma_data": schedule.sigma_data,
            "sigma_min": schedule.sigma_min,
            "sigma_max": schedule.sigma_max,
            "prediction_type": "epsilon",
        }
        config |= {"sigma_schedule": options.pop("sigmas")} if "sigmas" in options else {}
        config |= {"rho": options.pop("rho")} if "rho" in options else {}
    elif schedule.path == "flow":
        config = _written_flow(schedule, options)
    elif schedule.path == "continuous_vp":
        config = {
            "_class_name": _CONTINUOUS_VP,
            "beta_min": schedule.beta_min,
            "beta_max": schedule.beta_max,
            "sampling_eps": schedule.t_min,
            "_prediction_type": schedule.prediction,
            "_spacing": options.pop("spacing", None) or "trailing",
        }
    elif schedule.path == "cosine":
        config = _written_cosine(schedule, options)
    else:
        config = {"_class_name": _OURS} | {
            field.name: getattr(schedule, field.name)
            for field in dataclasses.fields(schedule)
            if getattr(schedule, field.name) != field.default
        }
    if options:
        raise InvalidArgumentError(
            f"no scheduler of diffusers walks the {schedule.path} path with {', '.join(map(repr, options))}: "
            "leave it out of grid_options and pass it to make_grid"
        )
    return config


def _written_cosine(schedule: NoiseSchedule, options: dict[str, Any]) -> dict[str, Any]:
    config = {"_class_name": _COSINE, "s": schedule.offset, "scaler": schedule.scaler}
    own = {"_prediction_type": schedule.prediction, "_final": options.pop("final", "clean")}
    own["_spacing"] = options.pop("spacing", None)
    usual = {"_prediction_type": "epsilon", "_final": "sigma_min", "_spacing": None}
    return config | {entry: value for entry, value in own.items() if usual[entry] != value}


def _written_betas(schedule: NoiseSchedule) -> dict[str, Any]:
    config = {
        "num_train_timesteps": schedule.num_train_timesteps,
        "prediction_type": _PREDICTIONS.get(schedule.prediction, schedule.prediction),
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "clip_sample": False,
    }
    if schedule.trained_betas is not None:
        count = len(schedule.trained_betas)
        return config | {"trained_betas": list(schedule.trained_betas), "num_train_timesteps": count}
    if schedule.betas in _BETAS:
        return config | schedule.beta_options() | {"beta_schedule": _BETAS[schedule.betas]}
    betas = dataclasses.replace(schedule, zero_terminal_snr=False).make_betas()
    return config | {"trained_betas": betas.tolist(), "_betas": schedule.betas}


def _written_discrete_grid(options: dict[str, Any]) -> dict[str, Any]:
    """The entries about the grid, and the scheduler that has them; what was written leaves `options`."""
    spacing, sigmas = options.pop("spacing", None), options.pop("sigmas", None)
    final, offset = options.pop("final", "clean"), options.pop("steps_offset", 0)
    if spacing == "lcm":
        return {"_class_name": "LCMScheduler", "original_inference_steps": options.pop("original_steps", 50)}
    whole = sigmas is not None and spacing is None
    family = next(
        (
            family
            for family, names in _SPACINGS.items()
            if ("trailing" if spacing is None else spacing) in (*names, "trailing")
            and (sigmas is None or family == ("open" if whole else "fractional"))
            and ("lambda_min" not in options or family == "open")
        ),
        None,
    )
    if family is None or (sigmas is not None and sigmas not in _SIGMAS):
        raise InvalidArgumentError(
            f"no scheduler of diffusers has spacing={spacing!r} with sigmas={sigmas!r}: leave them out of "
            "grid_options and pass them to make_grid"
        )
    linspace, leading = _SPACINGS[family]
    config = {
        "timestep_spacing": {linspace: "linspace", leading: "leading"}.get(spacing, "trailing"),
        "steps_offset": offset,
    }
    if family == "whole":
        return config | {"_class_name": "DDIMScheduler", "set_alpha_to_one": final == "clean"}
    name = "DPMSolverMultistepScheduler" if family == "open" else "EulerDiscreteScheduler"
    config |= {"_class_name": name, "final_sigmas_type": "zero" if final == "clean" else "sigma_min"}
    if family == "open" and "lambda_min" in options:
        config["lambda_min_clipped"] = options.pop("lambda_min")
    if sigmas is not None:
        entry = _SIGMAS["exponential" if sigmas == "uniform_log_snr" and not whole else sigmas]
        config |= {entry: True}
    return config


def _written_flow(schedule: NoiseSchedule, options: dict[str, Any]) -> dict[str, Any]:
    config = {
        "_class_name": _FLOW[0],
        "num_train_timesteps": round(1 / schedule.t_min),
        "shift": schedule.shift,
        "_prediction_type": schedule.prediction,
        "_spacing": options.pop("spacing", None) or "trailing",
    }
    if 1 / config["num_train_timesteps"] != schedule.t_min:
        config["_t_min"] = schedule.t_min
    if schedule.time_distribution != "uniform":
        config["_time_distribution"] = schedule.time_distribution
    if schedule.dynamic_shift is not None:
        keys = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
        config |= dict(zip(keys, schedule.dynamic_shift, strict=True))
        config |= {"use_dynamic_shifting": True, "time_shift_type": schedule.dynamic_shift_kind}
    if options.get("sigmas") in ("karras", "exponential", "beta"):
        config[_SIGMAS[options.pop("sigmas")]] = True
    if "shift_terminal" in options:
        config["shift_terminal"] = options.pop("shift_terminal")
    if options.pop("shift_t_min_twice", False):
        config["_shift_t_min_twice"] = True
    return config
