"""What happens inside of a denoising network: its attention weights, and what each of its parts makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
from flax import traverse_util
from jaxtyping import Array, Float, Shaped

from jaxldm.arguments import a_module, checked, flag, refuse
from jaxldm.models.denoising_network import applied, check_inputs
from jaxldm.nn.block_stack import STACK

_WEIGHTS, _OUTPUTS = "attention_weights", "__call__"


class Inside(NamedTuple):
    """One call of a network, from the inside.

    Attributes:
        output: `[B, H, W, C]`, as `models.network` returns it.
        attention: the softmax of each attention layer, float32 `[B, heads, N, M]`: row n says how much query
            n takes from each of M keys, and adds up to 1. By the layer's path ("blocks_0.attn"), from input
            to output.
        outputs: what each of the module's direct parts returned, where that is one array, by its name
            ("x_embedder", "blocks_0"), from input to output.
    """

    output: Float[Array, "B ..."]
    attention: dict[str, Float[Array, "B heads N M"]]
    outputs: dict[str, Array]


@checked(module=a_module, attention=flag)
def look_inside(
    module: nn.Module,
    params: Any,
    x: Float[Array, "B ..."],
    t: Float[Array, " B"],
    condition: Shaped[Array, "B ..."] | Mapping[str, Any] | None = None,
    *,
    attention: bool = True,
) -> Inside:
    """Call a denoising network once, as `models.network(module)` does, and keep what happens inside.

    The weights are those that the layers computed with (`jaxldm.nn.attend` sows them when asked to), not
    computed a second time. Any other call neither forms nor keeps them.

    Args:
        module: of `models.build`, or one of your own whose attention goes through `jaxldm.nn.attend`.
        params, x, t, condition: as those of `models.network(module)`.
        attention: False keeps the outputs alone: the weights of a large network are gigabytes.

    Raises:
        InvalidArgumentError: as `models.network(module)` does.

    >>> import jax, numpy as np
    >>> from jaxldm import models
    >>> dit = models.build("tiny-dit", depth=1)
    >>> x, t, label = np.zeros((1, 28, 28, 1), np.float32), np.ones(1, np.float32), np.zeros(1, np.int32)
    >>> inside = models.look_inside(dit, models.init(dit, jax.random.key(0)), x, t, label)
    >>> inside.attention["blocks_0.attn"].shape  # 4 heads, 49 patches
    (1, 4, 49, 49)
    """
    ended: list[tuple[str, ...]] = []  # the paths of the modules, in the order in which they returned

    def is_direct(part: nn.Module, method: str) -> bool:
        if method == _OUTPUTS:
            ended.append(part.path)
        return method == _OUTPUTS and len(part.path) == 1

    check_inputs(module, x, t)
    if not all(
        isinstance(leaf, int | float) or hasattr(leaf, "dtype") for leaf in jax.tree.leaves(condition)
    ):
        raise refuse("condition", "an array, or a mapping of names to arrays", condition)
    call = applied(module)

    @jax.jit
    def run(params: Any, x: Any, t: Any, condition: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        options = {"mutable": ["intermediates"], "capture_intermediates": is_direct}
        output, kept = call(params, x, t, condition, **options)
        sown = cast(dict[Any, Any], traverse_util.flatten_dict(kept.get("intermediates", {})))
        found = {
            name: {path[:-1]: entries[0] for path, entries in sown.items() if path[-1] == name}
            for name in (_WEIGHTS, _OUTPUTS)
        }
        arrays = {path: value for path, value in found[_OUTPUTS].items() if hasattr(value, "ndim")}
        return output, _by_name(found[_WEIGHTS] if attention else {}), _by_name(arrays)

    output, weights, outputs = run(params, x, t, condition)
    order = {name: place for place, path in enumerate(ended) for name in _names(path)}

    def sorted_by_call(arrays: dict[str, Any]) -> dict[str, Any]:
        return {name: arrays[name] for name in sorted(arrays, key=lambda name: order[name])}

    return Inside(output, sorted_by_call(weights), sorted_by_call(outputs))


def _names(path: tuple[str, ...]) -> list[str]:
    """The path with dots; of a scanned stack one for each block."""
    for place, part in enumerate(path):
        stack = STACK.fullmatch(part)
        if stack:
            blocks = range(int(stack[2]), int(stack[3]) + 1)
            return [".".join((*path[:place], f"{stack[1]}{block}", *path[place + 1 :])) for block in blocks]
    return [".".join(path)]


def _by_name(arrays: Mapping[tuple[str, ...], Array]) -> dict[str, Array]:
    """Arrays by the path with dots, those of a scanned stack as one for each block."""
    named = {}
    for path, array in arrays.items():
        names = _names(path)
        scanned = names != [".".join(path)]
        named |= {name: array[block] if scanned else array for block, name in enumerate(names)}
    return named
