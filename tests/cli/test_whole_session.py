"""The session of `jaxldm --help` on a recipe of seconds: train, info, eval, and what can go wrong."""

import json
import math

import numpy as np
import pytest
from command_lines import complaint, run

from jaxldm import cli

OPTIMIZED = True  # compiled as users do, see tests/conftest.py


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    assert cli.main(["train", "smoke-dit", "--run-dir", str(folder), "--epochs", "1", "--seed", "3"]) == 0
    return folder


def test_the_run_is_of_the_recipe_with_the_changes(trained):
    recipe = json.loads((trained / "config.json").read_text())["recipe"]
    assert (recipe["name"], recipe["seed"], recipe["diffusion"]["epochs"]) == ("smoke-dit", 3, 1)
    assert (trained / "transformer" / "config.json").exists()


def test_a_second_training_needs_resume_and_then_has_nothing_to_do(capsys, trained):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    assert "--resume" in complaint(capsys, "train", "smoke-dit", "--run-dir", trained)
    # The changes of the first command line need not be typed again, and others are refused.
    assert run(capsys, "train", "smoke-dit", "--run-dir", trained, "--resume", "--quiet") == (0, "", "")
    other = complaint(capsys, "train", "smoke-dit", "--run-dir", trained, "--resume", "--epochs", 7)
    assert "epochs" in other and "another recipe" in other
    assert "another recipe" in complaint(capsys, "train", "smoke", "--run-dir", trained, "--resume")
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()} == before


def test_info_of_a_run_tells_its_stages_and_steps(capsys, trained):
    code, out, _ = run(capsys, "info", trained)
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert code == 0 and "recipe smoke-dit on mnist5k" in out
    assert "4 steps done" in lines["diffusion"] and "complete" in lines["classifier"]
    assert f"jaxldm sample {trained}" in out


def test_info_of_an_unfinished_run_says_how_to_go_on(capsys, trained, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text((trained / "config.json").read_text())
    code, out, _ = run(capsys, "info", tmp_path / "run")
    assert code == 0 and "0 steps done" in out and "--resume" in out


def test_eval_measures_at_each_scale_with_the_real_figures_beside(capsys, trained):
    words = ["--num-images", 20, "--num-inference-steps", 2, "--guidance-scale", 1, 2.5]
    code, out, _ = run(capsys, "eval", trained, *words)
    figures = json.loads((trained / "eval" / "metrics.json").read_text())
    assert code == 0 and figures["settings"]["num_images"] == 20
    for scale in ("1", "2.5"):
        report = figures[f"guidance_scale {scale}"]
        assert report["num_images"] == 20 and 0 < report["classifier_accuracy"] < 1
        assert math.isfinite(report["frechet_distance"]) and report["real_frechet_distance"] > 0
        assert f"{report['frechet_distance']:.3f}" in out and f"{report['classifier_accuracy']:.1%}" in out
        assert (trained / "eval" / f"grid-w{scale}.png").exists()
    assert (trained / "eval" / "metrics.md").read_text() in out


def test_eval_with_noise_levels_and_quiet(capsys, trained, tmp_path):
    words = ["--num-images", 20, "--sigmas", "5", "0.5", "--num-inference-steps", 2, "--guidance-scale", 1]
    code, out, _ = run(capsys, "eval", trained, "--output-dir", tmp_path, *words, "--quiet", "--devices", 2)
    settings = json.loads((tmp_path / "metrics.json").read_text())["settings"]
    assert (code, out, settings["sigmas"]) == (0, "", [5.0, 0.5])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num-images", 3], "20 or more"),
        (["--guidance-scale", "nan"], "finite"),
        (["--solver", "dimm"], "dpmpp_2m"),
        (["--num-inference-steps", 0], "at least 1"),
        (["--seed", -1], "seed"),
        (["--sigmas", "many"], "must be numbers"),
        (["--devices", 0], "devices must be between 1"),
    ],
)
def test_a_wrong_option_of_eval(capsys, trained, tmp_path, words, expected):
    assert expected in complaint(capsys, "eval", trained, "--output-dir", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["smok"], "did you mean 'smoke'"),
        (["smoke", "--preset", "mini-unett"], "mini-unet"),
        (["smoke", "--dataset", "mnist5"], "mnist5k"),
        (["smoke", "--epochs", 0], "epochs"),
        (["smoke", "--batch-size", 10**6], "batch_size"),
        (["smoke", "--learning-rate", "nan"], "learning_rate"),
        (["smoke", "--seed", 2**32], "seed"),
        (["smoke", "--devices", 9], "devices must be between 1 and 8"),
    ],
)
def test_a_wrong_option_of_train_writes_nothing(capsys, tmp_path, words, expected):
    assert expected in complaint(capsys, "train", *words, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_nan_json_stays_json():
    from jaxldm.commands.eval import without_nan

    figures = {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": "text", "e": np.float64("nan")}}
    assert json.loads(json.dumps(without_nan(figures), allow_nan=False)) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": "text", "e": None},
    }
