"""What a recipe adds to a denoiser's loss: a learned log-variance, a route, an alignment."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import checkpoints, models, training
from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.training.denoiser_loss import FEATURES, LOG_VARIANCE, PROJECTOR, make_loss, new_params
from jaxldm.training.diffusion import build_denoiser, without_terms
from jaxldm.training.frozen_features import FrozenFeatures, classifier_features, dinov2_features

SMOKE = training.RECIPES["smoke-dit"]
TINY = {"hidden_size": 16, "depth": 3, "num_heads": 2, "patch_size": 2}
BATCH = {
    "mean": np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32),
    "label": np.zeros(4, np.int32),
}
KEY = jax.random.key(0)


def recipe_with(preset="tiny-dit", overrides=TINY, **fields):
    fields = {"prediction": D.v(D.VP.named("cosine")), "condition_dropout": 0.0, **fields}
    diffusion = dataclasses.replace(SMOKE.diffusion, preset=preset, overrides=overrides, **fields)
    return dataclasses.replace(SMOKE, diffusion=diffusion)


def built(**fields):
    recipe = recipe_with(**fields)
    return recipe, build_denoiser(recipe, (8, 8, 1), 3)


def state_with(**frozen):
    return types.SimpleNamespace(frozen=frozen, step=0)


def test_the_learned_log_variance_is_trained_beside_the_network():
    recipe, module = built(learn_log_variance=True)
    params = new_params(recipe.diffusion, module, KEY)
    plain = make_loss(dataclasses.replace(recipe.diffusion, learn_log_variance=False), module)
    loss = make_loss(recipe.diffusion, module)

    def both(params):
        (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(params, None, BATCH, KEY)
        without = plain({k: v for k, v in params.items() if k != LOG_VARIANCE}, None, BATCH, KEY)
        return value, aux, gradients, without

    value, aux, gradients, (expected, _) = jax.jit(both)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)  # it starts at 0
    np.testing.assert_allclose(gradients[LOG_VARIANCE]["bias"], 1 - aux["mse"], rtol=1e-4)  # of e^-u E + u
    network = without_terms(module, params)
    assert network[0] is module and LOG_VARIANCE not in network[1]


def test_a_route_draws_other_tokens_for_each_update_and_is_gone_at_the_end():
    recipe, module = built(route=(1, 2), route_share=0.25, overrides={**TINY, "scan": True})
    params = new_params(recipe.diffusion, module, KEY)
    params = jax.tree.map(
        lambda p: p + 0.1 * np.sin(np.arange(p.size, dtype=np.float32)).reshape(p.shape),
        jax.device_get(params),
    )
    loss = jax.jit(lambda key: make_loss(recipe.diffusion, module)(params, None, BATCH, key)[0])
    assert loss(jax.random.key(1)) != loss(jax.random.key(2))
    plain, network = without_terms(module, params)
    assert plain.config.route is None and list(network) != list(params)
    x, t, labels = BATCH["mean"], np.float32([1, 20, 300, 900]), BATCH["label"]
    found = jax.jit(plain.apply)({"params": network}, x, t, labels)
    np.testing.assert_allclose(found, jax.jit(module.apply)({"params": params}, x, t, labels), atol=1e-4)


@pytest.mark.parametrize("block", [1, 2, 3])  # before, on, and behind the route
def test_alignment_is_with_the_features_of_the_tokens_that_are_there(block):
    """A projector that copies the features' own direction: -1 exactly, wherever the tap is."""
    alignment = training.AlignmentRecipe(block=block, weight=0.25, hidden=8)
    recipe, module = built(route=(1, 3), alignment=alignment)
    wanted = np.random.default_rng(1).normal(size=(4, 16, 5)).astype(np.float32)
    features = FrozenFeatures(None, 5, lambda params, images: params["scale"] * wanted + images.mean())
    params = new_params(recipe.diffusion, module, KEY, features)
    state, batch = state_with(**{FEATURES: {"scale": jnp.float32(2)}}), BATCH | {"image": BATCH["mean"]}

    def whole(params, state):
        loss = make_loss(recipe.diffusion, module, None, features)
        without = dataclasses.replace(recipe.diffusion, alignment=None)
        network = {name: value for name, value in params.items() if name != PROJECTOR}
        expected = make_loss(without, module)(network, None, batch, KEY)[0]
        return loss(params, state, batch, KEY), expected

    ((value, aux), expected), of_all = jax.jit(
        lambda params: (whole(params, state), jax.grad(lambda p: whole(p, state)[0][0])(params))
    )(params)
    assert -1 <= aux["alignment"] <= 1
    np.testing.assert_allclose(value, expected + 0.25 * aux["alignment"], rtol=1e-5)
    assert np.abs(of_all[PROJECTOR]["layer_2"]["kernel"]).max() > 0


def test_features_are_one_for_each_token():
    images = jax.random.normal(KEY, (2, 8, 8, 1))
    classifier = models.build("digit-classifier", sample_size=8, block_out_channels=(2, 3, 5), num_features=4)
    dinov2 = models.Dinov2Model(
        models.Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    )
    for module, of, width in (
        (classifier, classifier_features(classifier, (4, 3)), 5),
        (dinov2, dinov2_features(dinov2, (4, 3)), 8),
    ):
        found = jax.eval_shape(of, models.shapes(module), images)
        assert found.shape == (2, 12, width) and found.dtype == jnp.float32


def test_terms_that_a_network_cannot_have_are_refused(tmp_path):
    alignment = training.AlignmentRecipe(block=1, encoder=str(tmp_path))
    with pytest.raises(InvalidArgumentError, match="route and alignment are for DiT and SiT"):
        built(preset="mini-unet", overrides={}, route=(0, 1))
    checkpoints.save(tmp_path, module := models.build("mini-autoencoder"), models.init(module, KEY))
    with pytest.raises(CheckpointError, match="ConvAutoencoder: features are aligned"):
        built(alignment=alignment)
    with pytest.raises(InvalidArgumentError, match="tap must be at most the 3 blocks"):
        built(alignment=training.AlignmentRecipe(block=4))
    with pytest.raises(InvalidArgumentError, match="give the recipe a classifier"):
        dataclasses.replace(recipe_with(alignment=training.AlignmentRecipe(block=1)), classifier=None)
    with pytest.raises(InvalidArgumentError, match="route_share"):
        recipe_with(route=(0, 1), route_share=0.0)
    recipe = recipe_with(alignment=training.AlignmentRecipe(block=1))
    assert training.stages_of(recipe) == ["classifier", "diffusion"]
