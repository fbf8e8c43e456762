"""Own pictures by the command line, from the folder to the model that leaves: train, sample, eval, export."""

import json
import re
import shlex

import numpy as np
import pytest
from command_lines import complaint, run
from PIL import Image

from jaxldm import cli
from jaxldm.training import read_data, read_log

OPTIMIZED = True  # compiled as users do, see tests/conftest.py

NUMBER, SIDE, STEPS = 500, 16, 3  # of pictures, of the squares that are trained on, of sampling
CLASSES = ("cats", "dogs")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders of pictures of many sizes, one of which is broken."""
    folder, rng = tmp_path_factory.mktemp("own") / "pictures", np.random.default_rng(0)
    for n in range(NUMBER):
        label = n % len(CLASSES)
        pixels = rng.integers(0, 60, (SIDE + n % 7, SIDE + n % 5, 3), np.uint8)
        pixels[..., 2 * label] += 180  # cats are red, dogs are blue
        path = folder / CLASSES[label] / f"{n:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (folder / "cats" / "broken.png").write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    words = ["train", "smoke", "--dataset", pictures, "--image-size", SIDE, "--run-dir", folder]
    words += ["--epochs", 1, "--autoencoder-epochs", 1, "--classifier-epochs", 6]
    assert cli.main([str(word) for word in words]) == 0
    return folder


def test_it_learns_from_the_folder_and_says_what_it_left_out(trained, pictures):
    config = json.loads((trained / "config.json").read_text())
    assert config["recipe"]["data"] == str(pictures) and config["data"]["class_names"] == list(CLASSES)
    assert json.loads((trained / "skipped-pictures.jsonl").read_text())["name"] == "cats/broken.png"
    images, labels = read_data(trained).arrays("test")
    blue = images[..., 2].mean((1, 2)) > images[..., 0].mean((1, 2))
    np.testing.assert_array_equal(labels, blue)
    assert 10 < blue.sum() < len(blue) - 10
    for stage in ("autoencoder", "diffusion", "classifier"):
        log = read_log(trained / stage / "log.csv")
        assert len(log["step"]) >= 3 and np.isfinite(log["loss"]).all() and (log["grad_norm"] > 0).all()
    assert (trained / "report.html").is_file() and (trained / "unet" / "config.json").is_file()


def drawn(capsys, model, out, labels=(1, 0)):
    words = ["--class-labels", *labels, "--num-images", 4, "--num-inference-steps", STEPS, "--seed", 3]
    code, _, err = run(capsys, "sample", model, *words, "--output-dir", out, "--quiet")
    assert code == 0, err
    assert (out / "grid.png").is_file()
    with np.load(out / "samples.npz") as found:
        return found["images"], found["labels"]


def test_the_run_and_its_export_draw_the_same_pictures(capsys, trained, tmp_path):
    images, labels = drawn(capsys, trained, tmp_path / "samples")
    assert images.shape == (4, SIDE, SIDE, 3) and images.dtype == np.uint8 and len(np.unique(images)) > 10
    assert labels.tolist() == [1, 0, 1, 0]
    code, out, _ = run(capsys, "export", trained, tmp_path / "exported")
    assert code == 0 and "read back bit for bit" in out
    for found, wanted in zip(
        drawn(capsys, tmp_path / "exported", tmp_path / "again"), (images, labels), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_its_classes_have_the_names_of_the_folders(capsys, trained, tmp_path):
    assert "0 to 1: cats, dogs" in run(capsys, "info", trained)[1]
    images, labels = drawn(capsys, trained, tmp_path / "numbers")
    named = drawn(capsys, trained, tmp_path / "names", ("dogs", 0))
    np.testing.assert_array_equal(named[0], images)
    np.testing.assert_array_equal(named[1], labels)
    line = complaint(capsys, "sample", trained, "--class-labels", "dgos", "--output-dir", tmp_path / "none")
    assert "unknown class 'dgos': choose one of dogs, cats" in line


def test_more_epochs_of_a_finished_run_are_a_fine_tuning(capsys, trained, pictures, tmp_path):
    line = complaint(capsys, "train", "smoke", "--run-dir", trained, "--resume", "--epochs", 3)
    words = ["--from", trained, "--data", pictures, "--method", "full", "--epochs", 2]
    command = shlex.join(["jaxldm", "train", "finetune", *map(str, words)])
    assert f"longer with `{command}`, or begin a new run" in line
    words = [
        *shlex.split(command)[1:],
        "--run-dir",
        tmp_path / "run",
        "--batch-size",
        64,
        "--sample-every",
        0,
    ]
    assert run(capsys, *words, "--quiet")[0] == 0
    assert re.search(r"method +full\n", run(capsys, "info", tmp_path / "run")[1])


def test_it_is_measured_against_the_pictures_that_were_held_out(capsys, trained):
    words = ["--num-images", 20, "--num-inference-steps", STEPS, "--guidance-scale", 2]
    code, out, err = run(capsys, "eval", trained, *words)
    assert code == 0, err
    report = json.loads((trained / "eval" / "metrics.json").read_text())["guidance_scale 2"]
    assert report["num_images"] == 20 and 0 <= report["accuracy"] <= 1
    assert report["classifier_accuracy"] > 0.9  # of real ones: it has seen which are cats
    assert 0 < report["real_frechet_distance"] < np.inf and np.isfinite(report["frechet_distance"])
    assert "guidance scale 2" in out and (trained / "eval" / "grid-w2.png").is_file()
