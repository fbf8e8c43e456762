"""The levels of U-Nets and convolutional autoencoders: residual blocks, attention, a change of size.

One class per direction covers what diffusers calls DownBlock2D, AttnDownBlock2D, CrossAttnDownBlock2D,
DownEncoderBlock2D, ResnetDownsampleBlock2D, SimpleCrossAttnDownBlock2D and UpBlock2D, AttnUpBlock2D,
CrossAttnUpBlock2D, UpDecoderBlock2D, ResnetUpsampleBlock2D, SimpleCrossAttnUpBlock2D: they differ only in
attention, the time embedding, skip connections and what changes the size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxldm.errors import InvalidArgumentError
from jaxldm.nn.added_kv_attention import AddedKVAttention, AddedKVOptions
from jaxldm.nn.attention import Attention2D, Context
from jaxldm.nn.free_u import free_u
from jaxldm.nn.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from jaxldm.nn.reuse import keep_session, session_of
from jaxldm.nn.transformer_2d import Transformer2D, TransformerOptions


class _Level(nn.Module, kw_only=True):
    """Base of the levels: their residual and attention blocks under the published names.

    Attributes:
        attention: attention over the pixels after every residual block.
        transformer: a spatial transformer in its place.
        identity_attention: the transformers whose names begin so ("" all) attend to nothing among the pixels.
        added_kv: attention to the text and the pixels in its place.
        resnet_resampling: a residual block changes the size, not a convolution.
        act, skip_time_act, output_scale_factor: of the residual blocks, see `ResnetBlock2D`.
        remat: keep no activations inside residual and transformer blocks for the backward pass, compute them
            again (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    """

    num_groups: int = 32
    eps: float = 1e-5
    dropout: float = 0.0
    time_scale_shift: str = "default"
    attention: bool = False
    attention_head_dim: int | None = None
    transformer: TransformerOptions | None = None
    identity_attention: tuple[str, ...] = ()
    added_kv: AddedKVOptions | None = None
    resnet_resampling: bool = False
    act: str = "silu"
    skip_time_act: bool = False
    output_scale_factor: float = 1.0
    dtype: str = "float32"
    remat: bool = False

    def resnet(
        self, name: str, channels: int, x, temb, train: bool, resample: str | None = None
    ) -> Float[Array, "B h w c"]:
        kind = nn.remat(ResnetBlock2D, static_argnums=(3,)) if self.remat else ResnetBlock2D
        block = kind(
            channels,
            self.num_groups,
            self.eps,
            self.dropout,
            self.time_scale_shift,
            self.dtype,
            self.act,
            self.skip_time_act,
            self.output_scale_factor,
            resample,
            name=name,
        )
        return block(x, temb, train)

    def _latents_or(self, temb: Any, context: Any) -> Any:
        """What the attention is given besides x: with spatial norms the latents, which stand for the time."""
        return temb if self.time_scale_shift == "spatial" else context

    def attend(self, index: int, groups: int | None, x, context, mask) -> Float[Array, "B H W C"]:
        name = f"attentions_{index}"
        if self.transformer is not None:
            identity = name.startswith(self.identity_attention) if self.identity_attention else False
            options = dataclasses.replace(self.transformer.of_layer(index), identity_attention=identity)
            block = Transformer2D(options, self.num_groups, self.dtype, self.remat, name=name)
            return block(x, context, mask)
        if self.added_kv is not None:
            kind = nn.remat(AddedKVAttention) if self.remat else AddedKVAttention
            return kind(self.added_kv, self.num_groups, self.dtype, name=name)(x, context, mask)
        if self.attention:
            spatial = self.time_scale_shift == "spatial"
            options = (self.attention_head_dim, None if spatial else groups, self.eps, self.dtype)
            return Attention2D(*options, name=name)(x, context if spatial else None)
        return x


class DownBlock2D(_Level, kw_only=True):
    """`num_layers` residual blocks, each with attention if the level has it, then a stride-2 convolution.

    `[B, H, W, C]` -> (`[B, h, w, out_channels]`, the skip connections: the outputs of every layer and of the
    downsampler). `context` and `mask` of the call are those of `Transformer2D`.
    """

    out_channels: int
    num_layers: int
    add_downsample: bool = True
    downsample_padding: int = 1
    first_layer: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        temb: Float[Array, "B time"] | None = None,
        train: bool = False,
        context: Context | None = None,
        mask: Shaped[Array, "B T"] | None = None,
        residual: Float[Array, "B _ _ out"] | None = None,
    ) -> tuple[Float[Array, "B h w out"], tuple[Float[Array, "B _ _ _"], ...]]:
        skips = []
        for i in range(self.first_layer, self.num_layers):
            x = self.resnet(f"resnets_{i}", self.out_channels, x, temb, train)
            x = self.attend(i, self.num_groups, x, context, mask)
            if self.takes_residual_inside and i == self.num_layers - 1:
                x = add_residual(x, residual)
            skips.append(x)
        if self.add_downsample:
            if self.resnet_resampling:
                x = self.resnet("downsamplers_0", self.out_channels, x, temb, train, "down")
            else:
                x = Downsample2D(self.downsample_padding, self.dtype, name="downsamplers_0")(x)
            skips.append(x)
        if residual is not None and not self.takes_residual_inside:
            x = add_residual(x, residual)
            skips[-1:] = [x]
        return x, tuple(skips)

    @property
    def takes_residual_inside(self) -> bool:
        """Whether a T2I-Adapter's residual enters before the change of size: in levels with transformers."""
        return self.transformer is not None


class UpBlock2D(_Level, kw_only=True):
    """`num_layers` residual blocks, each with a skip connection as second input, then nearest upsampling.

    Layers before `first_layer` are left out. `free_u`: (b, s) of FreeU, see `jaxldm.nn.free_u`.
    """

    out_channels: int
    num_layers: int
    add_upsample: bool = True
    first_layer: int = 0
    free_u: tuple[float, float] | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        skips: tuple[Float[Array, "B _ _ _"], ...] | None = None,
        temb: Float[Array, "B ..."] | None = None,
        train: bool = False,
        context: Context | None = None,
        mask: Shaped[Array, "B T"] | None = None,
        output_size: tuple[int, int] | None = None,
    ) -> Float[Array, "B h w out"]:
        """Apply the level.

        Args:
            x: `[B, H, W, C]`.
            skips: one array per layer, the last one used first; None for autoencoders, which have none.
            temb: `[B, time]`, the time embedding; None for autoencoders, or latents `[B, h, w, c]` for
                spatial norms.
            train: draw dropout from the rng stream "dropout".
            context, mask: those of `Transformer2D`.
            output_size: (h, w) to upsample to, see `Upsample2D`; residual blocks always double.
        """
        for i in range(self.first_layer, self.num_layers):
            if skips is not None:
                skip = skips[-1 - i + self.first_layer]
                if self.free_u is not None:
                    x, skip = free_u(x, skip, *self.free_u)
                x = jnp.concatenate([x, skip], axis=-1)
            x = self.resnet(f"resnets_{i}", self.out_channels, x, temb, train)
            x = self.attend(i, self.num_groups, x, self._latents_or(temb, context), mask)
        if self.add_upsample and self.resnet_resampling:
            x = self.resnet("upsamplers_0", self.out_channels, x, temb, train, "up")
        elif self.add_upsample:
            x = Upsample2D(self.dtype, name="upsamplers_0")(x, output_size)
        return x


class MidBlock2D(_Level, kw_only=True):
    """Residual block, attention, residual block. `[B, H, W, C]` -> the same shape.

    With `attention_groups` None the attention has no group normalisation; with `scales_attention` its sum
    with x is divided by `output_scale_factor`, too. `context` and `mask` of the call are those of
    `Transformer2D`.
    """

    attention: bool = True
    attention_groups: int | None = 32
    scales_attention: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        temb: Float[Array, "B ..."] | None = None,
        train: bool = False,
        context: Context | None = None,
        mask: Shaped[Array, "B T"] | None = None,
    ) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        x = self.resnet("resnets_0", channels, x, temb, train)
        attended = self.attend(0, self.attention_groups, x, self._latents_or(temb, context), mask)
        scaled = self.scales_attention and self.attention
        x = attended / self.output_scale_factor if scaled else attended
        return self.resnet("resnets_1", channels, x, temb, train)


class MidResnet2D(_Level, kw_only=True):
    """A single residual block: the middle of small ControlNets. `context` and `mask` are not used."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        temb: Float[Array, "B time"] | None = None,
        train: bool = False,
        context: Float[Array, "B T D"] | None = None,
        mask: Shaped[Array, "B T"] | None = None,
    ) -> Float[Array, "B H W C"]:
        return self.resnet("resnets_0", x.shape[-1], x, temb, train)


class Residuals(NamedTuple):
    """What other networks add to the levels of a U-Net on their way; None adds nothing.

    Attributes:
        skips: of a ControlNet, to the skip connections, one for each, the first to the input of the levels.
        mid: of a ControlNet, behind the middle block.
        levels: of a T2I-Adapter, in the down blocks, one for each or for the first of them; one more is for
            the middle block.
    """

    skips: tuple[Float[Array, "B _ _ _"], ...] | None = None
    mid: Float[Array, "B _ _ _"] | None = None
    levels: tuple[Float[Array, "B _ _ _"], ...] | None = None

    def of_skips(self, skips: tuple[Any, ...], first: int = 0) -> tuple[Any, ...]:
        """The skip connections from number `first` on, with theirs added."""
        if self.skips is None:
            return skips
        return tuple(map(add_residual, skips, self.skips[first : first + len(skips)]))

    def of_level(self, level: int) -> Any:
        """That of a down block, or None."""
        return self.levels[level] if self.levels is not None and level < len(self.levels) else None

    def of_mid(self, x: Float[Array, "B H W C"], num_levels: int) -> Float[Array, "B H W C"]:
        """The output of the middle block, with theirs added; an adapter's only where it fits."""
        more = self.of_level(num_levels)
        x = add_residual(x, more) if more is not None and more.shape == x.shape else x
        return add_residual(x, self.mid)


NO_RESIDUALS = Residuals()


def add_residual(
    x: Float[Array, "B H W C"], residual: Float[Array, "B _ _ C"] | None
) -> Float[Array, "B H W C"]:
    """x + residual, one number for each channel where it is [B, 1, 1, C]; x where there is none.

    Raises:
        InvalidArgumentError: it does not fit.
    """
    if residual is None:
        return x
    if residual.shape != x.shape and residual.shape != (x.shape[0], 1, 1, x.shape[-1]):
        raise InvalidArgumentError(
            f"a control network gives residuals {list(residual.shape)} where the U-Net has {list(x.shape)}: "
            "they are of different models, or the control image is of another size"
        )
    return x + residual.astype(x.dtype)


def apply_down_blocks(
    x: Float[Array, "B H W C"], blocks: Sequence[Any], *condition, residuals: Residuals = NO_RESIDUALS
) -> tuple[Float[Array, "B h w c"], tuple[Float[Array, "B _ _ _"], ...]]:
    """Apply all down blocks of a U-Net: (the lowest level, the skip connections, x itself first).

    `condition` are the further arguments of every block: temb, train, context, mask. Of the residuals those
    of the levels are added here.
    """
    skips = (x,)
    for level, block in enumerate(blocks):
        more = {} if residuals.levels is None else {"residual": residuals.of_level(level)}
        x, outputs = block(x, *condition, **more)
        skips += outputs
    return x, skips


def apply_up_blocks(
    x: Float[Array, "B h w c"],
    skips: tuple[Float[Array, "B _ _ _"], ...],
    blocks: Sequence[Any],
    *condition,
) -> Float[Array, "B H W C"]:
    """Apply all up blocks of a U-Net, each with as many skip connections as it has layers, the last first.

    A side that was halved to ceil(H / 2) comes back to H: every block upsamples to the size of the next
    skip.
    """
    for block in blocks:
        rest = len(skips) - block.num_layers
        used, skips = skips[rest:], skips[:rest]
        size = cast(tuple[int, int], skips[-1].shape[1:3]) if skips else None
        x = block(x, used, *condition, output_size=size)
    return x


def apply_levels(
    module: nn.Module,
    x: Float[Array, "B H W C"],
    down: Sequence[DownBlock2D],
    mid: MidBlock2D | None,
    up: Sequence[UpBlock2D],
    *condition,
    residuals: Residuals = NO_RESIDUALS,
) -> Float[Array, "B H W _"]:
    """All levels of a U-Net: down, the middle one, up. Call it in the compact method of their module.

    In a session (`jaxldm.nn.reuse`) the outermost k skip connections are computed in every step, and all that
    is deeper is computed or reused: DeepCache (Ma et al. 2023), with k = 1 its branch 0.

    Args:
        module: whose compact method this is.
        x: `[B, H, W, C]`, the first skip connection.
        down, mid, up: its blocks.
        condition: as in `apply_down_blocks`.
        residuals: of other networks, added in every step.
    """
    session = session_of(module)
    if session is None:
        x, skips = apply_down_blocks(x, down, *condition, residuals=residuals)
        x = residuals.of_mid(x if mid is None else mid(x, *condition), len(down))
        return apply_up_blocks(x, residuals.of_skips(skips), up, *condition)
    last = up[-1].num_layers
    shallow = session.cache.skips or 1
    if shallow > last:
        raise InvalidArgumentError(
            f"skips={shallow} of the cache is beyond this U-Net's outermost level, which has {last}"
        )

    def part(block: nn.Module, **changes: Any) -> Any:
        return _Pure(module, str(block.name), block.clone(parent=None, name=None, **changes))

    # The adapter's residual of the outermost level belongs to its last layer, on one side of the cut.
    whole = down[0].takes_residual_inside and shallow > down[0].num_layers
    above = residuals if whole else NO_RESIDUALS
    below = (
        residuals._replace(levels=(None, *residuals.levels[1:])) if whole and residuals.levels else residuals
    )
    first = part(down[0], num_layers=shallow - 1, add_downsample=False)
    x, skips = apply_down_blocks(x, [first], *condition, residuals=above)
    skips = residuals.of_skips(skips)

    def deep(x):
        x, more = apply_down_blocks(
            x, [part(down[0], first_layer=shallow - 1), *map(part, down[1:])], *condition, residuals=below
        )
        x = residuals.of_mid(x if mid is None else part(mid)(x, *condition), len(down))
        outermost = part(up[-1], num_layers=last - shallow, add_upsample=False)
        more = residuals.of_skips(more[1:], len(skips))
        return apply_up_blocks(x, skips + more, [*map(part, up[:-1]), outermost], *condition)

    x, session = session.run("deep", deep, x, residual=False)
    keep_session(module, session)
    outermost = part(up[-1], first_layer=last - shallow)
    return outermost(x, skips, *condition)


class _Pure(NamedTuple):
    """A block as a function of the parameters that it has in a module; `num_layers` is the block's."""

    module: nn.Module
    name: str
    block: nn.Module

    @property
    def num_layers(self) -> int:
        return cast(Any, self.block).num_layers

    def __call__(self, *inputs: Any, **more: Any) -> Any:
        params = self.module.get_variable("params", self.name)
        return self.block.apply({"params": params}, *inputs, **more)
