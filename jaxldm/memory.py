"""Plans that cannot fit in memory are refused with their size, before they are tried.

What is compared is a lower bound of what a plan needs, from shapes alone, so that nothing is refused that
would have worked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from jaxldm import host
from jaxldm.errors import InvalidArgumentError

_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


def check_fits(needed: int, what: str, fix: str, device: Any = None) -> None:
    """Raises `InvalidArgumentError` for more bytes than a device, or for None this machine, has.

    Args:
        needed: bytes, a lower bound.
        what: "1000 images of 8x8 pixels need".
        fix: what to do instead.
        device: of JAX.
    """
    there = host.memory_bytes(device)
    if needed > there:
        owner = "this machine" if device is None or device.platform == "cpu" else "the device"
        raise InvalidArgumentError(
            f"{what} at least {as_bytes(needed)} of memory, and {owner} has {as_bytes(there)}: {fix}"
        )


def check_computation(
    held: int, most: int, largest: Callable[[], int], device: Any, what: str, fix: str
) -> None:
    """Refuses a computation whose largest array does not fit next to what is held.

    Args:
        held: bytes that lie on the device meanwhile, such as the weights'.
        most: an upper bound of the bytes of the largest array.
        largest: a lower bound, asked for only where `most` does not fit: it may trace a network.
        device: that computes.
        what, fix: as in `check_fits`.
    """
    if held + most > host.memory_bytes(device):
        check_fits(held, what, fix, device)
        check_fits(held + largest(), what, fix, device)


def size_of(tree: Any) -> int:
    """Bytes of the arrays in a tree on a device that has a part of each."""

    def part(leaf: Any) -> tuple[int, ...]:
        sharding = getattr(leaf, "sharding", None)
        return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)

    return sum(math.prod(part(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def most_in_step(batch: int, height: int, width: int) -> int:
    """Bytes that no product of a network on [batch, height, width, c] is larger than, by far: attention of 64
    heads over all places, or 8192 channels, in float32.
    """
    places = height * width
    return 4 * batch * places * max(64 * places, 8192)


def as_bytes(number: int) -> str:
    """A number of bytes as people read it.

    >>> as_bytes(999), as_bytes(2_500_000_000_000), as_bytes(10**30)
    ('999 bytes', '2.5 TB', '1e+12 EB')
    """
    power = min((len(str(number)) - 1) // 3, len(_UNITS) - 1)
    return f"{number / 1000**power:.3g} {_UNITS[power]}"
