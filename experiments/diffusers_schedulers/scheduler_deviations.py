"""Where jaxldm draws something else than diffusers, on purpose: each with its reason and what it covers."""

from __future__ import annotations

import pathlib
import tomllib
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import numpy as np

from experiments.diffusers_schedulers import scheduler_runs
from experiments.diffusers_schedulers.scheduler_probes import Probe, signature
from jaxldm import diffusion as D
from jaxldm import schedulers

_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
_OPEN = ("DEISMultistepScheduler", "DPMSolverMulti", "DPMSolverSingle", "SASolver", "UniPC")
_MULTISTEP = (
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "EDMDPMSolverMultistepScheduler",
)


class Deviation(NamedTuple):
    """One difference.

    Attributes:
        title: where it is met.
        reason: what diffusers does, what jaxldm does, and why.
        test: the file whose tests show both.
        covers: probe -> whether the difference is met there.
        measured: the size of a difference that is met in no whole run from given noise.
    """

    title: str
    reason: str
    test: str
    covers: Callable[[Probe], bool]
    measured: Callable[[], float] | None = None


def _value(probe: Probe, entry: str):
    """An entry as diffusers reads it, its own default where the probe is silent."""
    return probe.config.get(entry, signature(probe.scheduler).get(entry))


def _has_levels(probe: Probe) -> bool:
    return any(_value(probe, entry) for entry in _LEVELS)


def _clips_with_ddim(probe: Probe) -> bool:
    return probe.scheduler == "DDIMScheduler" and bool(
        _value(probe, "clip_sample") or _value(probe, "thresholding")
    )


def _visits_the_last_row_twice(probe: Probe) -> bool:
    name, spacing = probe.scheduler, _value(probe, "timestep_spacing")
    if name in ("DDIMScheduler", "DDIMInverseScheduler", "PNDMScheduler"):
        at_0 = spacing == "linspace" or (spacing == "leading" and not _value(probe, "steps_offset"))
        return at_0 and not _value(probe, "set_alpha_to_one")
    if name in ("DEISMultistepScheduler", "SASolverScheduler"):
        return _has_levels(probe)
    if name == "CMStochasticIterativeScheduler":  # as many steps as there are levels
        return _value(probe, "num_train_timesteps") <= 4
    if _value(probe, "final_sigmas_type") != "sigma_min":
        return False
    if name.startswith("EDM") or _has_levels(probe):
        return True
    return name == "EulerDiscreteScheduler" and spacing != "trailing"


def _jumps_beside_its_rows(probe: Probe) -> bool:
    names = ("DDIMScheduler", "DDIMInverseScheduler", "PNDMScheduler")
    return probe.scheduler in names and _value(probe, "timestep_spacing") in ("linspace", "trailing")


def _third_order(probe: Probe) -> bool:
    return probe.scheduler in _MULTISTEP and _value(probe, "solver_order") == 3


def _cosine_in_float32(probe: Probe) -> bool:
    names = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
    names += ("EulerAncestralDiscreteScheduler", "DEISMultistepScheduler", "SASolverScheduler")
    return probe.scheduler in names and _value(probe, "beta_schedule") == "squaredcos_cap_v2"


def _not_a_number(probe: Probe) -> bool:
    if probe.scheduler == "UniPCMultistepScheduler":
        return _value(probe, "solver_type") == "bh1" or not _value(probe, "lower_order_final")
    return probe.scheduler == "DDPMScheduler" and _value(probe, "variance_type") == "fixed_large_log"


def _flow_levels(probe: Probe) -> bool:
    return probe.scheduler.startswith(_OPEN) and bool(_value(probe, "use_flow_sigmas"))


def _of(*names: str) -> Callable[[Probe], bool]:
    return lambda probe: probe.scheduler in names


def _static_shift(probe: Probe) -> bool:
    return probe.scheduler.startswith("FlowMatch") and "shift" in probe.config


def _rounded_times(probe: Probe) -> bool:
    return probe.scheduler.startswith(_OPEN) and _has_levels(probe)


def _image_to_image() -> float:
    configs = {"PNDMScheduler": {"skip_prk_steps": True}, "LMSDiscreteScheduler": {}}
    configs |= {"DPMSolverSinglestepScheduler": {}}
    sizes = []
    for name, config in configs.items():
        scheduler = schedulers.from_config({"_class_name": name} | config)
        for strength in (0.9, 0.5):
            expected = scheduler_runs.theirs(name, config, 11, scheduler, strength=strength)
            sizes.append(scheduler_runs.difference(expected, name, 11, scheduler, strength=strength))
    return max(sizes)


def _noise_scale() -> float:
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1}
    config |= {"beta_start": 0.00085, "beta_end": 0.012}
    return 1 - float(schedulers.from_config(config).make_grid(50).sigma[0])


def _written_levels() -> float:
    return float(D.at_sigmas(D.Flow(), [0.5], shift=3.0).sigma[0]) - 0.5


def _dit_scaled() -> float:
    from experiments.diffusers_schedulers.pipeline_runs import KINDS
    from experiments.diffusers_schedulers.product import verdict

    kind = next(kind for kind in KINDS if kind.name == "DiTPipeline")
    return verdict(kind, "EulerDiscreteScheduler", quirks=False).size


def _ipndm_first() -> float:
    """With a network that answers something at pure noise: the exact one there is 0."""
    scheduler = schedulers.from_config({"_class_name": "IPNDMScheduler"})
    with mock.patch.object(scheduler_runs, "network", lambda prediction, learned, x, t: 0.7 * np.sin(x + t)):
        expected = scheduler_runs.theirs("IPNDMScheduler", {}, 4, scheduler)
        return scheduler_runs.difference(expected, "IPNDMScheduler", 4, scheduler)


def _underflow() -> float:
    import torch

    made = scheduler_runs.reference_class("DDIMScheduler")(beta_end=0.5, clip_sample=False)
    made.set_timesteps(4)
    one = torch.ones(1)
    return float(made.step(one, made.timesteps[0], one).prev_sample)


def _of_pipelines(name: str) -> Callable[[], float]:
    def measured() -> float:
        from experiments.diffusers_schedulers.pipeline_deviations import MEASURED

        return MEASURED[name]()

    return measured


_MEASURED = {
    **{name: _of_pipelines(name) for name in ("no_negative", "clip_skip", "strength", "known_noise")},
    "ipndm_first": _ipndm_first,
    "underflow": _underflow,
    "dit_scaled": _dit_scaled,
    "image_to_image": _image_to_image,
    "noise_scale": _noise_scale,
    "written_levels": _written_levels,
}
_COVERS: dict[str, Callable[[Probe], bool]] = {
    "ddim_clips": _clips_with_ddim,
    "ddim_inverse": lambda probe: (
        probe.scheduler == "DDIMInverseScheduler"
        and bool(_value(probe, "prediction_type") != "epsilon" or _value(probe, "clip_sample"))
    ),
    "rows_left_out": _jumps_beside_its_rows,
    "last_row_twice": _visits_the_last_row_twice,
    "third_order": _third_order,
    "tcd_last": _of("TCDScheduler"),
    "flow_levels": _flow_levels,
    "shift_twice": _static_shift,
    "rounded_times": _rounded_times,
    "log_linear": lambda probe: (
        probe.config.get("interpolation_type") == "log_linear" and not _has_levels(probe)
    ),
    "zero_terminal_snr": lambda probe: bool(_value(probe, "rescale_betas_zero_snr")),
    "cosine_float32": _cosine_in_float32,
    "not_a_number": _not_a_number,
    "score_sde": _of("ScoreSdeVpScheduler"),
    "score_ve": _of("ScoreSdeVeScheduler"),
    **dict.fromkeys(_MEASURED, lambda probe: False),
}
_WRITTEN = tomllib.loads(pathlib.Path(__file__).with_name("deviations.toml").read_text(encoding="utf-8"))
PAGE: dict[str, str] = _WRITTEN.pop("page")
DEVIATIONS = tuple(
    Deviation(**written, covers=_COVERS[name], measured=_MEASURED.get(name))
    for name, written in _WRITTEN.items()
)


def foot(pipelines: str) -> str:
    """The end of the page.

    Args:
        pipelines: `results.table` of the pipelines.
    """
    return PAGE["foot"].replace("{pipelines}\n", pipelines)


def deviation_of(probe: Probe) -> Deviation | None:
    """The first that covers the probe."""
    return next((deviation for deviation in DEVIATIONS if deviation.covers(probe)), None)
