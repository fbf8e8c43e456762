"""Solvers by name.

To add one here: a short file with a function that returns a `Solver`, and a line in `SOLVERS`. From outside:
`make("package.module:function")`, or an entry point of your package in the group "jaxldm.solvers".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxldm.diffusion import registry
from jaxldm.diffusion.solvers.consistency import lcm, tcd
from jaxldm.diffusion.solvers.ddim import ddim
from jaxldm.diffusion.solvers.ddpm import ddpm
from jaxldm.diffusion.solvers.deis import deis
from jaxldm.diffusion.solvers.dpm import dpm_2m, dpm_2s, dpm_3m, dpm_3s, dpm_sde
from jaxldm.diffusion.solvers.dpm2 import dpm2, dpm2_ancestral
from jaxldm.diffusion.solvers.dpmpp import dpmpp_1s, dpmpp_2m, dpmpp_2s, dpmpp_3m
from jaxldm.diffusion.solvers.dpmpp_3s import dpmpp_3s
from jaxldm.diffusion.solvers.dpmpp_sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde
from jaxldm.diffusion.solvers.euler import euler, euler_ancestral
from jaxldm.diffusion.solvers.flow import flow_euler, flow_heun
from jaxldm.diffusion.solvers.heun import heun
from jaxldm.diffusion.solvers.inverse import ddim_inverse
from jaxldm.diffusion.solvers.ipndm import ipndm
from jaxldm.diffusion.solvers.lms import lms
from jaxldm.diffusion.solvers.pndm import pndm
from jaxldm.diffusion.solvers.predictor_corrector import predictor_corrector
from jaxldm.diffusion.solvers.restart import Restart, restart, restart_grid
from jaxldm.diffusion.solvers.sa import sa_solver
from jaxldm.diffusion.solvers.sit import sit_sde
from jaxldm.diffusion.solvers.solver import (
    A_SOLVER,
    Row,
    Solver,
    State,
    divide,
    move,
    noise_like,
    path_of,
    row,
)
from jaxldm.diffusion.solvers.unipc import unipc
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import InvalidArgumentError, Table, shown

SOLVERS: dict[str, Callable[..., Solver]] = Table("solver")
SOLVERS |= {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpm2": dpm2,
    "dpm2_ancestral": dpm2_ancestral,
    "lms": lms,
    "pndm": pndm,
    "ipndm": ipndm,
    "deis": deis,
    "dpmpp_1s": dpmpp_1s,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_3s": dpmpp_3s,
    "dpm_2s": dpm_2s,
    "dpm_3s": dpm_3s,
    "dpm_2m": dpm_2m,
    "dpm_3m": dpm_3m,
    "unipc": unipc,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpm_sde": dpm_sde,
    "dpmpp_sde": dpmpp_sde,
    "sa_solver": sa_solver,
    "predictor_corrector": predictor_corrector,
    "lcm": lcm,
    "tcd": tcd,
    "flow_euler": flow_euler,
    "flow_heun": flow_heun,
    "sit_sde": sit_sde,
    "restart": restart,
}


ENTRY_POINTS = "jaxldm.solvers"


def make(name: str, **options: Any) -> Solver:
    """The solver of that name, with options such as eta=1.0.

    Args:
        name: of `SOLVERS`, one that an installed package adds (entry-point group "jaxldm.solvers", name ->
            function), or "package.module:function" for a function (**options) -> Solver of your own.
        **options: arguments of the function.

    Raises:
        UnknownNameError: no solver of that name.
        InvalidArgumentError: an option that the solver does not have, a function that cannot be imported or
            that returns no solver.

    >>> from jaxldm import diffusion as D
    >>> D.solvers.make("ddim", eta=0.5) == D.solvers.ddim(eta=0.5)
    True
    """
    function = registry.find("solver", name, SOLVERS, ENTRY_POINTS)
    solver = registry.call("solver", name, equal_by_call(function), **options)
    if not isinstance(solver, Solver):
        raise InvalidArgumentError(f"solver {name!r} must return a Solver, got {shown(solver)}")
    return solver


def names() -> list[str]:
    """The names that `make` takes: of this library, then of installed packages."""
    return registry.names(SOLVERS, ENTRY_POINTS)


__all__ = [
    "A_SOLVER",
    "SOLVERS",
    "Restart",
    "Row",
    "Solver",
    "State",
    "ddim",
    "ddim_inverse",
    "ddpm",
    "deis",
    "divide",
    "dpm2",
    "dpm2_ancestral",
    "dpm_2m",
    "dpm_2s",
    "dpm_3m",
    "dpm_3s",
    "dpm_sde",
    "dpmpp_1s",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "dpmpp_3s",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "flow_heun",
    "heun",
    "ipndm",
    "lcm",
    "lms",
    "make",
    "move",
    "names",
    "noise_like",
    "path_of",
    "pndm",
    "predictor_corrector",
    "restart",
    "restart_grid",
    "row",
    "sa_solver",
    "sit_sde",
    "tcd",
    "unipc",
]
