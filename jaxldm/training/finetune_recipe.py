"""What a fine-tuning is: the model it starts from, and which of its parameters move."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxldm import diffusion as D
from jaxldm.arguments import count, number
from jaxldm.checkpoints.embedding_file import a_word
from jaxldm.checkpoints.lora_file import NAMES
from jaxldm.entries import check_types
from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.functions import NamedFields
from jaxldm.models.adapters import some_targets
from jaxldm.models.registry import class_name
from jaxldm.training.freezing import some_patterns
from jaxldm.training.stage_recipe import (
    WEIGHTS,
    Options,
    UpdatesRecipe,
    check_not_negative,
    from_table,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraRecipe(NamedFields):
    """A low-rank adapter in place of the network's own parameters, see `jaxldm.models.init_lora`.

    Attributes:
        rank: of the change of each layer.
        alpha: the change is multiplied with alpha / rank; None: with 1.
        targets: patterns of layers; None: the projections of all attention layers.
        names: of the tensors in the file, "diffusers" or "kohya", see `jaxldm.checkpoints.save_lora`.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    names: str = "diffusers"

    def __post_init__(self):
        check_types(self)
        count(1)("rank", self.rank)
        if self.alpha is not None:
            number(above=0)("alpha", self.alpha)
        if self.targets is not None:
            some_targets("targets", self.targets)
        one_of("kind of names", self.names, NAMES)

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorRecipe(NamedFields):
    """Pictures of the class of a subject, drawn as before: DreamBooth, Ruiz et al. 2022, equation 2.

    Attributes:
        prompt: of the class, "a photo of a dog".
        images: folder of such pictures; None: the model itself draws them before it is trained.
        number: of these.
        weight: of their loss, relative to that of the subject's.
    """

    prompt: str
    images: str | None = None
    number: int = 100
    weight: float = 1.0

    def __post_init__(self):
        check_types(self)
        count(1)("num_class_images", self.number)
        number(0)("prior_weight", self.weight)


# Of textual inversion: texts in which the new word is learned.
TEMPLATES = {
    "object": (
        "a photo of {}",
        "a photo of the {}",
        "a photo of one {}",
        "a picture of {}",
        "a close-up photo of {}",
        "a cropped photo of {}",
        "a bright photo of {}",
        "a dark photo of {}",
        "a good photo of {}",
        "a photo of my {}",
        "a photo of a small {}",
        "a rendering of {}",
    ),
    "style": (
        "a picture in the style of {}",
        "a painting in the style of {}",
        "a drawing in the style of {}",
        "a detailed picture in the style of {}",
        "a close-up in the style of {}",
        "a bright picture in the style of {}",
        "a dark picture in the style of {}",
        "a small picture in the style of {}",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordRecipe(NamedFields):
    """A new word, whose embeddings alone move: textual inversion, Gal et al. 2022, arXiv:2208.01618.

    Attributes:
        word: as it will stand in prompts, "<my-cat>".
        initial: what it is like at first, "cat".
        vectors: embeddings that it has, each in place of a token.
        templates: the texts that it is learned in: "object" or "style".
    """

    word: str
    initial: str
    vectors: int = 1
    templates: str = "object"

    def __post_init__(self):
        check_types(self)
        a_word("word", self.word)
        count(1, 64)("num_vectors", self.vectors)
        one_of("templates", self.templates, TEMPLATES)
        if not self.initial.strip():
            raise InvalidArgumentError('initial_text must be a text such as "cat": what the word is like')


CONTROL_IMAGES = ("folder", "edges")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlRecipe(NamedFields):
    """A ControlNet next to the network, which stays as it is: Zhang et al. 2023, arXiv:2302.05543.

    Attributes:
        images: what it sees: "folder", the condition picture that the folder names for each picture (see
            `jaxldm.data.load_folder`), or "edges" of the pictures, see `jaxldm.data.edges`.
    """

    images: str = "folder"

    def __post_init__(self):
        check_types(self)
        one_of("kind of control images", self.images, CONTROL_IMAGES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(UpdatesRecipe):
    """A published model, or one trained here, on further pictures; see `jaxldm.training.finetune_recipe`.

    Path, prediction, autoencoder, text encoders and tokenizers are those of the model and stay as they are.

    Attributes:
        source: folder of the model.
        lora: only an adapter moves; None: the network's own parameters.
        word: only the embeddings of a new word move.
        control: only a ControlNet moves.
        prior: pictures of a class that are trained on besides.
        prompt: of all pictures, in place of their captions.
        freeze: patterns of parameters that stay as they are, see `jaxldm.training.freeze`.
        remat: keep no activations inside the network's blocks for the backward pass, compute them again: less
            memory, about a third more arithmetic.
        weight, time, noise_offset, condition_dropout, sample_latents: as of `DiffusionRecipe`.
        sample_steps, samples_per_caption: of the pictures on the way; the steps also of `prior`'s.
        sample_guidance_scale: of these; None: the model's own.
    """

    source: str
    lora: LoraRecipe | None = None
    word: WordRecipe | None = None
    control: ControlRecipe | None = None
    prior: PriorRecipe | None = None
    prompt: str | None = None
    freeze: tuple[str, ...] = ()
    remat: bool = False
    epochs: int = 20
    batch_size: int = 1
    learning_rate: float = 1e-5
    save_every: int = 5
    sample_every: int = 5
    weight: Options | None = None
    time: Options | None = None
    noise_offset: float = 0.0
    condition_dropout: float = 0.1
    sample_latents: bool = True
    sample_steps: int = 25
    sample_guidance_scale: float | None = None
    samples_per_caption: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(self, "noise_offset")
        self.make_weight()
        self.make_time()
        number(0, 1)("condition_dropout", self.condition_dropout)
        count(1)("sample_steps", self.sample_steps)
        count(1)("samples_per_caption", self.samples_per_caption)
        if self.sample_guidance_scale is not None:
            check_not_negative(self, "sample_guidance_scale")
        some_patterns("freeze", self.freeze)
        if self.prompt is not None and not self.prompt.strip():
            raise InvalidArgumentError("prompt is empty: give a text, or leave it out")
        if self.freeze and self.lora is not None:
            raise InvalidArgumentError(
                "freeze has no effect with lora, which moves an adapter alone: give lora the targets"
            )
        if self.word is not None and self.optimizer == "muon":
            raise InvalidArgumentError("muon is for matrices, and with word only embeddings move: take adamw")
        if self.prior is not None and self.prompt is None:
            raise InvalidArgumentError(
                'a prior is for pictures of one subject: give them a prompt, "a photo of sks dog"'
            )
        for own, also in (("word", ("prompt",)), ("control", ("word",))):
            others = [name for name in ("lora", "prior", "freeze", *also) if getattr(self, name)]
            if getattr(self, own) is not None and others:
                raise InvalidArgumentError(
                    f"{others[0]} has no effect with {own}, which alone moves: leave it out"
                )

    def computing(self, config: Any) -> Any:
        """The config of a network as it computes in this training: in `dtype`, and with `remat`.

        Raises `InvalidArgumentError` for `remat` of a network that has none.
        """
        if not self.remat:
            return dataclasses.replace(config, dtype=self.dtype)
        if not hasattr(config, "remat"):
            raise InvalidArgumentError(
                f"a {class_name(config)} has no remat: leave it out, and compute batches in parts "
                "(accumulate)"
            )
        return dataclasses.replace(config, dtype=self.dtype, remat=True)

    def make_weight(self) -> Callable[[Any], Any] | None:
        """log-SNR -> weight, for `diffusion_loss`."""
        return from_table("weight", WEIGHTS, self.weight)

    def make_time(self) -> Callable[..., Any] | None:
        """(key, shape, path) -> t, for `diffusion_loss`."""
        return from_table("time", D.TRAINING_TIMES, self.time)


_LORA, _DREAMBOOTH, _INVERSION = ("lora", "dreambooth"), ("dreambooth",), ("textual-inversion",)
_CONTROL = ("controlnet",)
# What only one or some of the methods have: option -> the part of the recipe, its field there, the methods.
OWN_OPTIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "rank": ("lora", "rank", _LORA),
    "alpha": ("lora", "alpha", _LORA),
    "targets": ("lora", "targets", _LORA),
    "lora_names": ("lora", "names", _LORA),
    "freeze": ("", "freeze", ("freeze",)),
    "instance_prompt": ("", "prompt", _DREAMBOOTH),
    "class_prompt": ("prior", "prompt", _DREAMBOOTH),
    "class_images": ("prior", "images", _DREAMBOOTH),
    "num_class_images": ("prior", "number", _DREAMBOOTH),
    "prior_weight": ("prior", "weight", _DREAMBOOTH),
    "word": ("word", "word", _INVERSION),
    "initial_text": ("word", "initial", _INVERSION),
    "num_vectors": ("word", "vectors", _INVERSION),
    "templates": ("word", "templates", _INVERSION),
    "control_images": ("control", "images", _CONTROL),
    "caption": ("", "prompt", _CONTROL),
}
# Method -> the options that it needs, and the defaults that it changes.
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "lora": ((), {"learning_rate": 1e-4}),
    "full": ((), {}),
    "freeze": (("freeze",), {}),
    "dreambooth": (("instance_prompt",), {"learning_rate": 5e-6, "condition_dropout": 0.0}),
    "textual-inversion": (("word", "initial_text"), {"learning_rate": 5e-3, "condition_dropout": 0.0}),
    "controlnet": ((), {}),
}
_EXAMPLES = {
    "freeze": "['down_blocks_*']",
    "instance_prompt": "'a photo of sks dog'",
    "class_prompt": "'a photo of a dog'",
    "word": "'<my-cat>'",
    "initial_text": "'cat'",
}
_PARTS: dict[str, Any] = {
    "lora": LoraRecipe,
    "prior": PriorRecipe,
    "word": WordRecipe,
    "control": ControlRecipe,
}
_OF_METHOD = {"lora": "lora", "controlnet": "control"}  # the part that a method has without any option


def make_finetuning(source: str | os.PathLike, method: str, options: Mapping[str, Any]) -> FinetuneRecipe:
    """The recipe of a method, its options sorted into their parts.

    Raises:
        UnknownNameError: a method or an option that does not exist.
        InvalidArgumentError: an option that has no effect with this method, or one that it lacks.
    """
    needed, defaults = METHODS[one_of("method", method, METHODS)]
    for name in needed:
        if not options.get(name):
            raise _missing(name, f"method {method}")
    own = {"source", "prompt", "freeze", *_PARTS}
    shared = [field.name for field in dataclasses.fields(FinetuneRecipe) if field.name not in own]
    fields: dict[str, Any] = {"source": whole_path(source), **defaults}
    parts: dict[str, dict[str, Any]] = {_OF_METHOD[method]: {}} if method in _OF_METHOD else {}
    for name, value in options.items():
        if name not in OWN_OPTIONS:
            fields[one_of("option of a fine-tuning", name, [*OWN_OPTIONS, *shared])] = value
            continue
        part, field, methods = OWN_OPTIONS[name]
        if method not in methods:
            raise InvalidArgumentError(
                f"{name} has no effect with method {method}: leave it out, or take method {methods[0]}"
            )
        (parts.setdefault(part, {}) if part else fields)[field] = value
    if "prior" in parts:
        parts["prior"] = _of_prior(parts["prior"])
    if "lora" in parts and "learning_rate" not in options:
        fields["learning_rate"] = METHODS["lora"][1]["learning_rate"]
    return FinetuneRecipe(**fields, **{name: _PARTS[name](**given) for name, given in parts.items()})


def _of_prior(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a prior, with the whole path of its folder."""
    if not given.get("prompt"):
        raise _missing("class_prompt", "prior preservation")
    images = given.get("images")
    if images is not None and "number" in given:
        raise InvalidArgumentError(
            "num_class_images has no effect with class_images, all of which are used: leave it out"
        )
    return {**given, "images": None if images is None else whole_path(images)}


def _missing(name: str, what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{what} needs {name}, as in {name}={_EXAMPLES[name]}")


def whole_path(folder: str | os.PathLike) -> str:
    """The path of a folder from the root, so that a run is resumed from anywhere."""
    return os.fspath(Path(folder).expanduser().absolute())
