"""Schedulers of diffusers that go from an image to its noise: the rows of others, backwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxldm import diffusion as D
from jaxldm.diffusion.grids import check_count, rows_at
from jaxldm.errors import CheckpointError
from jaxldm.reading import shown
from jaxldm.schedulers.entries import PLACE
from jaxldm.schedulers.grids import GridRule
from jaxldm.schedulers.reference_solvers import ddim_inverse_of_diffusers
from jaxldm.schedulers.runs import Runs
from jaxldm.schedulers.table import INVERSES

# Entries of theirs -> the values that are known; the first is what a silent file has.
_KNOWN: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "DDIMInverseScheduler": {"timestep_spacing": ("leading", "trailing")},
    "DPMSolverMultistepInverseScheduler": {
        "timestep_spacing": ("linspace",),
        "use_karras_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "use_flow_sigmas": (False,),
        "algorithm_type": ("dpmsolver++", "dpmsolver", "deis"),
    },
}


@dataclasses.dataclass(frozen=True)
class Inverse(Runs):
    """Runs from the cleanest row to the noisiest.

    Attributes:
        as_ddim: None, or of DDIM as diffusers inverts it (what the network predicts, the bounds of x_0).
    """

    as_ddim: tuple[str, tuple[float, float] | None] | None = None

    def run(self, sampler: Any, rule: GridRule, path: D.Path, count: int) -> tuple[Any, D.Grid]:
        """(sampler, rows) of N steps, see `Runs.run`."""
        if self.as_ddim is None or path.num_train_timesteps is None:
            rows = rule.make(path, count)
        else:
            check_count(path, count)
            t = rule.times(path, count)
            rows = rows_at(path, np.append(t, path.t_clean if rule.final == "clean" else path.t_min))
            solver = ddim_inverse_of_diffusers(*self.as_ddim, path.num_train_timesteps // count)
            sampler = sampler._replace(solver=solver, threshold=None, clips=False, num_steps=count)
        return sampler, D.Grid(*(np.ascontiguousarray(column[::-1]) for column in rows[:3]))


def as_its_base(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The entries, under the name of the scheduler whose rows it takes; `CheckpointError` for others."""
    for entry, known in _KNOWN[name].items():
        if (config.get(entry) or known[0]) not in known:
            choices = " and ".join(map(repr, known))
            raise CheckpointError(f"{PLACE} has {entry} {shown(config[entry])}, known for {name}: {choices}")
    ends: dict[str, Any] = {"final_sigmas_type": "sigma_min"} if name.startswith("DPM") else {}
    if config.get("set_alpha_to_zero") is not None:  # its former name
        ends["set_alpha_to_one"] = bool(config["set_alpha_to_zero"])
    return {**config, **ends, "_class_name": INVERSES[name]}
