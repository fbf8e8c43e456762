"""Solvers made by equal calls are equal, so that jit finds the function that it has compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm.diffusion.values import MadeFunction, equal_by_call

PATH = D.Flow()
# Calls that must be equal to themselves, and to no other in the list.
CALLS = {
    "restart": lambda: D.solvers.restart(D.solvers.heun(s_churn=10.0)),
    "restart of another": lambda: D.solvers.restart(D.solvers.heun(s_churn=20.0)),
    "momentum": lambda: D.with_momentum(D.solvers.unipc(order=3, disable_corrector=[0, 1])),
    "unipc": lambda: D.solvers.unipc(order=3, disable_corrector=[0, 1]),
    "unipc of 1": lambda: D.solvers.unipc(order=1),
    "ddim with noise": lambda: D.solvers.make("ddim", eta=0.5),
    **{name: functools.partial(D.solvers.make, name) for name in D.solvers.SOLVERS if name != "restart"},
}
SAME = {"dpmpp_1s", "euler", "dpm2"}  # other names of ddim and of dpm2_ancestral(eta=0)


def test_equal_calls_make_equal_solvers():
    solvers = {name: call() for name, call in CALLS.items() if name not in SAME}
    assert {name: call() for name, call in CALLS.items() if name not in SAME} == solvers
    assert len(set(solvers.values())) == len(solvers)
    assert D.solvers.euler() == D.solvers.dpmpp_1s() == D.solvers.ddim(eta=0.0) == D.solvers.ddim(0.0)
    assert D.solvers.dpm2() == D.solvers.dpm2_ancestral(eta=0.0) != D.solvers.dpm2_ancestral()


def test_numbers_of_any_type_make_equal_solvers():
    """A NumPy number, an array without axes or an int for a float would otherwise compile again."""
    half = D.solvers.ddim(eta=0.5)
    for eta in (np.float64(0.5), np.float32(0.5), np.array(0.5), jnp.float32(0.5)):
        assert D.solvers.ddim(eta=eta) == D.solvers.make("ddim", eta=eta) == half
    assert D.solvers.euler_ancestral(s_noise=1) == D.solvers.euler_ancestral()
    assert D.solvers.unipc(order=np.int64(3)) == D.solvers.unipc(order=3)
    assert len({D.EDM(sigma_min=1), D.EDM(sigma_min=np.float64(1)), D.EDM(sigma_min=1.0)}) == 1


def test_a_replaced_function_makes_another_value():
    solver = D.solvers.ddim()
    assert solver._replace(step=D.solvers.ddim().step) == solver
    assert solver._replace(step=D.solvers.ddim(0.5).step) != solver
    assert solver._replace(step=lambda *arguments: None) != solver
    assert repr(solver.step) == "ddim(eta=0.0, keeps_epsilon=False).step"


def test_arguments_that_cannot_be_hashed_compare_by_identity():
    def make():
        return D.inpaint(D.solvers.ddim(), np.ones((4, 4, 1)), np.zeros((4, 4, 1)))

    first, second = make(), make()
    assert first == first and first != second and hash(first) != hash(second)


def test_a_static_solver_compiles_once():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(solver, x):
        traces.append(solver)
        grid = D.make_grid(PATH, 4)
        return D.sample(jax.random.key(0), D.gaussian_denoiser(PATH), solver, grid, x)

    x = jnp.ones((1, 2, 2, 1))
    for _ in range(3):
        run(D.solvers.dpmpp_2m(), x)
    assert len(traces) == 1
    run(D.solvers.dpmpp_2m(solver_type="heun"), x)
    assert len(traces) == 2


def test_the_decorator_keeps_signature_and_errors():
    @equal_by_call
    def make(scale: float, *, name: str = "a") -> D.Solver:
        """Doc."""
        return D.Solver(init=lambda x: scale * x, step=lambda *arguments: name)

    assert make.__doc__ == "Doc." and make.__name__ == "make"
    assert make(2.0) == make(scale=2.0, name="a") != make(2.0, name="b")
    assert isinstance(make(2.0).init, MadeFunction) and make(2.0).init(3.0) == 6.0
    with pytest.raises(TypeError, match="scale"):
        make()


def test_numbers_in_tuples_are_compared_with_their_types():
    @equal_by_call
    def make(numbers):
        return D.solvers.ddim()._replace(step=lambda *arguments: numbers)

    assert make((1, 2.0)) == make((1, 2.0))
    assert make((1, 2.0)) != make((1.0, 2.0))
    assert make(([1], 2)) == make(([1], 2))
    hash(make(([1], 2)))
