"""The ControlNet of FLUX.1: `FluxControlNetModel` of diffusers.

Some double and single blocks, which see the latents of a picture besides x; what each leaves is added to the
tokens of the large transformer (Zhang et al. 2023, on FLUX's blocks).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxldm.errors import InvalidArgumentError
from jaxldm.models.denoising_network import UNIT_TIME, Convention
from jaxldm.models.flux_transformer_2d import (
    PATCH,
    THETA,
    FluxSingleTransformerBlock,
    FluxTransformer2DConfig,
    FluxTransformerBlock,
    pack,
    positions,
)
from jaxldm.nn.adaptive_norm import ZERO
from jaxldm.nn.embeddings import TimestepTextEmbedding
from jaxldm.nn.linear import Embedding, Linear
from jaxldm.nn.rotary import rotary_embedding_of_axes


@dataclasses.dataclass(frozen=True)
class FluxControlNetConfig(FluxTransformer2DConfig):
    """Config of `FluxControlNetModel`; names and defaults are those of diffusers.

    Attributes:
        num_mode: kinds of pictures that a union of ControlNets knows; None: it is for one kind.
    """

    num_mode: int | None = None

    # XLabs' form, which sees pixels.
    fixed: ClassVar = {"patch_size": 1, "conditioning_embedding_channels": None}

    def to_dict(self) -> dict[str, Any]:
        entries = super().to_dict()
        del entries["out_channels"]  # it has no output of its own
        return entries

    @property
    def num_residuals(self) -> int:
        """How many arrays it gives."""
        return self.num_layers + self.num_single_layers


class FluxControlNetModel(nn.Module):
    """A ControlNet of FLUX.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import models
    >>> control = models.build("flux-controlnet")
    >>> x, t = jnp.zeros((1, 64, 96, 16)), jnp.zeros(1)
    >>> text, pooled = jnp.zeros((1, 512, 4096)), jnp.zeros((1, 768))
    >>> params = models.shapes(control)
    >>> given = jax.eval_shape(control.apply, {"params": params}, x, t, text, pooled, x, guidance=t)
    >>> {name: len(arrays) for name, arrays in given.items()}
    {'controlnet_block_samples': 5, 'controlnet_single_block_samples': 10}
    """

    config: FluxControlNetConfig

    convention: ClassVar[Convention] = UNIT_TIME

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        encoder_hidden_states: Float[Array, "B T D"],
        pooled_projections: Float[Array, "B E"],
        control_image: Float[Array, "B H W C"],
        guidance: Float[Array, " B"] | None = None,
        controlnet_mode: Int[Array, " B"] | None = None,
    ) -> dict[str, Any]:
        """What to add to the transformer, by the names of its arguments.

        Args:
            x, t, encoder_hidden_states, pooled_projections, guidance: what the transformer takes; the
                guidance is used with `guidance_embeds` alone.
            control_image: `[B, H, W, latent_channels]`, latents of the picture.
            controlnet_mode: `[B]`, of a union the kind of the picture, from 0 on.

        Returns:
            `controlnet_block_samples` and `controlnet_single_block_samples`, where it has such blocks.

        Raises:
            InvalidArgumentError: an input that is missing, or of another width or size.
        """
        config = self.config
        self._check(x, control_image, encoder_hidden_states, pooled_projections)
        image = Linear(config.inner_dim, dtype=config.dtype, name="x_embedder")(pack(x))
        embed_picture = Linear(config.inner_dim, dtype=config.dtype, name="controlnet_x_embedder", **ZERO)
        image = image + embed_picture(pack(control_image))
        text = Linear(config.inner_dim, dtype=config.dtype, name="context_embedder")(encoder_hidden_states)
        if config.num_mode is not None:
            text = jnp.concatenate([self._embed_mode(controlnet_mode).astype(text.dtype), text], axis=1)
        if config.guidance_embeds and guidance is None:
            raise InvalidArgumentError("this ControlNet needs guidance (guidance_embeds of its config)")
        scale = 1000.0 * guidance if config.guidance_embeds and guidance is not None else None
        embed = TimestepTextEmbedding(config.inner_dim, config.dtype, name="time_text_embed")
        c = embed(1000.0 * t, pooled_projections, scale)
        num_text = text.shape[1]
        coordinates = positions(num_text, (x.shape[1] // PATCH, x.shape[2] // PATCH))
        shared = (c, *map(jnp.asarray, rotary_embedding_of_axes(coordinates, config.axes_dims_rope, THETA)))
        doubles, singles = [], []
        for i in range(config.num_layers):
            block = FluxTransformerBlock(config, name=f"transformer_blocks_{i}")
            image, text = block((image, text), *shared)
            doubles.append(self._output(image, f"controlnet_blocks_{i}"))
        h = jnp.concatenate([text, image], axis=1)
        for i in range(config.num_single_layers):
            h = FluxSingleTransformerBlock(config, name=f"single_transformer_blocks_{i}")(h, *shared)
            singles.append(self._output(h[:, num_text:], f"controlnet_single_blocks_{i}"))
        found = {"controlnet_block_samples": doubles, "controlnet_single_block_samples": singles}
        return {name: tuple(arrays) for name, arrays in found.items() if arrays}

    def _output(self, h: Float[Array, "B N C"], name: str) -> Float[Array, "B N C"]:
        return Linear(self.config.inner_dim, dtype=self.config.dtype, name=name, **ZERO)(h)

    def _embed_mode(self, mode: Int[Array, " B"] | None) -> Float[Array, "B 1 C"]:
        config = self.config
        if mode is None:
            raise InvalidArgumentError(
                "this ControlNet is a union: say with controlnet_mode which picture it is"
            )
        table = Embedding(
            config.num_mode or 0, config.inner_dim, config.dtype, name="controlnet_mode_embedder"
        )
        return table(mode)[:, None]

    def _check(self, x: Array, image: Array, text: Array, pooled: Array) -> None:
        config = self.config
        chex.assert_rank([x, image, text, pooled], [4, 4, 3, 2])
        for name, array, wanted in (
            ("x", x, config.latent_channels),
            ("control_image", image, config.latent_channels),
            ("encoder_hidden_states", text, config.joint_attention_dim),
            ("pooled_projections", pooled, config.pooled_projection_dim),
        ):
            if array.shape[-1] != wanted:
                raise InvalidArgumentError(
                    f"{name} of width {array.shape[-1]}; this ControlNet takes {wanted}"
                )
        if image.shape != x.shape:
            raise InvalidArgumentError(
                f"control_image must be latents {list(x.shape)} as x, got {list(image.shape)}"
            )

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Shapes of the inputs to trace the network with; None for those that it does not take."""
        config = self.config
        side = 2 * PATCH
        x, text = (1, side, side, config.latent_channels), (1, 77, config.joint_attention_dim)
        shapes = (x, (1,), text, (1, config.pooled_projection_dim), x, (1,))
        *inputs, guidance = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        mode = None if config.num_mode is None else jax.ShapeDtypeStruct((1,), jnp.int32)
        return (*inputs, guidance if config.guidance_embeds else None, mode)


PRESETS = {
    # As InstantX publishes them.
    "flux-controlnet": FluxControlNetConfig(num_layers=5, num_single_layers=10, guidance_embeds=True),
}
