"""The exercises of lecture 39 run to their end with tiny settings; each checks what it shows by itself."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checks
from experiments.lecture39 import (
    e1_captions,
    e1_guidance_sweep,
    e3_noise_offset,
    e4_zero_terminal_snr,
    e5_min_snr,
    e6_negative_prompt,
    e7_guidance_three_views,
    e8_translation_drills,
    e9_over_guidance,
)
from jaxldm import data
from jaxldm import diffusion as D
from jaxldm.data import captioned_shapes, shapes
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


def shapes_dataset():
    """Captioned shapes as a dataset, few of them."""
    parts = {}
    for seed, (split, number) in enumerate({"train": 128, "validation": 96, "test": 96}.items()):
        shown = shapes.draw_attributes(seed, np.arange(number))
        images = data.from_uint8(shapes.render(seed, np.arange(number), shown, 32))
        parts[split] = data.ArrayRows({"image": images, "label": shown.shape * 6 + shown.colour})
    return data.Dataset("captioned_shapes", (32, 32, 3), tuple(captioned_shapes.PAIRS), parts)


def test_guidance_sweep_of_captions(tmp_path, monkeypatch, capsys):
    """A model that draws what it is asked for at w = 1, and the next colour at w = 3."""
    drawn = []

    def draw(key, prompts, guidance_scale, **options):
        drawn.append(guidance_scale)
        shown, expected = e1_captions.prompts_of(shapes.SEEN, 1)
        assert prompts == expected and options["num_inference_steps"] == 2
        shown = shown._replace(colour=(shown.colour + (guidance_scale == 3)) % 6)
        return data.from_uint8(shapes.render(0, np.arange(len(prompts)), shown, 32))

    monkeypatch.setattr(e1_captions, "load_run", lambda run, recipe: draw)
    monkeypatch.setattr(e1_captions, "load_dataset", lambda run: shapes_dataset())
    options = e1_captions.GuidanceSweepOfCaptions(tmp_path, tmp_path / "out", quick=True)
    e1_captions.main(options)
    shown = capsys.readouterr().out
    rows = {line.split(" | ")[0]: line.split(" | ") for line in shown.splitlines() if line.startswith("| ")}
    assert rows["| 1"][3] == "100.0%" and rows["| 3"][3] == "0.0%" and "| (real pictures)" in rows
    names = ("table.md", "curves.png", "pictures.png")
    assert all((tmp_path / "out" / "quick" / name).exists() for name in names)
    e1_captions.main(options)
    assert capsys.readouterr().out == shown and drawn == [1.0, 3.0]


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


def test_shapes_on_dark_and_light_backgrounds(monkeypatch):
    shown = shapes.draw_attributes(3, np.arange(12))
    images = shapes.render(3, np.arange(12), shown, 32) / 127.5 - 1
    dataset = types.SimpleNamespace(arrays=lambda split: (images, None))
    monkeypatch.setattr(e3_noise_offset.data, "load", lambda name: dataset)
    pictures = e3_noise_offset.pictures_of("captioned_shapes", "train")
    light = int(shown.background.sum())
    assert pictures.shape == (32, 32, 3) and pictures.number == min(light, 12 - light) > 2
    taken = np.asarray(pictures.of(None, np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])))
    for place, label in enumerate((0, 0, 1, 1)):
        row = np.flatnonzero(shown.background == label)[place % 2]
        np.testing.assert_allclose(taken[place], images[row], rtol=1e-6)


def test_the_constant_is_in_the_noise_and_not_in_the_target(monkeypatch):
    """A network that knows eps without the constant has no loss left."""
    options = e3_noise_offset.NoiseOffset(hidden_size=8, depth=1)
    pictures = e3_noise_offset.Pictures((28, 28, 1), 4, lambda key, rows, labels: None)
    trainer = e3_noise_offset.Trainer(options, e3_noise_offset.Setting(0.0, 0.1), pictures)
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
