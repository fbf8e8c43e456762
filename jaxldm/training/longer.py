"""How a finished run is trained longer: its epochs are settled, as its learning rate has ended with them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def hint_to_train_longer(run: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What a message advises whoever resumes a finished run with more epochs of its denoising network.

    Args:
        run: its folder.
        saved: the flat entries of its recipe, see `jaxldm.training.runs.flat_entries`.
        given: those of the recipe that it is resumed with.

    Returns:
        empty for runs that a fine-tuning cannot start from, and for fewer epochs.
    """
    before, now = saved.get("diffusion.epochs"), given.get("diffusion.epochs")
    if before is None or now is None or now <= before or "diffusion.few_steps.method" in saved:
        return ""
    words = ("--from", run, "--data", saved["data"], "--method", "full", "--epochs", now - before)
    further = shlex.join(map(str, words))
    return f"train its network longer with `jaxldm train finetune {further}`, or begin a new run"
