"""Caching: which steps of a run compute the blocks of the network, and what stands for them in the others.

From step to step the blocks of a network add nearly the same to what goes into them. A cache remembers that
residual, out - in, and a step may add it again in place of computing it. What is remembered and when it is
used again is a `Cache`: a decision, a rule for the residual, and their settings. The settings are arrays, so
that one compiled program serves all of them.

`cached_denoiser` and `cached` put a cache into the sampling loop; which blocks of a network it skips is for
the network to say (`jaxldm.nn.block_stack`).
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxldm.arguments import array, checked, count, instance, number, text
from jaxldm.diffusion.compiling import traced
from jaxldm.errors import InvalidArgumentError, one_of, shown
from jaxldm.exact import MAX_STEPS

# What a decision looks at: how much the first blocks add, or the modulated input of the first attention.
FIRST_BLOCKS, MODULATED_INPUT = "first_blocks", "modulated_input"


class Decision(NamedTuple):
    """Which steps compute, as a pair of pure functions. The first step of a run always computes.

    Attributes:
        init: signal -> state, any pytree of zeros.
        decide: (settings, state, i, signal) -> (whether step i computes, state).
        signal: which array `decide` is given: `FIRST_BLOCKS`, `MODULATED_INPUT`, or None for none.
    """

    init: Callable[[Any], Any]
    decide: Callable[[Mapping[str, Any], Any, Any, Any], tuple[Any, Any]]
    signal: str | None = None


class Residuals(NamedTuple):
    """What stands for the residual of the blocks in a step that does not compute it: three pure functions.

    Attributes:
        init: residual -> history, any pytree of zeros.
        update: (settings, history, i, residual) -> history, after a step that computed.
        predict: (settings, history, i) -> residual, in a step that does not.
    """

    init: Callable[[Any], Any]
    update: Callable[[Mapping[str, Any], Any, Any, Any], Any]
    predict: Callable[[Mapping[str, Any], Any, Any], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """A decision, a rule for the residual, and the settings of both: from `fora`, `first_block` and so on.

    A pytree of the settings: other settings compile nothing.

    Attributes:
        settings: arrays by name.
        decision: which steps compute.
        residuals: what the others add.
        first_blocks, last_blocks: of a transformer, how many blocks always run.
        skips: of a U-Net, how many of its outermost skip connections are always computed (DeepCache); None: 1
            of a U-Net. A number makes it a cache for U-Nets alone.
    """

    settings: Any
    decision: Decision = dataclasses.field(metadata={"static": True})
    residuals: Residuals = dataclasses.field(metadata={"static": True})
    first_blocks: int = dataclasses.field(default=0, metadata={"static": True})
    last_blocks: int = dataclasses.field(default=0, metadata={"static": True})
    skips: int | None = dataclasses.field(default=None, metadata={"static": True})

    def check_steps(self, num_steps: int) -> None:
        """Raise `InvalidArgumentError` for a schedule of more steps than a run has."""
        length = len(self.settings.get("schedule", ()))
        if length > num_steps:
            raise InvalidArgumentError(
                f"the cache's schedule has {length} steps, the run {num_steps}: give one entry for each step"
            )

    def padded(self, num_rows: int) -> Cache:
        """The same, a schedule of steps filled up to so many: further steps compute."""
        schedule = self.settings.get("schedule")
        if schedule is None:
            return self
        more = np.ones(num_rows - len(schedule), np.bool_)
        settings = {**self.settings, "schedule": np.concatenate([schedule, more])}
        return dataclasses.replace(self, settings=settings)


A_CACHE = instance(Cache, "a cache such as D.caching.fora(3)")


# ---------------------------------------------------------------- decisions


class _Seen(NamedTuple):
    """The signal to compare with, the sum of changes, and how many steps in a row did not compute."""

    signal: Any
    total: Float[Any, ""]
    skipped: Any


def _nothing(signal: Any) -> tuple[()]:
    return ()


def _unseen(signal: Any) -> _Seen:
    return _Seen(jnp.zeros_like(signal), jnp.float32(0), jnp.int32(0))


def relative_change(new: Float[Array, " ..."], old: Float[Array, " ..."]) -> Float[Array, ""]:
    """mean |new - old| / mean |old|, float32; infinite where old alone is 0, and 0 where both are."""
    new, old = (jnp.asarray(value, jnp.float32) for value in (new, old))
    change, size = jnp.mean(jnp.abs(new - old)), jnp.mean(jnp.abs(old))
    return jnp.where(change == 0, 0, jnp.where(size == 0, jnp.inf, change / jnp.where(size == 0, 1, size)))


def _at_interval(settings, state, i, signal):
    since = i - settings["warm_up"] + 1
    return (since < 0) | (since % settings["interval"] == 0), state


def _at_steps(settings, state, i, signal):
    schedule = jnp.asarray(settings["schedule"])
    return jnp.where(i < len(schedule), schedule[i], True), state


def _when_first_blocks_change(settings, state, i, signal):
    change = relative_change(signal, state.signal)
    compute = (change >= settings["threshold"]) | (state.skipped >= settings["max_skips"])
    compute |= i < settings["warm_up"]
    kept = jnp.where(compute, signal, state.signal)
    return compute, _Seen(kept, state.total, jnp.where(compute, 0, state.skipped + 1))


def _when_changes_add_up(settings, state, i, signal):
    change = relative_change(signal, state.signal)
    total = state.total + jnp.abs(jnp.polyval(jnp.asarray(settings["coefficients"]), change))
    compute = (i < settings["warm_up"]) | ~(total < settings["threshold"])
    compute |= i == settings["last_step"]
    total = jnp.where(compute, 0, total)
    return compute, _Seen(signal, total, jnp.where(compute, 0, state.skipped + 1))


AT_INTERVAL = Decision(_nothing, _at_interval)
AT_STEPS = Decision(_nothing, _at_steps)
BY_FIRST_BLOCKS = Decision(_unseen, _when_first_blocks_change, FIRST_BLOCKS)
BY_MODULATED_INPUT = Decision(_unseen, _when_changes_add_up, MODULATED_INPUT)


# ---------------------------------------------------------------- residuals


def _zeros(residual: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, residual)


LAST = Residuals(
    _zeros, lambda settings, history, i, residual: residual, lambda settings, history, i: history
)


class _Differences(NamedTuple):
    """The residual at the last step that computed and its differences per step, that step, and how many."""

    orders: tuple[Any, Any, Any]
    last: Any
    computed: Any


def _no_differences(residual: Any) -> _Differences:
    return _Differences((_zeros(residual),) * 3, jnp.int32(0), jnp.int32(0))


def _next_differences(settings, history, i, residual):
    gap = jnp.maximum(i - history.last, 1).astype(jnp.float32)
    orders = [residual]
    for order in (1, 2):

        def difference(new, old, order=order):
            change = (new.astype(jnp.float32) - old.astype(jnp.float32)) / gap
            return jnp.where(history.computed >= order, change, 0).astype(new.dtype)

        orders.append(jax.tree.map(difference, orders[-1], history.orders[order - 1]))
    return _Differences(tuple(orders), jnp.asarray(i, jnp.int32), history.computed + 1)


def _taylor_sum(settings, history, i):
    distance = (i - history.last).astype(jnp.float32)
    powers = [
        jnp.where(k <= settings["order"], distance**k / math.factorial(k), 0)
        for k in range(len(history.orders))
    ]

    def total(*orders):
        terms = [power * part.astype(jnp.float32) for power, part in zip(powers, orders, strict=True)]
        return sum(terms[1:], terms[0]).astype(orders[0].dtype)

    return jax.tree.map(total, *history.orders)


TAYLOR = Residuals(_no_differences, _next_differences, _taylor_sum)


# ---------------------------------------------------------------- caches

_STEPS, _BLOCKS = count(1, MAX_STEPS), count(0, 1000)


@checked(interval=_STEPS, warm_up=_STEPS)
def fora(interval: int = 3, *, warm_up: int = 1) -> Cache:
    """The blocks compute in every `interval`-th step; between them their last residual is added (FORA).

    Selvaraju et al. 2024. Of a U-Net it is the deep part whose result is kept, as in `deepcache`.

    Args:
        interval: N, 1 computes always.
        warm_up: so many first steps compute.
    """
    settings = {"interval": np.int32(interval), "warm_up": np.int32(warm_up)}
    return Cache(settings, AT_INTERVAL, LAST)


@checked(interval=_STEPS, order=count(0, 2), warm_up=_STEPS)
def taylor(interval: int = 4, order: int = 1, *, warm_up: int = 3) -> Cache:
    """As `fora`, and between the steps that compute the residual is extrapolated (Liu et al. 2025).

    TaylorSeer on the residual of all blocks: F + dF k + d^2F k^2 / 2, k steps after the last that computed,
    with differences of the steps that did.

    Args:
        interval: N, 1 computes always.
        order: 0, 1 or 2; 0 is `fora`.
        warm_up: so many first steps compute.
    """
    return extrapolate(fora(interval, warm_up=warm_up), order)


@checked(cache=A_CACHE, order=count(0, 2))
def extrapolate(cache: Cache, order: int = 1) -> Cache:
    """The cache with the residual extrapolated between the steps that compute, as in `taylor`."""
    settings = {**cache.settings, "order": np.int32(order)}
    return dataclasses.replace(cache, settings=settings, residuals=TAYLOR)


@checked(
    threshold=number(above=0),
    first_blocks=count(1, 1000),
    last_blocks=_BLOCKS,
    warm_up=_STEPS,
    max_skips=_STEPS,
)
def first_block(
    threshold: float = 0.1,
    *,
    first_blocks: int = 1,
    last_blocks: int = 0,
    warm_up: int = 4,
    max_skips: int = 4,
) -> Cache:
    """The blocks compute where what the first ones add has changed (FBCache; DBCache with more of them).

    mean |d - d_c| / mean |d_c| against the threshold, d being what the first blocks add, d_c the same in the
    last step that computed; over all images of a batch together.

    Args:
        threshold: above which the blocks compute; 0.05 to 0.12 is usual.
        first_blocks, last_blocks: blocks that always run: F and B of DBCache.
        warm_up: so many first steps compute.
        max_skips: so many steps in a row may be skipped.
    """
    settings = {
        "threshold": np.float32(threshold),
        "warm_up": np.int32(warm_up),
        "max_skips": np.int32(max_skips),
    }
    return Cache(settings, BY_FIRST_BLOCKS, LAST, first_blocks, last_blocks)


@checked(
    coefficients=array("real", "[degree + 1], the highest power first", axes=1, filled=True, finite=True),
    threshold=number(above=0),
    warm_up=_STEPS,
    num_steps=_STEPS,
)
def teacache(
    coefficients: Any, threshold: float = 0.1, *, warm_up: int = 1, num_steps: int = MAX_STEPS
) -> Cache:
    """The blocks compute where changes of their input have added up to the threshold (TeaCache).

    Liu et al. 2024: the change from step to step of the modulated input of the first block, mapped by a
    polynomial to the change of what the blocks give. The polynomial belongs to one model: `fit_teacache`
    finds it, and another model's is of no use.

    Args:
        coefficients: of the polynomial, the highest power first, as `fit_teacache` returns them.
        threshold: of the sum.
        warm_up: so many first steps compute.
        num_steps: of the run, of which the last step computes.
    """
    settings = {
        "coefficients": np.asarray(coefficients, np.float32),
        "threshold": np.float32(threshold),
        "warm_up": np.int32(warm_up),
        "last_step": np.int32(num_steps - 1),
    }
    return Cache(settings, BY_MODULATED_INPUT, LAST)


@checked(schedule=array("any", "[steps] of True (compute) or False", axes=1, filled=True))
def at_steps(schedule: Any) -> Cache:
    """The blocks compute in the steps that a schedule says: True computes, False adds the last residual.

    Args:
        schedule: a boolean for each step of the run; the first is True.

    Raises:
        InvalidArgumentError: numbers, or a first step that does not compute.

    >>> from jaxldm import diffusion as D
    >>> cache = D.caching.at_steps([True, True, False, True])
    """
    if schedule.dtype != np.bool_:
        raise InvalidArgumentError(
            f"schedule must be booleans, one for each step, True where it computes, got {shown(schedule)}"
        )
    if traced(schedule) or not schedule[0]:
        raise InvalidArgumentError(
            "schedule must begin with True: there is nothing to reuse in the first step"
        )
    return Cache({"schedule": np.asarray(schedule)}, AT_STEPS, LAST)


@checked(
    ratios=array("real", "[steps]", axes=1, filled=True, finite=True),
    threshold=number(above=0),
    max_skips=_STEPS,
    always=number(0, 1),
)
def magcache(ratios: Any, threshold: float = 0.12, *, max_skips: int = 3, always: float = 0.2) -> Cache:
    """The steps of `at_steps` where a calibration run says that residuals shrink little (MagCache).

    Ma et al. 2025: skipping k steps gets the size of the residual wrong by |1 - product of its ratios|; steps
    are skipped while the sum of these errors is below the threshold.

    Args:
        ratios: |r_i| / |r_(i - 1)| of each step of one run that computed all, from `calibrate`.
        threshold: of the sum; 0.06 to 0.24 is usual.
        max_skips: so many steps in a row may be skipped.
        always: this part of the steps, from the first on, computes.
    """
    ratios = np.asarray(ratios, np.float64)
    if (ratios < 0).any():
        raise InvalidArgumentError(
            f"ratios of sizes must be at least 0, got {ratios.min():g}: give the ratios of a calibration"
        )
    schedule = np.ones(len(ratios), np.bool_)
    product, total, skipped = 1.0, 0.0, 0
    for i in range(max(1, math.ceil(always * len(ratios))), len(ratios)):
        product, skipped = product * ratios[i], skipped + 1
        total += abs(1 - product)
        schedule[i] = not (total < threshold and skipped <= max_skips)
        if schedule[i]:
            product, total, skipped = 1.0, 0.0, 0
    return at_steps(schedule)


@checked(interval=_STEPS, skips=count(1, 100), warm_up=_STEPS)
def deepcache(interval: int = 3, *, skips: int = 1, warm_up: int = 1) -> Cache:
    """Of a U-Net, the deep part computes in every `interval`-th step (DeepCache, Ma et al. 2023).

    In the others the outermost layers alone do, on the deep part's last result.

    Args:
        interval: N, 1 computes always.
        skips: the number of skip connections, from the outside, that are always computed: 1 is that of the
            first convolution, fastest; at most one more than the layers of a level.
        warm_up: so many first steps compute.
    """
    return dataclasses.replace(fora(interval, warm_up=warm_up), skips=skips)


# What people type: name -> (function, its arguments in order).
NOTATIONS: dict[str, tuple[Callable[..., Cache], tuple[str, ...]]] = {
    "fora": (fora, ("interval", "warm_up")),
    "taylor": (taylor, ("interval", "order", "warm_up")),
    "first-block": (first_block, ("threshold", "first_blocks", "last_blocks", "warm_up", "max_skips")),
    "deepcache": (deepcache, ("interval", "skips", "warm_up")),
}


@checked(notation=text)
def read(notation: str) -> Cache:
    """The cache of a notation: "fora:3", "taylor:4,1", "first-block:0.1", "deepcache:3".

    A name of `NOTATIONS`, and behind a colon its arguments in order, with commas; those left out have their
    defaults.

    Raises:
        UnknownNameError: no such name.
        InvalidArgumentError: too many arguments, or one that is no number or out of range.

    >>> from jaxldm import diffusion as D
    >>> int(D.caching.read("taylor:5").settings["interval"])
    5
    """
    name, _, rest = notation.partition(":")
    if name in ("teacache", "magcache"):
        raise InvalidArgumentError(
            f"cache {notation!r} needs numbers of the model, which no notation has: calibrate it in Python "
            f"(pipelines.calibrate_cache) and write cache=D.caching.{name}(...), or choose one of "
            f"{', '.join(NOTATIONS)}"
        )
    one_of("cache", name, NOTATIONS)
    function, names = NOTATIONS[name]
    given = rest.split(",") if ":" in notation else []
    if len(given) > len(names):
        words = ",".join(word.upper() for word in names)
        raise InvalidArgumentError(f"cache {notation!r} has {len(given)} numbers: write {name}:{words}")
    annotations = inspect.signature(function).parameters
    options: dict[str, Any] = {}
    for argument, word in zip(names, given, strict=False):
        kind = int if annotations[argument].annotation == "int" else float
        try:
            options[argument] = kind(word)
        except ValueError:
            whole = "a whole number" if kind is int else "a number"
            raise InvalidArgumentError(
                f"cache {notation!r}: its {argument} must be {whole}, got {word!r}"
            ) from None
    try:
        return function(**options)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"cache {notation!r}: {error}") from None


def a_cache_or_notation(name: str, value: Any) -> Cache:
    """A cache, or what `read` reads."""
    return read(value) if isinstance(value, str) else A_CACHE(name, value)
