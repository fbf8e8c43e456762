"""DeepFloyd IF, the open Imagen: 64x64 pixels from a text, and 256x256 of those. Saharia et al. 2022.

stage_1 = pipelines.load("IF-I-XL-v1.0", dtype="bfloat16")
stage_2 = pipelines.load("IF-II-L-v1.0", dtype="bfloat16")
small = stage_1(key, "a kangaroo in an orange hoodie", spacing="smart100")
large = stage_2(key, "a kangaroo in an orange hoodie", image=small, spacing="smart50")
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of
from jaxldm.pipelines.image_inputs import as_images, check_count, check_rows, repeated
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.prompts import as_texts, encode_texts, for_each
from jaxldm.pipelines.schedulers import Plan, make_plan
from jaxldm.pipelines.starts import Start
from jaxldm.pipelines.text_pipeline import WITHOUT_SAFETY_CHECKER
from jaxldm.pipelines.text_to_image import TextToImage
from jaxldm.pipelines.walking import Rows

MAX_LENGTH = 77  # tokens of a text that the published models were trained on
# The grids of the published models: how many steps each of equal parts of the timesteps gets, cleanest first.
RESPACINGS: dict[str, tuple[int, ...]] = {
    "fast27": (10, 10, 3, 2, 2),
    "smart27": (7, 4, 2, 1, 2, 4, 7),
    "smart50": (10, 6, 4, 3, 2, 2, 3, 4, 6, 10),
    "smart100": (*(1,) * 4, *(2,) * 6, *(3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 13)),
    "smart185": (1, 1, 2, 2, 2, 3, 3, 3, *range(4, 17), 18, 20),
    "super27": (*(1,) * 7, 2, 5, 13),
    "super40": (*(2,) * 6, 3, 4, 6, 15),
    "super100": (4, 4, 6, 6, 8, 8, 10, 10, 14, 30),
}
_NOISING = np.uint32(2**32 - 2)  # what an image's key is folded with; no step has this number


def respaced_timesteps(counts: Sequence[int], num_train_timesteps: int = 1000) -> list[int]:
    """Timesteps, noisiest first: the path cut into equal parts, `counts` of them from each, ends included.

    Nichol & Dhariwal 2021, section 4, as published for each part of the path. Parts that cannot be equal are
    longer by one where the image is cleanest.

    >>> respaced_timesteps((2, 3), 10)
    [9, 7, 5, 4, 0]
    """
    timesteps: list[int] = []
    for part, count in zip(np.array_split(np.arange(num_train_timesteps), len(counts)), counts, strict=True):
        step = (len(part) - 1) / (count - 1) if count > 1 else 1.0
        # Sums and not products: their rounding decides between two timesteps, as it did for the models.
        places = itertools.accumulate([0.0] + [step] * (count - 1))
        timesteps += [int(part[0]) + round(place) for place in places]
    return timesteps[::-1]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DeepFloydIF(TextToImage):
    """Stage I: a U-Net on pixels that looks at the states of T5, and says its variance.

    `spacing` may be a name in `RESPACINGS` too, which has its own number of steps. The scheduler of the
    published folders is DDPM with the learned variance, on x_0 under dynamic thresholding; with other solvers
    the variance is not used. An image to start from, with or without a mask, is given in pixels.

    Attributes:
      unet: the denoising network.
      text_encoder, tokenizer: T5-XXL's encoder. All stages have the same: a folder may lack it, and
        `dataclasses.replace(stage_2, text_encoder=stage_1.text_encoder, tokenizer=stage_1.tokenizer)` shares
        one.
    """

    unet: Network
    text_encoder: Network | None
    tokenizer: Any

    denoiser_name: ClassVar[str] = "unet"
    class_names: ClassVar[tuple[str, ...]] = ("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline")
    optional: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    saved_options: ClassVar[Mapping[str, bool]] = WITHOUT_SAFETY_CHECKER
    default_guidance_scale: ClassVar[float] = 7.0
    default_num_inference_steps: ClassVar[int] = 100
    default_strength: ClassVar[float] = 0.7

    @property
    def size_multiple(self) -> int:
        """What heights and widths are divisible by: the U-Net halves and doubles exactly."""
        return self.unet.config.size_multiple

    def conditions(
        self, prompts: list[str], negative_prompts: list[str] | None, size: tuple[int, int]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """T5's states of 77 tokens; where there is no negative prompt, those of the empty text.

        The models were trained on texts in small letters, so they are made small. URLs, HTML and the like,
        which diffusers takes out where two more packages are installed, stay.

        Raises:
          InvalidArgumentError: there is no text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise InvalidArgumentError(
                "this model was loaded without a text encoder: give it the other stage's, with "
                "dataclasses.replace(stage_2, text_encoder=stage_1.text_encoder, tokenizer=stage_1.tokenizer)"
            )
        told, away = (
            {"encoder_hidden_states": self._encode(texts)}
            for texts in (prompts, negative_prompts or [""] * len(prompts))
        )
        return told, away

    def _encode(self, texts: list[str]) -> Float[np.ndarray, "P T D"]:
        texts = [text.lower().strip() for text in texts]
        return encode_texts(self.text_encoder, self.tokenizer, texts, max_length=MAX_LENGTH, mask=True).hidden

    def make_grid(
        self,
        plan: Plan,
        num_inference_steps: int | None = None,
        spacing: str | None = None,
        sigmas: str | None = None,
        *part: Any,
        **more: Any,
    ) -> D.Grid:
        """As for other families; `spacing` may be a name in `RESPACINGS` too.

        Raises:
          InvalidArgumentError: a name in `RESPACINGS` beside sigmas, or another number of steps.
        """
        if spacing is not None:
            one_of("spacing", spacing, (*D.SPACINGS, *RESPACINGS))
        if spacing not in RESPACINGS:
            return super().make_grid(plan, num_inference_steps, spacing, sigmas, *part, **more)
        steps = sum(RESPACINGS[spacing])
        if sigmas is not None or num_inference_steps not in (None, steps):
            raise InvalidArgumentError(
                f"spacing={spacing!r} says everything: leave out sigmas, and num_inference_steps too, or "
                f"give its {steps}"
            )
        timesteps = respaced_timesteps(RESPACINGS[spacing], plan.schedule.num_train_timesteps)
        plan = plan._replace(grid_options={"timesteps": timesteps})
        return super().make_grid(plan, steps, None, None, *part, **more)

    def count_ticks(self, num_images: int, options: Mapping[str, Any]) -> int:
        """How often a call with these options will tell its `progress`."""
        steps = sum(RESPACINGS.get(options.get("spacing"), ()))
        return super().count_ticks(
            num_images, {**options, "num_inference_steps": steps} if steps else options
        )

    def check_parts(self) -> None:
        """The U-Net must be of this stage, and take what the text encoder and the scheduler give and want.

        Raises:
          CheckpointError: parts of different models.
        """
        config, channels = self.unet.config, self.latent_channels
        if self.network_channels != channels or config.out_channels not in (channels, 2 * channels):
            raise CheckpointError(
                f"its U-Net takes {config.in_channels} channels and draws {config.out_channels}: stage I "
                "takes 3, super-resolution 6, and both draw 6, the pixels and their variance"
            )
        if make_plan(self.scheduler).sampler.learned_variance and config.out_channels == channels:
            raise CheckpointError("its scheduler wants a learned variance, which its U-Net does not say")
        if self.text_encoder is not None:
            self.check_text_width(self.text_encoder.config.d_model, config.text_dim)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DeepFloydIFSuperResolution(DeepFloydIF):
    """Stage II: the same on four times the size, told the small image, and how much noise was put on it.

    Saharia et al. 2022, section 2.3, "noise conditioning augmentation".

    Attributes:
      image_noising_scheduler: the entries of its scheduler_config.json: the path on which the small image is
        noised.
    """

    image_noising_scheduler: Mapping[str, Any]

    class_names: ClassVar[tuple[str, ...]] = (
        "IFSuperResolutionPipeline",
        "IFImg2ImgSuperResolutionPipeline",
        "IFInpaintingSuperResolutionPipeline",
    )
    default_guidance_scale: ClassVar[float] = 4.0
    default_num_inference_steps: ClassVar[int] = 50
    default_strength: ClassVar[float] = 0.8

    @functools.wraps(TextToImage.__call__, assigned=())  # its options are for callers who ask what there is
    def __call__(
        self,
        key: Key[Array, ...],
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        image: Any = None,
        original_image: Any = None,
        noise_level: int = 250,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> Any:
        """Draws images, float32 [N, H, W, 3] in [-1, 1], from texts and small images.

        Args:
          key, prompt, negative_prompt, num_images_per_prompt: as in `TextToImage.__call__`.
          image: the small image: 8-bit pixels or floats in [-1, 1], [h, w, 3] or [n, h, w, 3], PIL images.
            One for all, one for each prompt or one for each image; it is enlarged to the size to draw.
          original_image: a large image to start from, as `image` is there: with `strength` and `mask_image`.
          noise_level: a timestep: up to which the enlarged image is noised, which hides what the first stage
            got wrong. Image k has noise of its own, from (key, k).
          options: as there.

        Raises:
          UnknownNameError, InvalidArgumentError, DataError: always before the network is compiled.
        """
        prompts = as_texts(prompt)
        copies = check_count(num_images_per_prompt, "num_images_per_prompt", 1)
        negatives = for_each(negative_prompt, prompts, "negative_prompt")
        each, negatives = (
            None if texts is None else [text for text in texts for _ in range(copies)]
            for texts in (prompts, negatives)
        )
        if image is None:
            raise InvalidArgumentError("super-resolution needs image=, the small image that stage I drew")
        small = as_images(image)
        if len(small) == len(prompts):
            small = np.repeat(small, copies, axis=0)
        check_rows(small, len(each), "image")
        return super().__call__(
            key, each, negatives, image=original_image, small_image=small, noise_level=noise_level, **options
        )

    def conditions(
        self,
        prompts: list[str],
        negative_prompts: list[str] | None,
        size: tuple[int, int],
        *,
        small_image: Float[np.ndarray, "P h w 3"],
        noise_level: int = 250,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What stage I is told, the small images enlarged, without noise yet, and their noise level.

        Raises:
          InvalidArgumentError: a noise level that is no timestep.
        """
        last = self._noising.num_train_timesteps - 1
        if check_count(noise_level, "noise_level", 0) > last:
            raise InvalidArgumentError(f"noise_level must be a timestep from 0 to {last}, not {noise_level}")
        told, away = super().conditions(prompts, negative_prompts, size)
        beside = {
            "channels": repeated(np.asarray(models.resize_linear(small_image, size)), len(prompts)),
            "class_labels": np.full(len(prompts), noise_level, np.float32),
        }
        return told | beside, away | beside

    def _rows(self, keys, told, away, start: Start, copies: int) -> Rows:
        """As in other families, with noise on the enlarged image, the same in both branches."""
        keys_of_noise = jax.vmap(jax.random.fold_in, (0, None))(keys, _NOISING)
        t = told["class_labels"][:, None, None, None]
        noise = np.asarray(D.solvers.noise_like(keys_of_noise, told["channels"]))
        noised = {"channels": self._noising.alpha(t) * told["channels"] + self._noising.sigma(t) * noise}
        return super()._rows(keys, told | noised, away and away | noised, start, copies)

    @property
    def _noising(self) -> D.Path:
        return D.from_scheduler_config(self.image_noising_scheduler)[0].make_path()

    @property
    def network_channels(self) -> int:
        """Of x alone: the other half of the network's input is the small image."""
        return self.unet.config.in_channels // 2

    def count_ticks(self, num_images: int, options: Mapping[str, Any]) -> int:
        """How often a call with these options will tell its `progress`."""
        return super().count_ticks(num_images, {**options, "image": options.get("original_image")})

    def check_parts(self) -> None:
        """As stage I, and the U-Net must be told a noise level.

        Raises:
          CheckpointError: parts of different models.
        """
        super().check_parts()
        if not self.unet.config.has_classes:
            raise CheckpointError("its U-Net is not told a noise level (class_embed_type of its config)")
