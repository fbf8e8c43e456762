"""Stage two: a denoising network on cached latents, or on pixels where there is no autoencoder."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray, Shaped

from jaxldm import checkpoints, models, schedulers
from jaxldm import diffusion as D
from jaxldm.data import ArrayRows, Dataset, Rows, fingerprint, sharded
from jaxldm.data.batches import RowsAt, RowsWith
from jaxldm.data.buckets import JoinedBuckets, buckets_of
from jaxldm.data.folders import FolderRows, identity
from jaxldm.data.shards import ShardRows, rows_per_shard
from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.metrics.health import Finding, check_prediction_shape, check_terminal_latents, failed
from jaxldm.models.autoencoder import shift_and_scale
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.reading import shortened
from jaxldm.training.autoencoder import STAGE as AUTOENCODER
from jaxldm.training.autoencoder import as_posterior, build_autoencoder, encode_all
from jaxldm.training.conditions import Condition, label_condition
from jaxldm.training.denoiser_loss import (
    FEATURES,
    make_loss,
    network_params,
    new_params,
)
from jaxldm.training.dynamic import as_drawn, check_dynamic
from jaxldm.training.frozen_features import FrozenFeatures, check_encoder, load_features
from jaxldm.training.recipes import DiffusionRecipe, Recipe
from jaxldm.training.runs import save_denoiser
from jaxldm.training.stages import (
    MOST_CLASSES,
    Context,
    Job,
    JoinedRows,
    Task,
    build_model,
    of_one_shape,
    report_health,
    sample_size,
    save_samples,
    stage_keys,
    with_names,
)
from jaxldm.training.state import Params
from jaxldm.training.text import (
    PIPELINE_OF,
    CaptionedRows,
    encode_captions,
    load_text_parts,
    own_sizes,
    pipeline_class,
    text_fields,
    text_pipeline,
)

STAGE = "diffusion"
MOST_CAPTIONS = 6


def denoiser_recipe(recipe: Recipe) -> DiffusionRecipe:
    """The part of a recipe that this stage is of; recipes of masked image models have none."""
    return cast(DiffusionRecipe, recipe.diffusion)


def latent_shape(recipe: Recipe, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(h, w, c) of what the denoising network works on, without computing anything."""
    if recipe.autoencoder is None:
        return cast(tuple[int, int, int], tuple(image_shape))
    return encoded_shape(build_autoencoder(recipe, image_shape), image_shape)


def encoded_shape(module: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(h, w, c) of the latents of an autoencoder, without computing anything."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def encode(params, x) -> Any:
        return as_posterior(module.apply({"params": params}, x, method="encode")).mean

    return jax.eval_shape(encode, models.shapes(module), images).shape[1:]


def build_denoiser(recipe: Recipe, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The denoising network of a recipe. Raises `UnknownNameError`, `InvalidArgumentError`.

    A network that can learn the variance too (DiT) is built without it: this loss would not train it.
    """
    own = denoiser_recipe(recipe)
    path = own.prediction.path
    D.make_grid(path, own.sample_steps)  # refuses more steps than the path has
    if own.time is not None:  # refuses a distribution of continuous times on timesteps
        draw = cast(Callable[..., Any], own.make_time())
        jax.eval_shape(lambda key: draw(key, (1,), path), jax.random.key(0))
    shape = latent_shape(recipe, image_shape)
    _check_terms(own)
    module = build_model(
        own,
        sample_size=sample_size(shape),
        **channels_of(own.preset, shape[-1]),
        num_classes=num_classes,
        learn_sigma=False,
        route=own.route,
        tap=None if own.alignment is None else own.alignment.block,
        max_time=float(path.num_train_timesteps or path.t_noisy),
        **(
            {} if recipe.text is None else text_fields(recipe.text, models.PRESETS[own.preset], own.overrides)
        ),
    )
    if (pipeline_class(module.config) is None) == (recipe.text is not None):
        wanted = f"one of {', '.join(PIPELINE_OF)}" if recipe.text else "one of classes"
        raise InvalidArgumentError(
            f"{own.preset} is a {type(module).__name__}: a recipe "
            f"{'with' if recipe.text else 'without'} text needs {wanted}"
        )
    check_buckets(recipe, module, image_shape[-1])
    check_dynamic(own, module)
    if models.convention(module).continuous and path.num_train_timesteps is not None:
        raise InvalidArgumentError(
            f"{type(module).__name__} counts time from 0 to 1: train it on a continuous path, for example "
            "prediction D.flow(D.Flow()), or train a DiT"
        )
    return module


def check_buckets(recipe: Recipe, module: nn.Module, channels: int) -> None:
    """Trace the network once for each size of the recipe's buckets.

    Raises `InvalidArgumentError` for a size that it cannot work on.
    """
    for height, width in () if recipe.buckets is None else recipe.buckets.sizes:
        try:
            shape = latent_shape(recipe, (height, width, channels))
            x, t, *condition = cast(Any, module).example_inputs()
            inputs = (jax.ShapeDtypeStruct((*x.shape[:1], *shape), x.dtype), t, *condition)
            found = jax.eval_shape(
                lambda params, *given: module.apply({"params": params}, *given),
                models.shapes(module),
                *inputs,
            )
            fits = found.shape[1:3] == shape[:2]
        except (AssertionError, TypeError, ValueError):
            fits = False
        if not fits:
            raise InvalidArgumentError(
                f"{denoiser_recipe(recipe).preset} cannot work on images of {height}x{width}: give buckets "
                "with a larger multiple, or take a U-Net or a DiT with position_embedding 'sincos'"
            )


def _check_terms(recipe: DiffusionRecipe) -> None:
    """Refuse a route and an alignment of a network that has neither, and an encoder that is none."""
    config = models.PRESETS[one_of("preset", recipe.preset, models.PRESETS)]
    if (recipe.route or recipe.alignment) and not isinstance(config, models.DiTConfig):
        raise InvalidArgumentError(
            f"{recipe.preset} is a {models.class_name(config)}: route and alignment are for DiT and SiT, "
            "leave them out"
        )
    if recipe.alignment is not None:
        check_encoder(recipe.alignment)


def without_terms(module: nn.Module, params: Params) -> tuple[nn.Module, Params]:
    """The finished network as others have it, without a route and a tap, and its parameters."""
    config, params = cast(Any, module).config, network_params(params)
    if getattr(config, "route", None) is None and getattr(config, "tap", None) is None:
        return module, params
    plain = models.from_config(dataclasses.replace(config, route=None, tap=None))
    state = checkpoints.to_state_dict(params)  # stacks of blocks have other lengths
    return plain, checkpoints.from_state_dict(state, models.shapes(plain))


def channels_of(preset: str, latent_channels: int) -> dict[str, int]:
    """The fields of a network's config that the channels of its latents fill."""
    if isinstance(models.PRESETS[preset], models.FluxTransformer2DConfig):  # its tokens are 2x2 latents
        return {"in_channels": 4 * latent_channels}
    return {"in_channels": latent_channels, "out_channels": latent_channels}


def latent_columns(context: Context) -> Rows:
    """Examples for the denoising network: pixels, or the latents that the finished autoencoder makes of them.

    Latents are scaled by the autoencoder's own factors. They are kept in shards in the folder latents, keyed
    by a hash of the autoencoder and the images, computed again when either is another, and read by rows.
    """
    rows = context.train_rows()
    if context.recipe.autoencoder is None:
        return with_names(rows, mean="image", label="label")
    images, labels = identity_and_labels(rows, context.dataset)
    own = buckets_of(rows)
    if own is None:
        return RowsWith(
            _latents(context, rows, images, context.dataset.image_shape, context.run.latents),
            {"label": labels},
        )
    parts = []
    for bucket in np.unique(own):
        height, width = cast(FolderRows, context.dataset.rows("train")).sizes[bucket]
        shape, folder = (height, width, context.dataset.image_shape[2]), f"{height}x{width}"
        part = RowsAt(rows, np.flatnonzero(own == bucket))
        parts.append(_latents(context, part, images, shape, context.run.latents / folder))
    return RowsWith(JoinedBuckets(tuple(parts), own), {"label": labels})


def _latents(
    context: Context, rows: Rows, images: Any, shape: tuple[int, int, int], folder: Path
) -> ShardRows:
    """The latents of examples of one shape."""
    autoencoder = checkpoints.load(context.run.stage(AUTOENCODER).model)
    log = lambda line: context.log(f"{STAGE}: {line}")  # noqa: E731
    latents = latents_of(autoencoder, rows, images, shape, folder, log)
    return latents.only(*(("mean", "std") if denoiser_recipe(context.recipe).sample_latents else ("mean",)))


def latents_of(
    autoencoder: tuple[nn.Module, Params],
    rows: Rows,
    images: Any,
    shape: tuple[int, int, int],
    folder: Path,
    log: Callable[[str], None],
    at_once: int = 256,
) -> ShardRows:
    """The latents of examples of one shape; those that are in shards in `folder` are not computed again.

    Args:
        autoencoder: finished.
        rows: the examples, column `image`.
        images: theirs or a hash of them, for the key.
        shape: (H, W, C) of them.
        folder: of the shards.
        log: is given a line before a shard is computed.
        at_once: images that are encoded together.
    """
    module, params = cast(Any, autoencoder[0]), autoencoder[1]
    shift, scale = (np.asarray(part) for part in shift_and_scale(module.config, jnp.zeros((), jnp.float32)))

    def compute(start: int, stop: int) -> dict[str, Any]:
        log(f"encoding the training images {start + 1} to {stop} of {len(rows)}")
        part = rows.columns["image"][start:stop] if isinstance(rows, ArrayRows) else None
        some = RowsAt(rows, np.arange(start, stop)) if part is None else part
        posterior = encode_all(module, params, some, at_once)
        return {
            "mean": (posterior.mean - shift) * scale,
            "std": np.exp(0.5 * posterior.log_variance) * scale,
        }

    config = json.dumps(models.config_to_dict(module.config), sort_keys=True)
    row = jax.ShapeDtypeStruct(encoded_shape(module, shape), np.float32)
    key, size = fingerprint(params, config, images, str(shape)), rows_per_shard(mean=row, std=row)
    return sharded(folder, key, len(rows), compute, size)


def with_images(context: Context, rows: Rows) -> Rows:
    """Examples with their images as a further column."""
    return JoinedRows(rows, with_names(context.train_rows(), image="image"))


def identity_and_labels(rows: Rows, dataset: Dataset) -> tuple[Any, Int[np.ndarray, " N"]]:
    """(images or a hash of them, labels) of training examples."""
    if isinstance(rows, ArrayRows):
        return rows.columns["image"], rows.columns["label"]
    origin = dataset.rows("train")
    if isinstance(origin, FolderRows):
        return identity(origin), origin.labels[: len(rows)]
    hashes, labels = [], []
    for start in range(0, len(rows), 1024):
        columns = rows.take(np.arange(start, min(start + 1024, len(rows))))
        hashes.append(fingerprint(columns["image"]))
        labels.append(columns["label"])
    return fingerprint(*hashes), np.concatenate(labels)


def first_rows(rows: Rows, most: int) -> Mapping[str, Any]:
    """Named columns of the first `most` examples, of one shape."""
    rows = of_one_shape(rows)
    return rows.take(np.arange(min(len(rows), most)))


def make_sampler(
    context: Context, module: nn.Module, on: Condition, shown: Mapping[str, Shaped[np.ndarray, "K ..."]]
) -> Callable[[Params, Any], Float[np.ndarray, "N H W C"]]:
    """`draw(params, key)`: `samples_per_class` images of each of K conditions, by DDIM; jitted.

    `shown` has the columns of the conditions.
    """
    recipe = denoiser_recipe(context.recipe)
    grid = D.make_grid(recipe.prediction.path, recipe.sample_steps)
    conditions = on.of({k: np.concatenate([v] * recipe.samples_per_class) for k, v in shown.items()})
    scale = recipe.sample_guidance_scale

    def denoise(params):
        network = functools.partial(models.network(module), params)
        predict = D.classifier_free_guidance(network, conditions, on.nulls(), scale)
        return D.denoiser(predict, recipe.prediction)

    number = len(jax.tree.leaves(conditions)[0])
    return decoded_draws(context, denoise, D.solvers.ddim(), grid, number)


def decoded_draws(
    context: Context, denoiser_of: Callable[[Params], D.Denoiser], solver: D.Solver, grid: D.Grid, number: int
) -> Callable[[Params, Any], Float[np.ndarray, "N H W C"]]:
    """`draw(params, key)`: so many images of a denoiser of these parameters; jitted."""
    shape = (number, *latent_shape(context.recipe, context.dataset.image_shape))
    autoencoder, decoder_params = None, None
    if context.recipe.autoencoder is not None:
        autoencoder, decoder_params = checkpoints.load(context.run.stage(AUTOENCODER).model)

    @jax.jit
    def draw(params, decoder_params, key):
        x_T = D.initial_noise(key, shape, grid)
        latents = D.sample(key, denoiser_of(params), solver, grid, x_T)
        return latents if autoencoder is None else models.decode_latents(autoencoder, decoder_params, latents)

    return lambda params, key: np.asarray(draw(params, decoder_params, key))


def preflight(
    recipe: DiffusionRecipe, module: nn.Module, x_0: Float[np.ndarray, "N h w c"], condition: Any = None
) -> list[Finding]:
    """Check what can be checked before a run: the network's shapes, and that the path ends in noise."""
    x = jax.ShapeDtypeStruct((1, *x_0.shape[1:]), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    condition = jax.ShapeDtypeStruct((1,), jnp.int32) if condition is None else condition
    network = lambda params, x, t, condition: models.network(module)(params, x, t, condition)  # noqa: E731
    output = jax.eval_shape(network, models.shapes(module), x, t, condition)
    path, x_0 = recipe.prediction.path, x_0[:1000]
    alpha, sigma = (float(of(np.float64(path.t_noisy))) for of in (path.alpha, path.sigma))
    z_T = alpha * x_0 + sigma * np.random.default_rng(0).normal(size=x_0.shape)
    return [*check_prediction_shape(output, cast(Any, x)), *check_terminal_latents(z_T, sigma=sigma)]


def with_captions(
    context: Context, pipe: Pipeline, rows: Rows
) -> tuple[Condition, list[str], Mapping[str, Shaped[np.ndarray, "K ..."]], Rows]:
    """(condition, captions to draw on the way, their columns, examples with those of their captions)."""
    texts = cast(list[str], context.dataset.captions("train", len(rows)))
    context.log(f"diffusion: encoding {len(set(texts))} different captions")
    size = cast(tuple[int, int], tuple(context.dataset.image_shape[:2]))
    found = encode_captions(pipe, texts, size, context.run.captions)
    first = list(dict.fromkeys(texts))[:MOST_CAPTIONS]
    places = np.array([texts.index(text) for text in first])
    shown = found.of(places)
    captioned = CaptionedRows(rows, found, own_sizes(context.dataset.rows("train"), found))
    return Condition(found.null), [shortened(text, 24) for text in first], shown, captioned


class Conditioned(NamedTuple):
    """The examples of a denoising network, and what it is conditioned on.

    Attributes:
        on: the condition of a batch.
        names: of the conditions that are drawn on the way,
        shown: and their columns.
        columns: of the examples.
        text: the pipeline of a model of captions, None of one of classes.
    """

    on: Condition
    names: Sequence[str]
    shown: Mapping[str, Shaped[np.ndarray, "K ..."]]
    columns: Rows
    text: Pipeline | None


def conditioned(context: Context, module: Any) -> Conditioned:
    """Latents with labels, or with what the text encoders make of their captions."""
    columns = latent_columns(context)
    if context.recipe.text is not None:
        text = text_pipeline(module, load_text_parts(context.recipe.text))
        return Conditioned(*with_captions(context, text, columns), text)
    names = context.dataset.class_names[:MOST_CLASSES]
    shown = {"label": np.arange(min(module.config.num_classes, MOST_CLASSES), dtype=np.int32)}
    return Conditioned(label_condition(module.config.num_classes), names, shown, columns, None)


def prepare(context: Context) -> Job:
    """The denoising network of a run, on latents or pixels."""
    recipe, folder = denoiser_recipe(context.recipe), context.run.stage(STAGE)
    module = build_denoiser(context.recipe, context.dataset.image_shape, context.dataset.num_classes)
    on, names, shown, columns, text = conditioned(context, module)
    example = jax.tree.map(lambda part: jax.ShapeDtypeStruct((1, *part.shape[1:]), part.dtype), on.of(shown))
    findings = preflight(recipe, module, first_rows(columns, 1000)["mean"], example)
    for finding in failed(findings):
        context.log(
            f"diffusion: {finding.check}: {finding.seen}; likely cause: {finding.likely_cause}; "
            f"fix: {finding.fix}"
        )
    draw, key = make_sampler(context, module, on, shown), stage_keys(context.recipe.seed, STAGE).sample
    drawn: list[np.ndarray] = []
    features: FrozenFeatures | None = None
    if recipe.alignment is not None:
        features = load_features(context, recipe.alignment, module.config.grid_size)
        columns = with_images(context, columns)

    def preview(params: Params, step: int) -> None:
        drawn[:] = draw(network_params(params), key)
        save_samples(folder, np.stack(drawn), names, step)

    def finish(params: Params) -> None:
        report_health(context, folder, findings, drawn)
        plain, network = without_terms(module, params)
        plain = as_drawn(plain, network)
        save_denoiser(context.run, plain, network, schedulers.to_config(recipe.prediction), text)

    def init(key: PRNGKeyArray) -> Params:
        return new_params(recipe, module, key, features)

    frozen = None if features is None else {FEATURES: features.params}
    loss = make_loss(recipe, module, on, features)
    return Job(init, loss, columns, finish, preview, frozen=frozen)


TASK = Task(build_denoiser, prepare)
