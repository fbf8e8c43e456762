"""Few steps: losses that teach a network to draw in one to eight steps, as pure functions.

    from jaxldm import few_steps

    loss, metrics = few_steps.mean_flow_loss(u, x_0, epsilon, r, t, labels)

Each is a function of given draws (data, noise, times), so that it is as deterministic as its formula; what
draws the times stands next to it. Teachers are denoisers of `jaxldm.diffusion`.
"""

from jaxldm.few_steps.consistency import (
    consistency_loss,
    draw_neighbours,
    easy_times,
    edm_consistency_model,
    interval_probabilities,
    karras_levels,
    num_levels,
    pseudo_huber,
)
from jaxldm.few_steps.continuous import (
    TrigFlow,
    continuous_consistency_loss,
    trig_consistency,
    trig_teacher_slope,
    trig_times,
)
from jaxldm.few_steps.distribution_matching import (
    backward_simulation,
    distribution_matching_gradient,
    distribution_matching_loss,
)
from jaxldm.few_steps.drifting import drift, drifting_loss
from jaxldm.few_steps.guided import draw_scales, guidance_distillation_loss
from jaxldm.few_steps.jumps import ddim_jump, heun_jump, means_of, noised, squares_of
from jaxldm.few_steps.mean_flow import (
    guided_velocity,
    improved_mean_flow_loss,
    interval_times,
    mean_flow_loss,
)
from jaxldm.few_steps.progressive import draw_double_steps, halve, progressive_loss
from jaxldm.few_steps.reflow import reflow_loss, straightness, u_shaped_times
from jaxldm.few_steps.shortcut import shortcut_loss, shortcut_target, shortcut_times

__all__ = [
    "TrigFlow",
    "backward_simulation",
    "consistency_loss",
    "continuous_consistency_loss",
    "ddim_jump",
    "distribution_matching_gradient",
    "distribution_matching_loss",
    "draw_double_steps",
    "draw_neighbours",
    "draw_scales",
    "drift",
    "drifting_loss",
    "easy_times",
    "edm_consistency_model",
    "guidance_distillation_loss",
    "guided_velocity",
    "halve",
    "heun_jump",
    "improved_mean_flow_loss",
    "interval_probabilities",
    "interval_times",
    "karras_levels",
    "mean_flow_loss",
    "means_of",
    "noised",
    "num_levels",
    "progressive_loss",
    "pseudo_huber",
    "reflow_loss",
    "shortcut_loss",
    "shortcut_target",
    "shortcut_times",
    "squares_of",
    "straightness",
    "trig_consistency",
    "trig_teacher_slope",
    "trig_times",
    "u_shaped_times",
]
