"""A stack of blocks of one kind: unrolled, or as one scan that compiles a single block.

This is also the one place where a transformer leaves blocks out in steps that reuse what an earlier one
computed: [first F blocks | middle, computed or reused | last B]. See `jaxldm.nn.reuse`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.errors import InvalidArgumentError
from jaxldm.nn.reuse import (
    Session,
    first_leaf,
    keep_session,
    modulated_input,
    session_of,
)

STACK = re.compile(r"(.+_)(\d+)to(\d+)")  # the name of a scanned stack: its start, first and last block


class Within(NamedTuple):
    """Where a stack is whose blocks may be reused.

    Attributes:
        module: whose compact method calls `apply_blocks`.
        before, after: how many blocks of the network come before the stack and after it.
    """

    module: nn.Module
    before: int = 0
    after: int = 0


def apply_blocks(
    make_block: Callable[..., nn.Module],
    name: str,
    count: int,
    carry: Any,
    *shared: Any,
    first: int = 0,
    scan: bool = False,
    remat: bool = False,
    within: Within | None = None,
    skip: tuple[int, ...] = (),
    after: Callable[[Any, Any], Any] | None = None,
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
        within: for blocks of which a step may reuse the residual; None: they always run.
        skip: numbers of blocks that leave the carry as it is.
        after: (carry, number of the block) -> carry, after every block, also those left out: what another
            network adds. None: nothing.
    """
    session = None if within is None else session_of(within.module)
    if within is not None and session is not None and count > 0:
        blocks = _PureBlocks(make_block, name, first, count, shared, scan, remat, after)
        return _apply_reusing(blocks, within, session, carry)

    def call(block: nn.Module, carry: Any) -> Any:
        return block(carry, *shared)

    if remat:
        call = nn.remat(call, prevent_cse=not scan)
    if not scan:
        for number in range(first, first + count):
            carry = carry if number in skip else call(make_block(name=f"{name}_{number}"), carry)
            carry = carry if after is None else after(carry, number)
        return carry
    if count == 0:
        return carry
    skipped = [number in skip for number in range(first, first + count)]

    def step(block: nn.Module, carry: Any, each: tuple[Any, Any]) -> tuple[Any, None]:
        skipped, number = each
        out = call(block, carry)
        if skipped is not None:
            out = jax.tree.map(lambda old, new: jnp.where(skipped, old, new), carry, out)
        return (out if after is None else after(out, number)), None

    scanned = nn.scan(
        step,
        variable_axes={"params": 0, "intermediates": 0, "calibration": 0},
        split_rngs={"params": True, "dropout": True},
        length=count,
    )
    flags = jnp.asarray(skipped) if any(skipped) else None
    numbers = None if after is None else jnp.arange(first, first + count)
    return scanned(make_block(name=f"{name}_{first}to{first + count - 1}"), carry, (flags, numbers))[0]


def add_after(
    residuals: Sequence[Float[Array, "B N C"]] | None, places: Sequence[int], skip_tokens: int = 0
) -> Callable[[Any, Any], Any] | None:
    """`after` of `apply_blocks` that adds the residuals of a control network to the image's tokens.

    Args:
        residuals: of the control network; None: none.
        places: for each block of the network, which of the residuals it gets.
        skip_tokens: of a text, in front of those of the image in the carry.

    Raises:
        InvalidArgumentError: when called, residuals that do not fit.
    """
    if not residuals:
        return None
    stack, table = jnp.stack(list(residuals)), jnp.asarray(places)

    def after(carry: Any, number: Any) -> Any:
        several = isinstance(carry, tuple)
        x = carry[0] if several else carry
        residual = jax.lax.dynamic_index_in_dim(stack, table[number], keepdims=False).astype(x.dtype)
        if residual.shape != (x.shape[0], x.shape[1] - skip_tokens, x.shape[2]):
            raise InvalidArgumentError(
                f"a control network gives residuals {list(residual.shape)} where the transformer has "
                f"{list(x.shape)}: they are of different models, or the control image is of another size"
            )
        x = x + residual if skip_tokens == 0 else x.at[:, skip_tokens:].add(residual)
        return (x, *carry[1:]) if several else x

    return after


class _PureBlocks(NamedTuple):
    """A stack as a function of its parameters; the fields are arguments of `apply_blocks`."""

    make_block: Callable[..., nn.Module]
    name: str
    first: int
    count: int
    shared: tuple[Any, ...]
    scan: bool
    remat: bool
    after: Callable[[Any, Any], Any] | None = None

    @property
    def title(self) -> str:
        return f"{self.name}_{self.first}to{self.first + self.count - 1}"

    def call(self, params: Any, carry: Any) -> Any:
        """The carry after the block that has these parameters."""

        def block(params: Any, carry: Any) -> Any:
            return self.make_block(parent=None).apply({"params": params}, carry, *self.shared)

        return (jax.checkpoint(block) if self.remat else block)(params, carry)

    def params(self, module: nn.Module, number: Any) -> Any:
        """The parameters of a block of the stack."""
        if not self.scan:
            return module.get_variable("params", f"{self.name}_{self.first + number}")
        stacked = module.get_variable("params", self.title)
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), stacked)

    def run(self, module: nn.Module, start: int, end: int, carry: Any) -> Any:
        """The carry after the blocks `start` to `end` - 1 of the stack."""

        def one(carry: Any, number: Any) -> tuple[Any, None]:
            # Each takes its own parameters: no part of a stack is copied.
            out = self.call(self.params(module, number), carry)
            return (out if self.after is None else self.after(out, self.first + number)), None

        if self.scan and start < end:
            return jax.lax.scan(one, carry, jnp.arange(start, end))[0]
        for number in range(start, end):
            carry, _ = one(carry, number)
        return carry


def _apply_reusing(blocks: _PureBlocks, within: Within, session: Session, carry: Any) -> Any:
    """The stack in a session: its part of the first blocks, the middle or what stands for it, the last."""
    module, cache, count = within.module, session.cache, blocks.count
    if cache.skips is not None:
        raise InvalidArgumentError(
            "this cache is for U-Nets, and this network is a transformer: choose fora:3, taylor:4,1 or "
            "first-block:0.1"
        )
    total = within.before + count + within.after
    if cache.first_blocks + cache.last_blocks >= total:
        raise InvalidArgumentError(
            f"first_blocks={cache.first_blocks} and last_blocks={cache.last_blocks} always run, which leaves "
            f"none of the {total} blocks to reuse: give less"
        )
    start = min(max(cache.first_blocks - within.before, 0), count)
    end = max(count - max(cache.last_blocks - within.after, 0), start)
    if session.wants == "modulated_input" and session.signal is None:
        seen = modulated_input(lambda: blocks.call(blocks.params(module, 0), carry))
        session = dataclasses.replace(session, signal=seen)
    entered, carry = carry, blocks.run(module, 0, start, carry)
    if start > 0:
        session = dataclasses.replace(session, signal=first_leaf(carry) - first_leaf(entered))
    if start < end:
        carry, session = session.run(
            blocks.title, lambda carry: blocks.run(module, start, end, carry), carry, residual=True
        )
    keep_session(module, session)
    return blocks.run(module, end, count, carry)
