"""What a network reuses of its earlier calls: the residual of a run of blocks, out - in.

A network that may reuse something is applied with a collection "reuse" that has one variable, a `Session`,
and gives it back changed (`models.caching_network`). Its module hands itself to `apply_blocks` or
`apply_levels`; they find the session there, or none, and then run as ever. Blocks under a session are called
as pure functions of their parameters, so that `lax.cond` can leave them out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.errors import InvalidArgumentError

COLLECTION, _NAME = "reuse", "session"


class Memory(NamedTuple):
    """What one call of a network leaves for the next.

    Attributes:
        computed: how many calls computed.
        decision: the state of the cache's decision.
        runs: the history of each run of blocks, by its name.
    """

    computed: Any
    decision: Any
    runs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Session:
    """One call of a network that may reuse something.

    Attributes:
        cache: of `jaxldm.diffusion.caching`.
        memory: of the call before; None at the first call, which computes everything.
        step: the number of the call in its run.
        signal: what the decision looks at, as soon as it is known.
        compute: whether the blocks compute, as soon as it is decided.
        decision: the state of the decision after it.
        runs: the histories of this call so far.
    """

    cache: Any
    memory: Memory | None
    step: Any
    signal: Any = None
    compute: Any = None
    decision: Any = None
    runs: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def wants(self) -> str | None:
        """The kind of signal that the decision looks at."""
        return self.cache.decision.signal

    def decided(self) -> Session:
        """The same, with the decision taken; the first of a run computes."""
        if self.compute is not None:
            return self
        if self.wants is not None and self.signal is None:
            raise InvalidArgumentError(
                "this cache looks at the first blocks of a transformer, and this is none: choose one by the "
                "number of the step, such as fora:3 or deepcache:3"
            )
        rule = self.cache.decision
        state = rule.init(self.signal) if self.memory is None else self.memory.decision
        compute, state = rule.decide(self.cache.settings, state, self.step, self.signal)
        first = jnp.bool_(True) if self.memory is None else self.memory.computed == 0
        compute = jnp.asarray(compute) | first
        return dataclasses.replace(self, compute=compute, decision=state)

    def run(
        self, name: str, function: Callable[[Any], Any], carry: Any, residual: bool
    ) -> tuple[Any, Session]:
        """(function(carry), or what stands for it, and the session after that).

        Args:
            name: of the run, another one for each in a network.
            function: carry -> out, pure.
            carry: arrays.
            residual: out - carry is reused, and not out itself.
        """
        session = self.decided()
        rules, settings = session.cache.residuals, session.cache.settings

        def full(carry, history):
            out = function(carry)
            value = jax.tree.map(jnp.subtract, out, carry) if residual else out
            return out, rules.update(
                settings, rules.init(value) if history is None else history, self.step, value
            )

        def cheap(carry, history):
            value = rules.predict(settings, history, self.step)
            return (jax.tree.map(jnp.add, carry, value) if residual else value), history

        if session.memory is None:
            out, history = full(carry, None)
        else:
            out, history = jax.lax.cond(session.compute, full, cheap, carry, session.memory.runs[name])
        return out, dataclasses.replace(session, runs={**session.runs, name: history})

    def left(self) -> Memory:
        """What the next call is given."""
        computed = jnp.int32(0) if self.memory is None else self.memory.computed
        return Memory(computed + self.compute.astype(jnp.int32), self.decision, self.runs)


class Reached(Exception):
    """A network came to blocks that it may reuse: raised by a `Probe` and caught by who made it."""


class Probe(Session):
    """A session that ends the network where it would reuse something for the first time, by `Reached`."""

    def run(
        self, name: str, function: Callable[[Any], Any], carry: Any, residual: bool
    ) -> tuple[Any, Session]:
        self.decided()  # refuses a signal that there is not
        raise Reached


def session_of(module: nn.Module | None) -> Session | None:
    """The session of the network that a module is, or None."""
    if module is None or not module.has_variable(COLLECTION, _NAME):
        return None
    return cast(Session, module.get_variable(COLLECTION, _NAME))


def keep_session(module: nn.Module, session: Session) -> None:
    """Leaves the session for what comes next in the network."""
    module.put_variable(COLLECTION, _NAME, session)


def collection_of(session: Session) -> dict[str, Any]:
    """The collections with which a network is applied."""
    return {COLLECTION: {_NAME: session}}


def session_in(collections: Any) -> Session:
    """The session in what `apply` gave back."""
    return collections[COLLECTION][_NAME]


def modulated_input(call: Callable[[], Any]) -> Float[Array, "B N C"]:
    """What the first attention is given when `call` runs a block; the rest of it the compiler leaves out."""
    found: list[Any] = []

    def look(following: Callable[..., Any], inputs: Any, more: Any, context: Any) -> Any:
        if "Attention" in type(context.module).__name__ and context.method_name == "__call__" and not found:
            found.append(inputs[0])
        return following(*inputs, **more)

    with nn.intercept_methods(look):
        call()
    if not found:
        raise InvalidArgumentError(
            "this cache looks at the input of an attention, and the first block has none"
        )
    return found[0]


def first_leaf(carry: Any) -> Array:
    """The tokens of the image: a carry's first array."""
    return jax.tree.leaves(carry)[0]
