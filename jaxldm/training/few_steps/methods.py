"""The methods by name: `jaxldm distill RUN --method NAME`, and those of recipes without a teacher."""

from __future__ import annotations

from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.training.few_steps.consistency import CD, ECT, LCM
from jaxldm.training.few_steps.continuous import SCM
from jaxldm.training.few_steps.guided import GUIDANCE
from jaxldm.training.few_steps.matching import DMD
from jaxldm.training.few_steps.method import Method
from jaxldm.training.few_steps.progressive import PROGRESSIVE
from jaxldm.training.few_steps.reflow import REFLOW
from jaxldm.training.few_steps.untaught import DRIFTING, ICT, IMPROVED_MEAN_FLOW, MEAN_FLOW, SHORTCUT

METHODS: dict[str, Method] = {
    "progressive": PROGRESSIVE,
    "guidance": GUIDANCE,
    "lcm": LCM,
    "cd": CD,
    "ect": ECT,
    "scm": SCM,
    "reflow": REFLOW,
    "dmd": DMD,
    "mean_flow": MEAN_FLOW,
    "improved_mean_flow": IMPROVED_MEAN_FLOW,
    "shortcut": SHORTCUT,
    "ict": ICT,
    "drifting": DRIFTING,
}
TAUGHT = tuple(name for name, method in METHODS.items() if method.taught)


def taught(name: str) -> Method:
    """The method of a name, of those with a teacher.

    Raises:
        UnknownNameError: no such method.
        InvalidArgumentError: one that has none, with the recipe that trains by it.
    """
    other = METHODS.get(name.replace("-", "_"))
    if other is not None and not other.taught:
        recipe = f"mini-{name.replace('_', '-')}"
        raise InvalidArgumentError(
            f"the method {name} begins from nothing and has no teacher: `jaxldm train {recipe}`, or take one "
            f"of {', '.join(TAUGHT)}"
        )
    return METHODS[one_of("method", name, TAUGHT)]
