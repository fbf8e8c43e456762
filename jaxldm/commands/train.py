"""`jaxldm train`: a model from a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional

from jaxldm.commands.options import shown

_RECIPE = "the recipe's"


@dataclass(frozen=True)
class Train:
    """Train a model from a recipe: autoencoder, denoising network, and a classifier to judge them by.

    For example:
      jaxldm train mini-ldm --run-dir runs/mini-ldm
      jaxldm train mini-ldm --run-dir runs/mini-ldm --resume        (after an interruption)

    Stages that are complete are not trained again. `jaxldm info` lists the recipes.
    """

    recipe: Annotated[Positional[str], shown("RECIPE")]
    """Name of the recipe, for example mini-ldm or tiny-dit."""

    run_dir: Annotated[str | None, shown("FOLDER", "runs/RECIPE")] = None
    """Folder for everything this training makes: checkpoints, logs, plots, samples and the finished
    models.
    """

    resume: bool = False
    """Go on from the last checkpoint in the run folder."""

    epochs: Annotated[int | None, shown("INT", _RECIPE)] = None
    """How many times the denoising network sees all the training images."""

    autoencoder_epochs: Annotated[int | None, shown("INT", _RECIPE)] = None
    """How many times the autoencoder sees all the training images."""

    batch_size: Annotated[int | None, shown("INT", _RECIPE)] = None
    """Images in one update of the denoising network."""

    learning_rate: Annotated[float | None, shown("FLOAT", _RECIPE)] = None
    """Highest learning rate of the denoising network, after the warm-up."""

    preset: Annotated[str | None, shown("NAME", _RECIPE)] = None
    """Another denoising network, by its preset name."""

    dataset: Annotated[str | None, shown("NAME", _RECIPE)] = None
    """Another data set, by its TFDS name."""

    seed: Annotated[int | None, shown("INT", _RECIPE)] = None
    """Which random numbers: any whole number from 0 to 4294967295."""
