"""Timesteps, labels, positions and patches as vectors."""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from jaxldm.arguments import array, checked, count, flag, number, optional
from jaxldm.errors import InvalidArgumentError
from jaxldm.memory import check_fits
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.initialization import Initializer, normal, parameter, xavier_uniform, zeros
from jaxldm.nn.linear import Linear, compute_dtype, flat_matmul, product_dtype


@checked(
    t=array("real", "[B]", axes=1),
    dim=count(3, 2**16),
    flip_sin_to_cos=flag,
    downscale_freq_shift=number(),
    max_period=number(above=0),
)
def timestep_embedding(
    t: Num[Array, " B"],
    dim: int,
    *,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1.0,
    max_period: float = 10000.0,
) -> Float[Array, "B dim"]:
    """[sin(t w_k), cos(t w_k)], w_k = max_period^(-k / (dim/2 - downscale_freq_shift)), in float32.

    Vaswani et al. 2017, section 3.5, as DDPM uses it. Implementations differ in two ways, both named here:
    `flip_sin_to_cos` puts the cosines first, `downscale_freq_shift` is 1 in DDPM and 0 in Stable Diffusion
    and DiT. An odd `dim` ends with a zero. `t` may be fractional.
    """
    half = dim // 2
    frequencies = np.exp(-math.log(max_period) * np.arange(half) / (half - downscale_freq_shift)).astype(
        np.float32
    )
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    embedding = jnp.concatenate(parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, 1))) if dim % 2 else embedding


@checked(w=array("real", "[B]", axes=1), dim=count(4, 2**16))
def guidance_embedding(w: Float[Array, " B"], dim: int = 256) -> Float[Array, "B dim"]:
    """Embedding of the guidance scale for a guidance-distilled network: sines, then cosines, of 1000 w w_k.

    Luo et al. 2023 (LCM), section 4.3, after Kingma et al. 2021 (VDM): w_k = 10000^(-k / (dim/2 - 1)). In the
    teacher's prediction w multiplies cond - uncond on top of cond, so w = guidance_scale - 1.

    >>> import jax.numpy as jnp
    >>> guidance_embedding(jnp.array([7.5 - 1.0])).shape
    (1, 256)
    """
    return timestep_embedding(1000.0 * w, dim, flip_sin_to_cos=False, downscale_freq_shift=1.0)


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, Linear: `[B, in]` -> `[B, dim]`, submodules `linear_1` and `linear_2` as in diffusers.

    A second vector `condition` `[B, D]` enters through `cond_proj`, a linear map without bias that is added
    to x: the guidance of LCM. It starts at zero, so that a student with it begins as its teacher.

    Attributes:
        hidden_dim: width in between; None: dim.
        names: of the two layers, where a checkpoint has others.
        act: a name in `ACTIVATIONS`, in place of SiLU.
        begins_at_zero: the second layer starts at zero: for an input that is added to a trained network.
    """

    dim: int
    dtype: str = "float32"
    use_bias: bool = True
    hidden_dim: int | None = None
    names: tuple[str, str] = ("linear_1", "linear_2")
    act: str = "silu"
    begins_at_zero: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B in"], condition: Float[Array, "B D"] | None = None
    ) -> Float[Array, "B dim"]:
        if condition is not None:
            project = Linear(
                x.shape[-1], use_bias=False, dtype=self.dtype, kernel_init=zeros, name="cond_proj"
            )
            x = x.astype(compute_dtype(self.dtype)) + project(condition)
        hidden, (first, second) = self.hidden_dim or self.dim, self.names
        x = ACTIVATIONS[self.act](Linear(hidden, self.use_bias, self.dtype, name=first)(x))
        start = zeros if self.begins_at_zero else None
        return Linear(self.dim, self.use_bias, self.dtype, start, start, name=second)(x)


class GaussianFourier(nn.Module):
    """[cos(2 pi w_k t), sin(2 pi w_k t)] of drawn frequencies w, `[B]` -> `[B, dim]` (Tancik et al. 2020).

    Attributes:
        cosines_first: or else the sines.
        scale: standard deviation of the frequencies.
    """

    dim: int
    cosines_first: bool
    scale: float = 1.0

    @nn.compact
    def __call__(self, t: Float[Array, " B"]) -> Float[Array, "B dim"]:
        weight = parameter(self, "weight", normal(self.scale), (self.dim // 2,)).astype(jnp.float32)
        angles = t.astype(jnp.float32)[:, None] * weight[None, :] * np.float32(2 * np.pi)
        parts = (jnp.cos(angles), jnp.sin(angles))
        return jnp.concatenate(parts if self.cosines_first else parts[::-1], axis=-1)


class TextProjection(nn.Module):
    """linear_2(act(linear_1(x))), a text's vectors at the network's width: `[..., in]` -> `[..., dim]`.

    Attributes:
        act: "gelu_pytorch_tanh" for the hidden states of a text (PixArt), "silu" for a pooled text (SD3,
            FLUX).
    """

    dim: int
    act: str = "gelu_pytorch_tanh"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... dim"]:
        x = ACTIVATIONS[self.act](Linear(self.dim, dtype=self.dtype, name="linear_1")(x))
        return Linear(self.dim, dtype=self.dtype, name="linear_2")(x)


class TimestepTextEmbedding(nn.Module):
    """The condition of the blocks of SD3 and FLUX: embeddings of t and the pooled text, added. `[B, dim]`.

    Esser et al. 2024, figure 2a. Parts: `timestep_embedder`, `text_embedder` and, for a guidance-distilled
    network (FLUX.1-dev), `guidance_embedder`. The sinusoids are 256 wide, cosines first.
    """

    dim: int
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, t: Float[Array, " B"], pooled: Float[Array, "B P"], guidance: Float[Array, " B"] | None = None
    ) -> Float[Array, "B dim"]:
        """Embed t, the pooled text and the guidance.

        Args:
            t: `[B]`, from 0 to 1000.
            pooled: `[B, P]`.
            guidance: `[B]`, 1000 times the scale; None for a network without it.
        """

        def of_number(value: Array, name: str) -> Array:
            wave = timestep_embedding(value, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
            return TimestepEmbedding(self.dim, self.dtype, name=name)(wave)

        embedding = of_number(t, "timestep_embedder")
        if guidance is not None:
            embedding = embedding + of_number(guidance, "guidance_embedder")
        return embedding + TextProjection(self.dim, "silu", self.dtype, name="text_embedder")(pooled)


@checked(
    dim=count(4, 2**16),
    height=count(1),
    width=count(1),
    base_size=optional(count(1)),
    interpolation_scale=number(above=0),
)
def sincos_position_embedding_2d(
    dim: int,
    height: int,
    width: int,
    *,
    base_size: int | None = None,
    interpolation_scale: float = 1.0,
) -> Float[np.ndarray, "N dim"]:
    """Fixed 2-D position embedding, float32 `[height * width, dim]`, row by row.

    The first half of the channels encodes the column, the second half the row; each is
    [sin(p w_k), cos(p w_k)] with w_k = 10000^(-4k/dim). As in MAE (He et al. 2022) and DiT, whose tables put
    the column first.

    Args:
        dim: channels, a multiple of 4.
        height, width: of the grid.
        base_size: positions along an axis of n are stretched to base_size, p = i base_size / n, so that grids
            of any size share one range (PixArt, SD3); None: p = i.
        interpolation_scale: divides the positions. Chen et al. 2024 (PixArt-Sigma), section 3.3.

    Raises:
        InvalidArgumentError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise InvalidArgumentError(f"sin-cos positions need a width that is a multiple of 4, not {dim}")
    what = f"positions of a grid of {height}x{width}, {dim} numbers each, need"
    check_fits(8 * dim * height * width, what, "take a smaller image")
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))

    def along(count: int) -> np.ndarray:
        return np.arange(count) * ((base_size or count) / count / interpolation_scale)

    rows, columns = np.meshgrid(along(height), along(width), indexing="ij")

    def one_axis(positions: np.ndarray) -> np.ndarray:
        angles = positions.reshape(-1, 1) * frequencies[None, :]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    return np.concatenate([one_axis(columns), one_axis(rows)], axis=1).astype(np.float32)


@checked(images=array("real", "[B, H, W, C]", axes=4), patch_size=count(1))
def patchify(
    images: Float[Array, "B H W C"], patch_size: int
) -> Float[Array, "B N {patch_size}*{patch_size}*C"]:
    """Cut images into patches, row by row; `unpatchify` is its exact inverse.

    Token i W/p + j holds the pixels (i p + a, j p + b), channel c at position (a p + b) C + c. Peebles &
    Xie 2023, section 3.2.

    Raises:
        InvalidArgumentError: H or W is not a multiple of `patch_size`.
    """
    batch, height, width, channels = images.shape
    p = patch_size
    if height % p or width % p:
        raise InvalidArgumentError(f"images of {height}x{width} cannot be cut into whole {p}x{p} patches")
    x = images.reshape(batch, height // p, p, width // p, p, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, (height // p) * (width // p), p * p * channels)


@checked(tokens=array("real", "[B, N, D]", axes=3), patch_size=count(1), height=count(1), width=count(1))
def unpatchify(
    tokens: Float[Array, "B N D"], patch_size: int, height: int, width: int
) -> Float[Array, "B {height} {width} C"]:
    """Put patches together to images of `height` x `width`: the inverse of `patchify`.

    Raises:
        InvalidArgumentError: the number of tokens does not fit the size.
    """
    batch, num_tokens, features = tokens.shape
    p = patch_size
    if height % p or width % p or num_tokens != (height // p) * (width // p) or features % (p * p):
        raise InvalidArgumentError(
            f"{num_tokens} tokens of {features} numbers are not {p}x{p} patches of a {height}x{width} image"
        )
    x = tokens.reshape(batch, height // p, width // p, p, p, features // (p * p)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height, width, features // (p * p))


class PatchProjection(nn.Module):
    """A convolution of p x p patches as one matrix product: `[B, H, W, C]` -> `[B, N, features]`.

    The parameter is the convolution kernel `[p, p, C, features]`, so that checkpoints convert it as any
    convolution.
    """

    features: int
    patch_size: int
    dtype: str = "float32"
    use_bias: bool = True
    kernel_init: Initializer = xavier_uniform

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B N features"]:
        dtype = compute_dtype(self.dtype)
        p = self.patch_size
        shape = (p, p, images.shape[-1], self.features)
        wide = product_dtype(dtype)
        kernel = parameter(self, "kernel", self.kernel_init, shape).astype(dtype).astype(wide)
        patches = patchify(images.astype(dtype).astype(wide), p)
        tokens = flat_matmul(patches, kernel.reshape(-1, self.features))
        if self.use_bias:
            tokens = tokens + parameter(self, "bias", zeros, (self.features,)).astype(wide).reshape(1, 1, -1)
        return tokens.astype(dtype)
