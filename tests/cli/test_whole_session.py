"""The session of `jaxldm --help` on a recipe of seconds: train, info, eval, and what can go wrong."""

import contextlib
import html
import importlib
import itertools
import json
import math
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from command_lines import complaint, run

from jaxldm import checkpoints, cli, metrics, schedulers, training
from jaxldm import diffusion as D
from jaxldm.commands import eval_images, inspect_sections
from jaxldm.commands.eval import grid_of
from jaxldm.commands.terminal import progress_bar
from jaxldm.errors import CheckpointError
from jaxldm.metrics import FeatureNetwork

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
    other = complaint(capsys, "train", "smoke", "--run-dir", trained, "--resume")
    assert "another recipe: smoke-dit, not smoke; resume with that one" in other
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()} == before


def test_resume_compares_the_recipes_before_it_needs_the_data(capsys, trained, monkeypatch):
    def unreachable(self):
        raise AssertionError("the data is not needed")

    monkeypatch.setattr(training.Recipe, "load_data", unreachable)
    words = ["train", "smoke-dit", "--run-dir", trained]
    assert "another recipe" in complaint(capsys, *words, "--resume", "--epochs", 7)
    assert "--resume" in complaint(capsys, *words)


def test_a_run_on_a_path_of_ones_own_is_evaluated_with_its_module(capsys, trained, tmp_path, monkeypatch):
    """The network has learnt another path, but a network is a network."""
    (tmp_path / "own_paths.py").write_text(
        "import dataclasses\nfrom jaxldm import diffusion as D\n"
        "@dataclasses.dataclass(frozen=True)\nclass Mine(D.ContinuousVP):\n    name = 'mine'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = D.path_to_dict(importlib.import_module("own_paths").Mine())
    shutil.copytree(trained, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["recipe"]["diffusion"]["prediction"] = {"name": "epsilon", "path": path}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    scheduler = schedulers.to_config(D.epsilon(D.path_from_dict(path)))
    (tmp_path / "run" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = json.loads((tmp_path / "run" / "model_index.json").read_text())
    index["scheduler"][1] = scheduler["_class_name"]
    (tmp_path / "run" / "model_index.json").write_text(json.dumps(index))
    sys.modules.pop("own_paths")
    words = ["eval", tmp_path / "run", "--num-images", 20, "--num-inference-steps", 2, "--guidance-scale", 1]
    assert "jaxldm --import own_paths" in complaint(capsys, *words)
    assert run(capsys, "--import", "own_paths", *words)[0] == 0
    sys.modules.pop("own_paths")


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


def test_eval_measures_at_each_scale_with_the_real_figures_beside(capsys, monkeypatch, trained):
    bars = []

    @contextlib.contextmanager
    def noted(total, name, *options):
        with progress_bar(total, name, *options) as progress:
            yield lambda *done: (bars.append(name), progress(*done))

    monkeypatch.setattr("jaxldm.commands.eval.progress_bar", noted)
    words = ["--num-images", 20, "--num-inference-steps", 2, "--guidance-scale", 1, 2.5]
    code, out, _ = run(capsys, "eval", trained, *words)
    assert [name for name, _ in itertools.groupby(bars)] == ["w = 1", "measuring", "w = 2.5", "measuring"]
    figures = json.loads((trained / "eval" / "metrics.json").read_text())
    assert code == 0 and figures["settings"]["num_images"] == 20
    for scale in ("1", "2.5"):
        report = figures[f"guidance_scale {scale}"]
        assert report["num_images"] == 20 and 0 < report["classifier_accuracy"] < 1
        assert math.isfinite(report["frechet_distance"]) and report["real_frechet_distance"] > 0
        assert f"{report['frechet_distance']:.3f}" in out and f"{report['classifier_accuracy']:.1%}" in out
        assert (trained / "eval" / f"grid-w{scale}.png").exists()
    assert (trained / "eval" / "metrics.md").read_text() in out
    assert out.startswith("drawing 20 images at each guidance scale (1, 2.5), equally many of each class\n")
    assert len(re.findall(r"^guidance scale (?:1|2\.5): drawn in \d+ s$", out, re.MULTILINE)) == 2
    assert out.count("generated images: diversity and accuracy are rough") == 1  # of both scales


def test_the_grid_of_an_evaluation_has_whole_rows():
    images = np.random.default_rng(0).uniform(-1, 1, (120, 4, 4, 1))
    grid = grid_of(images, 1.0, 3, ("a", "b", "c"))  # nine columns: of a hundred one would stand alone
    title = "Images drawn at guidance scale w = 1"
    wanted = metrics.labelled_grid(images[:99], 9, title=title, column_labels=("a", "b", "c") * 3)
    np.testing.assert_array_equal(grid, wanted)


def test_published_metrics_of_a_run_and_of_its_real_images(capsys, trained, tmp_path, monkeypatch):
    """The run draws, and as --real it is its test images; the network is every 97th number of an image."""

    def features(params, x):
        return {"pool": x.reshape(x.shape[0], -1)[:, ::97]}

    def prepare(images):
        return images.astype(np.float32)

    network = FeatureNetwork("inception", "tf1", "a" * 64, ("pool",), prepare, features, 0.0)
    files = {"inception": {"file": "x", "sha256": "a" * 64}}
    monkeypatch.setattr(eval_images, "load_networks", lambda *_: ({"inception": network}, None, files))
    monkeypatch.setenv(eval_images.FEATURE_CACHE, str(tmp_path))
    words = ["--metrics", "fid", "--num-images", 4, "--num-inference-steps", 2, "--json", tmp_path / "o.json"]
    code, out, err = run(capsys, "eval", trained, "--real", trained, *words)
    assert code == 0, err
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["images"] == f"{trained} (w = 1)" and report["num_images"] == 4
    assert report["real"].endswith("(test)") and report["num_real"] > 50
    assert report["metrics"]["fid"]["fid"] > 0 and "fid" in out
    assert out.startswith("drawing 4 images at guidance scale 1, equally many of each class\n")
    two_scales = complaint(capsys, "eval", trained, "--real", trained, "--guidance-scale", 1, 3, *words)
    assert "one guidance scale" in two_scales


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
        (["smoke", "--learning-rate", "nan"], "--learning-rate must be finite"),
        (["smoke", "--epochs", 10**9], "more than the 2147483647"),
        (["smoke", "--dataset", "huggingface:a/b"], "TFDS"),
        (["smoke", "--dataset", "no-folder"], "there is no folder 'no-folder'"),
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


def inspected(capsys, run_dir, out, *words):
    """(the page, what was printed) of `jaxldm inspect` with few images."""
    words = [*words, "--num-images", 20, "--num-inference-steps", 2, "--output-dir", out]
    code, printed, err = run(capsys, "inspect", run_dir, *words)
    assert code == 0 and not err, err
    return (out / "index.html").read_text(encoding="utf-8"), printed


def test_a_run_is_shown_from_the_inside_as_one_page(capsys, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(inspect_sections, "MOST_PATCHES", 60)
    page, printed = inspected(capsys, trained, tmp_path / "out", "--class-labels", 3, 7)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.html"]
    assert f"saved in {tmp_path / 'out' / 'index.html'}" in printed
    # Everything is in the page: no script, no other file, no other host.
    assert "<script" not in page and "http://" not in page and "https://" not in page
    sources = re.findall(r'<img alt="([^"]+)" src="([^"]{30})', page)
    assert len(sources) == len(re.findall("<img", page)) == 8
    assert all(alt and source.startswith("data:image/png;base64,iVBOR") for alt, source in sources)
    for title in ("How it learned", "What the network draws: pixels", "self-attention", "t-SNE"):
        assert f"{title}" in page
    assert "Class 3, seen from one patch" in page and "Class 7, averaged" in page
    note = "This run keeps 1 checkpoint. For a longer curve"
    assert note in page and f"How it learned: the checkpoints\n  {note}" in printed
    (only,) = training.kept_steps(trained)
    kept, (_, finished) = training.read_kept(trained, only), checkpoints.load(trained / "transformer")
    jax.tree.map(np.testing.assert_array_equal, kept.params, finished)


def test_a_file_for_published_metrics_alone_names_where_the_figures_are(capsys, trained, tmp_path):
    line = complaint(capsys, "eval", trained, "--json", tmp_path / "a.json")
    assert "--json goes with --metrics" in line and str(trained / "eval" / "metrics.json") in line
    assert "--real" in complaint(capsys, "eval", trained, "--json", tmp_path / "a.json", "--metrics", "fid")


def test_what_is_missing_is_said_on_the_page(capsys, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "diffusion" / "checkpoints")
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    page, printed = inspected(capsys, tmp_path / "run", tmp_path / "out")
    for text in ("keeps no checkpoints", "pip install 'jaxldm[inspect]'"):
        assert text in html.unescape(page) and text in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--class-labels", 11], "there are images of class 0, 1, 2"),
        (["--point", 28, 0], "--point must lie in the image of 28 x 28 pixels, got 28 0"),
        (["--noise", 0], "noise must be above 0"),
        (["--num-images", 3], "num_images must be 20 or more"),
        (["--num-inference-steps", 0], "num_inference_steps must be 1 or more"),
        (["--prompt", "a cat"], "--prompt is for text-to-image models"),
        (["--inception", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_mistakes_in_what_to_inspect(capsys, trained, tmp_path, words, expected):
    words = ["inspect", trained, "--output-dir", tmp_path / "out", *words]
    assert expected in complaint(capsys, *words)
    assert not (tmp_path / "out" / "index.html").exists()


def test_a_damaged_checkpoint_is_left_out(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (step,) = training.kept_steps(tmp_path / "run")
    (tmp_path / "run" / "diffusion" / "checkpoints" / str(step) / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"checkpoint .* is damaged"):
        training.read_kept(tmp_path / "run", step)
    assert training.kept_steps(tmp_path / "run") == [step]  # nothing is set aside


def test_what_is_no_model_is_refused(capsys, tmp_path):
    assert "does not exist" in complaint(capsys, "inspect", tmp_path / "nowhere")
    assert "neither a run folder" in complaint(capsys, "inspect", tmp_path)
