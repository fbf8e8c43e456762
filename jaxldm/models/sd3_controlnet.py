"""The ControlNet of Stable Diffusion 3 and 3.5: `SD3ControlNetModel` of diffusers.

The first blocks of a transformer, which see the latents of a picture besides x; what each leaves is added to
the tokens of the large transformer (Zhang et al. 2023, on the MM-DiT of Esser et al. 2024).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.errors import InvalidArgumentError
from jaxldm.models.denoising_network import Convention
from jaxldm.models.sd3_transformer_2d import (
    EPS,
    JointTransformerBlock,
    PatchEmbed,
    SD3Transformer2DConfig,
    SD3Transformer2DModel,
)
from jaxldm.nn.adaptive_norm import ZERO, Modulation, gated
from jaxldm.nn.embeddings import PatchProjection, TimestepTextEmbedding
from jaxldm.nn.joint_attention import JointAttention
from jaxldm.nn.linear import Linear
from jaxldm.nn.normalization import layer_norm, modulate
from jaxldm.nn.transformer_2d import FeedForward


@dataclasses.dataclass(frozen=True)
class SD3ControlNetConfig(SD3Transformer2DConfig):
    """Config of `SD3ControlNetModel`; names and defaults are those of diffusers.

    Attributes:
        extra_conditioning_channels: of the picture beyond its latents (a mask).
        force_zeros_for_pooled_projection: it was trained without the pooled text, and on latents without
            their shift: the pipeline does so.
        joint_attention_dim: None: it sees no text but the pooled one, and its blocks are those of the image
            alone (SD 3.5 large).
        use_pos_embed: False: it has no first layer of its own, and is given that of the transformer.
    """

    joint_attention_dim: int | None = 4096
    extra_conditioning_channels: int = 0
    use_pos_embed: bool = True
    force_zeros_for_pooled_projection: bool = True

    fixed: ClassVar = {"pos_embed_type": "sincos"}

    @property
    def num_residuals(self) -> int:
        """How many arrays it gives."""
        return self.num_layers


class ImagePatches(nn.Module):
    """The picture's latents as tokens without positions, zero at the start."""

    config: SD3ControlNetConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B N width"]:
        config = self.config
        return PatchProjection(config.hidden_size, config.patch_size, config.dtype, name="proj")(x)


class SD3SingleTransformerBlock(nn.Module):
    """Attention of the image to itself and a feed-forward, modulated by c. `[B, N, C]` -> the same."""

    config: SD3ControlNetConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], c: Float[Array, "B C"]) -> Float[Array, "B N C"]:
        heads, dtype = self.config.num_attention_heads, self.config.dtype
        shift, scale, gate, *of_mlp = Modulation(6, dtype, name="norm1")(c)
        attention = JointAttention(heads, eps=EPS, dtype=dtype, name="attn")
        x = x + gated(cast(Array, attention(modulate(layer_norm(x, EPS), shift, scale))), gate)
        shift, scale, gate = of_mlp
        forward = FeedForward(dtype, activation="gelu-approximate", name="ff")
        return x + gated(forward(modulate(layer_norm(x, EPS), shift, scale)), gate)


class SD3ControlNetModel(nn.Module):
    """A ControlNet of the MM-DiT.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import models
    >>> control = models.build("sd3-controlnet")
    >>> x, t = jnp.zeros((2, 128, 96, 16)), jnp.zeros(2)
    >>> text, pooled = jnp.zeros((2, 77, 4096)), jnp.zeros((2, 2048))
    >>> given = jax.eval_shape(control.apply, {"params": models.shapes(control)}, x, t, text, pooled, x)
    >>> len(given["block_controlnet_hidden_states"])
    12

    Attributes:
        config: what the network is.
        borrows: its parameters hold the transformer's `pos_embed`, which its config says it lacks.
    """

    config: SD3ControlNetConfig
    borrows: bool = False

    convention: ClassVar[Convention] = SD3Transformer2DModel.convention
    untrained: ClassVar = SD3Transformer2DModel.untrained

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        encoder_hidden_states: Float[Array, "B T D"],
        pooled_projections: Float[Array, "B P"],
        control_image: Float[Array, "B H W image"],
    ) -> dict[str, Any]:
        """What to add to the transformer, by the name of its argument.

        Args:
            x, t, encoder_hidden_states, pooled_projections: what the transformer takes; see
                `force_zeros_for_pooled_projection`.
            control_image: `[B, H, W, in_channels + extra_conditioning_channels]`, latents of the picture.

        Returns:
            `block_controlnet_hidden_states`, one array for each block.

        Raises:
            InvalidArgumentError: an input of another width, a picture of another size than x, or a network
                without a first layer.
        """
        config, text, pooled = self.config, encoder_hidden_states, pooled_projections
        chex.assert_rank([x, t, text, pooled], [4, 1, 3, 2])
        self._check(x, text, pooled, control_image)
        h = ImagePatches(config, name="pos_embed_input")(control_image)
        if config.use_pos_embed or self.borrows:
            h = h + PatchEmbed(config, name="pos_embed")(x)
        elif not self.is_initializing():
            raise InvalidArgumentError("this ControlNet needs the first layer of its transformer, pos_embed")
        c = TimestepTextEmbedding(config.hidden_size, config.dtype, name="time_text_embed")(t, pooled)
        has_text = config.joint_attention_dim is not None
        if has_text:
            text = Linear(config.caption_projection_dim, dtype=config.dtype, name="context_embedder")(text)
        outputs = []
        for i in range(config.num_layers):
            name = f"transformer_blocks_{i}"
            if has_text:
                h, text = JointTransformerBlock(config, i in config.dual_attention_layers, name=name)(
                    (h, text), c
                )
            else:
                h = SD3SingleTransformerBlock(config, name=name)(h, c)
            outputs.append(
                Linear(config.hidden_size, dtype=config.dtype, name=f"controlnet_blocks_{i}", **ZERO)(h)
            )
        return {"block_controlnet_hidden_states": tuple(outputs)}

    def _check(self, x: Array, text: Array, pooled: Array, image: Array) -> None:
        config = self.config
        for name, array, wanted in (
            ("x", x, config.in_channels),
            ("encoder_hidden_states", text, config.joint_attention_dim or text.shape[-1]),
            ("pooled_projections", pooled, config.pooled_projection_dim),
            ("control_image", image, config.in_channels + config.extra_conditioning_channels),
        ):
            if array.shape[-1] != wanted:
                raise InvalidArgumentError(
                    f"{name} of width {array.shape[-1]}; this ControlNet takes {wanted}"
                )
        if image.shape[1:3] != x.shape[1:3]:
            raise InvalidArgumentError(
                f"control_image must be latents of {x.shape[1]}x{x.shape[2]}, got {list(image.shape)}"
            )

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the inputs to trace the network with."""
        config = self.config
        side = 2 * config.patch_size
        image = config.in_channels + config.extra_conditioning_channels
        shapes = (
            *((1, side, side, config.in_channels), (1,), (1, 77, config.joint_attention_dim or 1)),
            *((1, config.pooled_projection_dim), (1, side, side, image)),
        )
        return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


PRESETS = {
    # Half of the blocks of Stable Diffusion 3 medium.
    "sd3-controlnet": SD3ControlNetConfig(
        num_layers=12, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
    ),
    # As Stability publishes them for Stable Diffusion 3.5 large: half of its blocks, without the text.
    "sd35-large-controlnet": SD3ControlNetConfig(
        num_layers=19,
        num_attention_heads=38,
        caption_projection_dim=2432,
        pos_embed_max_size=192,
        joint_attention_dim=None,
        use_pos_embed=False,
        force_zeros_for_pooled_projection=False,
    ),
}
