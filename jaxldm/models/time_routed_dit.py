"""What DiTs with routers of the time have in common: gates in training, and a plan of what is computed later.

The time is cut into a few equal parts, and a router decides for each of them from the embedding of its
middle. So there are as many sets of gates as parts, and each is a branch of static shapes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from jaxldm.arguments import a_params, checked
from jaxldm.errors import InvalidArgumentError
from jaxldm.models.config import check
from jaxldm.models.dit import DiT, DiTConfig, TimestepEmbedder
from jaxldm.nn.routing import ROUTING, TimeRouter, group_times, time_group


@dataclasses.dataclass(frozen=True)
class TimeRoutedConfig(DiTConfig):
    """Config of a DiT that computes a part of its blocks, by the time.

    Attributes:
        time_groups: equal parts of [0, max_time], each with gates of its own.
        max_time: the largest t of the path: 1000 of timesteps, 1 of a continuous path.
        plan: None: all is computed, and multiplied with the gates of the routers. Else the gates of each part
            of the time, a text of 1 and 0, as `models.fix_routers` found them: the others are not computed.
    """

    time_groups: int = 4
    max_time: float = 1000.0
    plan: tuple[str, ...] | None = None

    def check_values(self) -> None:
        super().check_values()
        for name in ("scan", "remat", "route", "tap"):
            check(not getattr(self, name), f"a DiT with routers has no {name}: leave it out")
        check(self.max_time > 0, f"max_time must be above 0, got {self.max_time}")
        if self.plan is not None:
            check(
                len(self.plan) == self.time_groups
                and all(len(gates) == self.num_gates and set(gates) <= {"0", "1"} for gates in self.plan),
                f"plan must be {self.time_groups} texts (time_groups) of {self.num_gates} gates, 0 or 1",
            )
            for gates in self.plan:
                self.check_gates(np.array([gate == "1" for gate in gates]))

    @property
    def num_gates(self) -> int:
        """Of one part of the time."""
        raise NotImplementedError

    def check_gates(self, gates: Bool[np.ndarray, " gates"]) -> None:
        """Raises `InvalidArgumentError` for gates that leave nothing to compute."""
        raise NotImplementedError

    def table(self) -> Bool[np.ndarray, "groups gates"]:
        """The gates of the plan."""
        return np.array([[gate == "1" for gate in gates] for gates in self.plan or ()])


class TimeRoutedDiT(DiT):
    """Base of the DiTs whose routers look at the time.

    With a plan all times of a batch are usually those of one step, and one branch runs. Where they are
    of several parts (training, a server whose images are at different steps) everything is computed and
    multiplied with the gates, which gives the same numbers.
    """

    config: TimeRoutedConfig

    def gates_of(self, logits: Float[Array, "G gates"]) -> Float[Array, "G gates"]:
        """The gates of `straight_through`, of which one is open in each unit that must not be empty."""
        raise NotImplementedError

    def compute_share(self, gates: Float[Array, "G gates"]) -> Float[Array, " G"]:
        """Multiply-accumulates of the blocks with these gates, as a part of those of all blocks."""
        raise NotImplementedError

    def gated(self, call: Callable[..., Any], h: Any, c: Any, gates: Any, train: bool) -> Any:
        """All blocks, multiplied with the gates [B, gates]; `call(n)` is block n as a function."""
        raise NotImplementedError

    def chosen(self, h: Any, c: Any, gates: Bool[np.ndarray, " gates"]) -> Any:
        """The blocks of static gates, with nothing computed that is closed: a function of `self.own(n)`."""
        raise NotImplementedError

    def block(self, **options: Any) -> nn.Module:
        """A block, `name=` for a submodule, `parent=None` for a function of parameters."""
        raise NotImplementedError

    def own(self, number: int) -> Any:
        """The parameters of a block."""
        return self.get_variable("params", f"blocks_{number}")

    def _blocks(
        self,
        h: Float[Array, "B N C"],
        c: Float[Array, "B C"],
        t: Num[Array, " B"],
        train: bool,
        kept: Int[Array, "B k"] | None,
    ) -> Float[Array, "B N C"]:
        config = self.config
        group = time_group(t, config.time_groups, config.max_time)
        if config.plan is None or self.is_initializing():
            gates = self.gates_of(self._logits())
            self.sow(ROUTING, "compute", self.compute_share(gates)[group])
        elif train or self.is_mutable_collection("intermediates"):  # which sees all blocks
            gates = jnp.asarray(config.table(), jnp.float32)
        else:
            return self._planned(h, c, group)
        return self.gated(lambda n: self.block(name=f"blocks_{n}"), h, c, gates[group], train)

    def _logits(self) -> Float[Array, "G gates"]:
        """What the router says of the middle of each part, by the network's own embedding of the time."""
        config = self.config
        middles = group_times(config.time_groups, config.max_time)
        embedder = TimestepEmbedder(config, parent=None)
        embedded = embedder.apply({"params": self.get_variable("params", "t_embedder")}, middles)
        return TimeRouter(config.num_gates, name="time_router")(cast(Array, embedded))

    def _planned(
        self, h: Float[Array, "B N C"], c: Float[Array, "B C"], group: Int[Array, " B"]
    ) -> Float[Array, "B N C"]:
        """The branch of the plan that all images need, or all of it under gates where they need several."""
        table = self.config.table()
        rows = np.unique(table, axis=0)
        if len(rows) == 1:
            return self.chosen(h, c, rows[0])
        which = np.array([np.flatnonzero((rows == row).all(axis=1))[0] for row in table], np.int32)
        own = jnp.asarray(which)[group]

        def mixed(h: Any, c: Any) -> Any:
            def call(number: int) -> Callable[..., Any]:
                return functools.partial(self.block(parent=None).apply, {"params": self.own(number)})

            return self.gated(call, h, c, jnp.asarray(table, jnp.float32)[group], False)

        branches = [functools.partial(self.chosen, gates=row) for row in rows]
        index = jnp.where(jnp.all(own == own[0]), own[0], len(rows))
        return jax.lax.switch(index, [*branches, mixed], h, c)


def a_routed(name: str, value: Any) -> Any:
    """A network whose routers look at the time."""
    if not isinstance(value, TimeRoutedDiT):
        raise InvalidArgumentError(
            f"{name} must be a DiT with routers of the time, such as models.build('tiny-dydit'), got "
            f"{type(value).__name__}"
        )
    return value


@checked(module=a_routed, params=a_params)
def fix_routers(module: TimeRoutedDiT, params: Any) -> TimeRoutedDiT:
    """The network with the decisions of its routers as its plan: what they closed is no longer computed.

    The parameters stay as they are, and the outputs to rounding.

    >>> import jax
    >>> from jaxldm import models
    >>> dydit = models.build("tiny-dydit", depth=1, time_groups=2)
    >>> models.fix_routers(dydit, models.init(dydit, jax.random.key(0))).config.plan
    ('111111111111', '111111111111')
    """
    config = module.config
    middles = group_times(config.time_groups, config.max_time)
    embedded = TimestepEmbedder(config).apply({"params": params["t_embedder"]}, middles)
    logits = TimeRouter(config.num_gates).apply({"params": params["time_router"]}, embedded)
    gates = np.asarray(module.gates_of(jax.numpy.asarray(logits))) > 0.5
    plan = tuple("".join("1" if gate else "0" for gate in row) for row in gates)
    return type(module)(dataclasses.replace(config, plan=plan))


@checked(module=a_routed)
def planned_groups(module: TimeRoutedDiT) -> list[TimeRoutedDiT]:
    """For each part of the time the network that computes at all times what is computed in that part.

    `models.count_macs` of each is what a forward pass costs in that part of the time.

    Raises:
        InvalidArgumentError: a network without a plan, see `fix_routers`.
    """
    config = module.config
    if config.plan is None:
        raise InvalidArgumentError(
            "this network has no plan, so that all of it is computed: models.fix_routers(module, params)"
        )
    return [
        type(module)(dataclasses.replace(config, plan=(gates,) * config.time_groups)) for gates in config.plan
    ]
