"""The scheduler of masked image models: the mask token and the schedule, as diffusers writes them."""

from __future__ import annotations

from typing import Any

from jaxldm import diffusion as D
from jaxldm.arguments import checked, count, text
from jaxldm.errors import one_of

MASKED_TOKENS_SCHEDULER = "AmusedScheduler"


@checked(mask_token=count(0), schedule=text)
def masked_tokens_config(mask_token: int, schedule: str = "cosine") -> dict[str, Any]:
    """The entries of the scheduler_config.json of a masked image model.

    Args:
        mask_token: the id that stands for "unknown".
        schedule: a name of `D.MASK_SCHEDULES`; diffusers itself knows "cosine" and "linear".

    Raises:
        UnknownNameError: another schedule.
    """
    return {
        "_class_name": MASKED_TOKENS_SCHEDULER,
        "mask_token_id": int(mask_token),
        "masking_schedule": one_of("mask schedule", schedule, D.MASK_SCHEDULES),
    }
