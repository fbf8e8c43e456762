"""Schedulers: scheduler_config.json as values, read and written.

    scheduler = schedulers.from_config(json.load(file))  # or from_config(..., solver="dpmpp_2m")
    denoise, grid = scheduler.sampler.denoiser(network), scheduler.make_grid(20)

A scheduler of diffusers is four things of `jaxldm.diffusion` in one class: a path, a prediction, a solver and
a grid, and sometimes a change of x_0 (thresholding, the boundary condition of a consistency model).
"""

from jaxldm.schedulers.grids import GridRule
from jaxldm.schedulers.masked_tokens import MASKED_TOKENS_SCHEDULER, masked_tokens_config
from jaxldm.schedulers.read import from_config
from jaxldm.schedulers.runs import PLAIN
from jaxldm.schedulers.scheduler import DynamicShift, Sampler, Scheduler
from jaxldm.schedulers.table import SCHEDULER_OF, SCHEDULERS, Known, default_solver
from jaxldm.schedulers.write import to_config

__all__ = [
    "MASKED_TOKENS_SCHEDULER",
    "PLAIN",
    "SCHEDULERS",
    "SCHEDULER_OF",
    "DynamicShift",
    "GridRule",
    "Known",
    "Sampler",
    "Scheduler",
    "default_solver",
    "from_config",
    "masked_tokens_config",
    "to_config",
]
