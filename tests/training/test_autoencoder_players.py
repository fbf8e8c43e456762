"""Autoencoders with discriminator, perceptual distance and codebook: who moves, and whole small runs."""

import dataclasses
import os
import signal
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxldm import checkpoints, models, pipelines, training
from jaxldm.commands.info import describe
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError
from jaxldm.training import autoencoder_players as players
from jaxldm.training.codebook import Codebook, new_codebook, update_codebook
from jaxldm.training.log import CLOCKS
from jaxldm.training.perceptual import classifier_distance, load_perceptual, lpips_distance
from jaxldm.training.recipes import DiscriminatorRecipe

pytestmark = pytest.mark.usefixtures("compile_once")
STAGE = {"batch_size": 8, "save_every": 1, "warmup_epochs": 0.0}
CRITIC = DiscriminatorRecipe(overrides={"block_out_channels": (4, 4)}, start_epochs=1)
VQ = {
    "block_out_channels": (4,),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "num_vq_embeddings": 8,
    "mid_block_add_attention": False,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A KL autoencoder against a discriminator from the second epoch on."""
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(24):
        path = folder / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(n).integers(0, 255, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return training.Recipe(
        name="tiny-gan",
        data=str(folder),
        autoencoder=training.AutoencoderRecipe(
            overrides={"block_out_channels": (4, 4), "norm_num_groups": 2},
            epochs=2,
            discriminator=CRITIC,
            learn_log_variance=True,
            ema_decay=0.9,
            **STAGE,
        ),
        diffusion=None,
    )


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return training.train(recipe, folder, devices=1, log=lambda line: None, bar=False)


def test_a_run_against_a_discriminator(run):
    """It moves and counts after an epoch."""
    log = training.read_log(run.stage("autoencoder").log)
    steps = len(log["step"])
    late = np.arange(steps) >= steps // 2
    assert steps >= 4 and np.isnan(log["discriminator_loss"][~late]).all()
    assert np.isfinite(log["discriminator_loss"][late]).all()
    assert (log["adaptive_weight"][~late] == 0).all() and (log["adaptive_weight"][late] > 0).all()
    assert (log["generator"][~late] == 0).all() and np.ptp(log["log_variance"]) > 0
    module, params = checkpoints.load(run.stage("autoencoder").model)
    assert isinstance(module, models.ConvAutoencoder) and players.LOG_VARIANCE not in params
    assert (run.path / "autoencoder" / "reconstructions.png").is_file()
    assert "the autoencoder:" in describe(str(run.path)) and "resume" not in describe(str(run.path))
    with pytest.raises(CheckpointError, match="autoencoder alone, which draws nothing"):
        pipelines.load(run.path)


def test_a_stop_changes_no_bit_of_two_players(run, recipe, tmp_path):
    def say(line):
        if line.startswith("autoencoder: epoch 1/2"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        training.train(recipe, tmp_path / "run", devices=1, log=say, bar=False)
    again = training.train(recipe, tmp_path / "run", resume=True, devices=1, log=lambda line: None, bar=False)
    logs = [training.read_log(folder.stage("autoencoder").log) for folder in (run, again)]
    for log in logs:
        for clock in CLOCKS:
            log.pop(clock)
    chex.assert_trees_all_equal(*logs)
    name = "diffusion_pytorch_model.safetensors"
    files = [(folder.stage("autoencoder").model / name).read_bytes() for folder in (run, again)]
    assert files[0] == files[1]


def test_a_run_with_a_codebook(recipe, tmp_path):
    """Its entries are the moving averages, in the folder too, and all of it can be decoded from indices."""
    own = dataclasses.replace(
        recipe.autoencoder,
        preset="ldm-vq-f4",
        overrides=VQ,
        learn_log_variance=False,
        discriminator=None,
        codebook_decay=0.5,
    )
    recipe = dataclasses.replace(recipe, autoencoder=own)
    folder = training.train(recipe, tmp_path / "run", devices=1, log=lambda line: None, bar=False)
    log = training.read_log(folder.stage("autoencoder").log)
    assert ((log["perplexity"] >= 1) & (log["perplexity"] <= 8)).all() and log["perplexity"][-1] > 2
    assert {"commitment", "codebook_used"} <= set(log) and "kl" not in log
    module, params = checkpoints.load(folder.stage("autoencoder").model)
    table = params["quantize"]["embedding"]["embedding"]
    start = models.init(module, jax.random.key(0))["quantize"]["embedding"]["embedding"]
    assert table.shape == (8, 3) and np.abs(table).max() > 2 * np.abs(start).max()  # where latents are
    images = np.zeros((1, 8, 8, 3), np.float32)
    indices = models.encode_indices(module, params, images)
    latents = models.encode_latents(module, params, images)
    np.testing.assert_allclose(
        models.decode_indices(module, params, indices),
        models.decode_latents(module, params, latents),
        atol=1e-5,
    )


def test_a_step_of_the_codebook_is_its_moving_average():
    """Half a squared distance and a step of 1 along its gradient: exactly `update_codebook`."""
    module = models.build("ldm-vq-f4", sample_size=8, **VQ)
    params = models.init(module, jax.random.key(0))
    table = params.pop("quantize")["embedding"]["embedding"]
    own = new_codebook(table)._asdict()
    state = types.SimpleNamespace(params={players.AUTOENCODER: params}, step=jnp.int32(0))
    batch = {"image": jax.random.normal(jax.random.key(1), (2, 8, 8, 3))}
    recipe, key = training.AutoencoderRecipe(preset="ldm-vq-f4"), jax.random.key(2)
    loss = players.make_codebook_loss(recipe, module)

    @jax.jit
    def both(own, params):
        gradients = jax.grad(lambda own: loss(own, state, batch, key)[0])(own)
        moves, _ = players.jump().update(gradients, {"count": jnp.int32(0)}, own)
        network = players.network_params(params, own)
        z = module.apply({"params": network}, batch["image"], method="encode")
        expected = update_codebook(key, Codebook(**own), z, recipe.codebook_decay, recipe.restart_below)
        return jax.tree.map(jnp.add, own, moves), expected._asdict()

    chex.assert_trees_all_close(*both(own, params), rtol=1e-5, atol=1e-6)


def test_the_discriminator_moves_nothing_but_itself():
    """The gradient of its loss with respect to the autoencoder is exactly zero, and the other way round."""
    module = models.build("mini-autoencoder", sample_size=8, block_out_channels=(4, 4), norm_num_groups=2)
    critic = models.build("mini-patch-gan", sample_size=8, block_out_channels=(4, 4))
    params = models.init(module, jax.random.key(0))
    everyone = {players.AUTOENCODER: params, players.DISCRIMINATOR: models.init(critic, jax.random.key(1))}
    batch, key = {"image": jax.random.normal(jax.random.key(2), (2, 8, 8, 1))}, jax.random.key(3)
    recipe = training.AutoencoderRecipe(discriminator=CRITIC)
    of_critic = players.make_discriminator_loss(recipe, module, critic)
    of_module = players.make_loss(recipe, module, rules=players.Rules(discriminator=critic))

    def losses(everyone):
        state = types.SimpleNamespace(params=everyone, step=jnp.int32(5), frozen=None)
        one = of_critic(everyone[players.DISCRIMINATOR], state, batch, key)[0]
        return one, of_module(everyone[players.AUTOENCODER], state, batch, key)[0]

    of_one, of_other = jax.jit(jax.jacrev(losses))(everyone)
    zero = lambda tree: all((leaf == 0).all() for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert zero(of_one[players.AUTOENCODER]) and not zero(of_one[players.DISCRIMINATOR])
    assert zero(of_other[players.DISCRIMINATOR]) and not zero(of_other[players.AUTOENCODER])


def test_the_classifiers_distance():
    module = models.build("digit-classifier", sample_size=8, block_out_channels=(4, 4, 4), num_features=4)
    params = models.init(module, jax.random.key(0))
    between = classifier_distance(module)
    x, y = jax.random.normal(jax.random.key(1), (2, 3, 8, 8, 1))
    distances, slope = jax.jit(
        lambda x: (between(params, x, y), jax.grad(lambda x: between(params, x, x).sum())(x))
    )(x)
    assert distances.shape == (3,) and (distances > 0).all() and (distances < 4).all()
    assert (between(params, x, x) == 0).all() and (slope == 0).all()


def test_lpips_takes_grey_images_and_has_a_gradient_where_features_are_zero():
    module = models.LPIPS("alex")
    params = jax.tree.map(lambda spec: jnp.zeros(spec.shape), models.shapes(module))
    between = lpips_distance(module)
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 32, 32, 1))
    value, slope = jax.jit(jax.value_and_grad(lambda x: between(params, x, y).sum()))(x)
    assert value == 0 and (slope == 0).all()


@pytest.mark.unchecked  # a stand-in for the context of a run
def test_the_terms_of_a_recipe_reach_the_loss(recipe, tmp_path):
    """Perceptual distance by the run's classifier, which is trained first, and EQ regularisation."""
    own = dataclasses.replace(
        recipe.autoencoder, perceptual_weight=0.5, equivariance_weight=0.25, equivariance_scales=(0.5,)
    )
    classifier = training.ClassifierRecipe(overrides={"block_out_channels": (4, 4, 4), "num_features": 4})
    whole = dataclasses.replace(recipe, autoencoder=own, classifier=classifier)
    assert training.stages_of(whole) == ["classifier", "autoencoder"]
    network = models.build("digit-classifier", sample_size=8, in_channels=3, **classifier.overrides)
    module = models.build("mini-autoencoder", sample_size=8, in_channels=3, out_channels=3, **own.overrides)
    folder, said = training.RunFolder(tmp_path / "run"), []
    checkpoints.save(folder.stage("classifier").model, network, models.init(network, jax.random.key(0)))
    found = load_perceptual(types.SimpleNamespace(run=folder, log=said.append), own)
    assert "the run's own classifier, not by LPIPS" in said[0]

    def metrics(recipe, rules):
        state = types.SimpleNamespace(step=jnp.int32(0), frozen={players.PERCEPTUAL: found.params})
        params = models.init(module, jax.random.key(1)) | {players.LOG_VARIANCE: jnp.float32(0)}
        batch = {"image": jax.random.normal(jax.random.key(2), (2, 8, 8, 3))}
        loss = players.make_loss(recipe, module, rules=rules)
        return jax.jit(lambda: loss(params, state, batch, jax.random.key(3)))()

    with_all, aux = metrics(own, players.Rules(perceptual=found.between))
    plain, _ = metrics(recipe.autoencoder, players.Rules())
    assert aux["perceptual"] > 0 and aux["equivariance"] > 0
    np.testing.assert_allclose(with_all, plain + aux["perceptual"] + 0.25 * aux["equivariance"], rtol=1e-5)


def test_what_does_not_go_together_is_refused(recipe, tmp_path):
    own = recipe.autoencoder
    with pytest.raises(InvalidArgumentError, match="give the recipe a classifier, or perceptual_file"):
        dataclasses.replace(recipe, autoencoder=dataclasses.replace(own, perceptual_weight=1.0))
    with pytest.raises(InvalidArgumentError, match="trains an autoencoder alone: give one"):
        dataclasses.replace(recipe, autoencoder=None)
    with pytest.raises(UnknownNameError, match="hinge, vanilla"):
        DiscriminatorRecipe(loss="wasserstein")
    with pytest.raises(InvalidArgumentError, match="equivariance_scales"):
        dataclasses.replace(own, equivariance_scales=(0.0,))

    def refused(error, words, **changes):
        changed = dataclasses.replace(recipe, autoencoder=dataclasses.replace(own, **changes))
        with pytest.raises(error, match=words):
            training.train(changed, tmp_path / "run", log=print)
        assert not (tmp_path / "run").exists()

    refused(
        CheckpointError,
        "perceptual_file .*absent",
        perceptual_weight=1.0,
        perceptual_file=str(tmp_path / "absent.pth"),
    )
    (tmp_path / "vgg.pth").write_bytes(b"nothing")
    refused(
        InvalidArgumentError,
        "at least 16 pixels",
        perceptual_weight=1.0,
        perceptual_file=str(tmp_path / "vgg.pth"),
    )
    large = DiscriminatorRecipe(overrides={"block_out_channels": (4,) * 6})
    refused(InvalidArgumentError, "8 pixels is too small", discriminator=large)
