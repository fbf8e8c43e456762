"""Low-rank adapters (LoRA) as trees of their own: Hu et al. 2021, arXiv:2106.09685, eq. 3.

    W' = W + scale A B

with A `[in, r]` and B `[r, out]` in the layout of our kernels; a convolution of `[h, w, in, out]` has A
`[h, w, in, r]` and B `[1, 1, r, out]`, a stack of scanned blocks a leading axis of both. B begins with zeros,
so that the network is at first what it was. The optimizer is given the small tree alone, and the network's
own parameters lie in the `frozen` part of the state:

    def loss(lora, state, batch, key):
        params = models.apply_lora(state.frozen, lora, scale)
        ...

In the tree the factors stand at the place of the kernel, as `to_q/lora_A/kernel` and `to_q/lora_B/kernel`:
their published names are then those of PEFT, `to_q.lora_A.weight`, by the one rule of all parameters.
"""

from __future__ import annotations

import fnmatch
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import PRNGKeyArray

from jaxldm.arguments import a_params, array, checked, count, one_key, optional, refuse
from jaxldm.errors import InvalidArgumentError, shown
from jaxldm.nn.block_stack import STACK
from jaxldm.nn.quantized import Quantized, with_factors

Path: TypeAlias = tuple[str, ...]
DOWN, UP = ("lora_A", "kernel"), ("lora_B", "kernel")

# The projections of attention in every family: what LoRA was published for, and what most files change.
ATTENTION = (
    "*/to_[qkv]",
    "*/to_out_0",
    "*/add_[qkv]_proj",  # of the text, in SD3 and FLUX
    "*/to_add_out",
    "*/attn/qkv",  # DiT, SiT
    "*/attn/proj",
    "*/[qkv]_proj",  # CLIP, Qwen
    "*/out_proj",
    "*/o_proj",
    "*/SelfAttention/[qkvo]",  # T5
    "*/self/query",  # BERT
    "*/self/key",
    "*/self/value",
)


def some_targets(name: str, value: Any) -> tuple[str, ...]:
    """Patterns of layers, such as ("*/to_q", "*/to_v")."""
    if isinstance(value, str):
        raise refuse(name, "a list of patterns", value, f"[{value!r}]")
    fits = isinstance(value, Sequence) and all(isinstance(each, str) and each for each in value)
    if not fits or not value:
        raise refuse(name, 'patterns of layers such as ["*/to_q", "*/to_v"]', value)
    return tuple(value)


@checked(key=one_key, params=a_params, rank=count(1), targets=optional(some_targets))
def init_lora(
    key: PRNGKeyArray, params: Mapping[str, Any], rank: int = 8, targets: Sequence[str] | None = None
) -> dict[str, Any]:
    """The factors of a new adapter, float32: A uniform in +-1 / sqrt(fan-in), as in PEFT, and B zero.

    Args:
        key: draws A; each layer has its own draw, whatever the other targets are.
        params: of the network, or their shapes; works for every model here.
        rank: r.
        targets: patterns of the paths of layers, such as "mid_block/attentions_0/proj_in": `*` stands for
            anything, slashes too, `?` for a character, `[qkv]` for one of these; "*" for every layer. None:
            the projections of all attention layers (`ATTENTION`).

    Raises:
        InvalidArgumentError: a pattern that no layer has; a rank that none of the layers can have.

    >>> import jax
    >>> from jaxldm import models
    >>> shapes = models.shapes(models.build("tiny-dit"))
    >>> lora = init_lora(jax.random.key(0), shapes, rank=2, targets=["*/attn/qkv"])
    >>> {name: factor["kernel"].shape for name, factor in lora["blocks_0"]["attn"]["qkv"].items()}
    {'lora_A': (128, 2), 'lora_B': (2, 384)}
    """
    found = {path: _dimensions(path, shape) for path, shape in _targeted(params, targets).items()}
    largest = max(min(math.prod(own[:-1]), own[-1]) for _, own in found.values())
    if rank > largest:
        raise InvalidArgumentError(
            f"rank {rank} is more than the rank of every layer that it would change, {largest} at most: give "
            "a smaller one, such as 8"
        )
    factors: dict[Path, Any] = {}
    for path, (blocks, (*window, inputs, outputs)) in found.items():
        bound, of_layer = (
            1.0 / math.sqrt(math.prod((*window, inputs))),
            jax.random.fold_in(key, _number(path)),
        )
        factors[path + DOWN] = jax.random.uniform(
            of_layer, (*blocks, *window, inputs, rank), jnp.float32, -bound, bound
        )
        factors[path + UP] = jnp.zeros((*blocks, *(1 for _ in window), rank, outputs), jnp.float32)
    return traverse_util.unflatten_dict(factors)


@checked(params=a_params, lora=a_params, scale=array("real", axes=0))
def apply_lora(params: Mapping[str, Any], lora: Mapping[str, Any], scale: Any = 1.0) -> dict[str, Any]:
    """The parameters with an adapter in them, W + scale A B, each in its dtype: for use inside of a step.

    To a quantised kernel the factors are added as they are: it computes x W + scale (x A) B.

    Args:
        params: of the network.
        lora: of `init_lora`; only its layers change.
        scale: alpha / r, or what else the adapter is to be multiplied with; may be traced.

    Raises:
        InvalidArgumentError: the adapter has a layer that these parameters lack, or of another shape.
    """
    flat = cast(Any, traverse_util.flatten_dict(params))
    for path, (down, up) in lora_layers(lora).items():
        place = (*path, "kernel")
        if place not in flat:
            raise InvalidArgumentError(
                f"the adapter changes {'/'.join(path)}, which these parameters lack: it is of another network"
            )
        kernel = flat[place]
        if (*down.shape[:-1], up.shape[-1]) != tuple(kernel.shape):
            raise InvalidArgumentError(
                f"the adapter's change of {'/'.join(path)} is {[*down.shape[:-1], up.shape[-1]]}, and the "
                f"kernel {list(kernel.shape)}: it is of another network"
            )
        if isinstance(kernel, Quantized):
            wide = jnp.asarray(scale, jnp.float32) * down.astype(jnp.float32)
            flat[place] = with_factors(kernel, wide, up.astype(jnp.float32))
            continue
        change = jnp.matmul(down.astype(jnp.float32), up.astype(jnp.float32))
        whole = kernel.astype(jnp.float32) + jnp.asarray(scale, jnp.float32) * change
        flat[place] = whole.astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat)


def lora_layers(lora: Mapping[str, Any]) -> dict[Path, tuple[Any, Any]]:
    """{path of the layer: (A, B)} of a tree of `init_lora`. Raises `InvalidArgumentError` for another."""
    flat = cast(Any, traverse_util.flatten_dict(lora))
    layers = {path[:-2]: (leaf, flat.get(path[:-2] + UP)) for path, leaf in flat.items() if path[-2:] == DOWN}
    whole = [path for path, (_, up) in layers.items() if up is not None]
    if not whole or 2 * len(whole) != len(flat):
        raise InvalidArgumentError(
            "lora must be a tree of lora_A and lora_B at each layer, as models.init_lora(key, params) makes"
        )
    for path, (down, up) in layers.items():
        if down.ndim < 2 or down.ndim != up.ndim or down.shape[-1] != up.shape[-2]:
            raise InvalidArgumentError(
                f"lora: the factors of {'/'.join(path)}, {list(down.shape)} and {list(up.shape)}, do not fit "
                "together"
            )
    return layers


def _targeted(params: Mapping[str, Any], targets: Sequence[str] | None) -> dict[Path, tuple[int, ...]]:
    """{path of a layer: the shape of its kernel} of the layers that a pattern names."""
    kernels = {
        "/".join(path[:-1]): (path[:-1], tuple(leaf.shape))
        for path, leaf in cast(Any, traverse_util.flatten_dict(params)).items()
        if path[-1] == "kernel" and len(leaf.shape) >= 2
    }
    found: set[str] = set()
    for pattern in targets or ATTENTION:
        matching = fnmatch.filter(kernels, pattern)
        if not matching and targets:
            raise InvalidArgumentError(_no_such_layer(shown(pattern), list(kernels)))
        found.update(matching)
    if not found:
        few = ", ".join(list(kernels)[:2]) or "none"
        raise InvalidArgumentError(
            "no layer is a projection of attention, which an adapter changes where nothing else is said: "
            f"give targets, patterns of whole paths in which * stands for anything; here {few}"
        )
    return {path: shape for name, (path, shape) in kernels.items() if name in found}


def _no_such_layer(wanted: str, names: Sequence[str]) -> str:
    examples = [name for name in names if any(fnmatch.fnmatch(name, each) for each in ATTENTION)] or names
    few = ", ".join(examples[:2]) or "none"
    return f"no layer is named {wanted}: targets are whole paths, in which * stands for anything; here {few}"


def _dimensions(path: Path, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(blocks of a scan, the kernel of one of them)."""
    stacked = any(map(STACK.fullmatch, path))
    return shape[:stacked], shape[stacked:]


def _number(path: Path) -> int:
    """A number for a path that is the same in every process."""
    return zlib.crc32("/".join(path).encode())
