"""The checks of arguments: what passes, as what it arrives, and the line that refuses the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import arguments as A
from jaxldm import diffusion as D
from jaxldm import exact
from jaxldm.errors import InvalidArgumentError, UnknownNameError, shown


@pytest.mark.parametrize(
    "check, given, wanted",
    [
        (A.count(1), np.int64(3), 3),
        (A.count(1), np.array(3), 3),
        (A.number(0, 1), np.float32(0.58), 0.58),  # the decimal that was typed, as `jaxldm.exact` has it
        (A.number(0, 1), 1, 1.0),
        (A.number(infinite=True), np.inf, np.inf),
        (A.number(), jnp.float32(0.5), 0.5),
        (A.optional(A.count(1)), None, None),
        (A.flag, np.True_, True),
        (A.several(A.count(0)), [1, 2], (1, 2)),
        (A.choice("colour", ("red", "blue")), "red", "red"),
    ],
)
def test_what_is_allowed_arrives_as_plain_python(check, given, wanted):
    arrived = check("x", given)
    assert arrived == wanted and type(arrived) is type(wanted)


@pytest.mark.parametrize(
    "check, given, message",
    [
        (A.count(1), 3.0, "x must be a whole number of at least 1, got 3.0: write x=3"),
        (A.text, "a\udcff", r"x must be a text, got 'a\udcff'"),
        (A.count(1), True, "x must be a whole number of at least 1, got True"),
        (A.count(1), 2**31, "x must be a whole number from 1 to 2147483647, got 2147483648"),
        (A.count(1, 4), 5, "x must be a whole number from 1 to 4, got 5"),
        (A.number(above=0), 0, "x must be a positive number, got 0"),
        (A.number(above=0, high=1), np.nan, "x must be a number in (0, 1], got nan"),
        (A.number(), 1e39, "x must be a finite number, got 1e+39"),
        (A.number(), "1", "x must be a finite number, got '1'"),
        (A.flag, 1, "x must be True or False, got 1"),
        (A.function("(x, t) -> x_0"), 3, "x must be a function (x, t) -> x_0, got 3"),
        (
            A.function("(x, t) -> x_0"),
            lambda x: x,
            "x must be a function (x, t) -> x_0, got one of (x)",
        ),
        (A.several(A.count(0)), [1, -2], "x[1] must be a whole number of at least 0, got -2"),
        (
            A.array("whole"),
            np.zeros((2, 3)),
            "x must be an array of whole numbers, got an array [2, 3] of float64",
        ),
        (A.array("real"), [[1], [1, 2]], "x must be an array of numbers, got [[1], [1, 2]]"),
        (A.array("real"), None, "x must be an array of numbers, got None"),
        (A.a_key, 3, "x must be a key, got 3: write jax.random.key(3)"),
        (A.a_key, None, "x must be a key, got None: write jax.random.key(0)"),
    ],
)
def test_the_rest_is_refused_in_one_line(check, given, message):
    with pytest.raises(InvalidArgumentError) as error:
        check("x", given)
    assert str(error.value) == message


def test_old_keys_are_wrapped():
    old, new = jax.random.PRNGKey(0), jax.random.key(0)
    assert A.a_key("key", old) == new and A.a_key("key", np.asarray(old)) == new
    assert A.one_key("key", new) is new


def test_a_decorated_function_checks_what_a_call_gives():
    @A.checked(steps=A.count(1), rho=A.optional(A.number()))
    def run(steps, *, rho=None):
        return steps, rho

    assert run(np.int32(2)) == (2, None) and run(steps=3, rho=1) == (3, 1.0)
    with pytest.raises(InvalidArgumentError, match="steps must"):
        run(0)
    with pytest.raises(InvalidArgumentError, match="rho must"):
        run(1, rho="x")


def test_tracers_pass_as_arrays_and_not_as_settings():
    """Nothing is added to a program, and a setting of a solver cannot be an argument of a jitted function."""
    check = A.array("real", axes=0, low=0, high=1)
    plain, checking = (jax.make_jaxpr(f)(0.5) for f in (lambda x: 2 * x, lambda x: 2 * check("x", x)))
    assert str(plain) == str(checking)
    with pytest.raises(InvalidArgumentError, match="known before anything is compiled"):
        jax.jit(lambda eta: A.number()("eta", eta))(0.5)


def test_messages_stay_short():
    with pytest.raises(UnknownNameError) as error:
        A.choice("name", [f"a_rather_long_name_{k}" for k in range(100)])("x", "y" * 1000)
    assert len(str(error.value)) < 400
    assert len(shown("y\n" * 1000)) <= 60 and "\n" not in shown("y\n" * 1000)
    with pytest.raises(InvalidArgumentError, match="got a value of type int"):
        A.number()("x", 10**5000)  # of more digits than Python prints
    assert shown(A.count) == "the function count" and shown(int) == "the class int"


@pytest.mark.parametrize("scale", [2.0, 2])
def test_a_python_number_does_not_change_the_dtype_that_it_is_combined_with(scale):
    x = jnp.ones((1, 2, 2, 1), jnp.bfloat16)
    assert D.guide(x, x, scale).dtype == D.project_guidance(x, x, scale, 0, 1).dtype == jnp.bfloat16


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, [1, 2**40], 1e39, [0.5, -1e300], np.float64(1e39)])
def test_numbers_that_a_device_would_change_are_refused(value):
    """2**32 + 2 would be 2 in int32, and 1e39 infinity in float32."""
    with pytest.raises(InvalidArgumentError, match="x must hold numbers of at most"):
        A.array()("x", value)


def test_the_largest_numbers_that_a_device_holds_pass():
    largest = float(np.finfo(np.float32).max)
    for value in (2**31 - 1, -(2**31), largest, -largest, np.inf, np.array([largest, np.nan])):
        A.array()("x", value)
    assert (largest, np.iinfo(np.int32).max) == (exact.LARGEST_FLOAT32, exact.LARGEST_INT32)


def test_lengths_of_axes():
    x, y = np.zeros((2, 3)), np.zeros((1, 3))
    A.check_dims(x=(x, "B N"), y=(y, "#B N"))
    A.check_dims(x=(x, "#B N"), y=(x, "#B N"), z=(y, "1 3"))
    with pytest.raises(
        InvalidArgumentError, match=r"x \[2, 3\], y \[1, 3\]: x \[B, N\], y \[B, N\] are wanted"
    ):
        A.check_dims(x=(x, "B N"), y=(y, "B N"))
    with pytest.raises(InvalidArgumentError):
        A.check_dims(x=(np.zeros((3, 3)), "#B N"), y=(x, "#B N"))


def test_arrays_that_go_with_each_other_are_all_empty_or_none():
    A.check_broadcast(mean=np.zeros(1), x=np.zeros((4, 3)))
    A.check_broadcast(mean=np.zeros(0), x=np.zeros((4, 0)))
    with pytest.raises(InvalidArgumentError, match="mean"):
        A.check_broadcast(mean=np.zeros(0), x=np.zeros((4, 1)))
