"""A recipe of two small stages: an autoencoder, and a transformer on its latents."""

import dataclasses
from typing import Any

from jaxldm import training


def two_stages(**changes: Any) -> training.Recipe:
    """The recipe of 64 images, for one epoch.

    Args:
        changes: fields of both stages.
    """
    smoke = training.RECIPES["smoke"]
    stage = {"epochs": 1, "batch_size": 16, "sample_every": 0, **changes}
    encoder = {"block_out_channels": (4, 4, 4), "latent_channels": 2, "norm_num_groups": 2}
    network = {"hidden_size": 8, "depth": 1, "num_heads": 2, "patch_size": 7}
    return dataclasses.replace(
        smoke,
        name="two-stages",
        max_train_images=64,
        autoencoder=dataclasses.replace(smoke.autoencoder, overrides=encoder, **stage),
        diffusion=dataclasses.replace(
            smoke.diffusion, preset="tiny-dit", overrides=network, sample_steps=2, **stage
        ),
        classifier=None,
    )
