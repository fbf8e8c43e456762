"""How a finished run is trained longer: its epochs are settled, as its learning rate has ended with them."""

from __future__ import annotations

import shlex
from pathlib import Path

from jaxldm.training.recipes import Recipe


def hint_to_train_longer(run: Path, saved: Recipe, given: Recipe) -> str:
    """What a message advises whoever resumes a finished run with more epochs of its denoising network.

    Args:
        run: its folder.
        saved: its recipe.
        given: the one that it is resumed with.

    Returns:
        empty for runs that a fine-tuning cannot start from, and for fewer epochs.
    """
    before, now = saved.diffusion, given.diffusion
    if before is None or now is None or before.few_steps is not None or now.epochs <= before.epochs:
        return ""
    words = ("--from", run, "--data", saved.data, "--method", "full", "--epochs", now.epochs - before.epochs)
    further = shlex.join(map(str, words))
    return f"train its network longer with `jaxldm train finetune {further}`, or begin a new run"
