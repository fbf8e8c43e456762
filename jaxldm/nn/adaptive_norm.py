"""Adaptive layer norm: scales, shifts and gates of a block, computed from the time and the condition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.arguments import array, check_dims, checked
from jaxldm.nn.activations import silu
from jaxldm.nn.initialization import zeros
from jaxldm.nn.linear import Linear
from jaxldm.nn.normalization import layer_norm, modulate

ZERO: dict[str, Any] = {"kernel_init": zeros, "bias_init": zeros}


class Modulation(nn.Module):
    """`count` vectors as wide as c, linear in silu(c): c `[B, C]` -> `count` arrays `[B, features]`.

    Peebles & Xie 2023, section 3.2 (adaLN-Zero): the linear map starts at zero, and scales, shifts and gates
    with it. All adaptive norms of diffusers have this map, under the same name `linear`:

    | in diffusers | vectors, in their order |
    |---|---|
    | `AdaLayerNormZero` | shift, scale, gate; shift, scale, gate of the feed-forward |
    | `SD35AdaLayerNormZeroX` | the same; shift, scale, gate of the second attention |
    | `AdaLayerNormZeroSingle` | shift, scale, gate |
    | `AdaLayerNormContinuous` | scale, shift: see the class of that name |

    Attributes:
        features: width of each vector; None: that of c.
        use_bias: of the linear map.
    """

    count: int
    dtype: str = "float32"
    features: int | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, c: Float[Array, "B C"]) -> list[Float[Array, "B features"]]:
        features = self.features or c.shape[-1]
        linear = Linear(self.count * features, self.use_bias, self.dtype, **ZERO, name="linear")
        vectors = linear(silu(c))
        return jnp.split(vectors, self.count, axis=-1)


class AdaLayerNormContinuous(nn.Module):
    """layer_norm(x) (1 + scale) + shift with (scale, shift) linear in silu(c): x `[B, N, C]`, c `[B, D]`.

    The norm before the last layer, and of a text that no later block uses. Unlike in the blocks, the scale
    comes first in the published tensor.

    Attributes:
        learned: a norm with parameters, such as `RMSNorm` (aMUSEd), in place of the one without; its
            submodule is called `norm`.
        use_bias: of the linear map.
    """

    eps: float = 1e-6
    dtype: str = "float32"
    learned: Callable[..., nn.Module] | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], c: Float[Array, "B D"]) -> Float[Array, "B N C"]:
        both = Linear(2 * x.shape[-1], self.use_bias, self.dtype, **ZERO, name="linear")(silu(c))
        scale, shift = jnp.split(both, 2, axis=-1)
        if self.learned is None:
            normed = layer_norm(x, self.eps)
        else:
            normed = self.learned(eps=self.eps, dtype=self.dtype, name="norm")(x)
        return modulate(normed, shift, scale)


@checked(x=array("floating", "[B, N, C]", axes=3), gate=array("floating", "[B, C]", axes=2))
def gated(x: Float[Array, "B N C"], gate: Float[Array, "B C"]) -> Float[Array, "B N C"]:
    """x gate, the same for every token of an example: the output of a branch in adaLN-Zero."""
    check_dims(x=(x, "#B N C"), gate=(gate, "#B C"))
    return x * gate[:, None, :]
