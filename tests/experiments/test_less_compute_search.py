"""The table of searches: what each costs, and that rows are made once."""

import jax
import numpy as np
import pytest

from experiments.less_compute import search
from jaxldm import diffusion as D


def test_costs():
    """At most eight runs, or what the name says; searches over paths count the steps of their rounds."""
    costs = {name: method.evaluations(50) for name, method in search.METHODS.items()}
    assert costs["sampling"] == 50 and costs["guidance 3, 4 times the steps"] == 400
    assert costs["best of 8"] == costs["neighbours"] == costs["steering, max"] == 400
    # Rows 25, 31, 37, 43 and 49: back by 2, forward by 8, the last one to the end.
    assert costs["paths"] == 2 * 25 + 2 * 4 * (4 * 8 + 3)
    assert max(costs.values()) == 400


def test_rows(random_run, tmp_path, capsys):
    methods = ("sampling", "best of 2, good enough")
    options = search.Search(random_run("smoke"), tmp_path / "out", methods=methods, quick=True)
    search.main(options)
    out = options.output_dir / "quick"
    table = (out / "search.md").read_text().splitlines()
    assert [row.split("|")[2].strip() for row in table[4:]] == ["4", "8"]
    assert (out / "search.png").exists() and (out / "search-digits.png").exists()
    search.main(options)
    assert (out / "search.md").read_text().splitlines() == table  # nothing is drawn again


@pytest.mark.parametrize("enough", [False, True])
def test_a_method_draws_latents(enough):
    """Of a batch, whatever the search."""
    path = D.Flow()
    problem = search.Problem(
        lambda scale: D.gaussian_denoiser(path), lambda x: x.mean((1, 2, 3)), 0.1, path, 6, (2, 4, 4, 1)
    )
    keys = D.image_keys(jax.random.key(0), 2)
    for method in (search.paths(2, 2, enough), search.steered(3, "max", 1.0, enough)):
        assert np.shape(method.draw(problem, keys)) == (2, 4, 4, 1)
