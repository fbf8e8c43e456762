"""Functions on the host that a compiled sampler calls, without being part of what is compiled.

What JAX 0.10 does with a host callback in a compiled program, and what follows:

* `jax.debug.callback(f, ...)` makes f part of the traced program: another f is another program, so a jitted
  function that closes over a lambda, or takes it as a static argument, compiles again for every lambda.
  Therefore `Listener`: the compiled program calls one function of this module and hands it a number, which is
  an ordinary argument, and the number finds the listener's function in a table.
* The key of the persistent compilation cache does not depend on the callback (the program holds its index,
  no pointer), but JAX never writes a program with a host callback to that cache
  (`jax._src.compiler._cache_write`: "Not writing persistent cache entry ... because it uses host
  callbacks"). So every process compiles it again, whatever the callback is.
  Therefore `sample`, called outside of jit, compiles one step, which holds no callback, and loops on the
  host: that program is found in the persistent cache. Inside jit there is no host to loop on, and a callback
  costs the persistent cache; a jitted `sample_step` in a Python loop of one's own does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxldm.arguments import checked
from jaxldm.arguments import function as a_function
from jaxldm.errors import InvalidArgumentError

_numbers = itertools.count(1)
_functions: dict[int, Callable[..., None]] = {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Listener:
    """A function on the host, as an argument of a jitted function; from `listening`.

    A tree with one leaf, so that jit, vmap, pmap and shard_map take it as they take arrays, and another
    listener compiles nothing. Call it in the jitted function with the values that the host should see.

    Attributes:
        number: uint32, its place in the table of this module.
    """

    number: Any

    def __call__(self, *values: Any) -> None:
        jax.debug.callback(_dispatch, self.number, *values)


@checked(function=a_function("(*values)"))
@contextlib.contextmanager
def listening(function: Callable[..., None]) -> Iterator[Listener]:
    """A `Listener` for as long as the `with` block lasts; at its end all calls have arrived.

    Args:
        function: called on the host with what the compiled function hands to the listener. Calls of one run
            arrive in any order; under vmap and on several devices there is one for each run or device.

    >>> import jax
    >>> from jaxldm import diffusion as D
    >>> double = jax.jit(lambda x, listener: (listener(x), 2 * x)[1])
    >>> with D.listening(lambda x: print("heard", x)) as listener:
    ...     y = double(3, listener)
    heard 3
    """
    number = next(_numbers)
    _functions[number] = function
    try:
        yield Listener(np.uint32(number))
    finally:
        jax.effects_barrier()
        del _functions[number]


def report(function: Callable[..., None] | None, *values: Any) -> None:
    """Calls a function on the host from a traced one; None is nobody."""
    if isinstance(function, Listener):
        function(*values)
    elif function is not None:
        jax.debug.callback(function, *values)


def _dispatch(number: Any, *values: Any) -> None:
    function = _functions.get(int(number))
    if function is None:
        raise InvalidArgumentError("a Listener was called after its `with listening(...)` block had ended")
    function(*values)
