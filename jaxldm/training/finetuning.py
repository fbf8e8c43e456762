"""Fine-tuning: the denoising network of a finished model on further pictures, or what stands next to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float, PRNGKeyArray

from jaxldm import checkpoints, models, pipelines
from jaxldm import diffusion as D
from jaxldm.checkpoints.embedding_file import EMBEDDING_FILE, texts_with
from jaxldm.data import Rows
from jaxldm.data.batches import RowsWith
from jaxldm.models.quantization import refuse_quantized
from jaxldm.pipelines.folders import draws_classes
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.prompts import encode_ids
from jaxldm.pipelines.words import table_of, with_rows
from jaxldm.reading import shortened
from jaxldm.training.conditions import CONTROL_IMAGE
from jaxldm.training.control_pictures import (
    ControlledRows,
    control_images,
    controlnet_config,
    new_controlnet,
    save_control_images,
)
from jaxldm.training.denoiser_loss import Condition, label_condition
from jaxldm.training.diffusion import MOST_CAPTIONS, identity_and_labels, latents_of
from jaxldm.training.finetune_recipe import TEMPLATES, FinetuneRecipe, WordRecipe
from jaxldm.training.finetune_source import build, check, ids_of, with_single_blocks
from jaxldm.training.mesh import own_split
from jaxldm.training.prior_preservation import PairedRows, class_pictures, of_class
from jaxldm.training.runs import CONTROL_FOLDER, CONTROL_SAMPLES, LORA_FILE, RunFolder, save_pipeline
from jaxldm.training.stages import (
    MOST_CLASSES,
    Context,
    Job,
    Task,
    save_samples,
    stage_keys,
    with_names,
)
from jaxldm.training.state import Params
from jaxldm.training.text import CaptionConditions, CaptionedRows, encode_captions, own_sizes

STAGE = "finetune"
_PIXELS_AT_ONCE = 2**20  # that the autoencoder encodes


class Tuned(NamedTuple):
    """What moves, and what becomes of it.

    Attributes:
        init: key -> the parameters to begin with.
        network: (parameters, frozen) -> those that `call` takes, of the denoising network.
        condition: (parameters, frozen, batch, key) -> what the network takes; None: that of the batch.
        frozen: what lies in the state besides.
        pipeline: the finished parameters -> the model with them.
        save: (run, the finished parameters).
        call: the network, see `denoising`; None: the denoising network alone.
    """

    init: Callable[[PRNGKeyArray], Params]
    network: Callable[[Params, Any], Params]
    frozen: Any
    pipeline: Callable[[Params], Pipeline]
    save: Callable[[RunFolder, Params], None]
    condition: Callable[[Params, Any, Any, PRNGKeyArray], Any] | None = None
    call: Callable[..., Any] | None = None


def tuned_of(recipe: FinetuneRecipe, pipe: Pipeline) -> Tuned:
    """The network itself, an adapter in front of it, the embeddings of a word, or a ControlNet."""
    if recipe.word is not None:
        return tuned_word(recipe.word, pipe)
    if recipe.control is not None:
        return tuned_control(recipe, pipe)
    base, lora = pipe.denoiser.params, recipe.lora

    def with_network(params: Params) -> Pipeline:
        return pipe.replace(denoiser=Network(pipe.denoiser.module, params))

    if lora is None:
        return Tuned(
            lambda key: base,
            lambda params, frozen: params,
            None,
            with_network,
            lambda run, params: save_pipeline(run, with_network(params)),
        )

    def network(params: Params, frozen: Params) -> Params:
        return models.apply_lora(frozen, params, lora.scale)

    def save(run: RunFolder, params: Params) -> None:
        checkpoints.save_lora(run.path / LORA_FILE, {pipe.denoiser_name: params}, lora.scale, lora.names)

    return Tuned(
        lambda key: models.init_lora(key, base, lora.rank, lora.targets),
        network,
        base,
        lambda params: with_network(network(params, base)),
        save,
    )


def denoising(pipe: Pipeline, recipe: FinetuneRecipe) -> Callable[..., Any]:
    """The network of a pipeline as (params, x, t, condition) -> output, without a learned variance.

    That has no part in this loss, and stays what it is as far as the layers that it shares let it.
    """
    config, channels = pipe.denoiser.config, pipe.latent_spec.channels
    network = models.network(models.from_config(recipe.computing(config)))

    def call(params: Params, x: Any, t: Any, condition: Any) -> Any:
        return network(params, x, t, condition)[..., :channels]

    return call


def tuned_word(recipe: WordRecipe, pipe: Pipeline) -> Tuned:
    """The embeddings of a new word, in texts that are drawn at each update."""
    encoder, tokenizer, table = pipe.text_encoder, pipe.tokenizer, table_of(pipe.text_encoder.params)
    like = np.resize(ids_of(tokenizer, recipe.initial), recipe.vectors)
    vectors = np.asarray(traverse_util.flatten_dict(encoder.params)[table], np.float32)[like]
    whole = pipelines.with_word(pipe, recipe.word, vectors)
    _, first = checkpoints.with_word(tokenizer, recipe.word, recipe.vectors)
    length = min(whole.tokenizer.max_length, encoder.config.max_position_embeddings)
    texts = texts_with(recipe.word, TEMPLATES[recipe.templates])
    ids = whole.tokenizer(texts, max_length=length).input_ids

    def condition(params: Params, frozen: Any, batch: Any, key: PRNGKeyArray) -> Any:
        which = jax.random.randint(key, batch["mean"].shape[:1], 0, len(ids))
        params = with_rows(frozen["text_encoder"], first, params["vectors"])
        encoded = encode_ids(
            Network(whole.text_encoder.module, params), jnp.asarray(ids)[which], None, 0, True
        )
        return {"encoder_hidden_states": encoded.hidden}

    return Tuned(
        lambda key: {"vectors": jnp.asarray(vectors)},
        lambda params, frozen: frozen["network"],
        {"network": pipe.denoiser.params, "text_encoder": encoder.params},
        lambda params: pipelines.with_word(pipe, recipe.word, np.asarray(params["vectors"])),
        lambda run, params: checkpoints.save_embedding(
            run.path / EMBEDDING_FILE, recipe.word, np.asarray(params["vectors"])
        ),
        condition,
    )


def tuned_control(recipe: FinetuneRecipe, pipe: Pipeline) -> Tuned:
    """A ControlNet next to the network: a copy of its down blocks, whose outputs are zero at first."""
    config = controlnet_config(pipe, recipe.source)
    unet, computed = (models.from_config(recipe.computing(each)) for each in (pipe.denoiser.config, config))
    control = models.from_config(config)

    def call(params: Params, x: Any, t: Any, condition: Any) -> Any:
        network = models.controlled_network(unet, params["network"], computed)
        return network(params["control"], x, t, condition)

    return Tuned(
        lambda key: new_controlnet(pipe, recipe.source, key),
        lambda params, frozen: {"network": frozen, "control": params},
        pipe.denoiser.params,
        lambda params: pipelines.with_control(pipe, Network(control, params)),
        lambda run, params: checkpoints.save(run.path / CONTROL_FOLDER, control, params),
        call=call,
    )


def drawn(batch: Any, key: PRNGKeyArray) -> Any:
    """The latents of a batch: their means, or draws from the autoencoder's posteriors."""
    if "std" not in batch:
        return batch["mean"]
    return batch["mean"] + batch["std"] * jax.random.normal(key, batch["mean"].shape)


def make_loss(
    recipe: FinetuneRecipe,
    prediction: D.Prediction,
    network: Callable[..., Any],
    tuned: Tuned,
    on: Condition,
) -> Callable[..., Any]:
    """`loss(params, state, batch, key)` for `make_train_step`.

    With a prior it is the mean over the pictures of the subject, and that over those of its class times the
    weight: not one mean over both.
    """
    weight, time = recipe.make_weight(), recipe.make_time()

    def loss_of(whole: Params, batch: Any, condition: Any, key: PRNGKeyArray) -> Any:
        latent_key, loss_key = jax.random.split(key)
        return D.diffusion_loss(
            loss_key,
            lambda x, t, condition: network(whole, x, t, condition),
            prediction,
            drawn(batch, latent_key),
            condition,
            weight=weight,
            time=time,
            noise_offset=recipe.noise_offset,
            null_condition=on.nulls(batch),
            condition_dropout=recipe.condition_dropout,
        )

    def loss(params: Params, state: Any, batch: Any, key: PRNGKeyArray) -> Any:
        own_key, prior_key, text_key = jax.random.split(key, 3)
        whole = tuned.network(params, state.frozen)
        if tuned.condition is None:
            condition = on.of(batch)
        else:
            condition = tuned.condition(params, state.frozen, batch, text_key)
        value, metrics = loss_of(whole, batch, condition, own_key)
        if recipe.prior is None:
            return value, metrics
        others = of_class(batch)
        prior, _ = loss_of(whole, others, on.of(others), prior_key)
        return value + recipe.prior.weight * prior, {**metrics, "prior": prior}

    return loss


class Examples(NamedTuple):
    """What a fine-tuning is trained on, and what it draws on the way.

    Attributes:
        rows: latents, and the columns of their conditions.
        on: the condition.
        subjects: texts or classes, of the pictures on the way.
        names: of these.
        controls: control images of these, in [0, 1]; None without a ControlNet.
    """

    rows: Rows
    on: Condition
    subjects: Sequence[Any]
    names: Sequence[str]
    controls: Float[np.ndarray, "N H W 3"] | None = None


def latent_rows(context: Context, pipe: Pipeline, folder: Path) -> Rows:
    """The training pictures as latents and labels, or as they are where the model draws pixels."""
    rows, vae = context.train_rows(), pipe.autoencoder
    if vae is None:
        return with_names(rows, mean="image", label="label")
    images, labels = identity_and_labels(rows, context.dataset)
    shape = cast(tuple[int, int, int], tuple(context.dataset.image_shape))
    at_once = max(1, min(256, _PIXELS_AT_ONCE // (shape[0] * shape[1])))
    log = lambda line: context.log(f"{STAGE}: {line}")  # noqa: E731
    latents = latents_of((vae.module, vae.params), rows, images, shape, folder, log, at_once)
    drawn = cast(FinetuneRecipe, context.recipe.finetune).sample_latents
    return RowsWith(latents.only(*(("mean", "std") if drawn else ("mean",))), {"label": labels})


def examples_of(context: Context, pipe: Pipeline) -> Examples:
    """Latents with classes or with what the encoders make of their captions."""
    recipe = cast(FinetuneRecipe, context.recipe.finetune)
    rows = latent_rows(context, pipe, context.run.latents)
    if draws_classes(pipe.family):
        count = cast(int, pipe.num_classes)
        names = (pipe.class_names or context.dataset.class_names)[:MOST_CLASSES]
        return Examples(rows, label_condition(count), range(len(names)), names)
    size = cast(tuple[int, int], tuple(context.dataset.image_shape[:2]))
    if recipe.word is not None:
        null = {name: np.asarray(part)[0] for name, part in pipe.encode_prompts([""], None, size)[1].items()}
        texts = texts_with(recipe.word.word, TEMPLATES[recipe.word.templates])
        return Examples(rows, Condition(null), *_shown(texts))
    texts = context.dataset.captions("train", len(rows)) if recipe.prompt is None else None
    texts = [cast(str, recipe.prompt)] * len(rows) if texts is None else texts
    of_prior = [] if recipe.prior is None else [recipe.prior.prompt]
    context.log(f"{STAGE}: encoding {len({*texts, *of_prior})} different captions")
    found = encode_captions(pipe, [*texts, *of_prior], size, context.run.captions)
    found = with_guidance(pipe, found)
    sizes = own_sizes(context.dataset.rows("train"), found)
    captioned = CaptionedRows(rows, found._replace(which=found.which[: len(texts)]), sizes)
    if recipe.control is not None:
        return controlled(context, recipe.control.images, captioned, texts)
    if recipe.prior is None:
        return Examples(captioned, Condition(found.null), *_shown(texts))
    pictures = dataclasses.replace(context, dataset=class_pictures(context, recipe, pipe))
    others = latent_rows(pictures, pipe, context.run.latents / "prior")
    which = np.repeat(found.which[-1:], len(others))
    rows = PairedRows(captioned, CaptionedRows(others, found._replace(which=which)))
    return Examples(rows, Condition(found.null), *_shown([*texts, *of_prior]))


def controlled(context: Context, images: str, captioned: CaptionedRows, texts: Sequence[str]) -> Examples:
    """Examples with control images; those of the first pictures, with their captions, are drawn."""
    pictures = context.dataset.rows("train")
    null = {**captioned.captions.null, CONTROL_IMAGE: np.float32(0)}  # never used: pictures keep their own
    few = list(texts[:MOST_CAPTIONS])
    shown = control_images(pictures, images, np.arange(len(few)))
    names = [shortened(text, 24) for text in few]
    return Examples(ControlledRows(captioned, pictures, images), Condition(null), few, names, shown)


def _shown(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The texts to draw on the way, the first different ones, and their names."""
    first = list(dict.fromkeys(texts))[:MOST_CAPTIONS]
    return first, [shortened(text, 24) for text in first]


def with_guidance(pipe: Pipeline, captions: CaptionConditions) -> CaptionConditions:
    """For a network that takes the guidance scale: 1, which is that of the pictures themselves."""
    if not pipe.is_guidance_distilled:
        return captions
    number = len(captions.texts)
    own = {name: np.asarray(rows) for name, rows in pipe.family.guidance_condition(pipe, 1.0, number).items()}
    null = {name: rows[0] for name, rows in own.items()}
    return captions._replace(texts=RowsWith(captions.texts, own), null={**captions.null, **null})


def make_preview(
    context: Context, pipe: Pipeline, tuned: Tuned, examples: Examples
) -> Callable[[Params, int], None]:
    """Writes a picture of what the model draws of texts or classes, from the same noise each time.

    Control images are above it.
    """
    subjects, controls = examples.subjects, examples.controls
    recipe = cast(FinetuneRecipe, context.recipe.finetune)
    key, folder = stage_keys(context.recipe.seed, STAGE).sample, context.run.stage(STAGE)
    options: dict[str, Any] = {"num_inference_steps": recipe.sample_steps}
    if recipe.sample_guidance_scale is not None:
        options["guidance_scale"] = recipe.sample_guidance_scale
    if not draws_classes(pipe.family):
        options |= dict(zip(("height", "width"), context.dataset.image_shape[:2], strict=True))
    several = [subject for _ in range(recipe.samples_per_caption) for subject in subjects]
    above: Any = None if controls is None else 2 * controls - 1
    if controls is not None:
        options["control_image"] = np.tile(above, (recipe.samples_per_caption, 1, 1, 1))

    def preview(params: Params, step: int) -> None:
        images = tuned.pipeline(params)(key, several, **options)
        if above is not None:
            images = np.concatenate([above[..., : images.shape[-1]], images])
        save_samples(folder, images, examples.names, step)

    return preview


def prepare(context: Context) -> Job:
    """The model of the recipe, and what of it moves."""
    recipe = cast(FinetuneRecipe, context.recipe.finetune)
    pipe = pipelines.load(recipe.source, dtype="float32", mesh=own_split(context.mesh))
    refuse_quantized(pipe.denoiser.params, "fine-tuning")
    pipe = with_single_blocks(pipe) if recipe.freeze else pipe
    examples, tuned = examples_of(context, pipe), tuned_of(recipe, pipe)
    network = denoising(pipe, recipe) if tuned.call is None else tuned.call
    preview = make_preview(context, pipe, tuned, examples)
    loss = make_loss(recipe, pipe.prediction, network, tuned, examples.on)

    def finish(params: Params) -> None:
        if examples.controls is not None:
            save_control_images(context.run.stage(STAGE).path / CONTROL_SAMPLES, examples.controls)
        tuned.save(context.run, params)

    return Job(
        tuned.init,
        loss,
        examples.rows,
        finish,
        preview,
        frozen=tuned.frozen,
        freeze=recipe.freeze,
        save_frozen=False,
    )


TASK = Task(lambda recipe, shape, classes: build(recipe), prepare, check)
