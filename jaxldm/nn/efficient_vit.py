"""The blocks of EfficientViT: linear attention over several scales, and a gated convolution.

Cai et al. 2023, arXiv:2205.14756. Submodules are named as in diffusers.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.nn.activations import silu
from jaxldm.nn.attention import projections
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.linear import Linear
from jaxldm.nn.normalization import RMSNorm, RunningBatchNorm

EPS = 1e-15  # of the sum of weights in the attention


def channel_norm(kind: str, dtype: str, name: str) -> nn.Module:
    """ "rms_norm" over the channels of each pixel, or "batch_norm" with the statistics of training."""
    if kind == "rms_norm":
        return RMSNorm(1e-5, dtype, use_bias=True, name=name)
    return RunningBatchNorm(dtype, name=name)


class MultiscaleProjection(nn.Module):
    """Queries, keys and values gathered over a neighbourhood: depthwise, then one matrix a head."""

    num_heads: int
    kernel_size: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels, size = x.shape[-1], self.kernel_size
        options = {"dtype": self.dtype, "use_bias": False}
        h = Conv2d(channels, size, padding=size // 2, groups=channels, name="proj_in", **options)(x)
        return Conv2d(channels, 1, padding=0, groups=3 * self.num_heads, name="proj_out", **options)(h)


class MultiscaleLinearAttention(nn.Module):
    """x + norm(to_out(relu(Q) (relu(K)^T V) / (relu(Q) relu(K)^T 1))) over pixels. Cai et al. 2023, eq. 2.

    In float32, linear in the number of pixels. A head is each run of 3 `head_dim` channels of Q, K and V side
    by side, as published.
    """

    head_dim: int
    scales: tuple[int, ...] = (5,)
    norm: str = "rms_norm"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        heads = channels // self.head_dim
        inner = heads * self.head_dim
        rows = x.reshape(batch, height * width, channels)
        parts = projections(rows, ("to_q", "to_k", "to_v"), inner, use_bias=False, dtype=self.dtype)
        qkv = jnp.concatenate(parts, axis=-1).reshape(batch, height, width, 3 * inner)
        scaled = [
            MultiscaleProjection(heads, size, self.dtype, name=f"to_qkv_multiscale_{i}")(qkv)
            for i, size in enumerate(self.scales)
        ]
        joined = jnp.concatenate([qkv, *scaled], axis=-1).astype(jnp.float32)
        joined = joined.reshape(batch, height * width, -1, 3, self.head_dim)
        query, key = jax.nn.relu(joined[..., 0, :]), jax.nn.relu(joined[..., 1, :])
        state = jnp.einsum("bngk,bngv->bgkv", key, joined[..., 2, :], precision="highest")
        h = jnp.einsum("bngk,bgkv->bngv", query, state, precision="highest")
        weights = jnp.einsum("bngk,bgk->bng", query, key.sum(1), precision="highest")
        h = h / (weights[..., None] + EPS)
        h = h.reshape(batch, height, width, -1).astype(x.dtype)
        h = Linear(channels, False, self.dtype, name="to_out")(h)
        return x.astype(h.dtype) + channel_norm(self.norm, self.dtype, "norm_out")(h)


class GLUMBConv(nn.Module):
    """x + norm(conv_point(a silu(b))), (a, b) = depthwise(silu(conv_inverted(x))). Xie et al. 2024, SANA."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels, wide = x.shape[-1], 8 * x.shape[-1]
        h = silu(Conv2d(wide, 1, padding=0, dtype=self.dtype, name="conv_inverted")(x))
        h = Conv2d(wide, dtype=self.dtype, groups=wide, name="conv_depth")(h)
        value, gate = jnp.split(h, 2, axis=-1)
        h = Conv2d(channels, 1, padding=0, dtype=self.dtype, use_bias=False, name="conv_point")(
            value * silu(gate)
        )
        return x.astype(h.dtype) + channel_norm("rms_norm", self.dtype, "norm")(h)


class EfficientViTBlock(nn.Module):
    """Linear attention, then the gated convolution. `[B, H, W, C]` -> the same shape."""

    head_dim: int
    scales: tuple[int, ...] = (5,)
    norm: str = "rms_norm"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        attend = MultiscaleLinearAttention(self.head_dim, self.scales, self.norm, self.dtype, name="attn")
        return GLUMBConv(self.dtype, name="conv_out")(attend(x))
