"""Values made of functions that are equal when equal calls made them.

A solver or a prediction is a NamedTuple of closures. Python compares closures by identity, so two calls of
`ddim()` would give two different solvers, and a jitted function with a static solver would compile twice.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

Factory = TypeVar("Factory", bound=Callable[..., Any])


class MadeFunction:
    """A function that is a field of a value, equal to the same field of every value made by an equal call.

    Attributes:
        function: the closure itself.
        call: (factory, arguments) that made the value.
        field: its name in the value.
    """

    def __init__(self, function: Callable[..., Any], call: tuple[Any, ...], field: str):
        self.function = function
        self.call = call
        self.field = field
        self.__name__ = getattr(function, "__name__", field)
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, MadeFunction):
            return NotImplemented
        return self.field == other.field and self.call == other.call

    def __hash__(self) -> int:
        return hash((self.call, self.field))

    def __repr__(self) -> str:
        factory, arguments = self.call
        options = ", ".join(f"{name}={value!r}" for name, _, value in arguments)
        return f"{factory.__name__}({options}).{self.field}"


def equal_by_call(factory: Factory) -> Factory:
    """Decorates a function that returns a NamedTuple of functions: equal calls give equal, hashable values.

    The call is compared as Python binds it: `ddim()`, `ddim(0.0)` and `ddim(eta=0.0)` are equal. Arguments
    are compared with their types, lists as tuples. Where an argument cannot be hashed (an array), the value
    compares by identity, as it would without the decorator. `value._replace(step=other)` is equal only to a
    value with that very `other`.

    >>> from jaxldm import diffusion as D
    >>> D.solvers.ddim(0.5) == D.solvers.ddim(eta=0.5), D.solvers.ddim(0.5) == D.solvers.ddim()
    (True, False)
    """
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        value = factory(*args, **kwargs)
        if not hasattr(value, "_asdict"):
            return value
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = tuple((name, *_comparable(given)) for name, given in bound.arguments.items())
        call = (factory, arguments)
        try:
            hash(call)
        except TypeError:
            return value
        made = {
            field: MadeFunction(function, call, field)
            for field, function in value._asdict().items()
            if callable(function) and not isinstance(function, MadeFunction)
        }
        return value._replace(**made)

    return cast(Factory, make)


def _comparable(value: Any) -> tuple[type, Any]:
    """(type, value): 1, 1.0 and True are equal in Python, but not to a compiler. Lists become tuples."""
    several = type(value) in (list, tuple)
    return type(value), (tuple(_comparable(item) for item in value) if several else value)
