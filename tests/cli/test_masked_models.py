"""The commands on the run of a masked image model, around random networks."""

import json

import jax
import numpy as np
import pytest
from command_lines import complaint, run
from tiny_folders import write_masked_run

from jaxldm import data, models, pipelines, training
from jaxldm.commands.train import Train
from jaxldm.pipelines.families.maskgit import maskgit
from jaxldm.pipelines.network import Network
from jaxldm.training.classifier import build_classifier
from jaxldm.training.runs import RunFolder, save_classifier

RECIPE = training.RECIPES["smoke-masked"]


def random_params(module):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), models.shapes(module))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    module = models.build("tiny-maskgit", **RECIPE.masked_tokens.overrides)
    pipe = maskgit(Network(module, random_params(module)))
    path = write_masked_run(tmp_path_factory.mktemp("runs") / "masked", pipe)
    classifier = build_classifier(RECIPE, (28, 28, 1), 10)
    save_classifier(RunFolder(path), classifier, random_params(classifier))
    return path


def test_info_and_export(folder, capsys, tmp_path):
    code, out, _ = run(capsys, "info", folder)
    assert code == 0 and "masked_tokens  tiny-maskgit" in out and f"jaxldm sample {folder}" in out
    assert "of 16 values, masked by the cosine schedule" in out
    assert run(capsys, "export", folder, tmp_path / "export")[0] == 0
    code, out, _ = run(capsys, "info", tmp_path / "export", "--compare", folder)
    assert code == 0 and "the same, bit for bit" in out


def test_inspect_says_that_it_is_not_for_tokens(folder, capsys, tmp_path):
    assert "unmasks tokens" in complaint(capsys, "inspect", folder, "--output-dir", tmp_path / "out")


def test_sample(folder, capsys, tmp_path):
    words = ["sample", folder, "--class-labels", 3, 7, "--num-images", 4, "--quiet"]
    words += ["--output-dir", tmp_path / "out"]
    more = ["--num-inference-steps", 3, "--guidance-scale", 2, "--options", "temperature=[1,0]"]
    assert run(capsys, *words, *more) == (0, "", "")
    with np.load(tmp_path / "out" / "samples.npz") as samples:
        options = {"num_inference_steps": 3, "guidance_scale": 2.0, "temperature": (1.0, 0.0)}
        drawn = pipelines.load(folder)(jax.random.key(0), [3, 7], num_images=4, **options)
        np.testing.assert_array_equal(samples["images"], data.to_uint8(drawn))
    for option in (("--solver", "ddim"), ("--sigmas", 3, 1), ("--spacing", "karras"), ("--eta", 1)):
        line = complaint(capsys, *words, *option)
        assert f"{option[0]} is not for a model of the family MaskGIT" in line
    line = complaint(capsys, *words, "--guidance-rescale", 0.5)
    assert "--guidance-rescale is not for a model of the family MaskGIT" in line


def test_eval(folder, capsys):
    words = ["eval", folder, "--num-images", 20, "--guidance-scale", 2, "--quiet"]
    assert "--solver is not for" in complaint(capsys, *words, "--solver", "ddim")
    assert run(capsys, *words, "--num-inference-steps", 2)[0] == 0
    figures = json.loads((folder / "eval" / "metrics.json").read_text())
    assert figures["settings"] == {"num_images": 20, "num_inference_steps": 2, "seed": 0}
    assert 0 <= figures["guidance_scale 2"]["accuracy"] <= 1


def test_the_command_line_changes_the_recipe(capsys, tmp_path):
    recipe = Train("masked-digits", epochs=3, batch_size=8).make_recipe(tmp_path)
    assert (recipe.masked_tokens.epochs, recipe.masked_tokens.batch_size) == (3, 8)
    assert recipe.diffusion is None and recipe.generator == "masked_tokens"
    words = ["train", "masked-digits", "--run-dir", tmp_path / "run"]
    assert "tiny-maskgit" in complaint(capsys, *words, "--preset", "tiny-dit")
    assert not (tmp_path / "run").exists()
