"""Shape annotations checked at run time: `Float[Array, "B H W C"]` for arguments and for what is returned."""

import contextlib

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def install(*packages: str) -> None:
    """Make the functions of these packages checkable, which must not be imported yet; `checking` checks."""
    jaxtyping.Array = (
        jax.Array | np.ndarray
    )  # the library takes arrays of NumPy wherever it takes those of JAX
    jaxtyping.install_import_hook(packages, "annotations.check")
    jaxtyping.config.update("jaxtyping_disable", True)


def check(function):
    """The function with its arguments checked; unchanged if it is nested, or annotated with `Self`."""
    if "<locals>" in function.__qualname__:
        return function  # defined again in each call of the outer function: checking it would be slow
    try:
        return _beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function


@contextlib.contextmanager
def checking(on: bool):
    """Check annotations, or not, inside the block."""
    jaxtyping.config.update("jaxtyping_disable", not on)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", True)
