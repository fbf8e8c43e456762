"""A pipeline: a family, which is a value, and the parts of one model.

A family holds all that differs from model to model, as plain data and pure functions. `generate` reads it
from top to bottom. To add one, write a file in `families/` that ends in

    MY_FAMILY = Family(
        name="MyFamily",
        folder=Folder(("MyPipeline",), ("unet", "vae", "text_encoder", "tokenizer", "scheduler")),
        denoisers=("unet",),
        encode=encode,  # texts -> what the network takes besides x and t, for the prompt and for the negative
        defaults=lambda pipe: Defaults(guidance_scale=7.5),
    )

and put it into `families.FAMILIES`. Every other field has the function that most families have; where yours
differs in a stage (its grid, its guidance rule, how latents are decoded), name a function of the
same arguments, which may well call the usual one with something changed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from jaxldm import diffusion as D
from jaxldm import schedulers
from jaxldm.errors import CheckpointError, one_of
from jaxldm.models.config import height_width
from jaxldm.pipelines.generate import (
    Call,
    Request,
    call_options,
    decode,
    denoise_latents,
    encode_inputs,
    generate,
    grid,
    guidance_embedding,
    has_guidance_embedding,
    num_callbacks,
    read_call,
    read_call_inputs,
    read_prompts,
)
from jaxldm.pipelines.inputs import INPAINTING_CHANNELS, LatentSpec, Size
from jaxldm.pipelines.latents import classifier_free_guidance, scale_factor
from jaxldm.pipelines.network import Network

_TITLES = {"unet": "U-Net"}  # of denoising networks in messages, where it is not the part's name
_NONE: Mapping[str, Any] = MappingProxyType({})


class Defaults(NamedTuple):
    """What a call takes for options that it leaves out.

    Attributes:
        guidance_scale, num_inference_steps, strength: as in `Call`.
        round_up: a part of a step that `strength` leaves is taken, and not left out.
        solver: None is the one that the folder's scheduler names.
    """

    guidance_scale: float = 7.5
    num_inference_steps: int = 50
    strength: float = 0.8
    round_up: bool = False
    solver: str | None = None


def check_nothing(pipe: Pipeline) -> None:
    """For families whose parts cannot be of different models."""


def first_class_name(pipe: Pipeline) -> str:
    """The first of `class_names`."""
    return pipe.family.folder.class_names[0]


def options_in(index: Mapping[str, Any], folder: Folder) -> dict[str, Any]:
    """The options that a model_index.json has, by their own names."""
    return {name: index[name] for name in folder.options if name in index}


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
    options: Mapping[str, Any] = _NONE
    constants: Mapping[str, Any] = _NONE
    check: Callable[[Pipeline], None] = check_nothing
    class_name: Callable[[Pipeline], str] = first_class_name
    read_options: Callable[[Mapping[str, Any], Folder], dict[str, Any]] = options_in
    write_options: Callable[[Pipeline], dict[str, Any]] = options_of


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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pipeline:
    """A model that draws: `pipe(key, "a cat") -> images`. `pipelines.load` makes one.

    Parts and options are attributes, named as in the folder: `pipe.unet`, `pipe.vae`, `pipe.scheduler`.
    `pipe.replace(vae=...)` is the same model with another part.

    Attributes:
        family: what it is.
        parts: by name: networks (`Network`), tokenizers, and the entries of scheduler_config.json.
        options: by name, see `Folder.options`.

    >>> import jax                                                                       # doctest: +SKIP
    >>> from jaxldm import pipelines                                                     # doctest: +SKIP
    >>> pipe = pipelines.load("stable-diffusion-v1-5", dtype="bfloat16")                 # doctest: +SKIP
    >>> key = jax.random.key(0)                                                          # doctest: +SKIP
    >>> images = pipe(key, ["a cat in the snow"], num_inference_steps=30, solver="dpmpp_2m")  # doctest: +SKIP
    >>> images.shape                                                                     # doctest: +SKIP
    (1, 512, 512, 3)
    >>> again = pipe(key, "an oil painting of a cat", image=images, strength=0.6)        # doctest: +SKIP
    """

    family: Family
    parts: Mapping[str, Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        folder = self.family.folder
        for kind, given, known in (
            ("part", self.parts, (*folder.parts, *folder.optional)),
            ("option", self.options, folder.options),
        ):
            for name in given:
                one_of(f"{kind} of {self.family.name}", name, known)
        missing = [name for name in folder.parts if name not in self.parts]
        if missing:
            raise CheckpointError(
                f"it lacks {', '.join(missing)}: a {self.family.name} needs {', '.join(folder.parts)}"
            )
        object.__setattr__(self, "parts", dict.fromkeys(folder.optional) | dict(self.parts))
        object.__setattr__(self, "options", dict(folder.options) | dict(self.options))

    def __repr__(self) -> str:
        """The family and the parts, without their numbers."""
        parts = (
            f"{name}={type(getattr(part, 'module', part)).__name__}" for name, part in self.parts.items()
        )
        return f"Pipeline({self.family.name}: {', '.join(parts)})"

    def __call__(self, key: Key[Array, ...], *prompts: Any, **options: Any) -> Any:
        """Draw images, float32 [N, H, W, C] in [-1, 1]; see `generate`, and `Call` for the options."""
        return self.family.call(self, key, *prompts, **options)

    def __getattr__(self, name: str) -> Any:
        """A part, an option, or a function of the family."""
        if not name.startswith("__"):
            for values in (self.parts, self.options):
                if name in values:
                    return values[name]
            if name in self.family.methods:
                return functools.partial(self.family.methods[name], self)
        raise AttributeError(f"a pipeline of the family {self.family.name} has no {name!r}")

    def replace(self, **changes: Any) -> Pipeline:
        """The model with other parts or options; `denoiser` and `autoencoder` name these parts, too."""
        names = {"denoiser": self.denoiser_name, "autoencoder": self.family.autoencoder}
        changes = {names.get(name, name): value for name, value in changes.items()}
        known = (*self.parts, *self.options)
        for name in changes:
            one_of(f"part or option of {self.family.name}", name, known)
        parts, options = (
            {name: changes.get(name, value) for name, value in values.items()}
            for values in (self.parts, self.options)
        )
        return dataclasses.replace(self, parts=parts, options=options)

    def warm_up(self, *prompts: Any, **options: Any) -> None:
        """Compile all that a call with these prompts and options runs, and take no step.

        Later calls may differ in the key, the prompts, the guidance scale, callbacks, and the number of steps
        within the same 64.
        """
        self(jax.random.key(0), *prompts, compile_only=True, **options)

    @property
    def networks(self) -> dict[str, Network]:
        """The networks by the names of their parts, which are those of their folders."""
        return {name: part for name, part in self.parts.items() if isinstance(part, Network)}

    @property
    def denoiser_name(self) -> str:
        """The part that is the denoising network."""
        for name in self.family.denoisers:
            if self.parts.get(name) is not None:
                return name
        raise CheckpointError(f"it lacks a denoising network: {' or '.join(self.family.denoisers)}")

    @property
    def denoiser(self) -> Network:
        """The denoising network."""
        return self.parts[self.denoiser_name]

    @property
    def autoencoder(self) -> Network | None:
        """None where the denoising network draws pixels."""
        return self.parts.get(cast(str, self.family.autoencoder))

    @property
    def prediction(self) -> D.Prediction:
        """What the network's output means, and on which path: as the folder's scheduler says."""
        return schedulers.from_config(self.scheduler, "ddim").prediction

    @property
    def defaults(self) -> Defaults:
        """What a call takes for options that it leaves out."""
        return self.family.defaults(self)

    @property
    def default_guidance_scale(self) -> float:
        """The guidance scale of a call that names none."""
        return self.defaults.guidance_scale

    @property
    def is_guidance_distilled(self) -> bool:
        """Whether the network takes the guidance scale as an input (LCM, FLUX.1-dev)."""
        return self.family.is_guidance_distilled(self)

    @property
    def has_learned_variance(self) -> bool:
        """Whether the network draws its variance, too: twice as many channels (Nichol & Dhariwal 2021)."""
        return getattr(self.denoiser.config, "out_channels", None) == 2 * self.latent_spec.channels

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None for a model without them. The label `num_classes` is the null class."""
        return getattr(self.denoiser.config, "num_classes", None)

    @property
    def latent_spec(self) -> LatentSpec:
        """The latents that it draws."""
        return self.family.latent_spec(self)

    @property
    def default_size(self) -> Size:
        """(height, width) of the images of a call that names none."""
        return self.latent_spec.default_size

    def latent_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        """(h, w, c) of the latents of images of that (height, width)."""
        return self.latent_spec.shape(self.default_size if size is None else size)

    def num_image_tokens(self, size: Size) -> int:
        """Tokens of an image of that (height, width), which some schedules shift with."""
        return (size[0] // self.latent_spec.multiple) * (size[1] // self.latent_spec.multiple)

    def encode_prompts(
        self,
        prompts: Sequence[Any],
        negatives: Sequence[Any] | None = None,
        size: Size | None = None,
        **options: Any,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(cond, uncond): what the network takes of P prompts, and of P negatives, by argument name."""
        request = Request(prompts, negatives, None, self.default_size if size is None else size)
        return self.family.encode(self, request, **options)

    def grid(self, size: Size | None = None, **options: Any) -> tuple[Any, D.Grid]:
        """(solver and denoiser, rows) of a call with these options, padded, to look at or to use."""
        call = read_call(self, options)
        return self.family.grid(self, call, self.default_size if size is None else size)

    def decode(self, latents: Float[Any, "N h w c"], **options: Any) -> Float[np.ndarray, "N H W C"]:
        """Images in [-1, 1] of latents; options `tiling`, `batch_size`, `devices` as in a call."""
        return self.family.decode(self, latents, **options)

    def default_steps(self, solver: str | D.Solver | None = None) -> int:
        """The number of steps of a call that names none: 4 for the solvers of distilled models."""
        return int(D.steps_in(self.grid(solver=solver)[1]))

    def num_callbacks(self, num_images: int, **options: Any) -> int:
        """How often a call with these options calls its `progress`: the length of a progress bar."""
        return self.family.num_callbacks(self, num_images, **options)

    def call_options(self) -> list[str]:
        """The names of the options that a call takes."""
        names = call_options(self.family.call, self.family.encode)
        return [name for name in names if name not in self.family.unused]

    def check_parts(self) -> None:
        """Raise `CheckpointError` where the parts are of different models."""
        self.family.folder.check(self)


# ---------------------------------------------------------------- what `Folder.check` is made of


def check_text_width(pipe: Pipeline, width: int, taken: int, encoder: str = "text encoder") -> None:
    """Raise `CheckpointError` unless an encoder's states are as wide as the network takes them."""
    if width != taken:
        network = _TITLES.get(pipe.denoiser_name, pipe.denoiser_name)
        raise CheckpointError(f"its {encoder} gives states {width} wide, its {network} takes {taken}")


def check_latent_channels(pipe: Pipeline, taken: int) -> None:
    """Raise `CheckpointError` unless the autoencoder has the latent channels that the network takes."""
    channels = 3 if pipe.autoencoder is None else pipe.autoencoder.config.latent_channels
    if channels != taken:
        network = _TITLES.get(pipe.denoiser_name, pipe.denoiser_name)
        raise CheckpointError(f"its autoencoder has {channels} latent channels, its {network} takes {taken}")
