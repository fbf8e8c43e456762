"""Annotations checked at run time: `Float[Array, "B H W C"]` for arguments and for what is returned.

Every function and method of the packages given to `install`, and the fields of every dataclass once it is
made. Left out:

- functions inside functions: they are made again in each call of the outer one, which would be slow;
- all but the first `MOST_CALLS` calls of a function in a file of tests: a few tiny ones are called ten
  thousand times;
- the fields of NamedTuples and of other pytrees: JAX fills them with what it likes while it maps over them.

Where a function refuses an argument by itself, its own error is what the caller sees, as without checks: a
violation is what the library did not notice.
"""

import contextlib
import dataclasses
import functools
import inspect
import random
import types

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype
from beartype._check.code import codemain
from beartype.roar import BeartypeDecorHintPep673Exception
from jaxtyping import TypeCheckError, jaxtyped

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float

MOST_CALLS = 50
_files = 0  # that have begun


def install(*packages: str) -> None:
    """Check the functions of these packages, which must not be imported yet, from now on."""
    # The library takes arrays of NumPy wherever it takes those of JAX, and NumPy makes scalars of 0-d arrays.
    jaxtyping.Array = jax.Array | np.ndarray | np.generic
    jaxtyping.jaxtyped = checked
    # Of a container one element is checked, a random one: not by the generator that hypothesis watches.
    codemain.getrandbits = random.Random(0).getrandbits
    jaxtyping.install_import_hook(packages, "annotations.check")


def checked(function=None, *, typechecker=None):
    """What the import hook decorates each function and class with."""
    if function is None:
        return functools.partial(checked, typechecker=typechecker)
    if isinstance(function, classmethod | staticmethod):
        return type(function)(checked(function.__func__, typechecker=typechecker))
    if isinstance(function, property):
        return property(*(part and checked(part, typechecker=typechecker) for part in _parts(function)))
    if inspect.isclass(function):
        is_pytree = hasattr(function, "_flax_dataclass")
        if dataclasses.is_dataclass(function) and "__init__" in vars(function) and not is_pytree:
            function.__init__ = _fields_checked(function.__init__, typechecker)
        return function
    if not hasattr(function, "__code__") or "<locals>" in function.__qualname__:
        return function
    return _own_errors_first(function, typechecker)


def _fields_checked(init, typechecker):
    """`__init__` of a dataclass, after which all fields are as annotated, whatever they are made from."""

    names = list(inspect.signature(init).parameters)[1:]

    @functools.cache
    def check_fields():
        return jaxtyped(_empty_like(init), typechecker=typechecker)

    @functools.wraps(init)
    def make(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if not jaxtyping.config.jaxtyping_disable:
            check_fields()(self, **{name: getattr(self, name) for name in names})

    return make


def _empty_like(function):
    """A function with the same annotations that does nothing."""
    empty = types.FunctionType((lambda *args, **kwargs: None).__code__, function.__globals__)
    return functools.update_wrapper(empty, function)


def _parts(descriptor: property):
    return descriptor.fget, descriptor.fset, descriptor.fdel


def _own_errors_first(function, typechecker):
    """The function with checks; an argument that it refuses by itself is no violation."""
    place = f"the parameters of {function.__module__}.{function.__qualname__}."
    calls, file = 0, 0

    @functools.cache  # made at the first call: most functions are not called, and all names are defined then
    def with_checks():
        return jaxtyped(function, typechecker=typechecker)

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal calls, file
        calls, file = (calls + 1, file) if file == _files else (0, _files)
        if calls >= MOST_CALLS or jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        try:
            return with_checks()(*args, **kwargs)
        except TypeCheckError as violation:
            if place in str(violation):
                function(*args, **kwargs)  # raises what the caller sees without checks
            raise

    return call


def check(function):
    """The function with its arguments checked by beartype; unchanged if it is annotated with `Self`."""
    try:
        return _beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function


def begin_file() -> None:
    """Count calls from 0 again."""
    global _files
    _files += 1


@contextlib.contextmanager
def checking(on: bool):
    """Check annotations, or not, inside the block: one test."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", not on)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
