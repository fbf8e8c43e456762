"""The scripts of Choosing a sampler at their smallest, and the advice that follows from their results."""

import pathlib

import jax
import pytest

from experiments.choosing_a_sampler import advice, curves, digits, mixture
from jaxldm.errors import CheckpointError

PAGE = pathlib.Path(advice.__file__).parents[2] / "docs" / "choosing-a-sampler.md"


def test_digits(random_run, tmp_path, capsys):
    options = digits.Digits(random_run("smoke-dit"), quick=True, guidance_scales=(2.0,), output_dir=tmp_path)
    digits.main(options)
    out = tmp_path / "quick"
    rows = curves.read_results(out / "digits.csv")
    found = [(row["solver"], row["spacing"], row["budget"], row["evaluations"]) for row in rows]
    references = [("reference", "trailing", 10, 10), ("second reference", "exponential", 10, 10)]
    spaced = [("ddim", spacing, n, n) for spacing in ("trailing", "exponential") for n in (2, 5)]
    assert found == [*references, *spaced, ("ddpm", "trailing", 2, 2), ("ddpm", "trailing", 5, 5)]
    errors = [row["error"] for row in rows]
    assert errors[2] > errors[3] > 0  # more steps, nearer to the reference; noise has none to compare
    assert [error is None for error in errors] == [True, *[False] * 5, True, True]
    text = (out / "digits.md").read_text()
    assert "| ddpm |" in text and "| exponential |" in text and (out / "digits-solvers.png").exists()


def test_rows_of_other_networks_and_solvers_are_kept():
    def row(network, solver, value):
        return {"network": network, "solver": solver, "w": 1.0, "value": value}

    earlier = [row("a", "ddim", 1), row("a", "lms", 1), row("b", "ddim", 1)]
    rows = digits.merged(earlier, [row("a", "ddim", 2), row("a", "heun", 2)])
    assert {(r["network"], r["solver"], r["value"]) for r in rows} == {
        ("a", "ddim", 2),
        ("a", "lms", 1),
        ("a", "heun", 2),
        ("b", "ddim", 1),
    }


def test_results_are_read_as_they_were_written(tmp_path):
    rows = [{"a": "trailing", "b": 0.25, "c": 5, "d": None}, {"a": "beta", "b": 1e-5, "c": 10, "d": 2.0}]
    (tmp_path / "rows.csv").write_text(curves.as_csv(rows))
    assert curves.read_results(tmp_path / "rows.csv") == rows


def test_mixture(tmp_path, capsys, monkeypatch):
    """One solver on two spacings of one path, at its smallest."""
    monkeypatch.setattr(mixture, "PATHS", {"flow": mixture.PATHS["flow"]})
    options = mixture.Mixture(budgets=(5, 10), num_points=16)
    study = mixture.Study(options)
    with jax.enable_x64(True):
        truth = mixture.solve_exactly(mixture.PATHS["flow"], study.noise, 1.0)
        errors = {1.0: lambda x: curves.relative_rms(x, truth)}
        solver = curves.DETERMINISTIC["ddim"]
        rows = study.rows("flow", "ddim", solver, study.noise, errors, ("trailing", "karras"))
    assert [(row["spacing"], row["evaluations"]) for row in rows] == [
        ("trailing", 5),
        ("trailing", 10),
        ("karras", 5),
        ("karras", 10),
    ]
    assert all(coarse["error"] > fine["error"] > 0 for coarse, fine in (rows[:2], rows[2:]))


def test_the_tables_of_advice_on_the_page_follow_from_the_results():
    page = PAGE.read_text(encoding="utf-8")
    for name, text in advice.derive(curves.RESULTS).items():
        assert advice.block(name, text) in page, f"python -m {advice.__name__} writes the table {name!r}"


def test_the_nearest_is_chosen_within_the_budget():
    def row(solver, spacing, evaluations, error):
        return {"solver": solver, "spacing": spacing, "budget": 5, "evaluations": evaluations, "error": error}

    rows = [row("ddim", "trailing", 5, 0.2), row("unipc, order 2", "karras", 5, 0.1)]
    table = advice.in_short({"linear": rows + [{**r, "budget": b} for r in rows for b in (10, 20, 50)]})
    assert "| 5 | `unipc` of order 2, karras: 0.1 |" in table
    assert "| `ddim`, trailing | 2.0 |" in advice.losses({"linear": rows})


def test_without_a_run_it_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        digits.main(digits.Digits(tmp_path / "missing", output_dir=tmp_path))
