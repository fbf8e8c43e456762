"""Counts of products and quotients are those of the decimals that were typed."""

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal, localcontext

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import diffusion as D
from jaxldm.exact import as_typed, ceil_product, ceil_quotient, floor_product, round_product

counts = st.integers(1, 10**12)
typed = st.one_of(
    st.decimals(0, 1000, places=4), st.floats(0, 1e9).map(lambda x: Decimal(repr(x)))
)  # "0.5800" and every float as Python prints it


def whole(number: Decimal, rounding: str) -> int:
    return int(number.to_integral_value(rounding))


@given(count=counts, text=typed)
def test_products_are_those_of_decimal(count, text):
    with localcontext(prec=2000):
        product = count * Decimal(repr(float(text)))
        assert floor_product(count, float(text)) == whole(product, ROUND_FLOOR)
        assert ceil_product(count, float(text)) == whole(product, ROUND_CEILING)
        assert round_product(count, float(text)) == whole(product, ROUND_HALF_EVEN)


@given(count=st.integers(1, 10**6), divisor=st.decimals("0.01", 1000, places=2))
def test_quotients_are_those_of_decimal(count, divisor):
    quotient = ceil_quotient(count, float(divisor))
    assert (quotient - 1) * divisor < count <= quotient * divisor


def test_what_binary_floats_get_wrong():
    off = [(n, k) for n in range(1, 201) for k in range(1, 101) if int(n * (k / 100)) != n * k // 100]
    assert len(off) > 5
    for n, k in off:
        assert floor_product(n, k / 100) == n * k // 100
    assert int(50 * 0.58) == 28 and len(D.cut_by_strength(D.make_grid(D.Flow(), 50), 0.58).t) == 30
    assert len(D.lcm_timesteps(29, strength=0.58)) == 29
    assert len(D.make_unmasking(50, strength=0.58).fraction) == 29


@pytest.mark.parametrize("scalar", [np.float32, np.float16, np.float64, np.array, jnp.float32, str])
def test_a_number_of_any_type_is_what_was_typed(scalar):
    assert as_typed(scalar(0.58)) == as_typed(0.58) and math.floor(50 * as_typed(scalar(0.58))) == 29
