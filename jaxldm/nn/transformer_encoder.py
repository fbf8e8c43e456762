"""Self-attention and encoder layers of the text and image encoders, named as in their checkpoints."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from jaxldm.nn.activations import ACTIVATIONS, silu
from jaxldm.nn.attention import attend
from jaxldm.nn.initialization import Initializer, normal, zeros
from jaxldm.nn.linear import Linear
from jaxldm.nn.normalization import LayerNorm


class ProjectedAttention(nn.Module):
    """Multi-head self-attention by projections of any names. x `[B, N, C]` -> the same shape.

    The options of the call are those of `dot_product_attention`: scale, bias, mask, causal.

    Attributes:
        names: of the projections to query, key and value and, unless another module has it, of the output.
        kernel_inits: initializers of their kernels; biases start at 0.
    """

    names: tuple[str, ...]
    num_heads: int
    dtype: str = "float32"
    kernel_inits: tuple[Initializer | None, ...] = (None,) * 4

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], **options: Any) -> Float[Array, "B N C"]:
        query, key, value, *output = (
            Linear(x.shape[-1], dtype=self.dtype, kernel_init=init, bias_init=zeros, name=name)
            for name, init in zip(self.names, self.kernel_inits, strict=False)
        )
        h = attend(self, query(x), key(x), value(x), self.num_heads, **options)
        return output[0](h) if output else h


class MLP(nn.Module):
    """fc2(act(fc1(x))). `[B, N, C]` -> the same shape."""

    features: int
    act: str
    dtype: str = "float32"
    kernel_inits: tuple[Initializer | None, Initializer | None] = (None, None)

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        up, down = self.kernel_inits
        h = Linear(self.features, dtype=self.dtype, kernel_init=up, bias_init=zeros, name="fc1")(x)
        options = {"dtype": self.dtype, "kernel_init": down, "bias_init": zeros}
        return Linear(x.shape[-1], **options, name="fc2")(ACTIVATIONS[self.act](h))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) up(x)), all without biases. `[B, N, C]` -> the same shape.

    Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.

    Attributes:
        names: of the layers gate, up and down.
        output_dtype: dtype of the result, where it must be wider than `dtype`.
    """

    features: int
    names: tuple[str, str, str]
    dtype: str = "float32"
    kernel_init: Initializer | None = None
    output_dtype: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        gate, up, down = self.names
        options = {"use_bias": False, "dtype": self.dtype, "kernel_init": self.kernel_init}
        h = silu(Linear(self.features, **options, name=gate)(x))
        h = h * Linear(self.features, **options, name=up)(x)
        return Linear(x.shape[-1], **options, output_dtype=self.output_dtype, name=down)(h)


class PreNormLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Radford et al. 2021, section 2.4. `[B, N, C]`.

    The options of the call are those of `dot_product_attention`: mask, causal.
    """

    num_heads: int
    mlp_features: int
    num_layers: int  # of the whole encoder: the more, the smaller are the initial values
    act: str = "quick_gelu"
    eps: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], **masks: Any) -> Float[Array, "B N C"]:
        width = x.shape[-1] ** -0.5
        deep = normal(width * (2 * self.num_layers) ** -0.5)
        attention = ProjectedAttention(
            ("q_proj", "k_proj", "v_proj", "out_proj"),
            self.num_heads,
            dtype=self.dtype,
            kernel_inits=(deep, deep, deep, normal(width)),
            name="self_attn",
        )
        x = x + attention(LayerNorm(self.eps, self.dtype, name="layer_norm1")(x), **masks)
        kernel_inits = (normal(width * 2**-0.5), deep)
        mlp = MLP(self.mlp_features, self.act, self.dtype, kernel_inits, name="mlp")
        return x + mlp(LayerNorm(self.eps, self.dtype, name="layer_norm2")(x))


class PreNormEncoder(nn.Module):
    """`num_layers` pre-norm layers, as in both towers of CLIP. `[B, N, C]` -> all states, the input first.

    The options of the call are those of `dot_product_attention`: mask, causal.
    """

    num_layers: int
    num_heads: int
    mlp_features: int
    act: str = "quick_gelu"
    eps: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], **masks: Any) -> tuple[Float[Array, "B N C"], ...]:
        states = [x]
        for index in range(self.num_layers):
            layer = PreNormLayer(
                self.num_heads,
                self.mlp_features,
                self.num_layers,
                self.act,
                self.eps,
                self.dtype,
                name=f"layers_{index}",
            )
            states.append(layer(states[-1], **masks))
        return tuple(states)
