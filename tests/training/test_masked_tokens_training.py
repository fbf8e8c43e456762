"""A masked image model from its recipe: the run, its interruption, its loss."""

import dataclasses
import os
import signal

import chex
import jax
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm import models, pipelines
from jaxldm.data import ArrayRows, Dataset
from jaxldm.errors import InvalidArgumentError
from jaxldm.training import RECIPES, MaskedTokensRecipe, Recipe, check_recipe, make_mesh, read_log, train
from jaxldm.training.log import CLOCKS
from jaxldm.training.masked_tokens import make_loss

SMOKE = RECIPES["smoke-masked"]
SMALLER = dataclasses.replace(
    SMOKE.masked_tokens, overrides={**SMOKE.masked_tokens.overrides, "block_out_channels": (4,)}
)
RECIPE = dataclasses.replace(
    SMOKE, image_size=8, max_train_images=128, masked_tokens=SMALLER, classifier=None
)
pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return train(RECIPE, tmp_path_factory.mktemp("runs") / "straight", devices=1, log=lambda line: None)


def test_the_run_is_a_pipeline_folder_of_the_moving_average(straight):
    assert pipelines.kind_of(straight.path) == "run" and straight.has_model
    stage = straight.stage("masked_tokens")
    assert stage.complete and (stage.path / "samples" / "step-000004.png").stat().st_size > 0
    assert {"loss", "cross_entropy", "accuracy"} <= set(read_log(stage.log))
    assert "blank images" in (stage.path / "health.txt").read_text()
    pipe = pipelines.load(straight.path)
    assert pipe.num_classes == 10 and pipe.mask_token() == 16
    images = pipe(jax.random.key(0), [3, 7], num_inference_steps=2)
    levels = (images + 1) / 2 * 15
    assert images.shape == (2, 8, 8, 1)
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)


def test_an_interruption_changes_no_bit(straight, tmp_path):
    def say_and_stop(line):
        if line.startswith("masked_tokens: epoch 1/2"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, tmp_path / "run", devices=1, log=say_and_stop)
    again = train(RECIPE, tmp_path / "run", resume=True, devices=1, log=lambda line: None)
    logs = [read_log(of.stage("masked_tokens").log) for of in (straight, again)]
    for log in logs:
        for clock in CLOCKS:
            log.pop(clock)
    chex.assert_trees_all_equal(*logs)
    for name in ("transformer/diffusion_pytorch_model.safetensors", "model_index.json", "config.json"):
        assert (straight.path / name).read_bytes() == (again.path / name).read_bytes()


def test_the_loss_of_a_recipe_is_the_masked_token_loss():
    recipe = dataclasses.replace(RECIPE.masked_tokens, label_smoothing=0.1, schedule="square")
    module = models.build("tiny-maskgit", sample_size=8, **recipe.overrides)
    params = models.init(module, jax.random.key(1))
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 16, (4, 8, 8)).astype(np.int32),
        "label": np.arange(4, dtype=np.int32),
    }
    key = jax.random.key(2)
    loss, metrics = jax.jit(lambda params, key: make_loss(recipe, module)(params, None, batch, key))(
        params, key
    )
    expected, of_expected = jax.jit(
        lambda params, key: D.masked_token_loss(
            key, lambda *inputs: module.apply({"params": params}, *inputs), batch["tokens"], batch["label"],
            mask_token=16, schedule="square", label_smoothing=0.1, null_condition=10, condition_dropout=0.1,
        )
    )(params, jax.random.split(key)[0])  # fmt: skip
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics.keys() == of_expected.keys()


def pictures(channels):
    columns = {"image": np.zeros((256, 28, 28, channels), np.float32), "label": np.zeros(256, np.int32)}
    return Dataset("pictures", (28, 28, channels), tuple("0123456789"), {"train": ArrayRows(columns)})


def test_what_cannot_be_trained_is_refused_before_anything_is_written():
    with pytest.raises(InvalidArgumentError, match="3 channels"):
        check_recipe(RECIPE, pictures(3), make_mesh(1))
    dit = dataclasses.replace(RECIPE.masked_tokens, preset="tiny-dit", overrides={})
    with pytest.raises(InvalidArgumentError, match="take tiny-maskgit"):
        check_recipe(dataclasses.replace(RECIPE, masked_tokens=dit), pictures(1), make_mesh(1))
    with pytest.raises(InvalidArgumentError, match="either diffusion or masked_tokens"):
        Recipe(name="x", masked_tokens=MaskedTokensRecipe())
    with pytest.raises(InvalidArgumentError, match="without diffusion and masked_tokens"):
        Recipe(name="x", diffusion=None)
    with pytest.raises(InvalidArgumentError, match="leave the autoencoder out"):
        dataclasses.replace(RECIPE, autoencoder=RECIPES["smoke"].autoencoder)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"sample_steps": 0}, "sample_steps"),
        ({"sample_temperature": (-1.0, 0.0)}, "temperature"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"condition_dropout": 1.5}, "condition_dropout"),
        ({"sample_guidance_scale": -1.0}, "sample_guidance_scale"),
        ({"samples_per_class": 0}, "samples_per_class"),
    ],
)
def test_numbers_outside_their_range(numbers, words):
    with pytest.raises(InvalidArgumentError, match=words):
        MaskedTokensRecipe(**numbers)
