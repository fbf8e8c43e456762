"""The valid calls that `misuse` starts from, of the losses of training."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.faults.misuse_arrays import array_case
from experiments.faults.misuse_cases import IMAGES, KEY, Case
from experiments.faults.misuse_files import THERE, place
from jaxldm import models
from jaxldm import training as T

TABLE = np.eye(3, 1, dtype=np.float32)
TOKENS = np.ones((1, 2, 3), np.float32)
LOGITS = np.zeros((2, 2, 2, 1), np.float32)


def of_training() -> list[Case]:
    """Losses of training and what they are made of."""
    return [*autoencoders(), *adversaries(), *codebooks(), *regularizers(), *students()]


def autoencoders() -> list[Case]:
    """Losses of autoencoders."""
    posterior = models.DiagonalGaussian(IMAGES, IMAGES)
    return [
        Case("T.kl_per_channel", T.kl_per_channel, {"posterior": posterior}),
        Case(
            "T.autoencoder_loss",
            T.autoencoder_loss,
            {
                "key": KEY,
                "encode": lambda images: posterior,
                "decode": lambda z: z,
                "images": IMAGES,
                "beta": 1e-3,
                "free_bits": 0.0,
                "reconstruction": "mse",
                "perceptual": lambda x, y: jnp.mean((x - y) ** 2, (1, 2, 3)),
                "log_variance": 0.0,
                "adversary": None,
            },
            False,
            {"images": "images|shapes"},
        ),
        Case(
            "T.vq_autoencoder_loss",
            T.vq_autoencoder_loss,
            {
                "encode": lambda images: images,
                "decode": lambda z: z,
                "table": TABLE,
                "images": IMAGES,
                "commitment": 0.25,
                "codebook_weight": 0.0,
                "reconstruction": "mse",
                "perceptual": None,
                "log_variance": 0.0,
                "adversary": None,
            },
            False,
            {"images": "images|shapes", "table": "table|shapes"},
        ),
    ]


def adversaries() -> list[Case]:
    """Discriminators of autoencoders."""
    return [
        array_case("T.discriminator_loss", T.discriminator_loss, real=LOGITS, fake=LOGITS, kind="hinge"),
        array_case(
            "T.adaptive_weight", T.adaptive_weight, nll_gradient=TABLE, generator_gradient=TABLE, largest=1e4
        ),
    ]


def regularizers() -> list[Case]:
    """What keeps tokens and latents close to something else."""
    return [
        array_case("T.alignment_loss", T.alignment_loss, projected=TOKENS, features=TOKENS),
        Case(
            "T.kept_tokens",
            T.kept_tokens,
            {"key": KEY, "batch_size": 1, "num_tokens": 4, "share": 0.5},
            False,
        ),
        Case(
            "T.equivariance_loss",
            T.equivariance_loss,
            {
                "key": KEY,
                "decode": lambda z: z,
                "z": IMAGES,
                "images": IMAGES,
                "distance": _squared,
                "scales": (0.5,),
            },
            False,
            {"z": "z|images", "images": "images|shapes"},
        ),
    ]


def students() -> list[Case]:
    """Recipes of students."""
    arguments = {
        "teacher": place() / "run",
        "method": "lcm",
        "num_steps": None,
        "guidance_scale": 3.0,
        "numbers": {"huber": 0.01},
        "dataset": None,
        "seed": 0,
        "lora": T.LoraRecipe(rank=2),
    }
    words = {"teacher": f"teacher|{THERE}", "num_steps": "num_steps|num-steps", "numbers": "number"}
    return [Case("T.distill_recipe", T.distill_recipe, arguments, False, words)]


def codebooks() -> list[Case]:
    """Moving averages and losses of a codebook."""
    codebook = T.new_codebook(TABLE)
    return [
        array_case("T.new_codebook", T.new_codebook, table=TABLE),
        Case("T.codebook_entries", T.codebook_entries, {"codebook": codebook}, False),
        array_case(
            "T.update_codebook",
            T.update_codebook,
            key=KEY,
            codebook=codebook,
            z=IMAGES,
            decay=0.9,
            restart_below=0.1,
        ),
        array_case("T.quantization_losses", T.quantization_losses, z=IMAGES, table=TABLE),
    ]


def _squared(a: Any, b: Any) -> Any:
    """A distance."""
    return jnp.mean((a - b) ** 2)
