"""Recipes: all the numbers of a training run, as plain data, by name.

A recipe is written into the run folder as config.json, and a run is resumed only with the recipe it began
with. To try other numbers: `dataclasses.replace(RECIPES["mini-ldm"], seed=1)`, or a new entry in `RECIPES`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from jaxldm.diffusion import NoiseSchedule
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRecipe:
    """What every trained network has.

    Attributes:
        preset: a name in `jaxldm.models.PRESETS`.
        overrides: changed fields of its config. Image size, channels and number of classes come from the
            data and need not be given.
        epochs: how often each example is seen.
        batch_size: examples in an update.
        learning_rate, final_scale, weight_decay, max_grad_norm, b1, b2: see `jaxldm.training.optimizer`.
        warmup_epochs: of the learning rate; may be a fraction.
        ema_decay: of the moving average of the parameters, which is what the finished model then holds.
        dtype: compute type, "float32" or "bfloat16"; parameters, loss and optimizer are float32.
        save_every: epochs between checkpoints; 0: only at the end. (On Ctrl-C there is always one.)
        sample_every: epochs between pictures of what the model makes; 0: none.
    """

    preset: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_epochs: float = 0.5
    final_scale: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999
    ema_decay: float | None = None
    dtype: str = "float32"
    save_every: int = 5
    sample_every: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup_epochs", "save_every", "sample_every"):
            if not getattr(self, name) >= 0:
                raise InvalidArgumentError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise InvalidArgumentError(f"ema_decay must lie in [0, 1), or be None, not {self.ema_decay}")
        one_of("dtype", self.dtype, ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe(StageRecipe):
    """Stage one, see `jaxldm.training.autoencoder.autoencoder_loss`.

    Attributes:
        beta: weight of the KL term.
        beta_warmup_epochs: it rises from 0 to beta over so many epochs.
        free_bits: nats of each latent channel that cost nothing.
        reconstruction: "mse" or "l1".
    """

    preset: str = "mini-autoencoder"
    beta: float = 1e-3
    beta_warmup_epochs: float = 0.0
    free_bits: float = 0.0
    reconstruction: str = "mse"

    def __post_init__(self):
        super().__post_init__()
        for name in ("beta", "beta_warmup_epochs", "free_bits"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidArgumentError(f"{name} must be 0 or more, not {getattr(self, name)}")
        one_of("reconstruction", self.reconstruction, ("mse", "l1"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionRecipe(StageRecipe):
    """Stage two (or the only one, on pixels), see `jaxldm.diffusion.diffusion_loss`.

    Attributes:
        noise: path and prediction.
        min_snr_gamma, noise_offset, condition_dropout: as there.
        sample_latents: draw each latent anew from the autoencoder's posterior, as published; else its mean.
        sample_steps, sample_guidance_scale, samples_per_class: of the pictures on the way.
    """

    preset: str = "mini-unet"
    noise: NoiseSchedule = dataclasses.field(default_factory=NoiseSchedule)
    min_snr_gamma: float | None = None
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
                raise InvalidArgumentError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise InvalidArgumentError(f"min_snr_gamma must be above 0, or None, not {self.min_snr_gamma}")
        if not 0 <= self.condition_dropout <= 1:
            raise InvalidArgumentError(f"condition_dropout must lie in [0, 1], not {self.condition_dropout}")
        if self.samples_per_class < 1:
            raise InvalidArgumentError(f"samples_per_class must be at least 1, not {self.samples_per_class}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierRecipe(StageRecipe):
    """The judge for the metrics, see `jaxldm.models.digit_classifier`.

    Attributes:
        augment: turn, scale and shift the images a little.
    """

    preset: str = "digit-classifier"
    augment: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    Attributes:
        name: of the recipe.
        data: a TFDS name.
        image_size: side to which its images are scaled; None: as they are.
        max_train_images: use only the first so many of the training split; None: all.
        autoencoder: None: the diffusion model works on pixels.
        diffusion: the denoising network.
        classifier: None: no metrics that need one.
        seed: of every random number.
    """

    name: str
    data: str = "mnist5k"
    image_size: int | None = None
    max_train_images: int | None = None
    autoencoder: AutoencoderRecipe | None = None
    diffusion: DiffusionRecipe = dataclasses.field(default_factory=DiffusionRecipe)
    classifier: ClassifierRecipe | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise InvalidArgumentError(f"seed must be a whole number from 0 to {2**32 - 1}, not {self.seed}")
        if self.max_train_images is not None and self.max_train_images < 1:
            raise InvalidArgumentError(f"max_train_images must be at least 1, not {self.max_train_images}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: nested dictionaries, lists, numbers and strings."""
        return _listed(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`. Raises `CheckpointError` for unknown keys and values that cannot be."""
        return _build(cls, entries, "recipe")


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(entry) for key, entry in value.items()}
    return [_listed(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def _tupled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tupled(entry) for key, entry in value.items()}
    return tuple(_tupled(entry) for entry in value) if isinstance(value, (tuple, list)) else value


def _build(kind: type, entries: Any, place: str) -> Any:
    """An instance of the dataclass `kind` from plain data, nested dataclasses included."""
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"{place} should be a JSON object, not {entries!r}")
    types_of = typing.get_type_hints(kind)
    unknown = sorted(set(entries) - set(types_of))
    if unknown:
        raise CheckpointError(f"{place} has the unknown key {unknown[0]!r}; known: {', '.join(types_of)}")
    given = {}
    for key, value in entries.items():
        kinds = typing.get_args(types_of[key]) or (types_of[key],)
        nested = [choice for choice in kinds if dataclasses.is_dataclass(choice)]
        build_nested = nested and value is not None
        given[key] = _build(nested[0], value, f"{place}.{key}") if build_nested else _tupled(value)
    try:
        return kind(**given)
    except (TypeError, InvalidArgumentError) as error:
        raise CheckpointError(f"{place}: {error}") from error


_MINI_AUTOENCODER = AutoencoderRecipe(
    epochs=5, learning_rate=2e-3, beta=0.08, beta_warmup_epochs=2, ema_decay=0.99
)
# The decoder forgives errors of a posterior's width, so what matters is the noisy end: no Min-SNR weights
# (they turn to the clean end), and the posterior's mean for x_0, scaled to variance 1 by itself.
_MINI_UNET = DiffusionRecipe(
    preset="mini-unet",
    epochs=18,
    batch_size=32,
    learning_rate=2e-3,
    warmup_epochs=1,
    ema_decay=0.998,
    noise=NoiseSchedule(betas="cosine", prediction="v_prediction"),
    condition_dropout=0.07,
    sample_latents=False,
    sample_every=10,
    sample_steps=20,
)
_CLASSIFIER = ClassifierRecipe(
    epochs=14, learning_rate=3e-3, warmup_epochs=1, weight_decay=0.05, ema_decay=0.99, save_every=0
)
_SMOKE_AUTOENCODER = AutoencoderRecipe(
    overrides={"block_out_channels": (8, 8, 8)},
    epochs=2,
    batch_size=64,
    learning_rate=5e-3,
    ema_decay=0.9,
    beta_warmup_epochs=1,
    save_every=1,
)
_SMOKE_CLASSIFIER = ClassifierRecipe(
    overrides={"block_out_channels": (8, 8, 8), "num_features": 16},
    epochs=2,
    batch_size=64,
    learning_rate=5e-3,
    augment=False,
)

RECIPES: dict[str, Recipe] = {
    # Exercise 39.E2: 28x28x1 digits -> 7x7x4 latents -> class-conditional U-Net in the latent space.
    #   jaxldm train mini-ldm --run-dir runs/mini-ldm
    "mini-ldm": Recipe(
        name="mini-ldm", autoencoder=_MINI_AUTOENCODER, diffusion=_MINI_UNET, classifier=_CLASSIFIER
    ),
    # The same with a DiT in the latent space: one token per latent pixel.
    #   jaxldm train mini-ldm-dit --run-dir runs/mini-ldm-dit
    "mini-ldm-dit": Recipe(
        name="mini-ldm-dit",
        autoencoder=_MINI_AUTOENCODER,
        diffusion=dataclasses.replace(_MINI_UNET, preset="tiny-dit", overrides={"patch_size": 1}),
        classifier=_CLASSIFIER,
    ),
    # Lecture 43.2: Tiny DiT on the pixels of 28x28 digits, patch 4, linear betas. The lecture's batches of
    # 128 at Adam's 1e-4 are for 60 000 images: on a fifteenth of them 1 900 such updates, even at 5e-4,
    # leave patches that do not know of one another. Small batches make three times as many.
    #   jaxldm train tiny-dit --run-dir runs/tiny-dit
    "tiny-dit": Recipe(
        name="tiny-dit",
        diffusion=DiffusionRecipe(
            preset="tiny-dit",
            epochs=40,
            batch_size=32,
            learning_rate=1e-3,
            warmup_epochs=2,
            ema_decay=0.998,
            noise=NoiseSchedule(prediction="v_prediction"),
            sample_every=20,
        ),
        classifier=_CLASSIFIER,
    ),
    # Seconds instead of minutes, to see that everything runs; what it draws is noise.
    "smoke": Recipe(
        name="smoke",
        max_train_images=256,
        autoencoder=_SMOKE_AUTOENCODER,
        diffusion=DiffusionRecipe(
            overrides={
                "block_out_channels": (8, 8),
                "norm_num_groups": 4,
                "down_block_types": ("DownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "UpBlock2D"),
                "mid_block_type": None,
            },
            epochs=2,
            batch_size=64,
            ema_decay=0.9,
            save_every=1,
            sample_every=2,
            sample_steps=2,
            samples_per_class=1,
        ),
        classifier=_SMOKE_CLASSIFIER,
    ),
    "smoke-dit": Recipe(
        name="smoke-dit",
        max_train_images=256,
        diffusion=DiffusionRecipe(
            preset="tiny-dit",
            overrides={"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 7},
            epochs=2,
            batch_size=64,
            ema_decay=0.9,
            save_every=1,
            sample_every=2,
            sample_steps=2,
            samples_per_class=1,
        ),
        classifier=_SMOKE_CLASSIFIER,
    ),
}
