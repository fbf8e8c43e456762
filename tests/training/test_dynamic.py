"""Dynamic transformers in training: the cost in the loss, the trained DiT they begin as, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm import models, pipelines, training
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.training.denoiser_loss import make_loss, new_params
from jaxldm.training.diffusion import build_denoiser
from jaxldm.training.dynamic import as_drawn

SMOKE = training.RECIPES["smoke-dit"]
TINY = {"hidden_size": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
PREDICTION = D.x0(D.VP.named("cosine"))
BATCH = {
    "mean": np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32),
    "label": np.zeros(4, np.int32),
}
KEY = jax.random.key(0)


def recipe_with(preset="tiny-dydit", overrides=None, compute=0.5, source=None, **fields):
    own = {"channel_groups": 4} if preset == "tiny-dydit" else {}
    fields = {"prediction": PREDICTION, "condition_dropout": 0.0, **fields}
    fields.setdefault("dynamic", training.DynamicRecipe(compute=compute, source=source, weight=3.0))
    overrides = TINY | own | (overrides or {})
    diffusion = dataclasses.replace(SMOKE.diffusion, preset=preset, overrides=overrides, **fields)
    return dataclasses.replace(SMOKE, diffusion=diffusion)


def built(**fields):
    recipe = recipe_with(**fields)
    return recipe.diffusion, build_denoiser(recipe, (8, 8, 1), 3)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a plain DiT, and its network."""
    module = models.build("tiny-dit", **TINY, sample_size=8, num_classes=3)
    params = jax.tree.map(
        lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), models.init(module, KEY)
    )
    folder = tmp_path_factory.mktemp("source") / "dit"
    pipelines.save(pipelines.class_to_image(pipelines.Network(module, params), PREDICTION), folder)
    return folder, functools.partial(models.network(module), params)


def test_the_loss_has_the_distance_from_the_target_and_routers_its_gradient():
    recipe, module = built()
    params = new_params(recipe, module, KEY)

    def loss(params, weight):
        own = dataclasses.replace(recipe, dynamic=dataclasses.replace(recipe.dynamic, weight=weight))
        return make_loss(own, module)(params, None, BATCH, KEY)

    (plain, _), gradients = jax.jit(jax.value_and_grad(functools.partial(loss, weight=0.0), has_aux=True))(
        params
    )
    assert not np.any(gradients["time_router"]["router"]["bias"])  # adaLN-Zero: nothing else matters yet
    (value, metrics), gradients = jax.jit(
        jax.value_and_grad(functools.partial(loss, weight=3.0), has_aux=True)
    )(params)
    assert metrics["compute"] == 1  # all is open at first
    np.testing.assert_allclose(value - plain, 3 * (1 - 0.5) ** 2, rtol=1e-5)
    assert np.any(np.asarray(gradients["time_router"]["router"]["bias"]) > 0)


def test_the_target_is_reached_and_then_left_out():
    """Of the cost alone, by gradient descent: what is drawn costs the target, to a head."""
    recipe, module = built(compute=0.6)
    params = new_params(recipe, module, KEY)
    loss = make_loss(recipe, module)
    gradient = jax.jit(jax.grad(lambda params, key: loss(params, None, BATCH, key)[0]))
    for step in range(150):
        slope = gradient(params, jax.random.fold_in(KEY, step))
        params["time_router"] = jax.tree.map(
            lambda p, g: p - 0.5 * g, params["time_router"], slope["time_router"]
        )
    fixed = as_drawn(module, params)
    gates = jnp.asarray(fixed.config.table(), jnp.float32)
    np.testing.assert_allclose(np.mean(module.compute_share(gates)), 0.6, atol=0.15)


def test_it_begins_as_the_trained_dit(source):
    folder, network = source
    recipe, module = built(source=str(folder))
    assert module.config.max_time == 1000
    params = new_params(recipe, module, KEY)
    t = np.float32([1, 20, 300, 900])
    expected = jax.jit(network)(BATCH["mean"], t, BATCH["label"])
    own = functools.partial(models.network(module), params)  # weights are constants in both programs
    np.testing.assert_array_equal(jax.jit(own)(BATCH["mean"], t, BATCH["label"]), expected)


def test_what_does_not_fit_is_refused_before_anything_is_compiled(source, tmp_path):
    folder = str(source[0])
    for fields, kind, message in (
        ({"dynamic": None}, InvalidArgumentError, "learns what to compute: give the recipe dynamic"),
        ({"preset": "tiny-dit"}, InvalidArgumentError, "tiny-dit is a DiT, which has no routers"),
        ({"compute": None}, InvalidArgumentError, "give the part of the compute"),
        ({"source": folder, "overrides": {"depth": 1}}, InvalidArgumentError, r"with depth=2"),
        (
            {"source": folder, "prediction": D.v(D.VP.named("cosine"))},
            InvalidArgumentError,
            "was trained to predict sample",
        ),
        ({"source": str(tmp_path / "none")}, CheckpointError, "none"),
    ):
        with pytest.raises(kind, match=message) as error:
            built(**fields)
        assert len(str(error.value)) < 400
    for compute in (0.0, 1.2, float("nan")):
        with pytest.raises(InvalidArgumentError, match="compute must be"):
            training.DynamicRecipe(compute=compute)


def test_a_run_ends_with_the_network_that_leaves_out_what_is_closed(tmp_path):
    recipe = recipe_with(epochs=1, batch_size=32, sample_every=0, ema_decay=None, condition_dropout=0.1)
    recipe = dataclasses.replace(recipe, name="dydit", classifier=None, max_train_images=64)
    run = training.train(recipe, tmp_path / "run", devices=1, log=lambda line: None, bar=False)
    assert training.read_recipe(run.path) == recipe
    pipe = pipelines.load(run.path)
    config = pipe.denoiser.config
    assert type(config) is models.DyDiTConfig and len(config.plan) == 4
    images = pipe(KEY, [3], num_inference_steps=2, guidance_scale=2.0)
    assert images.shape == (1, 28, 28, 1) and np.isfinite(images).all()
    with pytest.raises(InvalidArgumentError, match="has nothing that a cache can reuse"):
        pipe(KEY, [3], num_inference_steps=2, guidance_scale=2.0, cache="fora:2")
