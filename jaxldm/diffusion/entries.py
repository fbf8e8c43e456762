"""Paths and predictions as plain data, for recipes and other files."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Annotated, Any, cast

from jaxldm.arguments import checked, instance
from jaxldm.diffusion.betas import rescale_zero_terminal_snr
from jaxldm.diffusion.cosine import Cosine
from jaxldm.diffusion.interpolants import Interpolant
from jaxldm.diffusion.paths import A_PATH, EDM, VP, ContinuousVP, Path
from jaxldm.diffusion.predictions import A_PREDICTION, Prediction, edm, prediction
from jaxldm.diffusion.rectified_flow import Flow
from jaxldm.entries import Bounds, field_types, read_values
from jaxldm.errors import CheckpointError, InvalidArgumentError, Table, one_of, shown
from jaxldm.exact import MAX_TIMESTEPS
from jaxldm.reading import reason

# Name in files -> class. A path of your own is named "package.module:Class".
PATHS: dict[str, type[Path]] = Table("path")
PATHS |= {
    "vp": VP,
    "continuous_vp": ContinuousVP,
    "edm": EDM,
    "flow": Flow,
    "interpolant": Interpolant,
    "cosine": Cosine,
}

ENTRIES = instance(Mapping, "a dictionary such as {'type': 'flow'}")


@checked(path=A_PATH)
def path_to_dict(path: Path) -> dict[str, Any]:
    """A path as JSON has it: "type", the name of its class, and its fields; `VP` with the names of its betas.

    Raises `InvalidArgumentError` for a path of your own that is no dataclass.

    >>> path_to_dict(Flow(shift=3.0))
    {'type': 'flow', 'shift': 3.0, 't_min': 0.001}
    >>> path_to_dict(VP.named("cosine"))
    {'type': 'vp', 'betas': 'cosine', 'num_train_timesteps': 1000}
    """
    if type(path) is VP:
        if path.schedule is None:
            return {"type": "vp", "betas": list(path.betas)}
        name, steps, *others = path.schedule
        defaults = type(path.schedule)._field_defaults
        named = dict(zip(path.schedule._fields[2:], others, strict=True))
        changed = {key: value for key, value in named.items() if value != defaults[key]}
        return {"type": "vp", "betas": name, "num_train_timesteps": steps} | changed
    names = {cls: name for name, cls in PATHS.items()}
    kind = names.get(type(path), f"{type(path).__module__}:{type(path).__qualname__}")
    if not dataclasses.is_dataclass(path):
        raise InvalidArgumentError(
            f"the path {kind} has no fields that a file could hold: make it a dataclass"
        )
    fields = {
        field.name: getattr(path, field.name)
        for field in dataclasses.fields(cast(Any, path))
        if field.compare
    }
    return {"type": kind} | {
        key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()
    }


@checked(entries=ENTRIES)
def path_from_dict(entries: Mapping[str, Any]) -> Path:
    """The inverse of `path_to_dict`; what is left out has its default.

    Raises:
        UnknownNameError: another type of path, or another name of betas.
        InvalidArgumentError: fields that the path does not have, numbers that are out of range, or a class
            of your own whose module has not been imported.
    """
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in entries.items()
        if key != "type"
    }
    kind = str(entries.get("type", "vp"))
    cls = _own_class(kind) if ":" in kind else PATHS[one_of("path", kind, PATHS)]
    make = VP.named if cls is VP and isinstance(options.get("betas", "linear"), str) else cls
    if make is not cls:
        options.setdefault("betas", "linear")
    try:
        return make(**read_values(options, _types_of(make), f"the {kind} path"))
    except (CheckpointError, TypeError) as error:
        words = str(error) if isinstance(error, CheckpointError) else reason(error)
        raise InvalidArgumentError(f"the entries of a {kind} path are not right: {words}") from error


def _types_of(make: Any) -> dict[str, Any]:
    """What the entries of one of our own paths may be; a path of another package checks its own."""
    if make == VP.named:
        betas = {"betas": str, "num_train_timesteps": Annotated[int, Bounds(2, MAX_TIMESTEPS)]}
        unit: Any = Annotated[float, Bounds(0, 1)]
        ends = dict.fromkeys(("beta_start", "beta_end"), unit | None)
        return betas | ends | {"zero_terminal_snr": bool}
    return dict(field_types(make)) if make in PATHS.values() else {}


def _own_class(name: str) -> type[Path]:
    """A class by "package.module:Class". A file must not import anything, so the module has to be there."""
    module, _, attribute = name.partition(":")
    cls = getattr(sys.modules.get(module), attribute, None)
    if not (isinstance(cls, type) and issubclass(cls, Path)):
        raise InvalidArgumentError(
            f"the path {shown(name)} is not known: import {module} first (on the command line: "
            "jaxldm --import "
            f"{module} COMMAND ...), and let {attribute} be a subclass of D.Path"
        )
    return cls


@checked(prediction=A_PREDICTION)
def prediction_to_dict(prediction: Prediction) -> dict[str, Any]:
    """The name of a prediction and its own option, without its path.

    >>> from jaxldm import diffusion as D
    >>> prediction_to_dict(D.edm(D.EDM(), 0.7))
    {'prediction': 'edm', 'sigma_data': 0.7}
    """
    options = {} if prediction.sigma_data is None else {"sigma_data": prediction.sigma_data}
    return {"prediction": prediction.name} | options


# What a schedule of version 0.1 says where it is silent; `betas` to `trained_betas` are of "vp", and so on.
_DEFAULTS_OF_0_1 = {
    "path": "vp",
    "prediction": "epsilon",
    "betas": "linear",
    "num_train_timesteps": 1000,
    "beta_start": None,
    "beta_end": None,
    "zero_terminal_snr": False,
    "trained_betas": None,
    "sigma_data": 0.5,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "beta_min": 0.1,
    "beta_max": 20.0,
    "interpolant": "linear",
    "gamma": None,
    "t_min": 1e-3,
    "time_distribution": "uniform",
    "shift": 1.0,
    "dynamic_shift": None,
    "dynamic_shift_kind": "exponential",
    "offset": 0.008,
    "scaler": 1.0,
}
_FIELDS_OF_0_1 = {
    "vp": ("betas", "num_train_timesteps", "beta_start", "beta_end", "zero_terminal_snr"),
    "edm": ("sigma_min", "sigma_max"),
    "continuous_vp": ("beta_min", "beta_max", "t_min"),
    "interpolant": ("gamma", "t_min"),
    "flow": ("shift", "t_min"),
    "cosine": ("offset", "scaler"),
}


@checked(entries=ENTRIES)
def prediction_of_0_1(entries: Mapping[str, Any]) -> Prediction:
    """The prediction, with its path, of a `noise` entry in a recipe of version 0.1.

    Raises:
        UnknownNameError: a path or prediction that does not exist.
        InvalidArgumentError: an entry that 0.1 did not have, or numbers out of range.

    >>> prediction_of_0_1({"path": "flow", "prediction": "flow", "shift": 3.0}).path
    Flow(shift=3.0, t_min=0.001)
    """
    unknown = sorted(set(entries) - set(_DEFAULTS_OF_0_1))
    if unknown:
        raise InvalidArgumentError(f"{shown(unknown[0])} is no entry of a noise schedule")
    values = _DEFAULTS_OF_0_1 | dict(entries)
    kind = one_of("path", values["path"], _FIELDS_OF_0_1)
    fields = {name: values[name] for name in _FIELDS_OF_0_1[kind]}
    if kind == "interpolant":
        fields["kind"] = values["interpolant"]
    if kind == "vp" and values["trained_betas"] is not None:
        path: Path = VP(values["trained_betas"])
        if values["zero_terminal_snr"] and not path.zero_terminal_snr:
            path = VP(cast(Any, rescale_zero_terminal_snr(cast(Any, path.betas))))
    else:
        path = path_from_dict({"type": kind} | fields)
    if kind == "edm":
        return edm(path, values["sigma_data"])
    return prediction(values["prediction"], path)
