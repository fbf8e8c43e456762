"""Counts that come of a product or quotient, without the rounding of binary floating point.

50 * 0.58 is 28.999999999999996 in Python, and `int` of it 28. Here a number means the decimal that was typed
(0.58, the shortest one that reads back as the same float), and a count is computed from that exactly.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

# What a device's numbers hold: counts, extents and indices are int32, seeds uint32, all else float32.
LARGEST_INT32, LARGEST_UINT32, LARGEST_INT64 = 2**31 - 1, 2**32 - 1, 2**63 - 1
LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127
# Published paths have 1000 or 2000 timesteps, of which a table is made; a grid has some hundreds of rows.
MAX_TIMESTEPS, MAX_STEPS = 100_000, 10**6


def as_typed(number: Any) -> Fraction:
    """The number exactly as it was typed: an int, a float of any precision, a `Fraction` or a scalar array.

    >>> as_typed(0.58), as_typed(3), as_typed(1e-5)
    (Fraction(29, 50), Fraction(3, 1), Fraction(1, 100000))
    """
    return number if isinstance(number, Fraction) else Fraction(str(number))


def floor_product(*factors: Any) -> int:
    """The largest whole number that is not above the product of the factors as they were typed.

    >>> floor_product(50, 0.58), int(50 * 0.58)
    (29, 28)
    """
    return math.floor(math.prod(map(as_typed, factors)))


def ceil_product(*factors: Any) -> int:
    """The smallest whole number that is not below the product of the factors as they were typed.

    >>> ceil_product(100, 0.07), math.ceil(100 * 0.07)
    (7, 8)
    """
    return math.ceil(math.prod(map(as_typed, factors)))


def round_product(*factors: Any) -> int:
    """The whole number next to the product of the factors as they were typed; halves go to the even one.

    >>> round_product(3, 0.5), round_product(15, 0.1)
    (2, 2)
    """
    return round(math.prod(map(as_typed, factors)))


def ceil_quotient(dividend: Any, divisor: Any) -> int:
    """The smallest whole number that is not below the quotient of two numbers as they were typed.

    >>> ceil_quotient(4267, 42.67), ceil_quotient(1024, 42.67)
    (100, 24)
    """
    return math.ceil(as_typed(dividend) / as_typed(divisor))


def least_share(count: int) -> str:
    """The smallest decimal of about three digits that leaves one of `count` or more, for a message.

    >>> least_share(3), least_share(8), least_share(1000), least_share(1)
    ('0.334 or more', '0.125 or more', '0.001 or more', '1')
    """
    digits = len(str(count)) + 2
    return "1" if count == 1 else f"{-(-(10**digits) // count) / 10**digits:g} or more"
