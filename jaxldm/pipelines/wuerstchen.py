"""Wuerstchen: a text to small image embeddings, those to latents, those to pixels (Pernias et al. 2024,
arXiv:2306.00637).

    prior, decoder = pipelines.load("wuerstchen-prior"), pipelines.load("wuerstchen")   # published as two
    pipe = pipelines.Wuerstchen.of(prior, decoder)
    images = pipe(key, "a fox in the snow", width=1536, num_inference_steps=29, spacing="stage_c")
    pipelines.save(pipe, "wuerstchen-whole")                                            # as one folder
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of
from jaxldm.pipelines.image_inputs import check_count
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.prompts import as_texts, encode_texts
from jaxldm.pipelines.starts import Canvas, four_axes
from jaxldm.pipelines.text_pipeline import TextPipeline
from jaxldm.pipelines.text_to_image import TextToImage

TRAINED_SIZE = (1024, 1024)
OUTPUTS = ("images", "latents", "image_embeddings")
_UNKNOWN_HERE = ("image", "strength", "mask_image", "tiling")


class _Stage(TextToImage):
    """What prior and decoder share: CLIP's last states, without its padding, and no image to start from."""

    draws_images: ClassVar[bool] = False

    def __call__(
        self,
        key: Key[Array, ...],
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """As `TextToImage.__call__`, without image, strength, mask_image and tiling."""
        for name in _UNKNOWN_HERE:
            if options.get(name) is not None:
                raise InvalidArgumentError(f"{name} is not for Wuerstchen's {self.denoiser_name}")
        return super().__call__(key, prompt, negative_prompt, **options)

    @property
    def network_channels(self) -> int:
        """Of the network's input."""
        return self.denoiser.config.c_in

    @property
    def latent_channels(self) -> int:
        """Of x."""
        return self.denoiser.config.c_in

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) of the smallest images of the training."""
        return TRAINED_SIZE

    def _states(self, texts: list[str]) -> dict[str, Any]:
        encoded = encode_texts(self.text_encoder, self.tokenizer, texts, mask=True)
        return {"encoder_hidden_states": encoded.hidden}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class WuerstchenPrior(_Stage):
    """Stage C: draws image embeddings [N, h, w, 16], one for each 42.67 pixels, where others draw images.

    `output="latents"` is what its network draws, `output="images"` (the default) the embeddings as the
    decoder takes them, `latents * latent_mean - latent_std`: names as published, although the second is
    subtracted.

    Attributes:
      prior: the denoising network.
      text_encoder, tokenizer: CLIP ViT-bigG/14's text tower.
      resolution_multiple: pixels that an embedding is high and wide.
    """

    prior: Network
    text_encoder: Network
    tokenizer: Any
    latent_mean: float = 42.0
    latent_std: float = 1.0
    resolution_multiple: float = 42.67

    class_names: ClassVar[tuple[str, ...]] = ("WuerstchenPriorPipeline",)
    flags: ClassVar[tuple[str, ...]] = ("latent_mean", "latent_std", "resolution_multiple")
    denoiser_name: ClassVar[str] = "prior"
    default_guidance_scale: ClassVar[float] = 8.0
    default_num_inference_steps: ClassVar[int] = 60

    def conditions(
        self, prompts: list[str], negative_prompts: list[str] | None, size: tuple[int, int]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """CLIP's states; where there is no negative prompt, those of the empty text."""
        return self._states(prompts), self._states(negative_prompts or [""] * len(prompts))

    @property
    def canvas(self) -> Canvas:
        """Any size, rounded up to whole embeddings."""
        return Canvas(TRAINED_SIZE, 1, self.resolution_multiple, self.latent_channels, False)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(h, w, c) of the embeddings of images of that (height, width)."""
        height, width = (math.ceil(side / self.resolution_multiple) for side in size)
        return height, width, self.latent_channels

    def decode(self, latents: Float[Any, "N h w c"], **options: Any) -> Float[np.ndarray, "N h w c"]:
        """Image embeddings as the decoder takes them."""
        return np.asarray(latents, np.float32) * np.float32(self.latent_mean) - np.float32(self.latent_std)

    def check_parts(self) -> None:
        """The texts' states must be as wide as the prior takes them."""
        self.check_text_width(self.text_encoder.config.hidden_size, self.prior.config.c_cond)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class WuerstchenDecoder(_Stage):
    """Stages B and A: draws latents from image embeddings, and makes images of them.

    Attributes:
      decoder: the denoising network.
      vqgan: the autoencoder; its codebook is not used.
      text_encoder, tokenizer: CLIP ViT-H/14's text tower.
      latent_dim_scale: latents to one image embedding, along each side.
    """

    decoder: Network
    vqgan: Network
    text_encoder: Network
    tokenizer: Any
    latent_dim_scale: float = 10.67

    class_names: ClassVar[tuple[str, ...]] = ("WuerstchenDecoderPipeline",)
    flags: ClassVar[tuple[str, ...]] = ("latent_dim_scale",)
    denoiser_name: ClassVar[str] = "decoder"
    default_guidance_scale: ClassVar[float] = 1.0
    default_num_inference_steps: ClassVar[int] = 12

    def __call__(
        self,
        key: Key[Array, ...],
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        image_embeddings: Any = None,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> Any:
        """Draws images, float32 [N, H, W, 3] in [-1, 1], from image embeddings.

        The other options are those of `TextToImage.__call__`, without height and width, which the embeddings
        say, and without image, strength, mask_image and tiling. Under guidance the other branch is told
        zeros for the embeddings.

        Args:
          image_embeddings: [E, h, w, 16], as `WuerstchenPrior` draws them: one for all images, one for each
            prompt, or one for each image.

        Raises:
          InvalidArgumentError: no embeddings, another number of them, or of a size that stage B cannot draw.
        """
        embeddings = self._embeddings(image_embeddings)
        for name in ("height", "width"):
            if options.get(name) is not None:
                raise InvalidArgumentError(f"{name} is said by the image embeddings: leave it out")
        count = len(as_texts(prompt))
        copies = check_count(num_images_per_prompt, "num_images_per_prompt", 1)
        if len(embeddings) not in (1, count, count * copies):
            raise InvalidArgumentError(
                f"{len(embeddings)} image_embeddings for {count} prompts and {count * copies} images: give "
                "one for all, one for each prompt, or one for each image"
            )
        each = count * copies // len(embeddings) if len(embeddings) in (1, count) else 1
        height, width = self.size_of(embeddings.shape[1:3])
        return super().__call__(
            key,
            prompt,
            negative_prompt,
            num_images_per_prompt=copies,
            height=height,
            width=width,
            image_embeddings=np.repeat(embeddings, each, axis=0),
            **options,
        )

    def conditions(
        self,
        prompts: list[str],
        negative_prompts: list[str] | None,
        size: tuple[int, int],
        *,
        image_embeddings: Float[np.ndarray, "N h w e"],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """CLIP's states, and the embeddings or zeros."""
        told = self._states(prompts) | {"image_embeddings": image_embeddings}
        away = self._states(negative_prompts or [""] * len(prompts))
        return told, away | {"image_embeddings": np.zeros_like(image_embeddings)}

    def _rows(self, keys, told, away, start, copies):
        """The embeddings have a row for each image already, and are not repeated."""
        branches = [dict(branch) if branch is not None else None for branch in (told, away)]
        own = [branch.pop("image_embeddings") if branch is not None else None for branch in branches]
        rows = super()._rows(keys, *branches, start, copies)
        condition = rows.condition | {"image_embeddings": own[0]}
        if rows.negative is None:
            return rows._replace(condition=condition)
        return rows._replace(condition=condition, negative=rows.negative | {"image_embeddings": own[1]})

    @property
    def autoencoder(self) -> Network:
        """Stage A."""
        return self.vqgan

    @property
    def canvas(self) -> Canvas:
        """What stage A and B can draw."""
        factor = self.vqgan.config.shrinks
        return Canvas(TRAINED_SIZE, factor * self.decoder.config.shrinks, factor, self.latent_channels, False)

    def size_of(self, embeddings: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels of the images that h x w embeddings stand for.

        Raises:
          InvalidArgumentError: so many embeddings stand for latents that stage B cannot halve often enough.
        """
        multiple, factor = self.decoder.config.shrinks, self.canvas.factor

        def latents(side: int) -> int:
            return int(side * self.latent_dim_scale)

        def nearest(side: int) -> int:
            near = range(1, side + 2 * multiple)
            fitting = (n for n in near if latents(n) and latents(n) % multiple == 0)
            return latents(min(fitting, key=lambda n: abs(n - side))) * factor

        if any(latents(side) < 1 or latents(side) % multiple for side in embeddings):
            there, could = ("x".join(map(str, map(f, embeddings))) for f in (latents, nearest))
            raise InvalidArgumentError(
                f"{embeddings[0]}x{embeddings[1]} image embeddings stand for {there} latents, and this "
                f"decoder takes multiples of {multiple}: ask the prior for another height and width, such as "
                f"{could}"
            )
        return tuple(latents(side) * factor for side in embeddings)

    def _embeddings(self, given: Any) -> np.ndarray:
        if given is None:
            raise InvalidArgumentError(
                "the decoder draws from image embeddings: give image_embeddings=, as the prior draws them, "
                "or draw with both, Wuerstchen.of(prior, decoder)"
            )
        return four_axes(given, self.decoder.config.effnet_embd, "image_embeddings")

    def check_parts(self) -> None:
        """The texts' states and the latents must be as wide as the decoder takes them."""
        self.check_text_width(self.text_encoder.config.hidden_size, self.decoder.config.clip_embd)
        channels, taken = self.vqgan.config.latent_channels, self.decoder.config.c_in
        if channels != taken:
            raise CheckpointError(
                f"its autoencoder has {channels} latent channels, its decoder takes {taken}"
            )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Wuerstchen(TextPipeline):
    """All three stages in one: what `prior_stage` draws goes to `decoder_stage`.

    Attributes:
      prior_prior, prior_text_encoder, prior_tokenizer, prior_scheduler: those of `WuerstchenPrior`.
      decoder, vqgan, text_encoder, tokenizer, scheduler: those of `WuerstchenDecoder`.
    """

    prior_prior: Network
    prior_text_encoder: Network
    prior_tokenizer: Any
    prior_scheduler: Mapping[str, Any]
    decoder: Network
    vqgan: Network
    text_encoder: Network
    tokenizer: Any
    scheduler: Mapping[str, Any]

    class_names: ClassVar[tuple[str, ...]] = ("WuerstchenCombinedPipeline",)
    default_guidance_scale: ClassVar[float] = 4.0
    default_num_inference_steps: ClassVar[int] = 60

    @classmethod
    def of(cls, prior: WuerstchenPrior, decoder: WuerstchenDecoder) -> Self:
        """The two published folders as one model.

        Raises:
          InvalidArgumentError: scales other than the published ones, which a folder of this kind cannot say.
          CheckpointError: the prior draws embeddings that the decoder does not take.
        """
        for stage in (prior, decoder):
            usual = {field.name: field.default for field in dataclasses.fields(stage)}
            for flag in stage.flags:
                if getattr(stage, flag) != usual[flag]:
                    raise InvalidArgumentError(
                        f"{flag} is {getattr(stage, flag)}; in one folder with the other stages it can be "
                        f"{usual[flag]} alone: call one stage after the other instead"
                    )
        of_prior = {f"prior_{name}": getattr(prior, name) for name in prior.component_names()}
        of_decoder = {name: getattr(decoder, name) for name in decoder.component_names()}
        pipe = cls(**of_prior, **of_decoder)
        pipe.check_parts()
        return pipe

    @property
    def prior_stage(self) -> WuerstchenPrior:
        """Stage C alone."""
        names = WuerstchenPrior.component_names()
        return WuerstchenPrior(**{name: getattr(self, f"prior_{name}") for name in names})

    @property
    def decoder_stage(self) -> WuerstchenDecoder:
        """Stages B and A alone."""
        names = WuerstchenDecoder.component_names()
        return WuerstchenDecoder(**{name: getattr(self, name) for name in names})

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
        solver: str | D.Solver | None = None,
        spacing: str | None = None,
        decoder_num_inference_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        decoder_solver: str | D.Solver | None = None,
        output: str = "images",
        batch_size: int = 1,
        devices: Sequence[Any] | None = None,
        progress: Callable[[Any, Any], None] | None = None,
    ) -> Any:
        """Draws images, float32 [N, H, W, 3] in [-1, 1]: those of the first prompt, of the second, ...

        Options without a prefix are those of the prior, which decides what is in the image.

        Args:
          key, prompt, negative_prompt, num_images_per_prompt, batch_size, devices: as in `TextToImage`; both
            stages are told the same texts.
          num_inference_steps, guidance_scale, solver, spacing: of the prior; default 60 steps, 4, and the
            folder's scheduler. `spacing="stage_c"` with 29 steps is the authors' faster choice.
          height, width: in pixels, divisible by 128; default 1024.
          decoder_num_inference_steps, decoder_guidance_scale, decoder_solver: of the decoder; default 12
            steps, 1 (no guidance), and the folder's scheduler.
          output: "images", "latents" of stage A, or the "image_embeddings".
          progress: called as progress(steps done, steps in all) in each of the two stages.

        Raises:
          UnknownNameError, InvalidArgumentError: before a network is compiled.
        """
        one_of("output", output, OUTPUTS)
        prior, decoder = self.prior_stage, self.decoder_stage
        scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        size = tuple(TRAINED_SIZE[0] if side is None else side for side in (height, width))
        decoder.size_of(prior.latent_shape(size)[:2])
        copies = check_count(num_images_per_prompt, "num_images_per_prompt", 1)
        keys = D.image_keys(key, copies * len(as_texts(prompt)))
        of_prior, of_decoder = (jax.vmap(jax.random.fold_in, (0, None))(keys, stage) for stage in (0, 1))
        common = {"batch_size": batch_size, "devices": devices, "progress": progress}
        common["num_images_per_prompt"] = copies
        embeddings = prior(
            of_prior,
            prompt,
            negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=scale,
            height=size[0],
            width=size[1],
            solver=solver,
            spacing=spacing,
            **common,
        )
        if output == "image_embeddings":
            return embeddings
        return decoder(
            of_decoder,
            prompt,
            negative_prompt,
            image_embeddings=embeddings,
            num_inference_steps=decoder_num_inference_steps,
            guidance_scale=decoder_guidance_scale,
            solver=decoder_solver,
            output=output,
            **common,
        )

    def check_parts(self) -> None:
        """Every stage must fit itself, and the decoder the prior."""
        self.prior_stage.check_parts()
        self.decoder_stage.check_parts()
        drawn, taken = self.prior_prior.config.c_in, self.decoder.config.effnet_embd
        if drawn != taken:
            raise CheckpointError(
                f"its prior draws image embeddings of {drawn} channels, its decoder takes {taken}"
            )

    def count_ticks(self, num_images: int, options: Mapping[str, Any]) -> int:
        """The steps of both stages."""
        batches = -(-num_images // max(options.get("batch_size") or 1, 1))
        steps = options.get("num_inference_steps") or self.default_steps()
        decoding = options.get("decoder_num_inference_steps") or WuerstchenDecoder.default_num_inference_steps
        return (steps + decoding) * batches
