"""The ControlNets of Stable Diffusion 1, 2 and XL: `ControlNetModel` of diffusers (Zhang et al. 2023).

A copy of a U-Net's down blocks and middle block that sees a picture besides x: its outputs pass through
convolutions that begin at zero, and are added to the skip connections and the middle of the U-Net.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real, Shaped

from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.models.config import check, check_groups
from jaxldm.models.unet_2d_encoder import CLASS_EMBEDDINGS, Encoder2DCondition, Encoder2DConditionConfig
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.blocks_2d import MidResnet2D, apply_down_blocks
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.initialization import zeros
from jaxldm.nn.linear import compute_dtype

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")
Residual = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(Encoder2DConditionConfig):
    """Config of `ControlNetModel`; entries that `UNet2DConditionConfig` has, too, are as there.

    Attributes:
        conditioning_channels: of the control image.
        mid_block_type: "UNetMidBlock2D" has one residual block and no attention.
        controlnet_conditioning_channel_order: "rgb", or "bgr" where the network was trained on that.
        conditioning_embedding_out_channels: of the convolutions that bring the control image to the size of
            the latents; each but the first halves it.
        global_pool_conditions: the residuals are averaged over the image (the shuffle ControlNet).
    """

    in_channels: int = 4
    conditioning_channels: int = 3
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    projection_class_embeddings_input_dim: int | None = None
    controlnet_conditioning_channel_order: str = "rgb"
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    global_pool_conditions: bool = False
    addition_embed_type_num_heads: int = 64
    dtype: str = "float32"
    remat: bool = False

    published: ClassVar = True
    fixed: ClassVar = {"num_attention_heads": None}
    # What a U-Net may have besides.
    dropout: ClassVar[float] = 0.0
    resnet_skip_time_act: ClassVar[bool] = False
    resnet_out_scale_factor: ClassVar[float] = 1.0
    time_embedding_dim: ClassVar[int | None] = None
    time_embedding_act_fn: ClassVar[str | None] = None
    time_cond_proj_dim: ClassVar[int | None] = None
    class_embeddings_concat: ClassVar[bool] = False

    def check_values(self) -> None:
        levels = len(self.block_out_channels)
        check(
            len(self.down_block_types) == levels,
            f"{levels} block_out_channels need {levels} down_block_types, not {len(self.down_block_types)}",
        )
        for kind in self.down_block_types:
            one_of("block type", kind, DOWN_BLOCKS)
        one_of("mid_block_type", self.mid_block_type, MID_BLOCKS)
        one_of("act_fn", self.act_fn, ACTIVATIONS)
        one_of("resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift"))
        one_of("channel order", self.controlnet_conditioning_channel_order, ("rgb", "bgr"))
        check(self.downsample_padding in (0, 1), "downsample_padding is 0 or 1")
        check(
            len(self.conditioning_embedding_out_channels) > 0, "conditioning_embedding_out_channels is empty"
        )
        self.check_per_level()
        check_groups(self.block_out_channels, self.norm_num_groups)
        self.check_embeddings()
        compute_dtype(self.dtype)

    @property
    def image_factor(self) -> int:
        """How many pixels of the control image a latent is wide: 8."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @property
    def num_residuals(self) -> int:
        """How many arrays it gives, that of the middle block included."""
        levels = len(self.block_out_channels)
        return levels * (self.layers_per_block + 1) + 1


class ControlNetConditioningEmbedding(nn.Module):
    """The control image as an array of the size of the latents. `[B, H, W, C]` -> `[B, h, w, out]`."""

    out_channels: int
    block_out_channels: tuple[int, ...]
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        widths = self.block_out_channels
        x = nn.silu(Conv2d(widths[0], dtype=self.dtype, name="conv_in")(image))
        for i, (narrow, wide) in enumerate(itertools.pairwise(widths)):
            x = nn.silu(Conv2d(narrow, dtype=self.dtype, name=f"blocks_{2 * i}")(x))
            x = nn.silu(Conv2d(wide, stride=2, dtype=self.dtype, name=f"blocks_{2 * i + 1}")(x))
        return zero_conv(self.out_channels, self.dtype, "conv_out", kernel_size=3)(x)


def zero_conv(channels: int, dtype: str, name: str, kernel_size: int = 1) -> Conv2d:
    """A convolution that begins at zero, so that an untrained ControlNet changes nothing."""
    return Conv2d(
        channels,
        kernel_size=kernel_size,
        padding=kernel_size // 2,
        kernel_init=zeros,
        bias_init=zeros,
        dtype=dtype,
        name=name,
    )


class ControlNetModel(Encoder2DCondition):
    """Zhang et al. 2023, section 3.1 and figure 3.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import models
    >>> control = models.build("sd15-controlnet")
    >>> params, t, text = models.shapes(control), jnp.zeros(2), jnp.zeros((2, 77, 768))
    >>> x, image = jnp.zeros((2, 64, 64, 4)), jnp.zeros((2, 512, 512, 3))
    >>> given = jax.eval_shape(control.apply, {"params": params}, x, t, text, image)
    >>> sorted(given), len(given["down_block_additional_residuals"])
    (['down_block_additional_residuals', 'mid_block_additional_residual'], 12)
    """

    config: ControlNetConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        encoder_hidden_states: Float[Array, "B T D"],
        control_image: Float[Array, "B _ _ image"],
        encoder_attention_mask: Shaped[Array, "B T"] | None = None,
        text_embeds: Float[Array, "B P"] | None = None,
        time_ids: Float[Array, "B ids"] | None = None,
        class_labels: Real[Array, " B"] | Float[Array, "B labels"] | None = None,
        train: bool = False,
    ) -> Residual:
        """What to add to the U-Net, by the names of the U-Net's arguments.

        Args:
            x, t, encoder_hidden_states, encoder_attention_mask, text_embeds, time_ids, class_labels: what the
                U-Net takes, x without the further channels of inpainting.
            control_image: `[B, 8 H, 8 W, conditioning_channels]` in [0, 1].
            train: has no effect.

        Returns:
            `down_block_additional_residuals` and `mid_block_additional_residual`.

        Raises:
            InvalidArgumentError: an input that is missing, that the network does not take, or of another
                width or size.
        """
        config = self.config
        chex.assert_rank([x, t, encoder_hidden_states], [4, 1, 3])
        self._check_sizes(x, encoder_hidden_states, control_image)
        given = (text_embeds, time_ids, None, class_labels)
        condition = self._condition(t, encoder_hidden_states, encoder_attention_mask, *given, train)
        if config.controlnet_conditioning_channel_order == "bgr":
            control_image = control_image[..., ::-1]
        width, embedding = config.block_out_channels[0], config.conditioning_embedding_out_channels
        embed = ControlNetConditioningEmbedding(
            width, embedding, config.dtype, name="controlnet_cond_embedding"
        )
        h = Conv2d(width, dtype=config.dtype, name="conv_in")(x) + embed(control_image)
        h, skips = apply_down_blocks(h, self._down_blocks(), *condition)
        h = self._middle()(h, *condition)
        outputs = tuple(
            zero_conv(skip.shape[-1], config.dtype, f"controlnet_down_blocks_{i}")(skip)
            for i, skip in enumerate(skips)
        )
        middle = zero_conv(h.shape[-1], config.dtype, "controlnet_mid_block")(h)
        if config.global_pool_conditions:
            outputs = tuple(output.mean((1, 2), keepdims=True) for output in outputs)
            middle = middle.mean((1, 2), keepdims=True)
        return {
            "down_block_additional_residuals": outputs,
            "mid_block_additional_residual": middle,
        }

    def _middle(self) -> Any:
        config = self.config
        if config.mid_block_type == "UNetMidBlock2DCrossAttn":
            return self._mid_block()
        scale = config.mid_block_scale_factor
        options: dict[str, Any] = self._level_options() | {"output_scale_factor": scale}
        return MidResnet2D(name="mid_block", **options)

    def _check_sizes(self, x: Array, states: Array, image: Array) -> None:
        config = self.config
        for name, array, width in (
            ("x", x, config.in_channels),
            ("encoder_hidden_states", states, config.text_dim),
            ("control_image", image, config.conditioning_channels),
        ):
            if array.shape[-1] != width:
                raise InvalidArgumentError(
                    f"{name} is {array.shape[-1]} wide; this ControlNet takes {width}: they are of different "
                    "models"
                )
        sides = [-(-side // config.image_factor) for side in image.shape[1:3]]
        if sides != list(x.shape[1:3]):
            wanted = [side * config.image_factor for side in x.shape[1:3]]
            raise InvalidArgumentError(
                f"control_image must be {wanted[0]}x{wanted[1]} pixels here, got {list(image.shape)}"
            )

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Shapes of the inputs to trace the network with; None for those that it does not take."""
        config = self.config
        side = 2 ** len(config.block_out_channels)

        def array(*shape: int | None, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct | None:
            return None if None in shape else jax.ShapeDtypeStruct((1, *shape), dtype)

        text = time_ids = labels = None
        if config.addition_embed_type == "text_time":
            total, dim = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
            text, time_ids = array((total or 0) - (dim or 0)), array(1)
        if config.class_embed_type in CLASS_EMBEDDINGS[1:]:
            labels = array(config.projection_class_embeddings_input_dim)
        elif config.has_classes:
            labels = array(dtype=jnp.int32)
        pixels = side * config.image_factor
        image = array(pixels, pixels, config.conditioning_channels)
        x, states = array(side, side, config.in_channels), array(77, config.text_dim)
        return (x, array(), states, image, None, text, time_ids, labels)


PRESETS = {
    "sd15-controlnet": ControlNetConfig(cross_attention_dim=768),
    "sd2-controlnet": ControlNetConfig(
        cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    ),
    "sdxl-controlnet": ControlNetConfig(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}
