"""A stack of blocks of one kind: unrolled, or as one scan that compiles a single block."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn

STACK = re.compile(r"(.+_)(\d+)to(\d+)")  # the name of a scanned stack: its start, first and last block


def apply_blocks(
    make_block: Callable[..., nn.Module],
    name: str,
    count: int,
    carry: Any,
    *shared: Any,
    first: int = 0,
    scan: bool = False,
    remat: bool = False,
) -> Any:
    """carry <- block(carry, *shared), for `count` blocks. Call it in the compact method of their module.

    Without `scan` the blocks are the submodules `{name}_{first}`, `{name}_{first + 1}`, ... and XLA compiles
    each by itself. With it they are one submodule `{name}_{first}to{last}`, every parameter with a leading
    axis of blocks: time and memory of compiling no longer grow with the depth. `checkpoints` reads and writes
    the same published tensors for both.

    Args:
        make_block: makes a block of its `name`, as `functools.partial(DiTBlock, config)` does.
        name: what the published checkpoint calls the list of blocks.
        count: how many; 0 leaves the carry as it is.
        carry: an array or a tuple of arrays that each block changes; shapes and dtypes stay.
        shared: further inputs, the same for every block: arrays, None, or flags.
        first: the number of the first block, if blocks of other kinds come before it in the list.
        scan: one `jax.lax.scan` in place of `count` blocks.
        remat: keep no activations inside a block for the backward pass, compute them again
            (Chen et al. 2016, arXiv:1604.06174).
    """

    def call(block: nn.Module, carry: Any) -> Any:
        return block(carry, *shared)

    if remat:
        call = nn.remat(call, prevent_cse=not scan)
    if not scan:
        for number in range(first, first + count):
            carry = call(make_block(name=f"{name}_{number}"), carry)
        return carry
    if count == 0:
        return carry
    scanned = nn.scan(
        lambda block, carry, _: (call(block, carry), None),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=count,
    )
    return scanned(make_block(name=f"{name}_{first}to{first + count - 1}"), carry, None)[0]
