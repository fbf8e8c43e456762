"""Caching in the sampling loop: what the network remembers rides in the state of the solver."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.arguments import checked, function, instance
from jaxldm.diffusion.caching import A_CACHE, Cache
from jaxldm.diffusion.denoiser import Denoiser
from jaxldm.diffusion.solvers.solver import A_SOLVER, Solver
from jaxldm.errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True, eq=False)
class CachedDenoiser(Denoiser):
    """A denoiser of a network that can reuse what it computed before; from `cached_denoiser`.

    Called as any denoiser it computes everything. `cached` makes a solver that hands it what it remembers.

    Attributes:
        cache: which steps compute.
        remembering: (name of the function, x, t, memory, i) -> (its result, memory) of step i: of "function"
            or "with_variance". The memory None begins one.
    """

    cache: Cache = None  # pyright: ignore[reportAssignmentType]
    remembering: Callable[..., tuple[Any, Any]] = None  # pyright: ignore[reportAssignmentType]

    def init(self, x: Float[Array, "B ..."]) -> Any:
        """The memory before the first step: zeros."""

        def begin(x):
            t = jnp.full(x.shape[:1], self.path.t_noisy, x.dtype)
            return self.remembering("function", x, t, None, jnp.int32(0))[1]

        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(begin, x))


@checked(
    network=function("(cache, memory, i, x, t, *condition) -> (output, memory)"),
    build=function("(network) -> denoiser"),
    cache=A_CACHE,
)
def cached_denoiser(
    network: Callable[..., tuple[Any, Any]], build: Callable[[Callable[..., Any]], Denoiser], cache: Cache
) -> CachedDenoiser:
    """A denoiser that remembers, from a network that does, and whatever makes a denoiser of a plain one.

    Args:
        network: (cache, memory, i, x [N, H, W, C], t [N], *condition) -> (output, memory), from
            `models.caching_network`.
        build: (network (x, t, *condition) -> output) -> denoiser: guidance, the prediction and so on. With
            guidance both branches are one batch and one decision.
        cache: from `D.caching`.

    Raises:
        InvalidArgumentError: when called, a denoiser that calls the network more than once, as guidance by a
            function of t does.

    >>> import jax
    >>> from jaxldm import diffusion as D, models
    >>> dit, path = models.build("tiny-dit", depth=2), D.Flow()
    >>> network = models.caching_network(dit, models.init(dit, jax.random.key(0)))
    >>> build = lambda network: D.denoiser(network, D.v(path))
    >>> denoise = D.cached_denoiser(network, build, D.caching.fora(2))
    >>> key, grid, solver = jax.random.key(0), D.make_grid(path, 4), D.cached(D.solvers.ddim(), denoise)
    >>> x_T = D.initial_noise(key, (1, 28, 28, 1), grid)
    >>> D.sample(key, denoise, solver, grid, x_T).shape
    (1, 28, 28, 1)
    """

    def forgetting(x, t, *condition):
        return network(cache, None, jnp.int32(0), x, t, *condition)[0]

    def remembering(name, x, t, memory, i):
        once = _Once(
            lambda *inputs: network(cache, memory, i, *inputs),
            "a cache needs a denoiser that calls the network once: give guidance_scale as a number",
        )
        result = getattr(build(once), name)(x, t)
        return result, once.kept()

    plain = build(forgetting)
    options = (plain.with_variance, plain.any_image, cache, remembering)
    return CachedDenoiser(plain.function, plain.path, *options, with_unchanged=plain.with_unchanged)


A_CACHED_DENOISER = instance(CachedDenoiser, "a denoiser from D.cached_denoiser")


class CachedState(NamedTuple):
    """The state of `cached`: the image, the solver's own state, and what the network remembers."""

    x: Float[Array, "B ..."]
    state: Any
    memory: Any


@checked(solver=A_SOLVER, denoise=A_CACHED_DENOISER)
def cached(solver: Solver, denoise: CachedDenoiser) -> Solver:
    """The solver with what the denoiser remembers in its state.

    Use it with that denoiser. Where no step reuses anything, it is the solver as it is, to the last bit.

    Args:
        solver: one that calls the network once a step: ddim, euler, ddpm, dpmpp_2m, unipc and so on.
        denoise: from `cached_denoiser`.

    Raises:
        InvalidArgumentError: when its step is traced, another solver, or a schedule longer than the grid.
    """

    def init(x):
        return CachedState(x, solver.init(x), denoise.init(x))

    def step(state, denoise, grid, i, keys):
        A_CACHED_DENOISER("denoise", denoise)
        denoise.cache.check_steps(grid.t.shape[0] - 1)
        once = _Once(
            lambda name, x, t: denoise.remembering(name, x, t, state.memory, i),
            "a cache needs a solver that calls the network once a step: choose ddim, euler, ddpm, dpmpp_2m, "
            "unipc or another that does so, or leave the cache out",
        )

        def of(name) -> Any:
            whole = getattr(denoise, name)
            return None if whole is None else lambda x, t: once(name, x, t)

        unchanged = None if denoise.with_unchanged is None else of("with_unchanged")
        plain = Denoiser(
            of("function"), denoise.path, of("with_variance"), denoise.any_image, with_unchanged=unchanged
        )
        inner, x_0 = solver.step(state.state._replace(x=state.x), plain, grid, i, keys)
        return CachedState(inner.x, inner, once.kept()), x_0

    return Solver(init, step)


class _Once:
    """A function of (result, memory) as one of its result, which keeps the memory of its only call."""

    def __init__(self, call: Callable[..., tuple[Any, Any]], refusal: str):
        self._call, self._refusal, self._memories = call, refusal, []
        self._trace = _trace()

    def __call__(self, *inputs: Any) -> Any:
        if self._memories or _trace() != self._trace:  # again, or in a branch or loop of its own
            raise InvalidArgumentError(self._refusal)
        result, memory = self._call(*inputs)
        self._memories.append(memory)
        return result

    def kept(self) -> Any:
        """The memory of the call."""
        if not self._memories:
            raise InvalidArgumentError(self._refusal)
        return self._memories[0]


def _trace() -> Any:
    """What is being traced: another value inside of each jit, scan, cond or vmap."""
    # JAX 0.8 has it in jax.core alone.
    place: Any = jax.extend.core if hasattr(jax.extend.core, "get_opaque_trace_state") else jax.core
    return place.get_opaque_trace_state(convention="flax")
