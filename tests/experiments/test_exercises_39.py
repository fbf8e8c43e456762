"""The exercises of lecture 39 run to their end with tiny settings; each checks what it shows by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checks
from experiments.lecture39 import (
    e1_guidance_sweep,
    e3_noise_offset,
    e4_zero_terminal_snr,
    e5_min_snr,
    e6_negative_prompt,
    e7_guidance_three_views,
    e8_translation_drills,
    e9_over_guidance,
)
from jaxldm import diffusion as D
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


def test_guidance_sweep(random_run, tmp_path, capsys):
    options = e1_guidance_sweep.GuidanceSweep(random_run("smoke"), tmp_path / "out", quick=True)
    e1_guidance_sweep.main(options)
    shown = capsys.readouterr().out
    assert all(f"| {row} | " in shown for row in ("0", "1", "7.5", "(real digits)"))
    names = ("table.md", "curves.png", "digits.png")
    assert all((options.output_dir / "quick" / name).exists() for name in names)
    # A second call draws nothing: its results are read.
    pipe = pytest.MonkeyPatch()
    pipe.setattr(e1_guidance_sweep, "draw", None)
    e1_guidance_sweep.main(options)
    pipe.undo()
    assert capsys.readouterr().out == shown
    with pytest.raises(InvalidArgumentError, match="make demo"):
        e1_guidance_sweep.main(dataclasses.replace(options, run_dir=tmp_path / "missing"))


def test_noise_offset(random_run, tmp_path, capsys):
    e3_noise_offset.main(e3_noise_offset.NoiseOffset(tmp_path, quick=True))
    shown = capsys.readouterr().out
    names = ("(real)", "offset 0.1", "offset 0.1, in the start, too", "constant 0.1")
    assert all(f"| {label} | {name} |" in shown for label in ("dark", "bright") for name in names)
    assert all((tmp_path / "quick" / name).exists() for name in ("brightness.png", "pictures.png"))


def test_digits_on_dark_and_bright_grounds():
    digits = np.full((6, 2, 2, 1), -1.0)
    digits[:, 0] = 1.0  # ink
    labels = np.array([0, 0, 0, 1, 1, 1])
    images = np.asarray(e3_noise_offset.on_grounds(jax.random.key(0), digits, labels))
    ink, ground = images[:, 0, 0, 0], images[:, 1, 0, 0]
    assert (ground[:3] < -0.2).all() and (ground[3:] > 0.2).all() and len(set(ground)) == 6
    np.testing.assert_allclose(ink - ground, [1, 1, 1, -1, -1, -1], rtol=1e-6)


def test_the_constant_is_in_the_noise_and_not_in_the_target(monkeypatch):
    """A network that knows eps without the constant has no loss left."""
    options = e3_noise_offset.NoiseOffset(hidden_size=8, depth=1)
    trainer = e3_noise_offset.Trainer(options, e3_noise_offset.Setting(0.0, 0.1), np.zeros((4, 28, 28, 1)))
    seen = []

    def network(module):
        def apply(params, x, t, labels):  # x_0 = 0: x_t is sigma (eps + constant)
            sigma = trainer.prediction.path.sigma(t)[:, None, None, None]
            seen.append(x)
            return x / sigma - 0.1

        return apply

    trainer.prediction = D.epsilon(trainer.prediction.path)
    monkeypatch.setattr(e3_noise_offset.models, "network", network)
    batch = jnp.zeros((4, 28, 28, 1)), jnp.zeros(4, jnp.int32)
    loss, _ = trainer.loss(None, None, batch, jax.random.key(0))
    assert len(seen) == 1 and loss < 1e-10


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
