"""A pipeline: a family, which is a value, and the parts of one model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from jaxldm import diffusion as D
from jaxldm import schedulers
from jaxldm.arguments import check_all, checked, count, instance, optional, pair, refuse
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of, shown
from jaxldm.functions import signature_error
from jaxldm.models.config import ModelConfig
from jaxldm.models.sharding import mesh_of
from jaxldm.pipelines.call import (
    EMBEDS,
    IMAGE_PROMPTS,
    OF_CONTROL,
    SHARED,
    Call,
    Defaults,
    Request,
    call_options,
    keywords_of,
)
from jaxldm.pipelines.control_kinds import base_name, check_control
from jaxldm.pipelines.few_steps import FewSteps
from jaxldm.pipelines.inputs import LatentSpec, Size, strength_of
from jaxldm.pipelines.network import Network, check_weights, merging_tokens
from jaxldm.pipelines.options import CHECKS, check_call
from jaxldm.schedulers.read import a_solver_or_name

OUTPUTS = ("images", "latents")
WITHOUT_NULL_CLASS = ("ConsistencyModelPipeline",)  # classes of diffusers' pipelines
OF_TEXTS, OF_CLASSES = ("prompt", "negative_prompt"), ("class_labels", "negative_labels")
A_SIZE = optional(pair(1))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pipeline:
    """A model that draws: `pipe(key, "a cat") -> images`. `pipelines.load` makes one.

    Parts and options are attributes, named as in the folder: `pipe.unet`, `pipe.vae`, `pipe.scheduler`.
    `pipe.replace(vae=...)` is the same model with another part.

    Attributes:
        family: what it is, a `Family`.
        parts: by name: networks (`Network`), tokenizers, and the entries of scheduler_config.json.
        options: by name, see `Folder.options`.
        few_steps: of a student that draws in few steps, how it does so; None of any other model.
        reference_quirks: draws as diffusers does, also where that errs; see `load`.
        image_adapters: what makes prompts of pictures, see `with_ip_adapter`.

    >>> import jax                                                                       # doctest: +SKIP
    >>> from jaxldm import pipelines                                                     # doctest: +SKIP
    >>> pipe = pipelines.load("stable-diffusion-v1-5", dtype="bfloat16")                 # doctest: +SKIP
    >>> key = jax.random.key(0)                                                          # doctest: +SKIP
    >>> images = pipe(key, ["a cat in the snow"], num_inference_steps=30, solver="dpmpp_2m")  # doctest: +SKIP
    >>> images.shape                                                                     # doctest: +SKIP
    (1, 512, 512, 3)
    >>> again = pipe(key, "an oil painting of a cat", image=images, strength=0.6)        # doctest: +SKIP
    """

    family: Any
    parts: Mapping[str, Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    few_steps: FewSteps | None = None
    reference_quirks: bool = False
    image_adapters: tuple[Any, ...] = ()

    def __post_init__(self):
        folder = self.family.folder
        for kind, given, known in (
            ("part", [*map(base_name, self.parts)], (*folder.parts, *folder.optional, *folder.control)),
            ("option", self.options, folder.options),
        ):
            for name in given:
                one_of(f"{kind} of {self.family.name}", name, known)
        missing = [name for name in folder.parts if name not in self.parts]
        if missing:
            raise CheckpointError(
                f"it lacks {', '.join(missing)}: a {self.family.name} needs {', '.join(folder.parts)}"
            )
        for name in (*self.family.denoisers, self.family.autoencoder):
            _check_network(name, self.parts.get(name))
        object.__setattr__(self, "parts", dict.fromkeys(folder.optional) | dict(self.parts))
        object.__setattr__(self, "options", dict(folder.options) | dict(self.options))

    def __repr__(self) -> str:
        """The family and the parts, without their numbers."""
        parts = (
            f"{name}={type(getattr(part, 'module', part)).__name__}" for name, part in self.parts.items()
        )
        return f"Pipeline({self.family.name}: {', '.join(parts)})"

    def __call__(self, key: Key[Array, " ..."] | None = None, *prompts: Any, **options: Any) -> Any:
        """Draw images, float32 [N, H, W, C] in [-1, 1]; see `generate`, and `Call` for the options."""
        key, options = check_call(key, prompts, options)
        _check_kind(self, options)
        _check_whole(self)
        wrong = signature_error(self.family.call, (self, key, *prompts), options, name="pipe", hidden=1)
        if wrong is not None:
            raise wrong
        drawn = self.family.call(self, key, *prompts, **options)
        check_weights(self.networks, drawn)
        return drawn

    def __reduce__(self) -> Any:
        """For `pickle` and `copy`: what it is made of. Arrays split over a mesh become whole ones."""
        return Pipeline, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __getattr__(self, name: str) -> Any:
        """A part, an option, or a function of the family."""
        if isinstance(getattr(type(self), name, None), property):
            return object.__getattribute__(self, name)  # raises what the property did
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

    def with_image_adapters(self, adapters: tuple[Any, ...]) -> Pipeline:
        """The model with these in place of its `image_adapters`."""
        return dataclasses.replace(self, image_adapters=adapters)

    def warm_up(self, *prompts: Any, **options: Any) -> None:
        """Compile all that a call with these prompts and options runs, and take no step.

        Later calls may differ in the key, the prompts, the guidance scale, callbacks, and the number of steps
        within the same 64.
        """
        for name in ("key", "compile_only"):
            if name in options:
                raise InvalidArgumentError(f"warm_up gives {name} itself: leave it out")
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
    def mesh(self) -> Mesh | None:
        """The mesh over which the denoising network is split, and calls compute; None: on whole devices."""
        return mesh_of(self.denoiser.params)

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
        found, own = self.family.defaults(self), self.few_steps
        if own is None:
            return found
        scale = found.guidance_scale if own.default_scale is None else own.default_scale
        steps = found.num_inference_steps if own.default_steps is None else own.default_steps
        return found._replace(guidance_scale=scale, num_inference_steps=steps, solver=own.solver)

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
        """Number of classes, None for a model without them.

        The label `num_classes` is the null class, where there is one.
        """
        count = getattr(self.denoiser.config, "num_classes", None)
        return None if count is None else count + (not self.has_null_class)

    @property
    def has_null_class(self) -> bool:
        """Whether a label stands for no class, so that guidance can steer away from it.

        In published consistency models every label is a class.
        """
        has_classes = getattr(self.denoiser.config, "num_classes", None) is not None
        return has_classes and self.options.get("diffusers_class") not in WITHOUT_NULL_CLASS

    @property
    def latent_spec(self) -> LatentSpec:
        """The latents that it draws."""
        return self.family.latent_spec(self)

    @property
    def default_size(self) -> Size:
        """(height, width) of the images of a call that names none."""
        return self.latent_spec.default_size

    @checked(size=A_SIZE)
    def latent_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        """(h, w, c) of the latents of images of that (height, width)."""
        return self.latent_spec.shape(self.default_size if size is None else size)

    @checked(size=pair(1))
    def num_image_tokens(self, size: Size) -> int:
        """Tokens of an image of that (height, width), which some schedules shift with."""
        return (size[0] // self.latent_spec.multiple) * (size[1] // self.latent_spec.multiple)

    @checked(size=A_SIZE)
    def encode_prompts(
        self,
        prompts: Sequence[Any] | Int[np.ndarray, " P"],
        negatives: Sequence[Any] | None = None,
        size: Size | None = None,
        **options: Any,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(cond, uncond): what the network takes of P prompts, and of P negatives, by argument name."""
        for name in options:
            one_of(f"option of the texts of {self.family.name}", name, keywords_of(self.family.encode))
        options = check_all(CHECKS, options)
        request = Request(cast(Any, prompts), negatives, None, self.default_size if size is None else size)
        return self.family.encode(self, request, **options)

    @checked(size=A_SIZE)
    def grid(self, size: Size | None = None, **options: Any) -> tuple[Any, D.Grid]:
        """(solver and denoiser, rows) of a call with these options, padded, to look at or to use."""
        call = read_call(self, options)
        return self.family.grid(self, call, self.default_size if size is None else size)

    def decode(
        self, latents: Float[Any, "N h w c"] | Int[Any, "N h w"], **options: Any
    ) -> Float[np.ndarray, "N H W C"]:
        """Images in [-1, 1] of latents, or of tokens where the model draws these.

        Options `tiling`, `batch_size`, `devices` as in a call.
        """
        return self.family.decode(self, latents, **options)

    @checked(solver=optional(a_solver_or_name))
    def default_steps(self, solver: str | D.Solver | None = None) -> int:
        """The number of steps of a call that names none: 4 for the solvers of distilled models."""
        return int(D.steps_in(self.grid(solver=solver)[1]))

    @checked(num_images=count(1))
    def num_callbacks(self, num_images: int, **options: Any) -> int:
        """How often a call with these options calls its `progress`: the length of a progress bar."""
        return self.family.num_callbacks(self, num_images, **options)

    def call_options(self) -> list[str]:
        """The names of the options that a call takes."""
        names = call_options(self.family.call, self.family.encode)
        unused = {*self.family.unused, *(EMBEDS if self.family.text_widths is None else ())}
        unused |= set() if self.family.folder.control else {*OF_CONTROL}
        unused |= set() if self.image_adapters else set(IMAGE_PROMPTS)
        return [name for name in names if name not in unused]

    def check_parts(self) -> None:
        """Raise `CheckpointError` where the parts are of different models."""
        vae = self.autoencoder
        if vae is not None and isinstance(vae.config, ModelConfig) and not hasattr(vae.module, "decode"):
            kind = type(vae.module).__name__
            raise CheckpointError(f"its {self.family.autoencoder} is a {kind}, and no autoencoder: give one")
        self.family.folder.check(self)
        check_control(self.parts, self.denoiser)


def _check_network(name: Any, part: Any) -> None:
    """Raise `InvalidArgumentError` for parameters, or a pair with their module, in place of a network."""
    if isinstance(part, (tuple, Mapping)):
        instead = f"pipelines.Network(*{name})" if isinstance(part, tuple) else ""
        raise refuse(name, "a network such as pipelines.Network(module, params)", part, instead)


def _check_whole(pipe: Pipeline) -> None:
    """Raise `CheckpointError` where parts are of different models; looked at once.

    A network of one's own has a config that nothing is known of: it is taken as it is.
    """
    known = all(isinstance(network.config, ModelConfig) for network in pipe.networks.values())
    if "_is_whole" in vars(pipe) or not known:
        return
    try:
        pipe.check_parts()
    except AttributeError as error:
        raise CheckpointError(f"parts of different models, of {shown(pipe)}: {error}") from error
    object.__setattr__(pipe, "_is_whole", True)


def _check_kind(pipe: Pipeline, options: Mapping[str, Any]) -> None:
    """Raise `InvalidArgumentError` for texts where a model draws classes, and the other way round."""
    known = call_options(pipe.family.call, pipe.family.encode)
    for name in (*OF_TEXTS, *OF_CLASSES):
        if name not in options or name in known:
            continue
        if name in OF_TEXTS and "class_labels" in known:
            instead = "leave it out" if pipe.num_classes is None else "write class_labels=[3]"
            raise InvalidArgumentError(f"{name} is a text, and this model draws no texts: {instead}")
        if name in OF_CLASSES and "prompt" in known:
            raise InvalidArgumentError(f"{name} are of classes, this model draws texts: write prompt='a cat'")


def read_call(pipe: Pipeline, options: Mapping[str, Any]) -> Call:
    """The options of a call, checked one by one.

    Raises:
        UnknownNameError: an option that neither `Call` nor the family has.
        InvalidArgumentError: one that is out of range.
    """
    options = check_all(CHECKS, options)
    known = call_options(pipe.family.call, pipe.family.encode)
    for name in options:
        one_of(f"argument of {pipe.family.name}", name, known)
    for name in pipe.family.unused:
        if options.get(name) is not None:
            raise InvalidArgumentError(f"{name} is not for {pipe.family.name}: leave it out")
    for name in IMAGE_PROMPTS:
        if options.get(name) is not None and not pipe.image_adapters:
            raise InvalidArgumentError(
                f"{name} is for a model with an IP-Adapter: write pipelines.with_ip_adapter(pipe, path)"
            )
    shared = SHARED.intersection(options)
    own = {name: value for name, value in options.items() if name not in shared}
    call = Call(**{name: options[name] for name in shared}, own=own)
    one_of("output", call.output, OUTPUTS)
    if call.output_type is not None and (call.output != "images" or not pipe.family.draws_images):
        raise InvalidArgumentError(
            f"output_type={call.output_type!r} is of images, and this call returns latents: leave it out"
        )
    if call.weak_guidance is not None:
        if call.cache is not None:
            raise InvalidArgumentError("weak_guidance and cache exclude each other: leave one of them out")
        call.weak_guidance.weak(pipe.denoiser)  # refuses other networks and layers
    merging_tokens(pipe.denoiser, call.token_merging)  # refuses networks that cannot
    defaults = pipe.defaults
    rescale = defaults.guidance_rescale if call.guidance_rescale is None else call.guidance_rescale
    if call.denoising_start and call.latents is None:
        raise InvalidArgumentError("denoising_start needs latents=, as another model left them there")
    strength = None
    if pipe.latent_spec.image_factor is None:
        strength = strength_of(call.image, call.strength, call.mask_image, defaults.strength)
    return dataclasses.replace(call, strength=strength, guidance_rescale=rescale)


A_PIPELINE = instance(Pipeline, "a pipeline from pipelines.load(folder)")
