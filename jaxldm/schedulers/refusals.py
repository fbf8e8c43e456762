"""Entries of a scheduler_config.json for the file's own solver that are refused: `check_solver_entries`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxldm.errors import CheckpointError
from jaxldm.reading import shown
from jaxldm.schedulers.entries import PLACE

# Scheduler -> entry -> (the one value that is known, and is the default; a solver to name instead).
_ONLY: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    "UniPCMultistepScheduler": {"predict_x0": (True, "unipc"), "solver_p": (None, "unipc")},
    "SASolverScheduler": {
        "algorithm_type": ("data_prediction", "sa_solver"),
        "tau_func": (None, "sa_solver"),
    },
    "DPMSolverSDEScheduler": {"noise_sampler_seed": (None, "dpmpp_sde")},
    "UnCLIPScheduler": {"beta_schedule": ("squaredcos_cap_v2", "ddpm")},
}


def check_solver_entries(config: Mapping[str, Any], scheduler: str) -> None:
    """Raises `CheckpointError` for what the file's own solver would do otherwise than ours."""
    for entry, (known, solver) in _ONLY.get(scheduler, {}).items():
        if config.get(entry, known) != known:
            raise CheckpointError(
                f"{PLACE} has {entry} {shown(config[entry])}, known for {scheduler}: {known!r}; name a "
                f"solver, such as {solver}"
            )
    if scheduler == "PNDMScheduler" and config.get("prediction_type") == "sample":
        raise CheckpointError(
            f"{PLACE} has prediction_type 'sample', and PNDMScheduler knows epsilon and v_prediction: name a "
            "solver, such as ddim"
        )
