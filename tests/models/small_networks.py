"""A small network of each family of denoising networks, with what it is called with."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm import models

B = 2
UNET = dict(block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4, sample_size=7)
SD15 = UNET | dict(
    cross_attention_dim=8,
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
HEADS = dict(attention_head_dim=8, num_attention_heads=2)
TEXT = {"encoder_hidden_states": np.ones((B, 3, 8), np.float32)}
POOLED = TEXT | {"pooled_projections": np.ones((B, 8), np.float32)}
LABELS = np.arange(B, dtype=np.int32)
# name -> ((preset or config, changes), the condition)
NETWORKS = {
    "unet": (("mini-unet", UNET), LABELS),
    "unet-of-texts": (("sd15-unet", SD15), TEXT),
    "dit": (("tiny-dit", dict(depth=3, hidden_size=16, num_heads=2, sample_size=8)), LABELS),
    "sit-scanned": (
        ("sit-s-8", dict(depth=3, hidden_size=16, num_heads=2, num_classes=4, sample_size=8)),
        LABELS,
    ),
    "dit-of-diffusers": (
        (models.DiTTransformer2DConfig, HEADS | dict(num_layers=4, sample_size=4, num_embeds_ada_norm=4)),
        LABELS,
    ),
    "sd3": (
        (
            "sd35-medium",
            HEADS
            | dict(
                num_layers=4,
                caption_projection_dim=16,
                dual_attention_layers=(0,),
                joint_attention_dim=8,
                pooled_projection_dim=8,
                sample_size=4,
                pos_embed_max_size=4,
                in_channels=4,
                out_channels=4,
            ),
        ),
        POOLED,
    ),
    "flux": (
        (
            "flux-schnell",
            HEADS
            | dict(
                num_layers=2,
                num_single_layers=2,
                axes_dims_rope=(2, 2, 4),
                joint_attention_dim=8,
                pooled_projection_dim=8,
                in_channels=16,
            ),
        ),
        POOLED,
    ),
    "flux2": (
        (
            "flux2-klein-4b",
            HEADS
            | dict(num_layers=2, num_single_layers=2, axes_dims_rope=(2, 2, 2, 2), joint_attention_dim=8)
            | dict(in_channels=4),
        ),
        TEXT,
    ),
    "pixart": (
        (
            "pixart-sigma-256",
            HEADS | dict(num_layers=3, caption_channels=8, cross_attention_dim=16, sample_size=4),
        ),
        TEXT,
    ),
    "qwen-image": (
        (
            "qwen-image",
            HEADS
            | dict(num_layers=3, axes_dims_rope=(2, 2, 4), joint_attention_dim=8)
            | dict(in_channels=16, out_channels=4),
        ),
        TEXT,
    ),
    "z-image": (
        (
            "z-image",
            dict(dim=24, n_heads=2, n_kv_heads=2, n_layers=3, n_refiner_layers=1, axes_dims=(4, 4, 4))
            | dict(cap_feat_dim=8, in_channels=4),
        ),
        TEXT,
    ),
}
SIZES = {"unet": (7, 7, 4), "unet-of-texts": (7, 7, 4), "dit": (8, 8, 1), "sit-scanned": (8, 8, 4)}


def build(name):
    """(module, x [B, H, W, C], condition) of a family."""
    (preset, changes), condition = NETWORKS[name]
    module = (
        models.build(preset, **changes) if isinstance(preset, str) else models.from_config(preset(**changes))
    )
    x = np.random.default_rng(1).standard_normal((B, *SIZES.get(name, (4, 4, 4))))
    return module, jnp.asarray(x, jnp.float32), condition


def params_of(module):
    """Random parameters, none zero: fresh networks add nothing in their blocks."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), models.shapes(module)
    )
