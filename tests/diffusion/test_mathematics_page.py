"""Runs the code of docs/mathematics.md, and measures the solver that the page adds."""

import re
from pathlib import Path

import annotations
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import diffusion as D

PAGE = (Path(__file__).parents[2] / "docs" / "mathematics.md").read_text()


@pytest.fixture(scope="module")
def page():
    """The names that the page defines, block after block."""
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 7
    with annotations.checking(False):  # readers have no such checks, and the page has plain numbers
        for block in blocks:
            exec(compile(block, "docs/mathematics.md", "exec"), names)
    return names


def test_the_page_draws_what_it_says(page):
    assert np.allclose(page["errors"], [0.19, 0.06, 0.002], rtol=0.25)  # the figures beside the code
    assert page["draw"]._cache_size() == 1
    assert np.isfinite(page["loss"]) and set(page["metrics"]) == {"mse"}
    assert np.isfinite(
        D.sample(page["key"], page["guided"], D.solvers.ddim(), page["second_half"], page["x_T"])
    ).all()
    assert page["inversion"].t[0] == 0
    assert page["predictions"].shape == (20, 2, 8, 8, 1) and np.isfinite(page["token_loss"])


def test_every_solver_has_its_row():
    assert set(re.findall(r"^\| `(\w+)\(", PAGE.split("## Solver")[1], re.MULTILINE)) == set(
        D.solvers.SOLVERS
    )


def test_the_added_solver_is_of_second_order(page, x64):
    path = D.EDM()
    x = 80 * np.random.default_rng(0).standard_normal((4, 3))
    denoise = D.gaussian_denoiser(path, 0.3, 0.5)
    exact = D.gaussian_solution(path, 0.3, 0.5, jnp.asarray(x), path.t_noisy, path.t_min)
    run = jax.jit(
        lambda grid: D.sample(jax.random.key(0), denoise, page["adams_bashforth"](), grid, jnp.asarray(x))
    )
    steps = (64, 128, 256, 512)
    errors = [jnp.abs(run(D.pad(D.make_grid(path, n, final="sigma_min"), 512)) - exact).max() for n in steps]
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(2, abs=0.2)


def test_the_added_solver_is_finite_at_both_ends(page):
    path = D.Flow()
    x_0 = D.sample(
        jax.random.key(0),
        D.gaussian_denoiser(path, 0.3, 0.5),
        page["adams_bashforth"](),
        D.make_grid(path, 5),
        jnp.ones((2, 3)),
    )
    assert np.isfinite(x_0).all()
