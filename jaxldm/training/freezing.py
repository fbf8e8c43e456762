"""Parameters that do not move: split from those that do by the patterns of their names, and put together."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from flax import traverse_util

from jaxldm.arguments import a_params, checked, refuse
from jaxldm.errors import InvalidArgumentError, shown


class Split(NamedTuple):
    """Two trees that share no parameter: `params` for the optimizer, and `frozen`."""

    params: Any
    frozen: Any


def some_patterns(name: str, value: Any) -> tuple[str, ...]:
    """Patterns of paths, such as ("encoder/*",)."""
    if isinstance(value, str):
        raise refuse(name, "a list of patterns", value, f"[{value!r}]")
    if not isinstance(value, Sequence) or not all(isinstance(each, str) and each for each in value):
        raise refuse(name, 'patterns of parameters such as ["down_blocks_*"]', value)
    return tuple(value)


@checked(params=a_params, patterns=some_patterns)
def freeze(params: Mapping[str, Any], patterns: Sequence[str]) -> Split:
    """Split the parameters of a network into those that train and those whose names a pattern matches.

    The state then has only what moves in `params` (so the optimizer and the moving average have no more), and
    the rest in `frozen`; the loss puts both together with `merge`.

    Args:
        params: a nested dict.
        patterns: of whole paths such as "down_blocks_0/conv/kernel": `*` stands for anything, slashes too,
            `?` for a character, `[01]` for one of these; "down_blocks_*" freezes all of these blocks.

    Raises:
        InvalidArgumentError: a pattern matches no parameter, or together they match every one.

    >>> import numpy as np
    >>> params = {"encoder": {"kernel": np.ones(2), "bias": np.ones(3)}, "decoder": {"kernel": np.ones(4)}}
    >>> moving, frozen = freeze(params, ["encoder/*"])
    >>> list(moving), list(frozen), list(merge(moving, frozen))
    (['decoder'], ['encoder'], ['decoder', 'encoder'])
    """
    flat = {"/".join(map(str, path)): path for path in traverse_util.flatten_dict(cast(Any, params))}
    found: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(flat, pattern)
        if not matching:
            kernel = next((name for name in flat if name.endswith("kernel")), next(iter(flat)))
            raise InvalidArgumentError(
                f"no parameter is named {shown(pattern)}: * stands for anything in a whole path such as "
                f"{kernel}"
            )
        found.update(matching)
    if len(found) == len(flat):
        raise InvalidArgumentError(
            f"{', '.join(map(shown, patterns))} freezes all {len(flat)} parameters: nothing is left to train"
        )
    leaves = traverse_util.flatten_dict(cast(Any, params))
    moving, frozen = (
        {flat[name]: leaves[flat[name]] for name in flat if (name in found) is held} for held in (False, True)
    )
    return Split(traverse_util.unflatten_dict(moving), traverse_util.unflatten_dict(frozen))


@checked(params=a_params, frozen=a_params)
def merge(params: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the whole network, from the two parts that `freeze` made.

    Raises:
        InvalidArgumentError: they have a parameter in common.
    """
    moving, held = (traverse_util.flatten_dict(cast(Any, tree)) for tree in (params, frozen))
    both = [path for path in moving if path in held]
    if both:
        raise InvalidArgumentError(
            f"{'/'.join(map(str, both[0]))} is in params and in frozen: give the two parts that freeze made"
        )
    return traverse_util.unflatten_dict({**moving, **held})
