"""Random models that are small enough to compile in a second or two, for the tests of pipelines and
commands.
"""

import json

import jax
import numpy as np

from jaxldm import checkpoints, models, schedulers
from jaxldm import diffusion as D
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


TEXT_UNET = dict(
    sample_size=8,
    block_out_channels=(8,),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=2,
    cross_attention_dim=8,
    down_block_types=("CrossAttnDownBlock2D",),
    mid_block_type=None,
    up_block_types=("CrossAttnUpBlock2D",),
)
TEXT_AUTOENCODER = dict(
    sample_size=16,
    block_out_channels=(4, 8),
    layers_per_block=1,
    norm_num_groups=2,
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
TEXT_ENCODER = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)


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


def text_parts(folder):
    """The parts of a text-to-image model of Stable Diffusion's kind, 8x8x4 -> 16x16x3.

    Args:
        folder: for the files of a tokenizer of letters.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    text_encoder = models.build("clip-l", **TEXT_ENCODER, vocab_size=len(words))
    modules = {
        "unet": models.UNet2DConditionModel(models.UNet2DConditionConfig(**TEXT_UNET)),
        "vae": models.AutoencoderKL(models.AutoencoderKLConfig(**TEXT_AUTOENCODER)),
        "text_encoder": text_encoder,
    }
    networks = {name: Network(module, random_params(module, 1)) for name, module in modules.items()}
    scheduler = schedulers.to_config(PREDICTION)
    return networks | {"tokenizer": checkpoints.load_tokenizer(folder), "scheduler": scheduler}
