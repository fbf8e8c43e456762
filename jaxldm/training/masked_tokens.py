"""A masked image model on the grey levels of images, in place of a denoising network."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxldm import data, models, schedulers
from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.recipes import MaskedTokensRecipe, Recipe
from jaxldm.training.runs import MASKGIT_CLASS, save_denoiser
from jaxldm.training.stages import (
    MOST_CLASSES,
    Context,
    Job,
    Task,
    build_model,
    labels_of_samples,
    report_health,
    sample_size,
    save_samples,
    stage_keys,
)
from jaxldm.training.state import Params

STAGE = "masked_tokens"


def build_masked_model(recipe: Recipe, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The network of a recipe. Raises `UnknownNameError`, `InvalidArgumentError`."""
    own = cast(MaskedTokensRecipe, recipe.masked_tokens)
    if image_shape[-1] != 1:
        raise InvalidArgumentError(
            f"the tokens of a masked image model are grey levels, the images of {recipe.data} have "
            f"{image_shape[-1]} channels: take data with one channel, or a recipe of a denoising network"
        )
    module = build_model(own, sample_size=sample_size(image_shape), num_classes=num_classes)
    if not isinstance(module, models.MaskGITTransformer):
        raise InvalidArgumentError(
            f"{own.preset} is a {type(module).__name__}, which predicts no masked tokens: take tiny-maskgit"
        )
    return module


def make_loss(recipe: MaskedTokensRecipe, module: nn.Module):
    """`loss_fn(params, state, batch, key)` for `make_train_step`.

    `batch`: `tokens` int32 `[B, h, w]` and `label` int32 `[B]`.
    """
    config = cast(models.MaskGITTransformerConfig, module.config)

    def loss_fn(params, state, batch, key):
        loss_key, dropout_key = jax.random.split(key)

        def network(tokens, labels):
            rngs = {"dropout": dropout_key}
            return module.apply({"params": params}, tokens, labels, train=True, rngs=rngs)

        return D.masked_token_loss(
            loss_key,
            network,
            batch["tokens"],
            batch["label"],
            mask_token=config.mask_token,
            schedule=recipe.schedule,
            label_smoothing=recipe.label_smoothing,
            null_condition=jnp.int32(config.num_classes),
            condition_dropout=recipe.condition_dropout,
        )

    return loss_fn


def make_sampler(
    recipe: MaskedTokensRecipe, module: nn.Module
) -> Callable[[Params, Any], Float[np.ndarray, "N H W 1"]]:
    """`draw(params, key)`: `samples_per_class` images of each class (of the first ten); jitted."""
    config = cast(models.MaskGITTransformerConfig, module.config)
    labels = labels_of_samples(cast(int, config.num_classes), recipe.samples_per_class)
    unmasking = D.make_unmasking(recipe.sample_steps, recipe.schedule, recipe.sample_temperature)
    start = np.full((len(labels), *module.example_inputs()[0].shape[1:]), config.mask_token, np.int32)

    @jax.jit
    def draw(params, key):
        def network(tokens, labels):
            return module.apply({"params": params}, tokens, labels)

        null, scale = jnp.int32(config.num_classes), recipe.sample_guidance_scale
        logits = D.guided_logits(network, labels, null, scale)
        tokens = jnp.asarray(start)
        return D.sample_tokens(key, logits, tokens, unmasking, mask_token=config.mask_token)

    return lambda params, key: data.from_grey_levels(np.asarray(draw(params, key)), config.codebook_size)


def prepare(context: Context) -> Job:
    """The masked image model of a run, on the grey levels of its images."""
    recipe, folder = cast(MaskedTokensRecipe, context.recipe.masked_tokens), context.run.stage(STAGE)
    module = build_masked_model(context.recipe, context.dataset.image_shape, context.dataset.num_classes)
    config = cast(models.MaskGITTransformerConfig, module.config)
    images, labels = context.train_arrays()
    columns = {"tokens": data.to_grey_levels(images, config.codebook_size), "label": labels}
    draw, key = make_sampler(recipe, module), stage_keys(context.recipe.seed, STAGE).sample
    drawn: list[np.ndarray] = []

    def preview(params: Params, step: int) -> None:
        drawn[:] = draw(params, key)
        save_samples(folder, np.stack(drawn), context.dataset.class_names[:MOST_CLASSES], step)

    def finish(params: Params) -> None:
        report_health(context, folder, [], drawn)
        scheduler = schedulers.masked_tokens_config(config.mask_token, recipe.schedule)
        save_denoiser(context.run, module, params, scheduler, class_name=MASKGIT_CLASS)

    loss = make_loss(recipe, module)
    return Job(functools.partial(models.init, module), loss, columns, finish, preview)


TASK = Task(build_masked_model, prepare)
