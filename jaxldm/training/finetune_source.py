"""The model that a fine-tuning starts from, without its weights, and whether recipe and data fit it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
from jax.sharding import Mesh

from jaxldm import checkpoints, models, pipelines
from jaxldm.arguments import a_path, checked, count, optional, text
from jaxldm.checkpoints.lora_file import check_names
from jaxldm.data import Dataset, load_folder, source_name
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError
from jaxldm.exact import LARGEST_UINT32
from jaxldm.memory import check_fits
from jaxldm.models.adapters import init_lora
from jaxldm.pipelines.folders import draws_classes, family_of, outline
from jaxldm.pipelines.inputs import INPAINTING_CHANNELS
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.runs import check_finished
from jaxldm.pipelines.words import check_takes_words
from jaxldm.reading import reading, shown
from jaxldm.training.control_pictures import check_control_pictures, control_shapes
from jaxldm.training.finetune_recipe import FinetuneRecipe, WordRecipe, make_finetuning
from jaxldm.training.freezing import freeze
from jaxldm.training.mesh import numbers_per_device
from jaxldm.training.recipes import Recipe
from jaxldm.training.text import check_lengths

# Families whose networks train on the plain loss of their path.
FAMILIES = (
    *("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux", "PixArtSigma", "PixArtAlpha"),
    *("ClassToImage", "DiT"),
)


@checked(
    source=a_path,
    data=a_path,
    method=text,
    image_size=optional(count(1, 2**16)),
    seed=count(0, LARGEST_UINT32),
)
def finetune_recipe(
    source: str | os.PathLike,
    data: str | os.PathLike,
    method: str = "lora",
    *,
    image_size: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Recipe:
    """The recipe that trains a model further on pictures, for `train`.

    Captions are those of the pictures; a model of classes needs as many classes of pictures as it has.

    Args:
        source: folder of the model: a published one, an exported one, or a run.
        data: folder of pictures (see `jaxldm.data.load_folder`), all of which are trained on, or a TFDS name.
        method: "lora": an adapter of low rank, which becomes one file; "full": all parameters of the network;
            "freeze": those that no pattern of `freeze` names; "dreambooth": one subject, whose pictures have
            the caption `instance_prompt`, next to pictures of its class; "textual-inversion": the embeddings
            of a new word alone, which become a file; "controlnet": a ControlNet next to the network, which
            becomes a folder. What is no file and no such folder is a model of its own.
        image_size: side to which the central square of each picture is scaled; None: the model's own.
        seed: of every random number.
        options: fields of `FinetuneRecipe`, and what a method alone has: rank, alpha, targets and lora_names
            of lora (and of dreambooth, which is one then); freeze of freeze; instance_prompt, class_prompt,
            class_images (a folder) or num_class_images, and prior_weight of dreambooth; word, initial_text,
            num_vectors and templates of textual-inversion; control_images ("folder" or "edges") and caption
            (of all pictures) of controlnet.

    Raises:
        CheckpointError: no such model, or one that cannot be trained so.
        UnknownNameError: a method or an option that does not exist.
        InvalidArgumentError: an option without effect, or with a value that cannot be.

    >>> from jaxldm import training                                                        # doctest: +SKIP
    >>> recipe = training.finetune_recipe("stable-diffusion-v1-5", "my-pictures", rank=4)  # doctest: +SKIP
    >>> run = training.train(recipe, "runs/my-lora")                                       # doctest: +SKIP
    """
    own = make_finetuning(source, method, options)
    if image_size is None:
        height, width = outline_of(own).default_size
        if height != width:
            raise InvalidArgumentError(
                f"{source} draws {width}x{height} pixels: give image_size, for squares"
            )
        image_size = height
    where = {"data": source_name(data), "image_size": image_size}
    name = "finetune" if own.control is None else "controlnet"
    return Recipe(name=name, **where, diffusion=None, finetune=own, seed=seed)


def outline_of(recipe: FinetuneRecipe) -> Pipeline:
    """The model of a fine-tuning without its parameters. Reads configs and tokenizers alone.

    Raises:
        CheckpointError: no model, a damaged one, or one of a kind that is not trained on this loss.
    """
    folder = Path(recipe.source)
    if pipelines.kind_of(folder) == "run":
        check_finished(folder)
    family = family_of(folder)
    if family.name not in FAMILIES:
        raise CheckpointError(
            f"{folder} is a model of the family {family.name}: those that can be fine-tuned are "
            f"{', '.join(FAMILIES)}"
        )
    pipe = outline(folder)
    _check_kind(folder, pipe)
    return with_single_blocks(pipe) if recipe.freeze else pipe


def _check_kind(folder: Path, pipe: Pipeline) -> None:
    """Refuse models of a family whose networks learned something else than to denoise from a condition."""
    config = pipe.denoiser.config
    if pipe.few_steps is not None and pipe.few_steps.is_taught:
        what, instead = "a student of few steps", "its teacher, and distil that (jaxldm distill)"
    elif pipe.few_steps is not None:
        what = f"a model of few steps by {pipe.few_steps.method}"
        instead = "a diffusion model, and distil that (jaxldm distill)"
    elif getattr(config, "in_channels", None) == INPAINTING_CHANNELS:
        what, instead = "an inpainting model", "the model that it was made from"
    elif getattr(config, "time_cond_proj_dim", None) is not None:
        what, instead = "a latent consistency model", "the model that it was distilled from"
    elif pipe.options.get("requires_aesthetics_score"):
        what, instead = "the refiner of SDXL", "the base model"
    elif draws_classes(pipe.family) and pipe.num_classes is None:
        what, instead = "a model without classes and captions", "one that has either"
    elif draws_classes(pipe.family) and not pipe.has_null_class:
        what, instead = "a consistency model", "the diffusion model that it was distilled from"
    else:
        return
    raise CheckpointError(f"{folder} is {what}, which this loss would spoil: fine-tune {instead}")


def with_single_blocks(pipe: Pipeline) -> Pipeline:
    """The pipeline with the blocks of its network one by one, by which they can be named."""
    module, params = pipe.denoiser.module, pipe.denoiser.params
    config = cast(Any, module).config
    if not getattr(config, "scan", False):
        return pipe
    single = models.from_config(dataclasses.replace(config, scan=False))
    if params:
        place = None if pipe.mesh is None else models.sharding_of(pipe.mesh)
        params = checkpoints.to_state_dict(params)
        params = checkpoints.from_state_dict(params, models.shapes(single), sharding=place)
    return pipe.replace(denoiser=Network(single, params))


def build(recipe: Recipe) -> nn.Module:
    """The network of a fine-tuning. Raises as `outline_of`, and as `FinetuneRecipe.computing`."""
    own = cast(FinetuneRecipe, recipe.finetune)
    module = cast(Any, outline_of(own).denoiser.module)
    own.computing(module.config)
    return module


def check(recipe: Recipe, dataset: Dataset, mesh: Mesh) -> None:
    """Refuse what would fail later, before anything is written or compiled.

    Raises:
        CheckpointError: as `outline_of`; a scheduler that is not known.
        DataError: pictures without captions, or of other classes.
        InvalidArgumentError: a pattern that names nothing, a rank that is too large, captions that are too
            long, a size that the network cannot work on, more than the memory.
    """
    own = cast(FinetuneRecipe, recipe.finetune)
    pipe = outline_of(own)
    with reading(Path(own.source)):
        pipe.prediction  # noqa: B018
    if own.lora is not None:
        check_names(pipe.denoiser_name, own.lora.names)
    if own.control is not None and draws_classes(pipe.family):
        raise CheckpointError(f"{own.source} draws from classes: a ControlNet is for a model of texts")
    total, moving = _count_parameters(own, models.shapes(pipe.denoiser.module), pipe, mesh)
    _check_pictures(recipe, pipe, dataset)
    device, needed = mesh.devices.flat[0], 4 * (total + (3 if own.ema_decay else 2) * moving)
    check_fits(needed, f"fine-tuning {own.source} needs", device=device, fix="take a smaller model")
    if own.word is not None:
        _check_word(own.word, pipe)
    if draws_classes(pipe.family):
        if own.prompt is not None:
            raise InvalidArgumentError(f"{own.source} draws from classes: a prompt is for one of texts")
        if dataset.num_classes != pipe.num_classes:
            raise DataError(
                f"{own.source} draws {pipe.num_classes} classes, and {dataset.name} has "
                f"{dataset.num_classes}: give a class folder for each"
            )
        return
    if own.prior is not None and own.prior.images is not None:
        load_folder(own.prior.images, image_size=dataset.image_shape[0], hold_out=False)
    if own.word is not None:
        return
    texts = dataset.captions("train") if own.prompt is None else [own.prompt]
    if texts is None:
        raise DataError(
            f"{own.source} draws from texts, and the pictures of {dataset.name} have no captions: put a .txt "
            "file next to each, or a metadata.jsonl into the folder"
            + (", or give one caption for all (--caption)" if own.control is not None else "")
        )
    check_captions(pipe, texts if own.prior is None else [*texts, own.prior.prompt])
    if own.control is not None:
        check_control_pictures(own.control, dataset)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without those at both ends. Raises `InvalidArgumentError` for none."""
    ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
    if not ids:
        raise InvalidArgumentError(f"initial_text {shown(text)} has no token: give a word such as cat")
    return ids


def _check_word(recipe: WordRecipe, pipe: Pipeline) -> None:
    """Refuse a word that exists, one that is like nothing, and models that take none."""
    check_takes_words(pipe)
    checkpoints.with_word(pipe.tokenizer, recipe.word, recipe.vectors)
    ids_of(pipe.tokenizer, recipe.initial)


def _count_parameters(recipe: FinetuneRecipe, shapes: Any, pipe: Pipeline, mesh: Mesh) -> tuple[int, int]:
    """(all, those that move) on a device. Raises `InvalidArgumentError` for patterns that name none."""
    moving = shapes
    if recipe.lora is not None:
        lora = recipe.lora
        moving = jax.eval_shape(
            lambda key: init_lora(key, shapes, lora.rank, lora.targets), jax.eval_shape(jax.random.key, 0)
        )
    elif recipe.freeze:
        moving = freeze(shapes, recipe.freeze).params
    elif recipe.word is not None:
        moving = {}
    elif recipe.control is not None:
        moving = control_shapes(pipe, recipe.source)
        shapes = (shapes, moving)
    return numbers_per_device(mesh, shapes), numbers_per_device(mesh, moving)


def _check_pictures(recipe: Recipe, pipe: Pipeline, dataset: Dataset) -> None:
    """Raise `InvalidArgumentError` for pictures of a size or with channels that the model cannot draw."""
    height, width, channels = dataset.image_shape
    multiple = pipe.latent_spec.multiple
    taken = channels if pipe.autoencoder is None else pipe.autoencoder.config.in_channels
    if channels != taken:
        raise InvalidArgumentError(
            f"{dataset.name} has pictures of {channels} channels, the model draws {taken}"
        )
    if (height, width) == tuple(pipe.default_size):
        return
    fixed = draws_classes(pipe.family)
    if fixed or height % multiple or width % multiple:
        side = pipe.default_size[0]
        allowed = str(side) if fixed else f"a multiple of {multiple}, and {side} is the model's own"
        raise InvalidArgumentError(f"image_size must be {allowed}, got {height}")


def check_captions(pipe: Pipeline, texts: Sequence[str]) -> None:
    """Raise `InvalidArgumentError` for captions of which no text encoder of the model reads the end."""
    tokenizers = []
    for name, tokenizer in pipe.parts.items():
        if name.startswith("tokenizer") and tokenizer is not None:
            encoder, length = pipe.parts[name.replace("tokenizer", "text_encoder")], tokenizer.max_length
            tokenizers.append(
                (tokenizer, min(length, getattr(encoder.config, "max_position_embeddings", length)))
            )
    check_lengths(tokenizers, texts, "shorten them")
