"""Stage two: a denoising network on cached latents, or on pixels where there is no autoencoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxldm import checkpoints, models
from jaxldm import diffusion as D
from jaxldm.data.latents import cached, fingerprint
from jaxldm.errors import InvalidArgumentError
from jaxldm.metrics.health import check_blank, check_prediction_shape, check_terminal_latents, failed
from jaxldm.metrics.pictures import image_grid, save_png
from jaxldm.training.autoencoder import STAGE as AUTOENCODER
from jaxldm.training.autoencoder import build_autoencoder, encode_all
from jaxldm.training.recipes import DiffusionRecipe, Recipe
from jaxldm.training.stages import (
    Context,
    build_model,
    sample_size,
    save_finished,
    stage_keys,
    tell_health,
    train_network,
)
from jaxldm.training.state import Params

STAGE = "diffusion"


def latent_shape(recipe: Recipe, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(h, w, c) of what the denoising network works on, without computing anything."""
    if recipe.autoencoder is None:
        return tuple(image_shape)
    module = build_autoencoder(recipe, image_shape)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    encode = lambda params, x: module.apply({"params": params}, x, method="encode").mean  # noqa: E731
    return jax.eval_shape(encode, models.shapes(module), images).shape[1:]


def build_denoiser(recipe: Recipe, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The denoising network of a recipe. Raises `UnknownNameError`, `InvalidArgumentError`.

    A network that can learn the variance too (DiT) is built without: nothing here would train it.
    """
    noise = recipe.diffusion.noise
    if noise.path == "edm":
        raise InvalidArgumentError("training on the edm path is not supported: choose the path vp or flow")
    noise.make_denoiser(lambda x, t: x)  # refuses unknown names, and epsilon where the path ends in noise
    shape = latent_shape(recipe, image_shape)
    return build_model(
        recipe.diffusion,
        sample_size=sample_size(shape),
        in_channels=shape[-1],
        out_channels=shape[-1],
        num_classes=num_classes,
        learn_sigma=False,
    )


def make_loss(recipe: DiffusionRecipe, module: nn.Module):
    """`loss_fn(params, key, batch, step)` for `make_train_step`.

    `batch`: `mean` `[B, h, w, c]`, `label` int32 `[B]` and, to draw x_0 = mean + std N(0, 1) anew each time,
    `std`.
    """
    path = recipe.noise.make_path()

    def loss_fn(params, key, batch, step):
        latent_key, loss_key, dropout_key = jax.random.split(key, 3)
        x_0 = batch["mean"]
        if "std" in batch:
            x_0 = x_0 + batch["std"] * jax.random.normal(latent_key, x_0.shape)

        def network(x, t, labels):
            return module.apply({"params": params}, x, t, labels, train=True, rngs={"dropout": dropout_key})

        return D.diffusion_loss(
            loss_key,
            network,
            path,
            x_0,
            batch["label"],
            prediction=recipe.noise.prediction,
            min_snr_gamma=recipe.min_snr_gamma,
            noise_offset=recipe.noise_offset,
            null_condition=jnp.int32(module.config.num_classes),
            condition_dropout=recipe.condition_dropout,
        )

    return loss_fn


def latent_columns(context: Context) -> dict[str, Any]:
    """Named columns of examples: pixels, or the latents that the finished autoencoder makes of the training
    images.

    Latents are scaled by the autoencoder's own factors. They are kept in latents.npz, keyed by a hash of the
    autoencoder and the images, and computed again when either is another.
    """
    images, labels = context.train_arrays()
    if context.recipe.autoencoder is None:
        return {"mean": images, "label": labels}
    module, params = checkpoints.load(context.run.stage(AUTOENCODER).model)
    config = module.config

    def compute():
        context.say("diffusion: encoding the training images")
        posterior = encode_all(module, params, images)
        return {
            "mean": (posterior.mean - np.float32(config.shift_factor or 0.0))
            * np.float32(config.scaling_factor),
            "std": np.exp(0.5 * posterior.log_variance) * np.float32(config.scaling_factor),
        }

    entries = json.dumps(models.config_to_dict(config), sort_keys=True)
    columns = cached(context.run.latents, fingerprint(params, entries, images), compute)
    names = ("mean", "std") if context.recipe.diffusion.sample_latents else ("mean",)
    return {**{name: columns[name] for name in names}, "label": labels}


def make_sampler(
    recipe: DiffusionRecipe, module: nn.Module, decode: Callable[[Any], Any]
) -> Callable[[Params, Any], Float[Array, "N H W C"]]:
    """A jitted `draw(params, key)`: `samples_per_class` images of each class, a column each, by DDIM."""
    path, num_classes = recipe.noise.make_path(), module.config.num_classes
    grid = D.make_grid(path, recipe.sample_steps, spacing="trailing")
    labels = np.tile(np.arange(num_classes, dtype=np.int32), recipe.samples_per_class)
    height_width = models.config.height_width(module.config.sample_size)

    @jax.jit
    def draw(params, key):
        network = lambda x, t, c: module.apply({"params": params}, x, t, c)  # noqa: E731
        scale = recipe.sample_guidance_scale
        predict = D.classifier_free_guidance(network, labels, jnp.int32(num_classes), scale)
        x_T = D.initial_noise(key, (len(labels), *height_width, module.config.in_channels), grid)
        return decode(D.sample(key, recipe.noise.make_denoiser(predict), D.solvers.ddim(), grid, x_T))

    return draw


def _terminal_latents(recipe: DiffusionRecipe, columns: dict[str, Any], key) -> Float[np.ndarray, "N h w c"]:
    """Up to 1000 latents, noised as far as the path goes, in units of its last sigma."""
    path, x_0 = recipe.noise.make_path(), columns["mean"][:1000]
    t = np.float64(path.t_noisy)
    sigma = float(path.sigma(t))
    return (float(path.alpha(t)) * x_0 + sigma * np.asarray(jax.random.normal(key, x_0.shape))) / sigma


def train_diffusion(context: Context) -> None:
    """Trains the denoising network of a run and writes its moving average into `diffusion/model`."""
    recipe, folder = context.recipe.diffusion, context.run.stage(STAGE)
    dataset, keys = context.dataset, stage_keys(context.recipe.seed, STAGE)
    module = build_denoiser(context.recipe, dataset.image_shape, dataset.num_classes)
    columns = latent_columns(context)
    output = jax.eval_shape(
        lambda params, x, t, c: module.apply({"params": params}, x, t, c),
        models.shapes(module),
        *(
            jax.ShapeDtypeStruct((1, *shape), dtype)
            for shape, dtype in ((columns["mean"].shape[1:], jnp.float32), ((), jnp.float32), ((), jnp.int32))
        ),
    )
    findings = [
        *check_prediction_shape(output, columns["mean"][:1]),
        *check_terminal_latents(_terminal_latents(recipe, columns, keys.sample)),
    ]
    for finding in failed(findings):
        context.say(
            f"diffusion: {finding.check}: {finding.seen}; likely cause: {finding.likely_cause}; "
            f"cure: {finding.cure}"
        )

    draw = make_sampler(recipe, module, _decoder(context))

    drawn = []

    def on_sample(params: Params, step: int) -> None:
        drawn[:] = np.asarray(draw(params, keys.sample))
        save_samples(folder.path / "samples" / f"step-{step:06d}.png", np.stack(drawn), dataset.num_classes)

    params = train_network(context, STAGE, recipe, module, make_loss(recipe, module), columns, on_sample)
    if drawn:
        findings = [*findings, *check_blank(np.stack(drawn))]
    tell_health(context, folder, findings)
    save_finished(folder, module, params)


def _decoder(context: Context) -> Callable[[Any], Any]:
    if context.recipe.autoencoder is None:
        return lambda x: x
    module, params = checkpoints.load(context.run.stage(AUTOENCODER).model)
    return lambda latents: models.decode_latents(module, params, latents)


def save_samples(path: Path, images: Float[Array, "N H W C"], num_classes: int) -> None:
    """Writes a grid with one column per class."""
    images = np.nan_to_num(np.asarray(images, np.float32), nan=-1.0)
    save_png(path, image_grid(images, columns=num_classes, scale=2))
