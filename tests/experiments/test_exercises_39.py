"""The exercises of lecture 39 run to their end with tiny settings; each checks what it shows by itself."""

import dataclasses

import numpy as np
import pytest

from experiments import checks
from experiments.lecture39 import (
    e4_zero_terminal_snr,
    e5_min_snr,
    e6_negative_prompt,
    e7_guidance_three_views,
    e8_translation_drills,
    e9_over_guidance,
)
from jaxldm.errors import InvalidArgumentError


def test_a_check_fails_for_what_is_wrong_or_not_a_number(capsys):
    with pytest.raises(SystemExit, match="2 of 3"):
        checks.show("some", [checks.Check(str(error), error, 0.1) for error in (0.2, float("nan"), 0.1)])
    assert capsys.readouterr().out.count("FAIL") == 2
    checks.show("close", [checks.Check("just within", 0.2146, 0.2147)])
    assert "2.1e-01  (at most 2.1e-01)" in capsys.readouterr().out
    assert checks.distance([1.0, 2.0], [1.0, 4.0]) == 0.5
    with pytest.raises(ValueError, match="shapes"):
        checks.distance([1.0], 1.0)


def test_guidance_three_views(tmp_path, capsys):
    options = e7_guidance_three_views.ThreeViews(tmp_path, ("flow",), (3.0,), 500, 5)
    e7_guidance_three_views.main(options)
    shown = capsys.readouterr().out
    assert "FAIL" not in shown and shown.count("PASS") == 4
    assert (tmp_path / "three-views.png").stat().st_size > 0


def test_zero_terminal_snr(tmp_path, capsys):
    options = e4_zero_terminal_snr.ZeroTerminalSNR(tmp_path, (4,), num_images=40, num_inference_steps=20)
    e4_zero_terminal_snr.main(options)
    shown = capsys.readouterr().out
    assert "FAIL" not in shown and shown.count("PASS") == 10
    assert (tmp_path / "brightness.png").exists() and (tmp_path / "pictures.png").exists()


def test_a_line_is_affine_and_a_parabola_is_not():
    x = np.linspace(1, 2, 5)
    assert e4_zero_terminal_snr.not_affine(x, 3 - 2 * x) < 1e-12
    assert e4_zero_terminal_snr.not_affine(x, x**2) > 0.2


def test_translation_drills(capsys):
    e8_translation_drills.main(e8_translation_drills.Drills(seed=1))
    shown = capsys.readouterr().out
    assert "FAIL" not in shown and shown.count("PASS") == 16


def test_negative_prompt(random_run, tmp_path, capsys):
    run_dir = random_run("smoke")
    e6_negative_prompt.main(
        e6_negative_prompt.NegativePrompt(
            run_dir, tmp_path, ((1, 2),), guidance_scale=3.0, num_images=2, num_inference_steps=2
        )
    )
    shown = capsys.readouterr().out
    assert "FAIL" not in shown and shown.count("PASS") == 6 and "| 1, 2 |" in shown
    assert (tmp_path / "negative-prompt.png").exists()


def test_over_guidance(random_run, tmp_path, capsys):
    options = e9_over_guidance.OverGuidance(
        random_run("smoke"), tmp_path, (1.0, 3.0), ("none", "threshold"), 20, 2
    )
    e9_over_guidance.main(options)
    shown = capsys.readouterr().out
    assert all(f"| {method} | 3 |" in shown for method in options.methods)
    assert (tmp_path / "over-guidance.png").exists() and (tmp_path / "digits.png").exists()


def test_min_snr(random_run, tmp_path, capsys):
    options = e5_min_snr.MinSNR(
        random_run("smoke"),
        tmp_path,
        ("v_prediction",),
        num_updates=2,
        look_every=1,
        batch_size=8,
        hidden_size=8,
        depth=1,
        num_images=20,
    )
    e5_min_snr.main(options)
    shown = capsys.readouterr().out
    assert "| v_prediction, plain |" in shown and "| v_prediction, Min-SNR 5 |" in shown
    assert (tmp_path / "min-snr.png").exists()
    with pytest.raises(InvalidArgumentError, match="look_every"):
        e5_min_snr.main(dataclasses.replace(options, look_every=3))
