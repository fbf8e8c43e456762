"""The demo's health checks, pictures and report, on a random network and on real digits."""

import numpy as np
import pytest

from experiments.lecture39 import mini_ldm
from jaxldm import data
from jaxldm.metrics import health
from jaxldm.training.runs import RunFolder


@pytest.fixture(scope="module")
def digits():
    return data.load("mnist5k").arrays("test")


def shrunk(images, labels, share):
    """The images with that share of their distance to the mean of their class, so of their diversity."""
    means = np.stack([images[labels == label].mean(axis=0) for label in range(10)])[labels]
    return means + share * (images - means)


@pytest.mark.parametrize(
    ("scale", "share", "healthy"), [(1.0, 0.9, True), (1.0, 0.5, False), (7.5, 0.5, True), (7.5, 0.1, False)]
)
def test_guidance_lowers_diversity_and_a_collapse_is_still_found(digits, scale, share, healthy):
    """Half the diversity is what a strong guidance costs; at w = 1, or at a tenth, it is a collapse."""
    images, labels = digits
    bad = health.failed(mini_ldm.check_health(shrunk(images, labels, share), labels, images, labels, scale))
    assert (not bad) == healthy
    assert all(finding.check == "diversity" for finding in bad)


def test_one_collapsed_class_is_found_at_any_scale(digits):
    images, labels = digits
    drawn = shrunk(images, labels, 0.8)
    drawn[labels == 3] = drawn[labels == 3][:1]
    bad = health.failed(mini_ldm.check_health(drawn, labels, images, labels, 7.5))
    assert [finding.check for finding in bad] == ["diversity"] and "class 3" in bad[0].seen


def test_nearest_pairs_are_one_of_each_class(digits, monkeypatch):
    images, labels = digits
    seen = {}
    monkeypatch.setattr(
        mini_ldm.metrics, "labelled_grid", lambda grid, *args, **names: seen.update(grid=grid)
    )
    copied = np.array([np.flatnonzero(labels == label)[-1] for label in range(10)])
    mini_ldm.nearest_of_each_class(images, labels, images[copied], 1.0)
    np.testing.assert_array_equal(seen["grid"], np.concatenate([images[copied]] * 2))


def test_it_draws_measures_and_says_what_it_did(random_run, capsys):
    run = RunFolder(random_run("smoke"))
    options = mini_ldm.MiniLDM(
        run.path, "smoke", guidance_scales=(1.0, 3.0), num_images=20, num_inference_steps=2, seed=5
    )
    reports = mini_ldm.draw_and_measure(options, run)
    shown = capsys.readouterr().out
    assert "w = 1: 20 digits" in shown and "w = 3: 20 digits" in shown
    (run.path / "guidance.png").write_bytes(mini_ldm.plot_scales(reports))
    for name in ("grid-w1", "grid-w3", "nearest-training-digits", "guidance"):
        assert (run.path / f"{name}.png").stat().st_size > 0
    text = mini_ldm.report_text(options, reports)
    for part in (
        "# Mini latent diffusion",
        "seed 5",
        "python -m experiments.lecture39.mini_ldm",
        "20 digits",
    ):
        assert part in text
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(mini_ldm.ROWS) and len({line.count("|") for line in table}) == 1


def test_the_export_is_read_back_bit_for_bit(random_run, capsys):
    run = RunFolder(random_run("smoke"))
    mini_ldm.export(run)
    shown = capsys.readouterr().out
    read, of = shown.split("export: ")[1].split(" tensors")[0].split(" of ")
    assert read == of and int(of) > 20
    assert (run.path / "export" / "model_index.json").exists()
