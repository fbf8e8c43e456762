"""Solvers and spacings from outside: by "package.module:function" and by entry points."""

import importlib.metadata
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm import schedulers
from jaxldm.errors import InvalidArgumentError, UnknownNameError

PATH = D.Flow()
MODULE = '''
from jaxldm import diffusion as D


def halfway(strength: float = 0.5) -> D.Solver:
    """x_s = x_t + strength (ddim(x_t) - x_t)."""
    inner = D.solvers.ddim()

    def step(state, denoise, grid, i, keys):
        new, x_0 = inner.step(state, denoise, grid, i, keys)
        return new._replace(x=state.x + strength * (new.x - state.x)), x_0

    return D.Solver(inner.init, step)


def two_rows(path, count, *, middle=0.5):
    return D.at_times(path, [path.t_noisy, middle])


def no_solver():
    return 3


nothing = None
'''


@pytest.fixture(autouse=True)
def outside(tmp_path, monkeypatch):
    """An importable module `outside_samplers`, as a package of another author."""
    (tmp_path / "outside_samplers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("outside_samplers", None)


@pytest.fixture
def entry_points(monkeypatch):
    """The same, installed: it adds a solver and a spacing by name."""

    def found(group):
        values = {"jaxldm.solvers": "halfway", "jaxldm.spacings": "two_rows"}
        value = f"outside_samplers:{values[group]}"
        return [importlib.metadata.EntryPoint(values[group], value, group)]

    monkeypatch.setattr(importlib.metadata, "entry_points", found)


def test_a_solver_from_outside():
    solver = D.solvers.make("outside_samplers:halfway", strength=1.0)
    assert solver == D.solvers.make("outside_samplers:halfway", strength=1.0)
    assert solver != D.solvers.make("outside_samplers:halfway")
    key, grid = jax.random.key(0), D.make_grid(PATH, 4)
    denoise, x = D.gaussian_denoiser(PATH), jnp.ones((1, 2, 2, 1))
    ours, same = (D.sample(key, denoise, s, grid, x) for s in (solver, D.solvers.ddim()))
    np.testing.assert_allclose(ours, same, rtol=1e-6)


def test_a_solver_from_outside_on_the_grid_of_a_file():
    config = {"_class_name": "DDIMScheduler", "timestep_spacing": "linspace"}
    ours = schedulers.from_config(config, "outside_samplers:halfway")
    assert ours.solver == D.solvers.make("outside_samplers:halfway") and ours.grid.spacing == "linspace"
    with pytest.raises(UnknownNameError, match="did you mean 'ddim'"):
        schedulers.from_config(config, "dddim")


def test_a_path_has_a_default_spacing():
    class Even(type(PATH)):
        default_spacing = "outside_samplers:two_rows"

    np.testing.assert_array_equal(D.make_grid(Even(), 2).t, np.float32([1, 0.5, 0]))
    np.testing.assert_array_equal(schedulers.GridRule().make(Even(), 2).t, np.float32([1, 0.5, 0]))


def test_a_spacing_from_outside():
    grid = D.make_grid(PATH, 2, spacing="outside_samplers:two_rows", middle=0.25)
    np.testing.assert_array_equal(grid.t, np.float32([1, 0.25, 0]))


def test_a_spacing_from_outside_on_the_grid_of_a_file():
    """It ends as it likes; one with the option `final` ends as the file says."""
    rule, name = schedulers.GridRule(final="sigma_min"), "outside_samplers:two_rows"
    assert rule.respaced("karras").final == rule.respaced().final == "sigma_min"
    np.testing.assert_array_equal(rule.respaced(name).make(PATH, 2).t, np.float32([1, 0.5, 0]))
    with pytest.raises(InvalidArgumentError, match="cannot be combined with sigmas"):
        rule.respaced(name, "karras").make(PATH, 2)


def test_entry_points_add_names(entry_points):
    assert D.solvers.names() == [*D.solvers.SOLVERS, "halfway"]
    assert D.spacing_names() == [*D.SPACINGS, "two_rows"]
    assert D.solvers.make("halfway", strength=0.2) == D.solvers.make("halfway", strength=0.2)
    np.testing.assert_array_equal(D.make_grid(PATH, 2, "two_rows").t, np.float32([1, 0.5, 0]))
    with pytest.raises(UnknownNameError, match="did you mean 'halfway'"):
        D.solvers.make("halfwy")


@pytest.mark.parametrize(
    "call, error, words",
    [
        (
            lambda: D.solvers.make("no_such_package:solver"),
            InvalidArgumentError,
            "No module named.*PYTHONPATH=.",
        ),
        (lambda: D.solvers.make("outside_samplers:other"), InvalidArgumentError, "no attribute 'other'"),
        (lambda: D.solvers.make(":halfway"), InvalidArgumentError, "package.module:function"),
        (lambda: D.solvers.make("outside_samplers:nothing"), InvalidArgumentError, "name a function"),
        (
            lambda: D.solvers.make("outside_samplers:no_solver"),
            InvalidArgumentError,
            "a Solver, got 3",
        ),
        (lambda: D.solvers.make("outside_samplers:halfway", eta=1), InvalidArgumentError, "has: strength"),
        (lambda: D.solvers.make("halfway"), UnknownNameError, "unipc, .*package.module:function"),
        (lambda: D.make_grid(PATH, 2, "two_rows"), UnknownNameError, "karras, .*package.module:function"),
        (lambda: D.make_grid(PATH, 2, "trailing", rho=7.0), InvalidArgumentError, "has no option 'rho'"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()
