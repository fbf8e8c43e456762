"""Random models that are small enough to compile in a second or two, for the tests of pipelines and
commands.
"""

import jax
import numpy as np

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.pipelines import Network, Pipeline, class_to_image

PREDICTION = D.epsilon(D.VP.named("linear"))
UNET = dict(
    sample_size=4,
    in_channels=2,
    out_channels=2,
    block_out_channels=(8,),
    layers_per_block=1,
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    norm_num_groups=4,
    attention_head_dim=4,
    num_classes=3,
)
AUTOENCODER = dict(sample_size=8, block_out_channels=(4, 4), latent_channels=2, norm_num_groups=2)
DIT = dict(sample_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3)


def random_params(module, seed=0):
    """Normal numbers in every tensor: the zero-initialised layers of a fresh network would hide most
    mistakes.
    """
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda spec: (0.3 * rng.standard_normal(spec.shape)).astype(spec.dtype), models.shapes(module)
    )


def latent_pipeline(seed=0, prediction=PREDICTION, **unet) -> Pipeline:
    """A class-conditional U-Net in the latents of a convolutional autoencoder: 4x4x2 -> 8x8x1."""
    denoiser = models.build("mini-unet", **{**UNET, **unet})
    autoencoder = models.build("mini-autoencoder", **AUTOENCODER, scaling_factor=0.7, shift_factor=0.1)
    networks = (denoiser, random_params(denoiser, seed)), (autoencoder, random_params(autoencoder, seed + 1))
    return class_to_image(Network(*networks[0]), prediction, Network(*networks[1]))


def pixel_pipeline(seed=0, prediction=PREDICTION, **dit) -> Pipeline:
    """A DiT that draws 8x8x1 pixels."""
    denoiser = models.build("tiny-dit", **{**DIT, **dit})
    return class_to_image(Network(denoiser, random_params(denoiser, seed)), prediction)
