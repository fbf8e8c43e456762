"""aMUSEd: images as tokens, unmasked in a few steps, the most certain first.

Patil et al. 2024 (arXiv:2401.01808), after MUSE (Chang et al. 2023). No path, no solver: `D.sample_tokens`
walks an `Unmasking`, and the codebook makes pixels of the tokens. Text-to-image, image-to-image and
inpainting are one call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt32

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.diffusion.guidance import checked
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of
from jaxldm.models.config import height_width
from jaxldm.pipelines.fixed_batches import over_images
from jaxldm.pipelines.image_inputs import check_count, check_rows, repeated
from jaxldm.pipelines.latent_images import on_devices, scale_factor
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.prompts import as_texts, encode_texts, for_each
from jaxldm.pipelines.starts import Canvas, make_start, strength_of
from jaxldm.pipelines.text_pipeline import TextPipeline
from jaxldm.pipelines.text_to_image import OUTPUTS, STEPS_AT_ONCE

Size = tuple[int, int]
SCHEDULER = "AmusedScheduler"


class Settings(NamedTuple):
    """What all images of a call share. All of it is data to the compiled function.

    Attributes:
      unmasking: the steps, padded.
      lost: the part of the tokens that is masked by chance before the first step.
      guidance_scale: w.
    """

    unmasking: D.Unmasking
    lost: Float[Array, ""]
    guidance_scale: Float[Array, ""]


class Rows(NamedTuple):
    """What each of N images has of its own.

    Attributes:
      key: [N, 2], the numbers of its key.
      tokens: [N, h, w], the mask token where nothing is known.
      total: [N], the number of tokens that the steps' fractions are parts of.
      condition: arrays [N, ...] by the names of the network's arguments.
      negative: the same for the branch to steer away from; None without guidance.
    """

    key: UInt32[Any, "N 2"]
    tokens: Int[Any, "N h w"]
    total: Int[Any, " N"]
    condition: dict[str, Any]
    negative: dict[str, Any] | None


class How(NamedTuple):
    """What is compiled into a run, besides shapes; another value of it compiles anew."""

    mask_token: int
    key_kind: Any
    on_step: Callable[[Any, Any], None] | None
    progress: Callable[[Any, Any], None] | None


def unmask(transformer: Network, settings: Settings, rows: Rows, how: How) -> Int[Array, "N h w"]:
    """The tokens of N images. Pure; jit it."""
    keys = jax.random.wrap_key_data(rows.key, impl=how.key_kind)

    def network(tokens, condition):
        return transformer(tokens, **condition)

    if rows.negative is None:
        logits = functools.partial(network, condition=rows.condition)
    else:
        scale = settings.guidance_scale
        logits = D.guided_logits(network, rows.condition, rows.negative, scale, alone_at_1=False)
    tokens = D.mask_by_chance(keys, rows.tokens, settings.lost, how.mask_token)
    more = {"total": rows.total, "callback": how.on_step, "progress": how.progress}
    return D.sample_tokens(keys, logits, tokens, settings.unmasking, mask_token=how.mask_token, **more)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Amused(TextPipeline):
    """A masked image model of texts. `pipelines.load` makes one of a folder of aMUSEd.

    Attributes:
      transformer: the U-ViT that says what each token may be.
      vqvae: the autoencoder whose codebook the tokens are numbers of; its images are in [0, 1].
      text_encoder, tokenizer: CLIP ViT-L/14 with its projection.
      scheduler: the entries of scheduler_config.json: `mask_token_id` and `masking_schedule`.

    >>> import jax                                                                       # doctest: +SKIP
    >>> from jaxldm import pipelines                                                     # doctest: +SKIP
    >>> pipe = pipelines.load("amused-256", dtype="bfloat16")                            # doctest: +SKIP
    >>> images = pipe(jax.random.key(0), ["a cat in the snow", "a dog"])                 # doctest: +SKIP
    >>> images.shape                                                                     # doctest: +SKIP
    (2, 256, 256, 3)
    """

    transformer: Network
    vqvae: Network
    text_encoder: Network
    tokenizer: Any
    scheduler: Mapping[str, Any]

    class_names: ClassVar[tuple[str, ...]] = (
        "AmusedPipeline",
        "AmusedImg2ImgPipeline",
        "AmusedInpaintPipeline",
    )
    default_guidance_scale: ClassVar[float] = 10.0
    default_strength: ClassVar[float] = 0.5
    default_num_inference_steps: ClassVar[int] = 12

    def __call__(
        self,
        key: Key[Array, ...],
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        latents: Any = None,
        temperature: float | Sequence[float] = (2.0, 0.0),
        mask_schedule: str | None = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        aesthetic_score: float = 6.0,
        output: str = "images",
        batch_size: int = 1,
        devices: Sequence[Any] | None = None,
        on_step: Callable[[Any, Any], None] | None = None,
        progress: Callable[[Any, Any], None] | None = None,
    ) -> Any:
        """Draws images, float32 [N, H, W, 3] in [-1, 1]: those of the first prompt, of the second, ...

        Image k depends on (key, k), its prompt and the options alone: not on the number of images. Another
        seed, guidance scale, prompt, schedule or number of steps (within the same 64) compiles nothing anew;
        the first scale of 1 does.

        Args:
          key: image k draws its random numbers from fold_in(key, k); or N keys, one for each image.
          prompt: one text, or P of them.
          negative_prompt: what to steer away from: one text for all, or P of them. None: the empty text.
          num_images_per_prompt: N / P.
          num_inference_steps: default 12.
          guidance_scale: on the logits; 1 is the model as trained, default 10.
          height, width: in pixels, divisible by what one token covers (16; 32 for 512); default the size of
            `image`, or the one that the model was trained on.
          image: start from this image: 8-bit pixels or floats in [-1, 1], [H, W, 3] or [N, H, W, 3], or PIL
            images. Its tokens are masked by chance, and the rest is kept.
          strength: in (0, 1]; the last int(steps x strength) steps are taken, from an image that has lost as
            many tokens as those before them would leave unknown. Default 0.5, or 1 with a mask.
          mask_image: white (1) where `image` is drawn anew, black (0) where it stays. A token is drawn anew
            where half of its pixels or more are white.
          latents: the start as tokens, [N, h, w], whole numbers; the mask token where nothing is known.
          temperature: of the noise on the confidence, from the first step to the last, or one for all.
          mask_schedule: a name of `D.MASK_SCHEDULES`; default the folder's ("cosine"), or "linear" with a
            mask, as published.
          original_size, crops_coords_top_left, aesthetic_score: the micro-conditions: (height, width) of a
            training picture as it was, default the size drawn; (top, left) where it was cut; and its score.
          output: "images", or "latents", which are tokens, int32 [N, h, w].
          batch_size: images that a device computes at once. It is fixed, so that an image is the same to the
            last bit however many are asked for.
          devices: default the first device; the weights are copied to each.
          on_step: called on the host as on_step(steps done, tokens) after each step of each batch.
          progress: called as progress(steps done, steps in all), where no tokens need to leave the device.

        Raises:
          UnknownNameError, InvalidArgumentError, DataError: always before the network is compiled.
        """
        prompts = as_texts(prompt)
        negatives = for_each(negative_prompt, prompts, "negative_prompt")
        copies = check_count(num_images_per_prompt, "num_images_per_prompt")
        keys = D.image_keys(key, copies * len(prompts))
        one_of("output", output, OUTPUTS)
        check_count(batch_size, "batch_size")
        scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        scale = checked("guidance_scale", scale, np.inf)

        strength = strength_of(image, strength, mask_image, self.default_strength)
        schedule = mask_schedule or self._schedule(mask_image is not None)
        unmasking = self.make_unmasking(num_inference_steps, schedule, temperature, strength)
        size, tokens, total = self._start(len(keys), height, width, image, strength, mask_image, latents)
        by_chance = image is not None and mask_image is None
        settings = Settings(unmasking, unmasking.start if by_chance else np.float32(0), np.float32(scale))

        micro = (original_size, crops_coords_top_left, aesthetic_score)
        told, away = self.conditions(prompts, negatives, size, *micro)
        told, away = jax.tree.map(lambda rows: np.repeat(rows, copies, axis=0), (told, away))
        key_data = np.asarray(jax.random.key_data(keys))
        rows = Rows(key_data, tokens, total, told, None if scale == 1 else away)
        how = How(self.mask_token, jax.random.key_impl(keys), on_step, progress)
        drawn = self._draw(settings, rows, how, batch_size, devices)
        return drawn if output == "latents" else self.decode(drawn, batch_size=batch_size, devices=devices)

    def conditions(
        self,
        prompts: list[str],
        negative_prompts: list[str] | None,
        size: Size,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        aesthetic_score: float = 6.0,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the network is told of P prompts, and of the P negatives: arrays [P, ...] by argument name."""
        height, width = original_size or size
        # Width and height, but top and left: so the training counted them.
        numbers = np.float32([width, height, *crops_coords_top_left, aesthetic_score])

        def told(texts: list[str]) -> dict[str, Any]:
            encoded = encode_texts(self.text_encoder, self.tokenizer, texts, penultimate=True)
            return {
                "encoder_hidden_states": encoded.hidden,
                "pooled_text_emb": encoded.pooled,
                "micro_conds": np.tile(numbers, (len(texts), 1)),
            }

        return told(prompts), told(negative_prompts or [""] * len(prompts))

    @property
    def mask_token(self) -> int:
        """The id that stands for "unknown"."""
        return int(self.scheduler["mask_token_id"])

    @property
    def default_size(self) -> Size:
        """(height, width) of the images that the model was trained on."""
        height, width = height_width(self.transformer.config.sample_size)
        return height * scale_factor(self.vqvae), width * scale_factor(self.vqvae)

    @property
    def size_multiple(self) -> int:
        """What heights and widths are divisible by."""
        return scale_factor(self.vqvae) * (2 if self.transformer.config.downsample else 1)

    def make_unmasking(
        self,
        num_inference_steps: int | None = None,
        mask_schedule: str | None = None,
        temperature: float | Sequence[float] = (2.0, 0.0),
        strength: float | None = None,
    ) -> D.Unmasking:
        """The steps that a call takes, padded; see `__call__` for the arguments."""
        steps = self.default_steps() if num_inference_steps is None else num_inference_steps
        padded = -(-check_count(steps, "num_inference_steps") // STEPS_AT_ONCE) * STEPS_AT_ONCE
        schedule = mask_schedule or self._schedule()
        return D.make_unmasking(steps, schedule, temperature, padded, 1.0 if strength is None else strength)

    def encode(self, images: Float[Any, "N H W C"]) -> Int[np.ndarray, "N h w"]:
        """The tokens of images in [-1, 1]. Every different image is encoded once, alone."""
        known: dict[bytes, np.ndarray] = {}
        for image in np.asarray(images, np.float32):
            if image.tobytes() not in known:
                known[image.tobytes()] = np.asarray(_encode(self.vqvae, image[None]))[0]
        return np.stack([known[image.tobytes()] for image in np.asarray(images, np.float32)])

    def decode(
        self,
        tokens: Int[Any, "N h w"],
        *,
        batch_size: int = 1,
        devices: Sequence[Any] | None = None,
    ) -> Float[np.ndarray, "N H W C"]:
        """Images in [-1, 1] of tokens."""
        return on_devices(_decode, self.vqvae, np.asarray(tokens, np.int32), batch_size, devices)

    def check_parts(self) -> None:
        """Raises `CheckpointError` where the parts are of different models."""
        config = self.transformer.config
        kind = self.scheduler.get("_class_name")
        if kind != SCHEDULER or "mask_token_id" not in self.scheduler:
            raise CheckpointError(f"its scheduler is a {kind}; an {SCHEDULER} with a mask_token_id is needed")
        self._schedule()
        if not 0 <= self.mask_token < config.vocab_size:
            raise CheckpointError(
                f"its scheduler's mask is token {self.mask_token}, its transformer knows {config.vocab_size}"
            )
        text, entries = self.text_encoder.config, self.vqvae.config.num_vq_embeddings
        for there, width, wanted in (
            ("text encoder gives states", text.hidden_size, config.encoder_hidden_size),
            ("text encoder gives a pooled text", text.projection_dim, config.cond_embed_dim),
            ("autoencoder has a codebook", entries, config.codebook_size),
        ):
            if width != wanted:
                raise CheckpointError(f"its {there} of {width}, its transformer takes {wanted}")

    def _schedule(self, with_mask: bool = False) -> str:
        """The folder's mask schedule; the published pipeline for inpainting has its own."""
        name = self.scheduler.get("masking_schedule", "cosine")
        if name not in D.MASK_SCHEDULES:
            raise CheckpointError(f"scheduler_config.json has masking_schedule {name!r}, which is not known")
        return "linear" if with_mask else name

    def _start(
        self, count: int, height, width, image, strength, mask_image, latents
    ) -> tuple[Size, Int[np.ndarray, "N h w"], Int[np.ndarray, " N"]]:
        """((height, width), the first tokens, the number of tokens that fractions are parts of)."""
        factor = scale_factor(self.vqvae)
        if latents is not None:
            if image is not None:
                raise InvalidArgumentError("image and latents are both a start: give one of them")
            latents = self._as_tokens(latents)
            check_rows(latents, count, "latents")
            there = tuple(n * factor for n in latents.shape[1:])
            height, width = there[0] if height is None else height, there[1] if width is None else width
        canvas = Canvas(self.default_size, self.size_multiple, 1, 3, False)
        given = {"image": image, "strength": strength, "mask_image": mask_image}
        start = make_start(canvas, None, count, height, width, **given)
        shape = tuple(n // factor for n in start.size)
        if latents is not None:
            if latents.shape[1:] != shape:
                given, asked = ("x".join(map(str, sides)) for sides in (latents.shape[1:], shape))
                raise InvalidArgumentError(f"latents are {given} tokens, {asked} are asked for")
            tokens = repeated(latents, count)
        elif image is None:
            tokens = np.full((count, *shape), self.mask_token, np.int32)
        elif mask_image is None:
            return start.size, self.encode(start.image), np.full(count, shape[0] * shape[1], np.int32)
        else:
            white = start.repaint.reshape(count, shape[0], factor, shape[1], factor).mean((2, 4))
            tokens = np.where(white >= 0.5, np.int32(self.mask_token), self.encode(start.known))
        return start.size, tokens, (tokens == self.mask_token).sum((1, 2), dtype=np.int32)

    def _as_tokens(self, tokens: Any) -> Int[np.ndarray, "N h w"]:
        tokens, vocabulary = np.asarray(tokens), self.transformer.config.vocab_size
        tokens = tokens[None] if tokens.ndim == 2 else tokens
        if tokens.ndim != 3 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
            raise InvalidArgumentError(
                f"latents are tokens here: whole numbers [N, h, w], not {tokens.dtype} {list(tokens.shape)}"
            )
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise InvalidArgumentError(
                f"latents hold tokens from {tokens.min()} to {tokens.max()}; this model knows 0 to "
                f"{vocabulary - 1}, the mask token is {self.mask_token}"
            )
        return tokens.astype(np.int32)

    def _draw(self, settings, rows, how, batch_size, devices) -> Int[np.ndarray, "N h w"]:
        """`unmask` in batches of one fixed size, split over the devices."""
        unmasked = functools.partial(_unmask, how=how)
        return on_devices(unmasked, (self.transformer, settings), rows, batch_size, devices)


@functools.partial(jax.jit, static_argnames=("how", "mesh"))
def _unmask(shared, rows, *, how, mesh):
    def on_one_device(shared, rows):
        return unmask(*shared, rows, how)

    return over_images(on_one_device, mesh)(shared, rows)


@jax.jit
def _encode(vqvae: Network, images: Float[Array, "N H W C"]) -> Int[Array, "N h w"]:
    return models.encode_indices(vqvae.module, vqvae.params, (images + 1) / 2)


@functools.partial(jax.jit, static_argnames="mesh")
def _decode(vqvae: Network, tokens: Int[Array, "N h w"], *, mesh: Mesh) -> Float[Array, "N H W C"]:
    def on_one_device(vqvae, tokens):
        images = models.decode_indices(vqvae.module, vqvae.params, tokens)
        return 2 * jnp.clip(images, 0.0, 1.0) - 1

    return over_images(on_one_device, mesh)(vqvae, tokens)
