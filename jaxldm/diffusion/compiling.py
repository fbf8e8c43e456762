"""Programs that are compiled once, however often the closures that they are made of are made again.

`jax.jit` finds a compiled function again by the identity of the Python function. Samplers are called with
closures (a network with its weights, condition and guidance), which are new objects in each call, so every
call would compile again. `compile_once` compares the traced programs themselves.
"""

from __future__ import annotations

import collections
import hashlib
import threading
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.core

# The most programs kept; the one used longest ago goes first.
MAX_PROGRAMS = 16
_programs: collections.OrderedDict[Any, Callable[..., Any]] = collections.OrderedDict()
_lock = threading.Lock()


def traced(*trees: Any) -> bool:
    """Whether a leaf of the trees is a tracer of an outer jit, grad or vmap, whose value cannot be seen."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def jit_disabled() -> bool:
    """Whether functions run operation by operation (`jax.disable_jit`)."""
    return cast(Any, jax.config).jax_disable_jit


def compile_once(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """The function, compiled for arguments of these shapes and types, or as compiled before.

    The function is traced and lowered; a program with the same StableHLO text that was compiled before in
    this process is used again. Arrays that the function closes over (the weights of a network) are arguments
    of the program, so other weights of the same shapes compile nothing, and the persistent compilation cache
    of JAX finds the program too.

    What cannot be compared runs as it is: a function that closes over tracers, or that calls back to Python
    (`jax.debug.callback`, `jax.pure_callback`), because the text does not say which function is called.

    Args:
        function: of arrays and trees of them; called once, to trace it.
        *arguments: concrete ones.
    """
    if jit_disabled():
        return function
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    if traced(closed.consts):
        return function
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shapes)
    program = jax.jit(lambda constants, leaves: jax.core.eval_jaxpr(jaxpr, constants, *leaves))
    text = program.lower(closed.consts, jax.tree.leaves(arguments)).as_text()
    if "callback" in text or "host_transfer" in text:
        return function
    key = hashlib.sha256(text.encode()).digest(), jax.config.read("jax_disable_most_optimizations")
    with _lock:
        program = _programs.setdefault(key, program)
        _programs.move_to_end(key)
        while len(_programs) > MAX_PROGRAMS:
            _programs.popitem(last=False)

    def run(*arguments: Any) -> Any:
        return jax.tree.unflatten(structure, program(closed.consts, jax.tree.leaves(arguments)))

    return run
