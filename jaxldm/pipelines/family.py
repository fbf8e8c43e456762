"""A family of models: what differs from one to the next, as plain data and pure functions.

`generate` reads it from top to bottom. To add one, write a file that ends in

    MY_FAMILY = Family(
        name="MyFamily",
        folder=Folder(("MyPipeline",), ("unet", "vae", "text_encoder", "tokenizer", "scheduler")),
        denoisers=("unet",),
        encode=encode,  # texts -> what the network takes besides x and t, for the prompt and for the negative
        defaults=lambda pipe: Defaults(guidance_scale=7.5),
    )

Every other field has the function that most families have; where yours differs in a stage (its grid, its
guidance rule, how latents are decoded), name a function of the same arguments, which may well call the usual
one with something changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from jaxldm.arguments import checked, count, optional, pair
from jaxldm.entries import read_value
from jaxldm.errors import CheckpointError
from jaxldm.models.config import height_width
from jaxldm.pipelines.call import Call, Defaults
from jaxldm.pipelines.embeds import TextWidths
from jaxldm.pipelines.generate import (
    decode,
    denoise_latents,
    encode_inputs,
    generate,
    grid,
    guidance_embedding,
    has_guidance_embedding,
    num_callbacks,
    read_call_inputs,
    read_prompts,
)
from jaxldm.pipelines.inputs import INPAINTING_CHANNELS, LatentSpec, Size
from jaxldm.pipelines.latents import scale_factor
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline
from jaxldm.pipelines.sampling_run import classifier_free_guidance

_TITLES = {"unet": "U-Net"}  # of denoising networks in messages, where it is not the part's name
_NONE: Mapping[str, Any] = MappingProxyType({})


def check_nothing(pipe: Pipeline) -> None:
    """For families whose parts cannot be of different models."""


def first_class_name(pipe: Pipeline) -> str:
    """The first of `class_names`."""
    return pipe.family.folder.class_names[0]


def class_named(pipe: Pipeline, word: str) -> str:
    """The first of `class_names` that has a word in it, or else the first."""
    names = pipe.family.folder.class_names
    return next((name for name in names if word in name), names[0])


def class_name_by_control(pipe: Pipeline) -> str:
    """The first of `class_names`, or with a ControlNet the first that has it in its name."""
    return class_named(pipe, "ControlNet") if "controlnet" in pipe.parts else first_class_name(pipe)


def options_in(index: Mapping[str, Any], folder: Folder) -> dict[str, Any]:
    """The options that a model_index.json has, by their own names, of the type of their defaults."""
    return {
        name: read_value(index[name], type(default), name)
        for name, default in folder.options.items()
        if name in index
    }


def options_of(pipe: Pipeline) -> dict[str, Any]:
    """All options, by their own names."""
    return dict(pipe.options)


class Folder(NamedTuple):
    """How a model of the family lies on the disk.

    Attributes:
        class_names: the `_class_name`s of model_index.json that it opens. One family here does what several
            classes do in diffusers: text-to-image, image-to-image and inpainting.
        parts: networks, tokenizers and schedulers that the folder must have.
        optional: parts that it may lack; None then.
        control: control networks that its models take, each any number of times: "controlnet", "adapter".
        options: entries of model_index.json that are no parts, and what they are where it lacks them.
        constants: entries that diffusers wants to find there besides.
        check: raises `CheckpointError` where the parts are of different models.
        class_name: the `_class_name` under which diffusers opens the model.
        read_options: (entries of model_index.json, this) -> options.
        write_options: its inverse, entries of model_index.json.
    """

    class_names: tuple[str, ...]
    parts: tuple[str, ...]
    optional: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    options: Mapping[str, Any] = _NONE
    constants: Mapping[str, Any] = _NONE
    check: Callable[[Pipeline], None] = check_nothing
    class_name: Callable[[Pipeline], str] = first_class_name
    read_options: Callable[[Mapping[str, Any], Folder], dict[str, Any]] = options_in
    write_options: Callable[[Pipeline], dict[str, Any]] = options_of


@checked(pipe=A_PIPELINE, patch=count(1), in_channels=optional(count(1)), default_size=optional(pair(1)))
def default_latent_spec(
    pipe: Pipeline,
    patch: int = 1,
    in_channels: int | None = None,
    default_size: Size | None = None,
) -> LatentSpec:
    """The latents of the autoencoder, or pixels where there is none.

    Args:
        patch: latents that a token is high and wide.
        in_channels: of the network, where its config does not have them.
        default_size: (height, width) in pixels; None is that of the network's config.

    Raises:
        CheckpointError: a network that takes other channels.
    """
    vae, config = pipe.autoencoder, pipe.denoiser.config
    factor, channels = (1, 3) if vae is None else (scale_factor(vae), vae.config.latent_channels)
    in_channels = config.in_channels if in_channels is None else in_channels
    if in_channels not in (channels, INPAINTING_CHANNELS):
        raise CheckpointError(
            f"the {pipe.denoiser_name} has {in_channels} input channels; pipelines here know {channels} "
            f"(text) and {INPAINTING_CHANNELS} (inpainting)"
        )
    if default_size is None:
        default_size = cast(Size, tuple(side * factor for side in height_width(config.sample_size)))
    return LatentSpec(default_size, factor * patch, factor, channels, in_channels == INPAINTING_CHANNELS)


class Family(NamedTuple):
    """What differs from one family of models to the next.

    Attributes:
        name: in messages.
        folder: how its models lie on the disk.
        defaults: of a call.
        encode: (pipe, request, **options of the family) -> (cond, uncond), what the network takes besides x
            and t: arrays by argument name, with a row for each prompt or for each image.
        text_widths: (pipe) -> the widths of the states that a caller may give in place of texts; None: none.
        denoisers: the part that is the denoising network: the first of these that there is.
        autoencoder: the part that makes images of latents; None: the network draws pixels.
        latent_spec: (pipe) -> the latents that it draws.
        grid: (pipe, call, (height, width)) -> solver and denoiser, and the rows of the run.
        combine: the guidance rule, see `Compiled`.
        is_guidance_distilled: whether the network takes the guidance scale as an input (LCM, FLUX.1-dev).
        guidance_condition: (pipe, scale, P) -> that input.
        true_cfg: classifier-free guidance is `true_cfg_scale` in every model of the family.
        check_guidance: (pipe, call); raises `InvalidArgumentError` for scales that mean something else here.
        read_prompts, read_inputs, initial_latents, denoise, decode: the other stages of `generate`.
        call: what `pipe(...)` is; `generate`, or a function that calls it.
        num_callbacks: (pipe, number of images, **options) -> how often `progress` will be called.
        unused: options of `Call` that its models have no use for.
        methods: more functions of a pipeline, called as pipe.name(...).
        draws_images: False for a stage whose call takes or gives something else than prompts and images.
    """

    name: str
    folder: Folder
    defaults: Callable[[Pipeline], Defaults]
    encode: Callable[..., tuple[dict[str, Any], dict[str, Any]]]
    denoisers: tuple[str, ...] = ("transformer",)
    autoencoder: str | None = "vae"
    latent_spec: Callable[[Pipeline], LatentSpec] = default_latent_spec
    grid: Callable[..., Any] = grid
    combine: Callable[..., Any] = classifier_free_guidance
    is_guidance_distilled: Callable[[Pipeline], bool] = has_guidance_embedding
    guidance_condition: Callable[[Pipeline, float, int], dict[str, Any]] = guidance_embedding
    true_cfg: bool = False
    check_guidance: Callable[[Pipeline, Call], None] = lambda pipe, call: None
    read_prompts: Callable[[Any, Any], Any] = read_prompts
    read_inputs: Callable[..., Any] = read_call_inputs
    initial_latents: Callable[..., Any] = encode_inputs
    denoise: Callable[..., Any] = denoise_latents
    decode: Callable[..., Any] = decode
    call: Callable[..., Any] = generate
    num_callbacks: Callable[..., int] = num_callbacks
    unused: tuple[str, ...] = ()
    methods: Mapping[str, Callable[..., Any]] = _NONE
    draws_images: bool = True
    text_widths: Callable[[Pipeline], TextWidths] | None = None

    def __deepcopy__(self, memo: Any) -> Family:
        return self


# ---------------------------------------------------------------- what `Folder.check` is made of


def check_text_width(pipe: Pipeline, width: int, taken: int, encoder: str = "text encoder") -> None:
    """Raise `CheckpointError` unless an encoder's states are as wide as the network takes them."""
    if width != taken:
        network = _TITLES.get(pipe.denoiser_name, pipe.denoiser_name)
        raise CheckpointError(f"its {encoder} gives states {width} wide, its {network} takes {taken}")


def states_width(encoder: Any) -> int:
    """The width of a text encoder's states, whatever its config calls it."""
    return getattr(encoder.config, "d_model", None) or encoder.config.hidden_size


def check_latent_channels(pipe: Pipeline, taken: int) -> None:
    """Raise `CheckpointError` unless the autoencoder has the latent channels that the network takes."""
    channels = 3 if pipe.autoencoder is None else pipe.autoencoder.config.latent_channels
    if channels != taken:
        network = _TITLES.get(pipe.denoiser_name, pipe.denoiser_name)
        raise CheckpointError(f"its autoencoder has {channels} latent channels, its {network} takes {taken}")
