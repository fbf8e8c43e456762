"""The valid calls of caches that `misuse` starts from."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from experiments.faults.misuse_cases import FLOW, KEY, Case, of_d
from jaxldm import diffusion as D

CACHE = D.caching.fora(3)
CALIBRATION = D.Calibration(*(np.array([0.0, 0.1, 0.2, 0.4, 0.5]) for _ in range(3)))
CACHES: dict[str, dict[str, Any]] = {
    "fora": {"interval": 3, "warm_up": 1},
    "taylor": {"interval": 3, "order": 1, "warm_up": 1},
    "extrapolate": {"cache": CACHE, "order": 1},
    "first_block": {"threshold": 0.1, "first_blocks": 1, "last_blocks": 0, "warm_up": 1, "max_skips": 2},
    "teacache": {"coefficients": [1.0, 0.0], "threshold": 0.1, "warm_up": 1, "num_steps": 20},
    "at_steps": {"schedule": [True, False]},
    "magcache": {"ratios": [1.0, 0.9], "threshold": 0.1, "max_skips": 2, "always": 0.2},
    "deepcache": {"interval": 3, "skips": 1, "warm_up": 1},
}


class Memory(NamedTuple):
    """What a network remembers from step to step."""

    decision: Any
    runs: dict[str, Any]


def remember(cache, memory, i, x, t, *condition):
    """A network that remembers what it was given, and reuses nothing."""
    history = cache.residuals.init(x) if memory is None else memory.runs["blocks"]
    state = cache.decision.init(None) if memory is None else memory.decision
    history = cache.residuals.update(cache.settings, history, i, x)
    return 0.5 * x, Memory(state, {"blocks": history})


def denoise_with(network):
    """A denoiser of a network."""
    return D.denoiser(network, D.v(FLOW))


def cases_of_caching() -> list[Case]:
    """Caches, and what puts them into the sampling loop."""
    of_run = {"network": remember, "build": denoise_with}
    named = [Case(f"D.caching.{name}", getattr(D.caching, name), options) for name, options in CACHES.items()]
    return [
        *named,
        Case("D.caching.read", D.caching.read, {"notation": "fora:3"}, words={"notation": "cache|interval"}),
        of_d("cached_denoiser", cache=CACHE, **of_run),
        of_d("cached", solver=D.solvers.ddim(), denoise=D.cached_denoiser(remember, denoise_with, CACHE)),
        of_d("fit_teacache", calibrations=CALIBRATION, degree=2),
        of_d(
            "calibrate_cache",
            key=KEY,
            **of_run,
            solver=D.solvers.ddim(),
            grid=D.make_grid(FLOW, 1),
            x_T=np.ones((1, 4, 4, 1), np.float32),
            blocks=False,
            cheap=False,
        ),
    ]
