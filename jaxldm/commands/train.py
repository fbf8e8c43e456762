"""`jaxldm train`: a model from a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

_RECIPE = "(default: the recipe's)"


@dataclass(frozen=True)
class Train:
    """Train a model from a recipe: autoencoder, denoising network, and a classifier to judge them by.

    For example:
      jaxldm train mini-ldm --run-dir runs/mini-ldm
      jaxldm train mini-ldm --run-dir runs/mini-ldm --resume        (after an interruption)

    Stages that are complete are not trained again. `jaxldm info` lists the recipes.
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """Name of the recipe, for example mini-ldm or tiny-dit."""

    run_dir: Annotated[str | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: runs/RECIPE)")] = None
    """Folder for everything this training makes: checkpoints, logs, plots, samples and the finished models."""

    resume: bool = False
    """Go on from the last checkpoint in the run folder."""

    epochs: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_RECIPE)] = None
    """How many times the denoising network sees all the training images."""

    autoencoder_epochs: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_RECIPE)] = None
    """How many times the autoencoder sees all the training images."""

    batch_size: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_RECIPE)] = None
    """Images in one update of the denoising network."""

    learning_rate: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_RECIPE)] = None
    """Highest learning rate of the denoising network, after the warm-up."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=_RECIPE)] = None
    """Another denoising network, by its preset name."""

    dataset: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=_RECIPE)] = None
    """Another data set, by its TFDS name."""

    seed: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_RECIPE)] = None
    """Which random numbers: any whole number from 0 to 4294967295."""
