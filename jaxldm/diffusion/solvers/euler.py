"""Euler's method."""

from __future__ import annotations

from jaxldm.diffusion.solvers.ddim import ddim
from jaxldm.diffusion.solvers.solver import Solver


def euler() -> Solver:
    """Euler's method for d(x/alpha) / d(sigma/alpha) = eps: first order, one evaluation a step.

    The step x_s / alpha_s = x_t / alpha_t + (sigma_s/alpha_s - sigma_t/alpha_t) eps is DDIM's x_s = alpha_s
    x_0 + sigma_s eps. On EDM's path it is Euler in sigma (Karras et al. 2022, Algorithm 1 without its
    correction); on the flow path it is Euler in t, x_s = x_t + (s - t) (eps - x_0).
    """
    return ddim(eta=0.0)
