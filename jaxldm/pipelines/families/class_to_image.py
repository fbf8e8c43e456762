"""Class labels to images: models trained here, and DiT and SiT (Peebles & Xie 2023; Ma et al. 2024).

    pipe = pipelines.load("runs/mini-ldm")
    images = pipe(jax.random.key(0), [3, 7], num_images=16, num_inference_steps=20, guidance_scale=3.0)

Of a model trained here a run folder and an exported folder hold the same parts: "unet" or "transformer",
"vae" unless the network draws pixels, and "scheduler". A DiTPipeline is the folder of diffusers, with a
solver and a grid of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxldm import diffusion as D
from jaxldm import models, schedulers
from jaxldm.arguments import as_array, checked, count, number, optional, refuse, several, text
from jaxldm.diffusion.predictions import A_PREDICTION
from jaxldm.entries import Bounds, read_value
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.exact import LARGEST_FLOAT32, LARGEST_INT32
from jaxldm.models.config import height_width
from jaxldm.models.registry import DYNAMIC
from jaxldm.pipelines.call import Call, Defaults, Request
from jaxldm.pipelines.family import Family, Folder
from jaxldm.pipelines.generate import generate, grid, num_callbacks, read_call_inputs, read_scheduler
from jaxldm.pipelines.inputs import Inputs, LatentSpec, Size
from jaxldm.pipelines.labels import checked_labels, cycle_labels
from jaxldm.pipelines.latents import decode_images, scale_factor
from jaxldm.pipelines.network import A_NETWORK, Network
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.schedulers import Sampler, Scheduler

AUTOENCODERS = ("ConvAutoencoder", "AutoencoderKL", "VQModel")
# Networks of classes, or of none; the last is not trained here.
TRAINED = ("UNet2DModel", "DiT", "SiT", *DYNAMIC)
CLASS_CONDITIONAL = (*TRAINED, "DiTTransformer2DModel")
EXPORT_CLASS, DIT_CLASS = "LatentDiffusionPipeline", "DiTPipeline"
# Pipelines of diffusers without classes -> the solver that they draw with (None: the folder's), their steps.
OF_DIFFUSERS = {
    "DDPMPipeline": (None, 1000),
    "DDIMPipeline": ("ddim", 50),
    "PNDMPipeline": ("pndm", 50),
    "ConsistencyModelPipeline": (None, 1),
    "ScoreSdeVePipeline": (None, 2000),
}
UP_TO_1 = ("ScoreSdeVePipeline",)  # of these the network's pictures are numbers in [0, 1]
# class_names: one for each label; empty when nobody named them.
# guided_channels: how many of the network's channels are guided, from the first on; None: all of them. The
#   authors' samplers of DiT and SiT guide 3 of 4: `pipe.replace(guided_channels=3)`.
# diffusers_class: the class in `OF_DIFFUSERS` of the folder, or None.
# images_per_device: images that a device always computes at once; more is faster on a large device.
OPTIONS = {
    "class_names": (),
    "default_guidance_scale": 3.0,
    "diffusers_class": None,
    "guided_channels": None,
    "images_per_device": 16,
}
OF_LARGE_MODELS = {"default_guidance_scale": 4.0, "images_per_device": 1}
# Option -> its entry in model_index.json; "id2label" has the names of the classes.
_ENTRIES = {
    "default_guidance_scale": "_scale",
    "guided_channels": "_guided_channels",
    "images_per_device": "_images_per_device",
}
_TYPES = {
    "default_guidance_scale": Annotated[float, Bounds(0, 1e6)],
    "guided_channels": Annotated[int | None, Bounds(1, LARGEST_INT32)],
    "images_per_device": Annotated[int, Bounds(1, 2**16)],
}


def draw_classes(
    pipe: Pipeline,
    key: Key[Array, ""],
    class_labels: Sequence[int | str] | Int[Array, " N"] | None = None,
    *,
    num_images: int | None = None,
    negative_labels: int | str | Sequence[int | str] | Int[Array, " ..."] | None = None,
    batch_size: int = 64,
    devices: Sequence[Any] | None = None,
    **options: Any,
) -> Any:
    """Draw images, float32 [N, H, W, C] in [-1, 1].

    Image k depends on (key, k), its label and the options alone: not on the number of images, the batch size
    or the devices. Another seed, guidance scale, class, callback or number of steps (within the same 64)
    compiles nothing new; the first guidance scale of 1 does.

    Args:
        key: image k draws its random numbers from fold_in(key, k).
        class_labels: in [0, num_classes), or names of classes, repeated in this order until there are
            `num_images`. None: every class once, of up to 100; always None for a model without classes.
        num_images: default one for each label.
        negative_labels: for the unconditional branch, in place of the null class: one label, or several,
            repeated like `class_labels`.
        batch_size: images under way at once; it is rounded up to whole batches of `images_per_device`.
        devices: default all devices of this process, or those of the mesh that the model was loaded on.
        options: of `generate`; guidance_scale 1 is the conditional model, 0 the unconditional one.

    Raises:
        UnknownNameError, InvalidArgumentError, DataError: always before anything is compiled.
    """
    if options.pop("in_flight", None) is not None:
        raise InvalidArgumentError(
            f"in_flight is not for {pipe.family.name}: give batch_size, it means the same"
        )
    labels = cycle_labels(pipe, class_labels, num_images)
    count = (1 if num_images is None else num_images) if labels is None else len(labels)
    if labels is None:
        if negative_labels is not None:
            raise InvalidArgumentError("this model has no classes: leave the negative labels out")
        labels, negatives = [None] * count, None
    elif negative_labels is None:
        negatives = None
    elif not pipe.has_null_class:
        raise InvalidArgumentError(
            "this model has no null class and is not guided: leave the negative labels out"
        )
    else:
        negatives = np.resize(checked_labels(pipe, negative_labels, "negative labels"), count)
    batches = {"batch_size": pipe.images_per_device, "in_flight": batch_size}
    batches["devices"] = jax.local_devices() if devices is None and pipe.mesh is None else devices
    return generate(pipe, key, cast(Any, labels), cast(Any, negatives), **batches, **options)


def read_labels(labels: Any, negatives: Any) -> tuple[Any, Any]:
    """The labels of a call, which `draw_classes` has made one for each image."""
    if isinstance(labels, str) or not hasattr(labels, "__len__"):
        raise refuse("prompt", "labels of classes", labels, "pipe(key, class_labels=[3])")
    return labels, negatives


def encode(pipe: Pipeline, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    """The labels themselves, and the null class; nothing for a model without classes."""
    if pipe.num_classes is None:
        return {}, {}
    if not pipe.has_null_class:
        return {"labels": request.prompts}, {}
    null = np.full_like(request.prompts, pipe.num_classes)
    return {"labels": request.prompts}, {"labels": null if request.negatives is None else request.negatives}


def read_latents(pipe: Pipeline, call: Call, num_images: int) -> Inputs:
    """The noise of a call, one for each image."""
    _check_guided_channels(pipe)
    _check_latents(pipe, call.latents, num_images)
    return read_call_inputs(pipe, call, num_images)


def latent_spec(pipe: Pipeline) -> LatentSpec:
    """What the network was trained on, whatever its autoencoder's channels of pixels are."""
    config = pipe.denoiser.config
    factor = 1 if pipe.autoencoder is None else scale_factor(pipe.autoencoder)
    height, width = height_width(config.sample_size)
    return LatentSpec((height * factor, width * factor), factor, factor, config.in_channels)


def own_grid(pipe: Pipeline, call: Call, size: Size) -> tuple[Any, D.Grid]:
    """The grid that fits the path: the file's solver and grid are for other programs.

    Not where it was distilled for the file's own, nor in a folder that such a program wrote.
    """
    distilled = pipe.few_steps is not None and call.solver is None
    if distilled or pipe.diffusers_class is not None or pipe.reference_quirks:
        return folder_grid(pipe, call, size)
    scheduler = read_scheduler(pipe, call)
    sampler = _with_variance(pipe, Sampler(scheduler.prediction, scheduler.solver))
    return grid(pipe, call, size, Scheduler(sampler, dynamic_shift=scheduler.dynamic_shift))


def folder_grid(pipe: Pipeline, call: Call, size: Size) -> tuple[Any, D.Grid]:
    """The grid of the folder's scheduler."""
    scheduler = read_scheduler(pipe, call)
    sampler = _with_variance(pipe, scheduler.sampler)
    return grid(pipe, call, size, dataclasses.replace(scheduler, sampler=sampler))


def _with_variance(pipe: Pipeline, sampler: Sampler) -> Sampler:
    """The variance that the network learned goes to every solver, for those of the caller's own."""
    return sampler._replace(learned_variance=pipe.has_learned_variance)


def defaults(pipe: Pipeline) -> Defaults:
    """DDIM; a model without classes, or without a null class, cannot be guided."""
    scale = pipe.options["default_guidance_scale"] if pipe.has_null_class else 1.0
    solver, steps = OF_DIFFUSERS.get(pipe.options["diffusers_class"], ("ddim", 50))
    return Defaults(guidance_scale=scale, solver=solver, num_inference_steps=steps)


def is_guidance_distilled(pipe: Pipeline) -> bool:
    """Whether the network takes the guidance scale as an input."""
    return "guidance_scale" in getattr(pipe.denoiser.config, "scalar_inputs", ())


def guidance_condition(pipe: Pipeline, scale: float, count: int) -> dict[str, Any]:
    """The scale as such a network takes it."""
    return {"guidance_scale": np.full(count, scale, np.float32)}


def check_guidance(pipe: Pipeline, call: Call) -> None:
    """Raise `InvalidArgumentError` for a scale that is not finite, negative, or without a null class."""
    check_guidance_scale(pipe, call.guidance_scale)


def check_guidance_scale(pipe: Pipeline, guidance_scale: float | None) -> float:
    """The scale, or the default for None. Raises `InvalidArgumentError` unless finite and 0 or more."""
    if guidance_scale is None:
        return pipe.default_guidance_scale
    if not 0 <= guidance_scale <= LARGEST_FLOAT32:
        raise InvalidArgumentError(
            f"guidance_scale must be a finite number of 0 or more, not {guidance_scale}: "
            "1 is the model as trained, 3 is a good start"
        )
    if not pipe.has_null_class and guidance_scale != 1:
        missing = "classes" if pipe.num_classes is None else "null class"
        raise InvalidArgumentError(
            f"this model has no {missing}, so there is nothing to guide it by: leave the guidance scale out"
        )
    if pipe.few_steps is not None:
        pipe.few_steps.check_scale(guidance_scale)
    return guidance_scale


def image_shape(pipe: Pipeline) -> tuple[int, int, int]:
    """(H, W, C) of the images."""
    shape, vae = pipe.latent_shape(), pipe.autoencoder
    if vae is None:
        return shape
    latents = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return jax.eval_shape(lambda z: models.decode_latents(vae.module, vae.params, z), latents).shape[1:]


def decode_pictures(
    pipe: Pipeline, latents: Float[Any, "N h w c"], **options: Any
) -> Float[np.ndarray, "N H W C"]:
    """Images in [-1, 1] of what the network draws; options as in `decode_images`."""
    if pipe.options.get("diffusers_class") in UP_TO_1:
        latents = 2 * np.asarray(latents, np.float32) - 1
    return decode_images(pipe.autoencoder, latents, **options)


def _check_guided_channels(pipe: Pipeline) -> None:
    guided, channels = pipe.guided_channels, pipe.latent_spec.channels
    if guided is not None and not 1 <= guided <= channels:
        raise InvalidArgumentError(
            f"guided_channels must lie between 1 and the network's {channels} channels, or be None for "
            f"all of them, not {guided}"
        )


def _check_latents(pipe: Pipeline, latents: Any, count: int) -> None:
    wanted = (count, *pipe.latent_shape())
    latents = None if latents is None else as_array("latents", f"numbers {list(wanted)}", latents)
    if latents is not None and np.shape(latents) != wanted:
        raise InvalidArgumentError(
            f"latents must be {list(wanted)}, channels last, one for each image; they are "
            f"{list(np.shape(latents))}"
        )


def count_callbacks(pipe: Pipeline, num_images: int, **options: Any) -> int:
    """How often a call with these options calls its `progress`; see `generate.num_callbacks`."""
    devices = options.get("devices")
    batches = {"batch_size": pipe.images_per_device}
    batches["devices"] = jax.local_devices() if devices is None and pipe.mesh is None else devices
    return num_callbacks(pipe, num_images, **options | batches)


# ---------------------------------------------------------------- on the disk


@checked(
    denoiser=A_NETWORK,
    prediction=A_PREDICTION,
    autoencoder=optional(A_NETWORK),
    class_names=several(text),
    default_guidance_scale=number(0, 1e6),
    guided_channels=optional(count(1)),
    images_per_device=count(1, 2**16),
)
def class_to_image(
    denoiser: Network,
    prediction: D.Prediction,
    autoencoder: Network | None = None,
    **options: Any,
) -> Pipeline:
    """A pipeline of networks in memory.

    Args:
        denoiser: (x [B, h, w, c], t [B], labels [B]) -> [B, h, w, c].
        prediction: what its output means, on the path that it was trained on: `D.v(path)` and so on.
        autoencoder: decodes latents into images; None where the network draws pixels.
        options: see `OPTIONS`.
    """
    name = "unet" if type(denoiser.module).__name__.startswith("UNet") else "transformer"
    parts = {name: denoiser, "scheduler": schedulers.to_config(prediction)}
    return Pipeline(CLASS_TO_IMAGE, parts | ({"vae": autoencoder} if autoencoder else {}), options)


def check(pipe: Pipeline) -> None:
    """The network must be one of classes, and take the autoencoder's latents.

    Raises:
        CheckpointError: parts of different models.
    """
    denoiser, vae = pipe.denoiser, pipe.autoencoder
    kinds = [models.class_name(part.config) for part in (vae, denoiser) if part is not None]
    if kinds[-1] not in CLASS_CONDITIONAL or (vae is not None and kinds[0] not in AUTOENCODERS):
        raise CheckpointError(
            f"it holds {' and '.join(kinds)}: an autoencoder and a denoising network are needed"
        )
    if vae is not None and vae.config.latent_channels != denoiser.config.in_channels:
        raise CheckpointError(
            f"its autoencoder has {vae.config.latent_channels} latent channels, its denoising network works "
            f"on {denoiser.config.in_channels}"
        )
    pipe.prediction  # noqa: B018 (refuses a file that describes none)
    names = len(pipe.class_names)
    if names and names != (pipe.num_classes or 0):
        raise CheckpointError(
            f"its id2label does not name each of its network's {pipe.num_classes or 0} classes"
        )


def class_name(pipe: Pipeline) -> str:
    """diffusers has a pipeline for its own DiT in the latents of an AutoencoderKL; for others we have."""
    if pipe.diffusers_class is not None:
        return pipe.diffusers_class
    modules = [part and part.module for part in (pipe.denoiser, pipe.autoencoder)]
    has_class = isinstance(modules[0], models.DiTTransformer2DModel)
    return DIT_CLASS if has_class and isinstance(modules[1], models.AutoencoderKL) else EXPORT_CLASS


def read_options(index: Mapping[str, Any], folder: Folder) -> dict[str, Any]:
    """The options that model_index.json has; its `id2label` becomes `class_names`.

    Raises:
        CheckpointError: an `id2label` that does not name each class.
    """
    options = {
        name: read_value(index[entry], _TYPES[name], entry)
        for name, entry in _ENTRIES.items()
        if entry in index
    }
    if index.get("_class_name") in OF_DIFFUSERS:
        options["diffusers_class"] = index["_class_name"]
    table = index.get("id2label")
    if not table:
        return options
    labels = [str(label) for label in range(len(read_value(table, dict, "id2label")))]
    if set(table) != set(labels):
        raise CheckpointError("its id2label does not name each of its network's classes")
    return options | {"class_names": tuple(str(table[label]) for label in labels)}


def write_options(pipe: Pipeline) -> dict[str, Any]:
    """The inverse of `read_options`: names of the classes, and options that are not the usual ones."""
    usual = OPTIONS | OF_LARGE_MODELS if class_name(pipe) == DIT_CLASS else OPTIONS
    return options_to_write(pipe, usual)


def options_to_write(pipe: Pipeline, usual: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of model_index.json for the options that differ from the usual ones, and `id2label`."""
    entries = {
        entry: pipe.options[name]
        for name, entry in _ENTRIES.items()
        if name in usual and pipe.options[name] != usual[name]
    }
    names = {str(label): name for label, name in enumerate(pipe.class_names)}
    return entries | ({"id2label": names} if names else {})


CLASS_TO_IMAGE = Family(
    name="ClassToImage",
    folder=Folder(
        class_names=(EXPORT_CLASS, *OF_DIFFUSERS),
        parts=("scheduler",),
        optional=("unet", "transformer", "vae"),
        options=OPTIONS,
        check=check,
        class_name=class_name,
        read_options=read_options,
        write_options=write_options,
    ),
    defaults=defaults,
    encode=encode,
    denoisers=("unet", "transformer"),
    latent_spec=latent_spec,
    grid=own_grid,
    is_guidance_distilled=is_guidance_distilled,
    guidance_condition=guidance_condition,
    check_guidance=check_guidance,
    read_prompts=read_labels,
    read_inputs=read_latents,
    decode=decode_pictures,
    call=draw_classes,
    num_callbacks=count_callbacks,
    unused=(
        *("num_images_per_prompt", "true_cfg_scale", "height", "width", "image", "strength", "mask_image"),
        "resize",
    ),
    methods={
        "cycle_labels": cycle_labels,
        "check_guidance_scale": check_guidance_scale,
        "image_shape": image_shape,
    },
)
DIT = CLASS_TO_IMAGE._replace(
    name="DiT",
    folder=CLASS_TO_IMAGE.folder._replace(
        class_names=(DIT_CLASS,),
        parts=("transformer", "vae", "scheduler"),
        optional=(),
        options=OPTIONS | OF_LARGE_MODELS,
    ),
    defaults=lambda pipe: defaults(pipe)._replace(solver=None),
    denoisers=("transformer",),
    grid=folder_grid,
)
