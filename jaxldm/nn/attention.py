"""Scaled dot-product attention: one entry point for every model, chosen by platform in one place."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxldm.arguments import array, check_dims, checked, flag, number, optional
from jaxldm.errors import InvalidArgumentError
from jaxldm.nn.attention_kernels import explicit_attention, merged_mask
from jaxldm.nn.flash_attention import memory_efficient_attention
from jaxldm.nn.initialization import Initializer, fan_in_uniform, parameter
from jaxldm.nn.linear import Linear, compute_dtype, flat_matmul, product_dtype, quantized_matmul
from jaxldm.nn.normalization import GroupNorm
from jaxldm.nn.quantized import Quantized, observe_input
from jaxldm.nn.spatial_norm import SpatialNorm

_LARGEST_JOINED = 2**16  # numbers of one kernel
HEADS = array("floating", "[B, N, H, D]", axes=4)


@checked(
    query=HEADS,
    key=HEADS,
    value=HEADS,
    scale=optional(number()),
    bias=optional(array("floating", "[B, H, N, M]", axes=4)),
    mask=optional(array("any", "[B, H, N, M]", axes=4)),
    return_weights=flag,
)
def dot_product_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B M H D"],
    value: Float[Array, "B M H D"],
    *,
    scale: float | None = None,
    bias: Float[Array, "#B #H #N M"] | None = None,
    mask: Bool[Array, "#B #H #N M"] | None = None,
    causal: bool = False,
    key_lengths: Int[Array, " B"] | None = None,
    return_weights: bool = False,
) -> Float[Array, "B N H D"] | tuple[Float[Array, "B N H D"], Float[Array, "B H N M"]]:
    """softmax(Q K^T scale + bias) V for every head, the softmax in float32; by default scale = 1/sqrt(D).

    Vaswani et al. 2017, eq. 1. Two batched matrix products; where the matrix of logits is large, for chunks
    of queries, so that it never exists as a whole (only with `return_weights` it must). On NVIDIA a flash
    kernel in 16 bits: see `jaxldm.nn.flash_attention`.

    Args:
        query, key, value: `[B, N, H, D]` and `[B, M, H, D]`: N queries and M keys of H heads.
        scale: of the logits; None: 1/sqrt(D).
        bias: added to the logits, such as the relative positions of T5.
        mask: False where a query must not attend, such as padding. A row without any True attends to all
            keys equally.
        causal: query n attends to the keys up to n alone.
        key_lengths: how many keys count, from the first on, at least 1; a mask of keys with any other order
            costs more.
        return_weights: also return the softmax, float32 `[B, H, N, M]`, whose rows sum to 1 (the attention
            maps).
    """
    check_dims(query=(query, "B N H D"), key=(key, "B M H D"), value=(value, "B M H D"))
    logits = jax.ShapeDtypeStruct((query.shape[0], query.shape[2], query.shape[1], key.shape[1]), query.dtype)
    for name, extra in (("bias", bias), ("mask", mask)):
        if extra is not None:
            check_dims(**{"logits": (logits, "B H N M"), name: (extra, "#B #H #N M")})
    scale = cast(float, query.shape[-1] ** -0.5 if scale is None else scale)
    if return_weights:
        mask = merged_mask(mask, causal, key_lengths, query.shape[1], key.shape[1])
        return explicit_attention(query, key, value, scale, bias, mask)
    return memory_efficient_attention(query, key, value, scale, bias, mask, causal, key_lengths)


def attend(module: nn.Module, query, key, value, num_heads: int, **options: Any) -> Float[Array, "B N C"]:
    """Split `[B, N, C]` projections into heads, attend, and join the heads again.

    The options are those of `dot_product_attention`: scale, bias, mask, causal, key_lengths.

    With `mutable=["intermediates"]` the attention weights `[B, heads, N, M]` are sown under the module's path
    as `attention_weights`; without it they are never formed as a whole where they are many.
    """
    batch, _, channels = query.shape
    heads = [x.reshape(batch, x.shape[1], num_heads, channels // num_heads) for x in (query, key, value)]
    if module.is_mutable_collection("intermediates"):
        out, weights = dot_product_attention(*heads, return_weights=True, **options)
        module.sow("intermediates", "attention_weights", weights)
    else:
        out = cast(Array, dot_product_attention(*heads, **options))
    return out.reshape(batch, -1, channels)


class SelfAttention(nn.Module):
    """Multi-head self-attention, parameters `qkv` and `proj`. `[B, N, C]` -> the same shape.

    Attributes:
        head_dim: channels of each head; None: the heads share C.
    """

    num_heads: int
    dtype: str = "float32"
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None
    head_dim: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        channels = x.shape[-1]
        options = {"dtype": self.dtype, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        inner = channels if self.head_dim is None else self.num_heads * self.head_dim
        query, key, value = jnp.split(Linear(3 * inner, name="qkv", **options)(x), 3, axis=-1)
        return Linear(channels, name="proj", **options)(attend(self, query, key, value, self.num_heads))


class _Projection(nn.Module):
    """The parameters of a Linear layer, so that several of them can run as one matrix product."""

    features: int
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> tuple[Any, ...]:
        channels = x.shape[-1]
        init = fan_in_uniform(channels)
        observe_input(self, x)
        kernel = parameter(self, "kernel", init, (channels, self.features))
        return (kernel, parameter(self, "bias", init, (self.features,))) if self.use_bias else (kernel,)


def projections(
    x: Float[Array, "B N C"], names: Sequence[str], features: int, *, use_bias: bool, dtype: str
) -> list[Float[Array, "B N features"]]:
    """Linear maps of one input, one submodule per name. On a CPU small ones are one matrix product.

    Elsewhere, and where they are large, they stay several: joining their kernels copies them in every
    denoising step, and one of these products is work enough.

    Call it inside the compact method of the module that has them.
    """
    parts = [_Projection(features, use_bias, name=name)(x) for name in names]
    number = compute_dtype(dtype)

    wide = product_dtype(number)

    def project(kernel: Any, bias: Array | None = None) -> Array:
        if isinstance(kernel, Quantized):
            y = quantized_matmul(x.astype(number), kernel, wide)
        else:
            y = flat_matmul(x.astype(number).astype(wide), kernel.astype(number).astype(wide))
        y = y if bias is None else y + bias.astype(y.dtype).reshape(1, 1, -1)
        return y.astype(number)

    quantized = any(isinstance(kernel, Quantized) for kernel, *_ in parts)
    if jax.default_backend() != "cpu" or quantized or parts[0][0].size > _LARGEST_JOINED:
        return [project(*part) for part in parts]
    joined = (jnp.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    return jnp.split(project(*joined), len(names), axis=-1)


class ImagePrompts(NamedTuple):
    """Pictures as prompts, of one or several adapters (IP-Adapter, Ye et al. 2023).

    Attributes:
        tokens: of each adapter `[B, T, D]`, as wide as the states of the text.
        scales: `[B, adapters]`, how much each counts next to the text; 0 not at all.
    """

    tokens: tuple[Float[Array, "B _ D"], ...]
    scales: Float[Array, "B adapters"]


class TextAndImages(NamedTuple):
    """What cross-attention attends to with image prompts, in place of the states of a text alone."""

    text: Float[Array, "B T D"]
    images: ImagePrompts


Context = Float[Array, "B T D"] | TextAndImages


def with_images(text: Float[Array, "B T D"], images: ImagePrompts | None) -> Context:
    """The states of a text, with image prompts where there are any."""
    return text if images is None else TextAndImages(text, images)


def parts_of(context: Context) -> tuple[Float[Array, "B T D"], ImagePrompts | None]:
    """(the states of the text, the image prompts or None)."""
    return (context.text, context.images) if isinstance(context, TextAndImages) else (context, None)


class ImagePromptAttention(nn.Module):
    """The sum over adapters of scale softmax(Q K^T / sqrt(d)) V, K and V of image tokens.

    The decoupled cross-attention of Ye et al. 2023, eq. 5, which is added to that of the text. Parameters as
    in diffusers' attention processors: `to_k_ip_0`, `to_v_ip_0`, a pair for each adapter.
    """

    num_heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, query: Float[Array, "B N C"], images: ImagePrompts) -> Float[Array, "B N C"]:
        total = jnp.zeros_like(query)
        for i, tokens in enumerate(images.tokens):
            names = (f"to_k_ip_{i}", f"to_v_ip_{i}")
            key, value = projections(tokens, names, query.shape[-1], use_bias=False, dtype=self.dtype)
            h = attend(self, query, key, value, self.num_heads)
            total = total + images.scales[:, i, None, None].astype(h.dtype) * h
        return total


class CrossAttention(nn.Module):
    """to_out(softmax(Q K^T / sqrt(d)) V), Q from x and K, V from the context. `[B, N, C]` -> the same shape.

    Vaswani et al. 2017, section 3.2; without a context it is self-attention. Parameters as in diffusers'
    `Attention`: `to_q`, `to_k`, `to_v` (see `projections`; with a bias if `use_bias`), `to_out_0` (with one
    if `out_bias`).

    Attributes:
        identity: each token attends to itself alone: to_out(V). Parameters stay, those of Q and K unused
            (perturbed attention, Ahn et al. 2024, arXiv:2403.17377).
    """

    num_heads: int
    dtype: str = "float32"
    use_bias: bool = False
    out_bias: bool = True
    identity: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N C"],
        context: Float[Array, "B T D"] | None = None,
        mask: Shaped[Array, "B T"] | None = None,
        images: ImagePrompts | None = None,
    ) -> Float[Array, "B N C"]:
        """Attend to the context.

        Args:
            x: `[B, N, C]`, the queries.
            context: `[B, T, D]`, the keys and values; None means x itself.
            mask: `[B, T]`, nonzero for the tokens to attend to. A row of zeros attends to all equally.
            images: prompts that are attended to as well, see `ImagePromptAttention`; parameters `processor`.
        """
        channels = x.shape[-1]
        options = {"use_bias": self.use_bias, "dtype": self.dtype}
        out = functools.partial(Linear, channels, self.out_bias, self.dtype, name="to_out_0")
        if self.identity and context is None:
            return out()(*projections(x, ("to_v",), channels, **options))
        if context is None:
            query, key, value = projections(x, ("to_q", "to_k", "to_v"), channels, **options)
        else:
            (query,) = projections(x, ("to_q",), channels, **options)
            key, value = projections(context, ("to_k", "to_v"), channels, **options)
        allowed = None if mask is None else (mask != 0)[:, None, None, :]
        h = attend(self, query, key, value, self.num_heads, mask=allowed)
        if images is not None:
            h = h + ImagePromptAttention(self.num_heads, self.dtype, name="processor")(query, images)
        return out()(h)


class Attention2D(nn.Module):
    """x + to_out(attention(group_norm(x))) over the pixels. `[B, H, W, C]` -> the same shape.

    Ho et al. 2020, appendix B. Parameters as in diffusers' `Attention`: `group_norm`, `to_q`, `to_k`,
    `to_v`, `to_out_0`; with latents `[B, h, w, c]` a `spatial_norm` of them comes first.

    Attributes:
        head_dim: channels per head; None: one head.
        num_groups: of the group norm; None: no norm.
    """

    head_dim: int | None = None
    num_groups: int | None = 32
    eps: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], latents: Float[Array, "B h w c"] | None = None
    ) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        head_dim = self.head_dim or channels
        if channels % head_dim:
            raise InvalidArgumentError(f"{channels} channels cannot be split into heads of {head_dim}")
        h = x
        if latents is not None:
            h = SpatialNorm(dtype=self.dtype, name="spatial_norm")(h, latents)
        if self.num_groups is not None:
            h = GroupNorm(self.num_groups, self.eps, self.dtype, name="group_norm")(h)
        h = h.reshape(batch, height * width, channels)
        names = ("to_q", "to_k", "to_v")
        query, key, value = projections(h, names, channels, use_bias=True, dtype=self.dtype)
        h = attend(self, query, key, value, channels // head_dim)
        return x + Linear(channels, dtype=self.dtype, name="to_out_0")(h).reshape(x.shape)
