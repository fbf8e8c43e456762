"""DyDiT (Zhao et al. 2024, arXiv:2410.03456): a DiT whose width depends on the time.

In each block a router chooses attention heads and groups of the MLP's channels from the embedding of the time
(timestep-wise dynamic width), and tokens that a router of their own finds easy bypass the MLP (spatial-wise
dynamic tokens). Routers are trained with the network, towards a share of the compute.

As published, but for two things that static shapes ask for: the router of the width sees the middle of one of
a few parts of the time, and the MLP is given the same number of tokens of every image, those of the highest
scores. Gates have no Gumbel noise in training.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxldm.models.config import check
from jaxldm.models.dit import XAVIER, ZERO
from jaxldm.models.time_routed_dit import TimeRoutedConfig, TimeRoutedDiT
from jaxldm.nn.activations import gelu_tanh, silu
from jaxldm.nn.attention import attend
from jaxldm.nn.linear import Linear
from jaxldm.nn.normalization import layer_norm, modulate
from jaxldm.nn.routing import (
    TokenRouter,
    pass_through,
    put_tokens,
    straight_through,
    take_tokens,
    top_tokens,
)


@dataclasses.dataclass(frozen=True)
class DyDiTConfig(TimeRoutedConfig):
    """Config of `DyDiT`: that of `DiT`, and its routers.

    Attributes:
        channel_groups: the MLP's channels are chosen in so many groups; as many as heads, as published.
        token_capacity: the part of the tokens that go through each MLP; with 1 there is no router of tokens.
    """

    channel_groups: int = 16
    token_capacity: float = 1.0

    def check_values(self) -> None:
        super().check_values()
        check(
            self.hidden_channels % self.channel_groups == 0,
            f"{self.hidden_channels} channels of the MLP cannot be split into {self.channel_groups} groups",
        )
        check(
            0 < self.token_capacity <= 1,
            f"token_capacity must be above 0 and at most 1, got {self.token_capacity}",
        )

    @property
    def hidden_channels(self) -> int:
        """Of the MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def num_gates(self) -> int:
        """Heads, then groups of channels, of each block."""
        return self.depth * (self.num_heads + self.channel_groups)

    def split(self, gates: Any) -> tuple[Any, Any]:
        """(heads `[..., depth, num_heads]`, groups of channels `[..., depth, channel_groups]`)."""
        each = gates.reshape(*gates.shape[:-1], self.depth, self.num_heads + self.channel_groups)
        return each[..., : self.num_heads], each[..., self.num_heads :]

    def check_gates(self, gates: Bool[np.ndarray, " gates"]) -> None:
        check(
            all(part.any(axis=-1).all() for part in self.split(gates)),
            "plan closes all heads or all channels of a block: leave at least one of each open",
        )


class GatedAttention(nn.Module):
    """`SelfAttention` with so many heads of a width, each multiplied with its gate `[B, heads]`."""

    num_heads: int
    head_size: int
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N C"], gates: Float[Array, "B heads"] | None
    ) -> Float[Array, "B N C"]:
        width = self.num_heads * self.head_size
        query, key, value = jnp.split(
            Linear(3 * width, dtype=self.dtype, name="qkv", **XAVIER)(x), 3, axis=-1
        )
        y = attend(self, query, key, value, self.num_heads)
        if gates is not None:
            y = y * jnp.repeat(gates, self.head_size, axis=-1)[:, None].astype(y.dtype)
        return Linear(x.shape[-1], dtype=self.dtype, name="proj", **XAVIER)(y)


class GatedMlp(nn.Module):
    """DiT's MLP with so many channels, in groups that are each multiplied with a gate `[B, groups]`."""

    config: DyDiTConfig
    channels: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N C"], gates: Float[Array, "B groups"] | None, train: bool = False
    ) -> Float[Array, "B N C"]:
        config = self.config
        y = gelu_tanh(Linear(self.channels, dtype=config.dtype, name="fc1", **XAVIER)(x))
        if config.dropout > 0.0:
            y = nn.Dropout(config.dropout, deterministic=not train)(y)
        if gates is not None:
            size = self.channels // config.channel_groups
            y = y * jnp.repeat(gates, size, axis=-1)[:, None].astype(y.dtype)
        return Linear(x.shape[-1], dtype=config.dtype, name="fc2", **XAVIER)(y)


class DyDiTBlock(nn.Module):
    """DiT's block with some heads and channels; a part of the tokens goes through the MLP.

    Attributes:
        num_heads, channels: that its parameters have; None: those of the config.
    """

    config: DyDiTConfig
    num_heads: int | None = None
    channels: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N C"],
        c: Float[Array, "B C"],
        head_gates: Float[Array, "B heads"] | None = None,
        channel_gates: Float[Array, "B groups"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B N C"]:
        config = self.config
        size, dtype = config.hidden_size, config.dtype
        modulation = Linear(6 * size, dtype=dtype, name="adaLN_modulation_1", **ZERO)(silu(c))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.split(modulation, 6, axis=-1)
        attention = GatedAttention(
            self.num_heads or config.num_heads, size // config.num_heads, dtype, name="attn"
        )
        y = modulate(layer_norm(x, config.norm_eps), shift_msa, scale_msa)
        x = x + gate_msa[:, None, :] * attention(y, head_gates)
        mlp = GatedMlp(config, self.channels or config.hidden_channels, name="mlp")

        def after_mlp(x: Any) -> Any:
            y = modulate(layer_norm(x, config.norm_eps), shift_mlp, scale_mlp)
            return x + gate_mlp[:, None, :] * mlp(y, channel_gates, train)

        tokens = x.shape[1]
        through = math.ceil(config.token_capacity * tokens)
        if config.token_capacity == 1:
            return after_mlp(x)
        logits = TokenRouter(name="token_router")(x)
        which = top_tokens(logits, through)
        if head_gates is None:  # nothing is trained: the others are not computed
            return put_tokens(x, which, after_mlp(take_tokens(x, which)))
        chosen = jnp.zeros(logits.shape, bool).at[jnp.arange(len(x))[:, None], which].set(True)
        return pass_through(after_mlp(x), x, straight_through(logits, chosen)[..., None])


class DyDiT(TimeRoutedDiT):
    """DiT with dynamic width and tokens. Zhao et al. 2024, section 3.

    Its parameters are those of `DiT` and of the routers; with all gates open it computes what the DiT does.
    `training.DynamicRecipe` trains it, from a trained DiT; `models.fix_routers` then leaves out what is
    closed.

    >>> from jaxldm import models
    >>> dydit = models.build("tiny-dydit", token_capacity=0.5)
    """

    config: DyDiTConfig

    def block(self, **options: Any) -> DyDiTBlock:
        return DyDiTBlock(self.config, **options)

    def gates_of(self, logits: Float[Array, "G gates"]) -> Float[Array, "G gates"]:
        parts = [straight_through(part) for part in self.config.split(logits)]
        return jnp.concatenate(parts, axis=-1).reshape(logits.shape)

    def compute_share(self, gates: Float[Array, "G gates"]) -> Float[Array, " G"]:
        attention, mlp = self._costs()
        heads, channels = (part.mean(axis=(-2, -1)) for part in self.config.split(gates))
        through = math.ceil(self.config.token_capacity * self._tokens()) / self._tokens()
        return (attention * heads + mlp * through * channels) / (attention + mlp)

    def _tokens(self) -> int:
        return math.prod(self.config.grid_size)

    def _costs(self) -> tuple[int, int]:
        """Multiply-accumulates of one block's attention and of its MLP, all of which a gate can save."""
        tokens, size = self._tokens(), self.config.hidden_size
        return tokens * size * (4 * size + 2 * tokens), 2 * tokens * size * self.config.hidden_channels

    def gated(self, call: Any, h: Any, c: Any, gates: Any, train: bool) -> Any:
        heads, channels = self.config.split(gates)
        for number in range(self.config.depth):
            h = call(number)(h, c, heads[:, number], channels[:, number], train)
        return h

    def chosen(self, h: Any, c: Any, gates: Bool[np.ndarray, " gates"]) -> Any:
        for number, (heads, groups) in enumerate(zip(*self.config.split(gates), strict=True)):
            params = sliced_params(self.own(number), self.config, heads, groups)
            width = int(groups.sum()) * (self.config.hidden_channels // self.config.channel_groups)
            block = self.block(num_heads=int(heads.sum()), channels=width, parent=None)
            h = cast(Any, block.apply({"params": params}, h, c))
        return h


def sliced_params(
    params: Any, config: DyDiTConfig, heads: Bool[np.ndarray, " heads"], groups: Bool[np.ndarray, " groups"]
) -> Any:
    """The parameters of a block with these heads and groups of channels alone."""
    size, width = config.hidden_size, config.hidden_size // config.num_heads
    of_heads = np.tile(np.repeat(heads, width), 3)
    of_channels = np.repeat(groups, config.hidden_channels // config.channel_groups)
    attn, mlp = params["attn"], params["mlp"]
    return {
        **params,
        "attn": {
            "qkv": {name: _kept(value, of_heads, -1) for name, value in attn["qkv"].items()},
            "proj": {**attn["proj"], "kernel": _kept(attn["proj"]["kernel"], of_heads[:size], 0)},
        },
        "mlp": {
            "fc1": {name: _kept(value, of_channels, -1) for name, value in mlp["fc1"].items()},
            "fc2": {**mlp["fc2"], "kernel": _kept(mlp["fc2"]["kernel"], of_channels, 0)},
        },
    }


def _kept(x: Array, chosen: Bool[np.ndarray, " n"], axis: int) -> Array:
    """The chosen entries of an axis, as slices: a gather would be slower."""
    if chosen.all():
        return x
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(np.int8), [0]])))
    axis %= x.ndim
    before = (slice(None),) * axis
    runs = [x[(*before, slice(*map(int, run)))] for run in edges.reshape(-1, 2)]
    return runs[0] if len(runs) == 1 else jnp.concatenate(runs, axis)


PRESETS = {
    # The small DiT for 28x28 digits (`tiny-dit`) with routers.
    "tiny-dydit": DyDiTConfig(
        sample_size=28,
        patch_size=4,
        in_channels=1,
        hidden_size=128,
        depth=4,
        num_heads=4,
        num_classes=10,
        learn_sigma=False,
        channel_groups=8,
    ),
}
