"""docs/draw-with-diffusers.md: both listings, on a random model of the classes of `mini-ldm-32`."""

import dataclasses
import json
import pathlib
import re

import diffusers
import jax
import numpy as np
import pytest

from jaxldm import models, pipelines, schedulers
from jaxldm.training import RECIPES
from jaxldm.training.autoencoder import build_autoencoder
from jaxldm.training.autoencoder_players import make_loss as autoencoder_loss
from jaxldm.training.diffusion import build_denoiser, latent_shape
from jaxldm.training.runs import RunFolder, save_autoencoder, save_denoiser

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "draw-with-diffusers.md"
RECIPE, SHAPE = RECIPES["smoke-32"], (32, 32, 1)


def random_params(module, seed):
    """Kernels that keep the scale of their input, other numbers near their usual values: no layer is idle."""
    numbers = np.random.default_rng(seed)

    def draw(path, spec):
        drawn = numbers.standard_normal(spec.shape)
        if len(spec.shape) >= 2:
            return (drawn / np.sqrt(np.prod(spec.shape[:-1]))).astype(spec.dtype)
        return (0.1 * drawn + (path[-1].key == "scale")).astype(spec.dtype)

    return jax.tree_util.tree_map_with_path(draw, models.shapes(module))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder, as training leaves it."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "mini-ldm-32")
    autoencoder = build_autoencoder(RECIPE, SHAPE)
    config = dataclasses.replace(autoencoder.config, scaling_factor=0.9, shift_factor=0.1)
    run.path.mkdir(exist_ok=True)
    save_autoencoder(run, models.from_config(config), random_params(autoencoder, 0))
    denoiser = build_denoiser(RECIPES["smoke-32"], SHAPE, 10)
    prediction = RECIPES["mini-ldm-32"].diffusion.prediction
    save_denoiser(run, denoiser, random_params(denoiser, 1), schedulers.to_config(prediction))
    return run


@pytest.mark.torch  # the second listing imports it
@pytest.mark.parametrize("exported", [False, True], ids=["run", "export"])
def test_the_listings_draw_the_same_pictures(run, tmp_path, monkeypatch, exported):
    folder = run.path
    if exported:
        folder = tmp_path / "exported"
        pipelines.save(pipelines.load(run.path), folder)
    monkeypatch.chdir(tmp_path)
    drawn = []
    for listing in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        assert '"runs/mini-ldm-32"' in listing and "50" in listing
        listing = listing.replace('"runs/mini-ldm-32"', repr(str(folder)))
        # 8 divides the 1000 timesteps, as 50 does: the scheduler of diffusers looks 1000 // n back.
        listing = listing.replace("steps=50", "steps=8").replace("set_timesteps(50)", "set_timesteps(8)")
        names = {}
        exec(compile(listing, PAGE.name, "exec"), names)
        drawn.append(np.asarray(names["images"]))
    ours, theirs = drawn[0], drawn[1].transpose(0, 2, 3, 1)
    assert ours.shape == (10, 32, 32, 1) and ours.std() > 0.05
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_the_components_are_those_of_diffusers(run):
    index = json.loads(run.index.read_text())
    assert (index["vae"], index["unet"]) == (["diffusers", "AutoencoderKL"], ["diffusers", "UNet2DModel"])
    for kind, name in ((diffusers.AutoencoderKL, "vae"), (diffusers.UNet2DModel, "unet")):
        _, loading = kind.from_pretrained(run.path, subfolder=name, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]


@pytest.mark.parametrize("name", ["mini-ldm-32", "smoke-32"])
def test_the_recipe_has_8x8_latents_and_its_autoencoder_a_loss(name):
    recipe = RECIPES[name]
    assert recipe.pad_to == 32 and latent_shape(recipe, SHAPE) == (8, 8, 4)
    module = build_autoencoder(recipe, SHAPE)
    batch = {"image": jax.ShapeDtypeStruct((2, *SHAPE), np.float32)}
    loss_fn = autoencoder_loss(dataclasses.replace(recipe.autoencoder, beta_warmup_epochs=0), module, 0)

    def loss(params, batch):
        class state:
            step = 0

        return loss_fn(params, state, batch, jax.random.key(0))

    value, metrics = jax.eval_shape(loss, models.shapes(module), batch)
    assert value.shape == () and metrics["kl_channel"].shape == (4,)
