"""The schedulers of diffusers: for each, its solver here, how it spaces its rows, and its options by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxldm.arguments import checked, instance
from jaxldm.entries import known_names
from jaxldm.errors import CheckpointError
from jaxldm.reading import shown

# How a scheduler of the discrete path spaces t -> our spacings by their `timestep_spacing`.
SPACINGS = {
    "whole": {"trailing": "trailing", "linspace": "linspace", "leading": "leading"},
    "fractional": {"trailing": "trailing", "linspace": "linspace_fractional", "leading": "leading"},
    "open": {"trailing": "trailing", "linspace": "linspace_open", "leading": "leading_open"},
}
# Our rule for the noise levels -> the entry that switches it on.
LEVELS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "uniform_log_snr": "use_lu_lambdas",
}
_MULTISTEP = {
    "solver_type": ("solver_type", "midpoint"),
    "lower_order_final": ("lower_order_final", True),
    "euler_at_final": ("euler_at_final", False),
}
_MULTISTEP_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpm_2m", "dpm_3m"), _MULTISTEP),
    "dpm_sde": {"order": ("solver_order", 2), **_MULTISTEP},
}
_SINGLESTEP = {
    "solver_type": ("solver_type", "midpoint"),
    "lower_order_final": ("lower_order_final", False),
}


class Known(NamedTuple):
    """A scheduler of diffusers.

    Attributes:
        solvers: names in `D.solvers.SOLVERS`; the first is the scheduler's own, unless its options say more.
        rows: on the discrete path "whole" timesteps, "fractional" ones, "open" (N + 1 without the cleanest)
            or "lcm"; otherwise what it is for: "edm", "flow", "continuous_vp", "cosine", "score", "gvp",
            "consistency".
        options: solver -> our option -> (its entry, what the scheduler does where the file is silent).
        ends_clean: for "whole" rows, where the file is silent about `set_alpha_to_one`.
        clips: it reads `clip_sample`.
    """

    solvers: tuple[str, ...]
    rows: str
    options: Mapping[str, Mapping[str, tuple[str, Any]]] = {}
    ends_clean: bool = True
    clips: bool = False


SCHEDULERS: dict[str, Known] = {
    "DDPMScheduler": Known(
        ("ddpm",), "whole", {"ddpm": {"variance": ("variance_type", "fixed_small")}}, clips=True
    ),
    "DDIMScheduler": Known(("ddim",), "whole", clips=True),
    "PNDMScheduler": Known(
        ("pndm",),
        "whole",
        {
            "pndm": {
                "skip_prk_steps": ("skip_prk_steps", False),
                "combine": ("prediction_type", "epsilon"),
            }
        },
        ends_clean=False,
    ),
    "LCMScheduler": Known(("lcm",), "lcm", clips=True),
    "TCDScheduler": Known(("tcd",), "lcm"),  # it has the entries of clipping, and uses none
    "EulerDiscreteScheduler": Known(("euler",), "fractional"),
    "EulerAncestralDiscreteScheduler": Known(("euler_ancestral",), "fractional"),
    "HeunDiscreteScheduler": Known(("heun",), "fractional", clips=True),
    "KDPM2DiscreteScheduler": Known(("dpm2",), "fractional"),
    "KDPM2AncestralDiscreteScheduler": Known(("dpm2_ancestral",), "fractional"),
    "LMSDiscreteScheduler": Known(("lms",), "fractional"),
    "DEISMultistepScheduler": Known(
        ("deis",),
        "open",
        {"deis": {"order": ("solver_order", 2), "lower_order_final": ("lower_order_final", True)}},
    ),
    "DPMSolverSinglestepScheduler": Known(
        ("dpmpp_2s", "dpmpp_3s", "dpm_2s", "dpm_3s"),
        "open",
        dict.fromkeys(("dpmpp_2s", "dpmpp_3s", "dpm_2s", "dpm_3s"), _SINGLESTEP),
    ),
    "DPMSolverMultistepScheduler": Known(
        (
            "dpmpp_2m",
            "dpmpp_1s",
            "dpmpp_3m",
            "dpmpp_2m_sde",
            "dpmpp_3m_sde",
            "dpm_2m",
            "dpm_3m",
            "dpm_sde",
        ),
        "open",
        _MULTISTEP_OPTIONS,
    ),
    "UniPCMultistepScheduler": Known(
        ("unipc",),
        "open",
        {
            "unipc": {
                "order": ("solver_order", 2),
                "solver_type": ("solver_type", "bh2"),
                "lower_order_final": ("lower_order_final", True),
                "disable_corrector": ("disable_corrector", ()),
            }
        },
    ),
    "SASolverScheduler": Known(
        ("sa_solver",),
        "open",
        {
            "sa_solver": {
                "predictor_order": ("predictor_order", 2),
                "corrector_order": ("corrector_order", 2),
                "interval": ("num_train_timesteps", 1000),
                "lower_order_final": ("lower_order_final", True),
            }
        },
    ),
    "DPMSolverSDEScheduler": Known(("dpmpp_sde",), "fractional"),
    "UnCLIPScheduler": Known(
        ("ddpm",), "whole", {"ddpm": {"variance": ("variance_type", "fixed_small_log")}}, clips=True
    ),
    "EDMEulerScheduler": Known(("euler",), "edm"),
    "EDMDPMSolverMultistepScheduler": Known(("dpmpp_2m",), "edm", _MULTISTEP_OPTIONS),
    "FlowMatchEulerDiscreteScheduler": Known(("flow_euler",), "flow"),
    "FlowMatchHeunDiscreteScheduler": Known(("flow_heun",), "flow"),
    "FlowMatchLCMScheduler": Known(("lcm",), "flow"),
    "ScoreSdeVpScheduler": Known(("ddim",), "continuous_vp"),
    "ScoreSdeVeScheduler": Known(("predictor_corrector",), "score"),
    "CMStochasticIterativeScheduler": Known(("lcm",), "consistency"),
    "IPNDMScheduler": Known(("ipndm",), "gvp"),
    "DDPMWuerstchenScheduler": Known(("ddpm",), "cosine"),
}
# The same under another name: their `batch_step_no_noise` is for a pipeline that is not here.
ALIASES = {"DDIMParallelScheduler": "DDIMScheduler", "DDPMParallelScheduler": "DDPMScheduler"}
# From an image to its noise -> the one whose rows it takes backwards.
INVERSES = {
    "DDIMInverseScheduler": "DDIMScheduler",
    "DPMSolverMultistepInverseScheduler": "DPMSolverMultistepScheduler",
}
OWN = "PathScheduler"  # for paths and predictions that no scheduler of diffusers has
OWN_OF_0_1 = "NoiseSchedule"  # what 0.1 wrote for them
DISCRETE = ("whole", "fractional", "open", "lcm")
# `algorithm_type` and `solver_order` -> solver. Of first order in x_0 or in eps is the same step.
_DPM_SOLVERS = {
    ("dpmsolver++", 1): "dpmpp_1s",
    ("dpmsolver++", 2): "dpmpp_2m",
    ("dpmsolver++", 3): "dpmpp_3m",
    ("sde-dpmsolver++", 1): "euler_ancestral",  # which has a scheduler of its own, too
    ("sde-dpmsolver++", 2): "dpmpp_2m_sde",
    ("sde-dpmsolver++", 3): "dpmpp_3m_sde",
}
ALGORITHMS: Mapping[str, Mapping[tuple[Any, Any], str]] = {
    "DPMSolverMultistepScheduler": {
        **_DPM_SOLVERS,
        ("dpmsolver", 1): "dpmpp_1s",
        ("dpmsolver", 2): "dpm_2m",
        ("dpmsolver", 3): "dpm_3m",
        ("sde-dpmsolver", 1): "dpm_sde",
        ("sde-dpmsolver", 2): "dpm_sde",
    },
    "EDMDPMSolverMultistepScheduler": _DPM_SOLVERS,
    "DPMSolverSinglestepScheduler": {
        ("dpmsolver++", 1): "dpmpp_1s",
        ("dpmsolver++", 2): "dpmpp_2s",
        ("dpmsolver++", 3): "dpmpp_3s",
        ("sde-dpmsolver++", 1): "euler_ancestral",
        ("dpmsolver", 1): "dpmpp_1s",
        ("dpmsolver", 2): "dpm_2s",
        ("dpmsolver", 3): "dpm_3s",
    },
}
# They end at the last noise level whatever a file has, or at none.
ENDS_NOISY = ("DEISMultistepScheduler", "SASolverScheduler")
ENDS_CLEAN = ("DPMSolverSDEScheduler",)
# What integrates eps: diffusers lets it end at the last noise level alone, where eps is known.
OF_EPSILON = ("dpm_2m", "dpm_3m", "dpm_2s", "dpm_3s", "dpm_sde")
# `solver_type` -> what a scheduler takes instead where it is another's: `from_config` of diffusers keeps it.
SOLVER_TYPES = {
    **dict.fromkeys(ALGORITHMS, dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint")),
    "UniPCMultistepScheduler": dict.fromkeys(("logrho", "midpoint", "heun"), "bh2"),
}
# `variance_type` of DDPMScheduler -> ours; the logarithms there are another way to write the same.
VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
    "learned_range": "learned",
}
# The scheduler that spaces the rows for a solver. Solvers that have none keep the folder's.
SCHEDULER_OF = {
    solver: name
    for name, known in SCHEDULERS.items()
    if known.rows in DISCRETE and name != "UnCLIPScheduler"
    for solver in known.solvers
}


def class_name(config: Mapping[str, Any]) -> str:
    """The scheduler that a file names. Raises `CheckpointError` for one that is not known here."""
    name = config.get("_class_name")
    name = (ALIASES | INVERSES).get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or (name not in SCHEDULERS and name not in (OWN, OWN_OF_0_1)):
        known = known_names(name, [*SCHEDULERS, OWN])
        raise CheckpointError(f"scheduler_config.json has _class_name {shown(name)}; {known}")
    return name


A_CONFIG = instance(Mapping, "the entries of a scheduler_config.json, a dictionary")


@checked(config=A_CONFIG)
def default_solver(config: Mapping[str, Any]) -> str:
    """Our name of the solver that a scheduler_config.json names.

    Raises:
        CheckpointError: a scheduler, or an algorithm of it, that is not known here.

    >>> default_solver({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3})
    'dpmpp_3m'
    """
    scheduler = class_name(config)
    if scheduler in (OWN, OWN_OF_0_1):
        return "ddim"
    if scheduler == "FlowMatchEulerDiscreteScheduler" and config.get("stochastic_sampling"):
        return "lcm"
    solvers = ALGORITHMS.get(scheduler)
    if solvers is None:
        return SCHEDULERS[scheduler].solvers[0]
    algorithm, order = config.get("algorithm_type", "dpmsolver++"), config.get("solver_order", 2)
    asked = ("dpmsolver++" if algorithm == "deis" else algorithm, order)
    if asked not in solvers:
        raise CheckpointError(
            f"scheduler_config.json has algorithm_type {shown(algorithm)} with solver_order {shown(order)}, "
            f"which is not known here: name a solver, such as {', '.join(dict.fromkeys(solvers.values()))}"
        )
    return solvers[asked]
