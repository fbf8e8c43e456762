"""Structured pruning of DiT and SiT: attention heads and channels of the MLPs, as pure functions.

    found = pruning.importance(module, params, loss, times)      # a number for each head and channel
    keep = pruning.mask(found, heads=0.5, channels=0.5)          # which of them stay
    params = pruning.masked(module, params, keep)                # the others are zero, and stay zero
    module, params = pruning.sliced(module, params, keep)        # the same function, a smaller network

Every block keeps the same numbers of heads and channels, each its own best ones: then a plain config says how
large the network is, the blocks are still one scan, and what is pruned is read, trained and drawn with as any
other network. Counts of each block's own would gain little where blocks are alike, and need it all again.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Bool, Float, Int

from jaxldm.arguments import a_module, a_params, array, checked, function, instance, number
from jaxldm.errors import InvalidArgumentError, shown
from jaxldm.models.dit import DiT, DiTConfig
from jaxldm.models.quantization import refuse_quantized
from jaxldm.models.sit import SiTConfig

Path: TypeAlias = tuple[str, ...]
__all__ = ["Units", "importance", "mask", "masked", "sliced", "unit_counts"]
_BLOCK = re.compile(r"blocks_(\d+)(to(\d+))?")


class Units(NamedTuple):
    """A number, or whether it stays, for each unit of L blocks that can be pruned.

    Attributes:
        heads: [L, H].
        channels: [L, M], those between the two layers of the MLP.
    """

    heads: Any
    channels: Any


class Place(NamedTuple):
    """Where the units of a parameter are.

    Attributes:
        of: the field of `Units`.
        axis: which axis has them.
        parts: how often all units follow one another along it: queries, keys, values.
    """

    of: str
    axis: int
    parts: int = 1


# Every parameter that belongs to a unit. Without the unit its output is that of the others: `proj` and `fc2`
# add up what units make of what they are given.
PLACES: dict[Path, Place] = {
    ("attn", "qkv", "kernel"): Place("heads", -1, 3),
    ("attn", "qkv", "bias"): Place("heads", -1, 3),
    ("attn", "proj", "kernel"): Place("heads", -2),
    ("mlp", "fc1", "kernel"): Place("channels", -1),
    ("mlp", "fc1", "bias"): Place("channels", -1),
    ("mlp", "fc2", "kernel"): Place("channels", -2),
}

SOME_UNITS = instance(Units, "what pruning.importance or pruning.mask returns")


@checked(
    module=a_module,
    params=a_params,
    loss=function("(params, t) -> loss"),
    times=array("real", "[T]", axes=1, filled=True),
)
def importance(
    module: nn.Module,
    params: Mapping[str, Any],
    loss: Callable[[Any, Any], Float[Array, ""]],
    times: Float[Array, " T"],
) -> Units:
    """How much the loss depends on each unit: the sum of |w dloss/dw| over its parameters, averaged over t.

    The first term of Taylor's expansion of the loss around the parameters, were they zero (Molchanov et al.
    2019, arXiv:1906.10771), at evenly spaced times, because a network of diffusion does other work at each
    (Fang et al. 2023, arXiv:2305.10924).

    Args:
        module: a DiT or SiT.
        params: its parameters.
        loss: (params, t) -> the loss at time t, a scalar, over the same examples for each t.
        times: evenly spaced, in the units of `loss`.

    Returns:
        `Units` of floats.

    Raises:
        InvalidArgumentError: another network, or one that is quantised.
    """
    check_can_prune(module, params)

    def at(params: Any, t: Any) -> Units:
        products = jax.tree.map(lambda w, g: jnp.abs(w * g), params, jax.grad(loss)(params, t))
        sums: dict[str, list[Any]] = {"heads": [], "channels": []}
        for part in _parts(module, products):
            found: dict[str, Any] = dict.fromkeys(sums, 0.0)
            for place, units in part.units():
                found[place.of] += jnp.sum(units, axis=(1, 2, 4))
            for name, total in found.items():
                sums[name].append(total)
        return Units(**{name: jnp.concatenate(found) for name, found in sums.items()})

    run = jax.jit(lambda params, times: jax.lax.map(lambda t: at(params, t), times))
    return jax.tree.map(lambda found: jnp.mean(found, axis=0), run(dict(params), jnp.asarray(times)))


@checked(importance=SOME_UNITS, heads=number(0, 1), channels=number(0, 1))
def mask(importance: Units, heads: float = 1.0, channels: float = 1.0) -> Units:
    """The units that stay: in each block the most important ones, the same number in all blocks.

    Args:
        importance: of `importance`; any finite numbers.
        heads, channels: the share that stays, rounded to whole units.

    Returns:
        `Units` of booleans.

    Raises:
        InvalidArgumentError: a share outside 0 to 1, or so small that none is left.

    >>> mask(Units(np.array([[1.0, 3.0, 2.0, 0.0]]), np.ones((1, 8))), heads=0.5).heads
    array([[False,  True,  True, False]])
    """
    return Units(
        *(
            _most(np.asarray(values), share, name)
            for name, values, share in zip(Units._fields, importance, (heads, channels), strict=True)
        )
    )


def _most(values: Float[np.ndarray, "L U"], share: float, name: str) -> Bool[np.ndarray, "L U"]:
    """True where the values of a row are among its largest."""
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise InvalidArgumentError(
            f"the importance of the {name} must be numbers [L, units], one for each unit of L blocks, got "
            f"{shown(values)}: pruning.importance gives them"
        )
    total = values.shape[-1]
    count = math.floor(share * total + 0.5)
    if count < 1:
        raise InvalidArgumentError(
            f"{name}={share:g} keeps none of the {total} {name} of a block: keep {1 / total:.2g} or more"
        )
    if not np.isfinite(values).all():
        raise InvalidArgumentError(
            f"the importance of the {name} has numbers that are not finite: the loss is not finite somewhere"
        )
    rank = np.argsort(np.argsort(-values, axis=-1, kind="stable"), axis=-1, kind="stable")
    return rank < count


@checked(module=a_module, params=a_params, keep=SOME_UNITS)
def masked(module: nn.Module, params: Mapping[str, Any], keep: Units) -> dict[str, Any]:
    """The parameters with those of the other units at zero: what the network does without these.

    Under a gradient the zeros get none: a loss of `masked(module, params, keep)` trains the rest alone.

    Raises:
        InvalidArgumentError: another network, units of another one, or numbers in place of booleans.
    """
    _check_units(module, params, keep)

    def zeroed(units: Array, stays: Any) -> Array:
        return units * jnp.asarray(stays, units.dtype)[:, None, None, :, None]

    return _changed(module, params, keep, zeroed)


@checked(module=a_module, params=a_params, keep=SOME_UNITS)
def sliced(module: nn.Module, params: Mapping[str, Any], keep: Units) -> tuple[DiT, dict[str, Any]]:
    """The network without the other units: (module, parameters), the same function as with them at zero.

    Its config has fewer heads, of as many channels each (`head_dim`), and a smaller `mlp_ratio`.

    Raises:
        InvalidArgumentError: another network, units of another one; blocks of which none stays, or not as
            many as in the others.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import models
    >>> dit = models.build("tiny-dit", depth=1)
    >>> ones = Units(np.ones((1, 4)), np.ones((1, 512)))
    >>> smaller, params = sliced(dit, models.init(dit, jax.random.key(0)), mask(ones, 0.5, 0.25))
    >>> smaller.config.num_heads, smaller.config.head_dim, smaller.config.mlp_ratio
    (2, 32, 1.0)
    """
    _check_units(module, params, keep)
    config: Any = cast(Any, module).config
    counts = Units(*(_one_count(np.asarray(stays), name) for name, stays in keep._asdict().items()))
    which = Units(
        *(
            np.stack([np.flatnonzero(row) for row in np.asarray(stays)]).reshape(len(stays), count)
            for stays, count in zip(keep, counts, strict=True)
        )
    )

    def taken(units: Array, index: Any) -> Array:
        return jnp.take_along_axis(units, jnp.asarray(index)[:, None, None, :, None], axis=3)

    head_dim = _head_dim(config)
    whole = counts.heads * head_dim == config.hidden_size
    changes = {"num_heads": counts.heads, "head_dim": None if whole else head_dim}
    changes["mlp_ratio"] = _ratio(counts.channels, config.hidden_size)
    smaller = type(cast(Any, module))(dataclasses.replace(config, **changes))
    return smaller, _changed(module, params, which, taken)


def check_can_prune(module: Any, params: Any) -> None:
    """Raises `InvalidArgumentError` for networks that cannot be pruned, and parameters in fewer bits."""
    # Networks that are made of a DiT have further parts that belong to its heads and channels.
    if type(getattr(module, "config", None)) not in (DiTConfig, SiTConfig):
        raise InvalidArgumentError(
            f"pruning is for DiT and SiT, whose configs can say how many heads are left, not for a "
            f"{type(module).__name__}"
        )
    refuse_quantized(params, "pruning")


@checked(module=a_module)
def unit_counts(module: nn.Module) -> Units:
    """(L, H) and (L, M): the shapes of a network's `Units`.

    Raises:
        InvalidArgumentError: another network than DiT and SiT.
    """
    check_can_prune(module, {})
    config = cast(Any, module).config
    return Units((config.depth, config.num_heads), (config.depth, _channels(config)))


def _check_units(module: Any, params: Any, keep: Units) -> None:
    check_can_prune(module, params)
    for name, wanted in unit_counts(module)._asdict().items():
        shape = tuple(np.shape(getattr(keep, name)))
        if shape != wanted:
            raise InvalidArgumentError(
                f"the {name} of keep must be {list(wanted)}, those of {wanted[0]} blocks, got {list(shape)}"
            )
        kind = jnp.result_type(getattr(keep, name))
        if kind != jnp.bool_:
            raise InvalidArgumentError(
                f"the {name} of keep must be True where a unit stays, got {kind}: write "
                "pruning.mask(importance, heads=0.5, channels=0.5)"
            )


def _one_count(stays: Bool[np.ndarray, "L U"], name: str) -> int:
    """How many units stay in every block."""
    found = sorted({int(count) for count in np.sum(stays.astype(bool), axis=-1)})
    if len(found) != 1 or found[0] < 1:
        raise InvalidArgumentError(
            f"keep must leave the same number of {name} in each block, 1 or more, got {found}: "
            "pruning.mask does"
        )
    return found[0]


def _head_dim(config: DiTConfig) -> int:
    return config.hidden_size // config.num_heads if config.head_dim is None else config.head_dim


def _channels(config: DiTConfig) -> int:
    return int(config.hidden_size * config.mlp_ratio)


def _ratio(channels: int, hidden_size: int) -> float:
    """The `mlp_ratio` of exactly so many channels, where a division of floats may fall short by one."""
    ratio = channels / hidden_size
    return ratio if int(hidden_size * ratio) == channels else math.nextafter(ratio, math.inf)


class _Part(NamedTuple):
    """Blocks of a network as one stack: their name, their number of the first, and their parameters.

    Attributes:
        params: {path within a block: [n, ...]}.
        units_of: the number of units, by field.
    """

    name: str
    first: int
    last: int
    params: dict[Path, Any]
    units_of: Mapping[str, int]

    def units(self) -> Iterator[tuple[Place, Array]]:
        """Each parameter of units as [n, others, parts, units, width]."""
        for path, place in PLACES.items():
            yield place, _opened(self.params[path], place, self.units_of[place.of])


def _parts(module: Any, params: Mapping[str, Any]) -> list[_Part]:
    """The blocks, alone or in the stacks of scans, from the first to the last."""
    units = {name: shape[1] for name, shape in unit_counts(module)._asdict().items()}
    parts = []
    for name, tree in params.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            continue
        flat = cast(dict[Path, Any], traverse_util.flatten_dict(tree))
        first = int(match[1])
        last = first if match[3] is None else int(match[3])
        if match[2] is None:
            flat = {path: jnp.asarray(leaf)[None] for path, leaf in flat.items()}
        parts.append(_Part(name, first, last, flat, units))
    return sorted(parts, key=lambda part: part.first)


def _opened(leaf: Any, place: Place, count: int) -> Array:
    """[n, ...] -> [n, others, parts, units, width]."""
    moved = jnp.moveaxis(jnp.asarray(leaf), place.axis, -1)
    return moved.reshape(moved.shape[0], -1, place.parts, count, moved.shape[-1] // (place.parts * count))


def _closed(units: Array, like: Any, place: Place) -> Array:
    """The inverse of `_opened`, with as many units as there are."""
    before = jnp.moveaxis(jnp.asarray(like), place.axis, -1).shape[:-1]
    return jnp.moveaxis(units.reshape(*before, -1), -1, place.axis)


def _changed(
    module: Any,
    params: Mapping[str, Any],
    keep: Units,
    change: Callable[[Array, Bool[Any, "n U"] | Int[Any, "n k"]], Array],
) -> dict[str, Any]:
    """The parameters with `change(units, rows of keep)` in place of those of units."""
    changed = dict(params)
    for part in _parts(module, params):
        flat = dict(part.params)
        for path, place in PLACES.items():
            units = _opened(flat[path], place, part.units_of[place.of])
            rows = getattr(keep, place.of)[part.first : part.last + 1]
            flat[path] = _closed(change(units, rows), flat[path], place)
        if "to" not in part.name:
            flat = {path: leaf[0] for path, leaf in flat.items()}
        changed[part.name] = traverse_util.unflatten_dict(flat)
    return changed
