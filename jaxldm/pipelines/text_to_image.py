"""Text -> latents -> images: what the pipelines of all text-to-image families share.

`TextToImage.__call__` is the composition: encode the condition, make grid and solver, `walk`, decode. A
family is a subclass that says what its network is told of a prompt, in `conditions`, and where it differs
from the U-Nets of Stable Diffusion.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of
from jaxldm.models.config import height_width
from jaxldm.pipelines.image_inputs import check_count
from jaxldm.pipelines.latent_images import decode_images, on_devices, scale_factor
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.prompts import as_texts, for_each
from jaxldm.pipelines.schedulers import Plan, make_plan
from jaxldm.pipelines.starts import INPAINTING_CHANNELS, Canvas, Start, make_start, strength_of
from jaxldm.pipelines.text_pipeline import TextPipeline
from jaxldm.pipelines.walking import Rows, Settings, Walk, walk_on_devices

# Grids are padded to a multiple of this many steps: numbers of steps up to it share one compiled function.
STEPS_AT_ONCE = 64
OUTPUTS = ("images", "latents")
_TITLES = {"unet": "U-Net"}  # of denoising networks in messages, where it is not the field's name
_OWN = ("prompts", "negative_prompts", "size", "condition", "more")  # parameters that no caller gives


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TextToImage(TextPipeline):
    """A diffusion model of texts and images. `pipelines.load` makes one; a family adds its networks.

    The denoising network is the field that `denoiser_name` names, the autoencoder is `vae`; a family without
    one draws pixels.

    Attributes:
      scheduler: the entries of scheduler_config.json: path, prediction, and the default grid and solver.

    Class attributes:
      denoiser_name: the field of the denoising network.
      has_true_cfg: classifier-free guidance is `true_cfg_scale` in every model of the family, those that are
        told no guidance among them (FLUX).
      shifts_with_size: a schedule that shifts with the number of image tokens is told it.
    """

    scheduler: Mapping[str, Any]

    denoiser_name: ClassVar[str] = "transformer"
    has_true_cfg: ClassVar[bool] = False
    shifts_with_size: ClassVar[bool] = False

    def conditions(
        self, prompts: list[str], negative_prompts: list[str] | None, size: tuple[int, int], **more: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the network is told of P prompts, and of the P negatives: arrays [P, ...] by argument name."""
        raise NotImplementedError

    @staticmethod
    def ask(
        network: Network, x: Float[Array, "N h w c"], t: Float[Array, " N"], **condition: Any
    ) -> Float[Array, "N h w out"]:
        """The network's answer as the scheduler means it: t is the path's, the sign the prediction's."""
        return models.network(network.module)(network.params, x, t, condition)

    @staticmethod
    def mix(
        negative: Float[Array, "N h w c"],
        positive: Float[Array, "N h w c"],
        t: Float[Array, ...],
        condition: Mapping[str, Any],
        settings: Settings,
    ) -> Float[Array, "N h w c"]:
        """The answers to the negative and to the prompt as one; `condition` is what the latter is told."""
        mixed = D.guide(negative, positive, settings.guidance_scale)
        return D.rescale_guidance(mixed, positive, settings.guidance_rescale)

    def __call__(
        self,
        key: Key[Array, ...],
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        solver: str | D.Solver | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        sigmas: str | None = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        latents: Any = None,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
        output: str = "images",
        previews: int = 0,
        tiling: models.Tiling | None = None,
        batch_size: int = 1,
        devices: Sequence[Any] | None = None,
        on_step: Callable[[Any, Any], None] | None = None,
        progress: Callable[[Any, Any], None] | None = None,
        **condition: Any,
    ) -> Any:
        """Draws images, float32 [N, H, W, 3] in [-1, 1]: those of the first prompt, of the second, ...

        Image k depends on (key, k), its prompt and the options alone: not on the number of images. Another
        seed, guidance scale, prompt or number of steps (within the same 64) compiles nothing anew; the first
        scale of 1 does, because it asks the network half as much.

        Args:
          key: image k draws its random numbers from fold_in(key, k); or N keys, one for each image.
          prompt: one text, or P of them.
          negative_prompt: what to steer away from: one text for all, or P of them. None: no text.
          num_images_per_prompt: N / P.
          num_inference_steps: default 50 or the family's own, or 4 for the solvers of distilled models (lcm,
            tcd).
          guidance_scale: 1 is the model as trained, without a negative prompt; None is the family's default.
            A network that was distilled with guidance (LCM, FLUX.1-dev) is told the scale instead.
          guidance_rescale: phi of Lin et al. 2023, section 3.4, in [0, 1].
          true_cfg_scale: guidance by the negative prompt, on top, of a network that is told its scale.
          height, width: in pixels, divisible by what one token or latent covers (8 or 16); default the size
            of `image`, or the one that the model was trained on.
          solver: a name in `jaxldm.diffusion.solvers.SOLVERS`, a `Solver` of your own, or None for the
            scheduler that the folder names.
          eta: for the solvers that have this option.
          spacing, sigmas: as in `jaxldm.diffusion.make_grid`, in place of what the folder says.
          image: start from this image: 8-bit pixels or floats in [-1, 1], [H, W, 3] or [N, H, W, 3], PIL
            images, or latents [N, h, w, c].
          strength: in (0, 1]; the last steps x strength steps are walked, from the noised image: rounded
            down, or up where the family's published pipelines do (SD3, FLUX). Default 0.8 (0.3 for SDXL, 0.6
            for SD3 and FLUX), or 1 with a mask, which starts from pure noise.
          mask_image: white (1) where `image` is drawn anew, black (0) where it stays. A network trained for
            it (9 channels) is told the mask; with any other the known part is put back after each step.
          latents: [N, h, w, c], x at the first row of the grid, as it is: noise of your own, or what another
            model left.
          denoising_start, denoising_end: walk this part of the grid alone. The base model of SDXL ends at 0.8
            with `output="latents"`, and its refiner starts at 0.8 with `latents=` these.
          output: "images", or "latents" as they are behind the last step, [N, h, w, c].
          previews: K > 0 returns (images, previews [N, K, H, W, 3]): x_0 as it was seen on the way.
          tiling: decode large images in squares, in less memory.
          batch_size: images that a device computes at once. It is fixed, so that an image is the same to the
            last bit however many are asked for; larger is faster on a large device, and takes its memory.
          devices: default the first device; the weights are copied to each.
          on_step: called on the host as on_step(step, latents) after each step of each batch.
          progress: called as progress(steps done, steps in all), where no latents need to leave the device.
          condition: options of the family, see its `conditions`.

        Raises:
          UnknownNameError, InvalidArgumentError, DataError: always before the network is compiled.
        """
        prompts = as_texts(prompt)
        negatives = for_each(negative_prompt, prompts, "negative_prompt")
        copies = check_count(num_images_per_prompt, "num_images_per_prompt", 1)
        keys = D.image_keys(key, copies * len(prompts))
        self._check(output, previews, batch_size, denoising_start, latents, condition)

        strength = strength_of(image, strength, mask_image, self.default_strength)
        plan = make_plan(self.scheduler, solver, eta=eta, stops_early=denoising_end < 1)
        told_scale, scale = self._guidance_scales(guidance_scale, true_cfg_scale)
        if negatives is not None and scale == 1 and self.has_true_cfg:
            warnings.warn("the negative prompt is not heeded: give true_cfg_scale=2 or so", stacklevel=2)
        given = {"image": image, "strength": strength, "mask_image": mask_image, "latents": latents}
        start = make_start(self.canvas, self.autoencoder, len(keys), height, width, **given)
        part = (denoising_start, denoising_end)
        grid = self.make_grid(plan, num_inference_steps, spacing, sigmas, strength, part, start.size)
        settings = Settings(grid, np.float32(scale), _rescale(guidance_rescale))

        told, away = self.conditions(prompts, negatives, start.size, **condition)
        if told_scale is not None:
            told, away = (branch | self.guidance_told(told_scale, len(prompts)) for branch in (told, away))
        rows = self._rows(keys, told, None if scale == 1 else away, start, copies)

        shape, key_kind = self.latent_shape(start.size), jax.random.key_impl(keys)
        how = Walk(plan.sampler, self.ask, self.mix, shape, key_kind, previews, on_step, progress)
        drawn = self._draw(settings, rows, how, batch_size, devices)
        if output == "images":
            drawn = self._decode_all(drawn, tiling=tiling, batch_size=batch_size, devices=devices)
        return (drawn[:, 0], drawn[:, 1:]) if previews else drawn[:, 0]

    @property
    def denoiser(self) -> Network:
        """The denoising network."""
        return getattr(self, self.denoiser_name)

    @property
    def autoencoder(self) -> Network | None:
        """None where the denoising network draws pixels."""
        return getattr(self, "vae", None)

    @property
    def latent_channels(self) -> int:
        """Of x: those of the autoencoder, 3 for pixels."""
        return 3 if self.autoencoder is None else self.autoencoder.config.latent_channels

    @property
    def latent_factor(self) -> int:
        """Pixels that a latent is high and wide; 1 for pixels."""
        return 1 if self.autoencoder is None else scale_factor(self.autoencoder)

    @property
    def network_channels(self) -> int:
        """Of the network's input, before it packs anything into tokens."""
        return self.denoiser.config.in_channels

    @property
    def size_multiple(self) -> int:
        """What heights and widths are divisible by."""
        return self.latent_factor

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) of the images that the model was trained on."""
        height, width = height_width(self.denoiser.config.sample_size)
        return height * self.latent_factor, width * self.latent_factor

    @property
    def canvas(self) -> Canvas:
        """What a start has to fit."""
        tells_mask = self.network_channels == INPAINTING_CHANNELS
        sizes = (self.default_size, self.size_multiple, self.latent_factor)
        return Canvas(*sizes, self.latent_channels, tells_mask)

    @property
    def knows_guidance(self) -> bool:
        """Whether the network is told the guidance scale, as distilled ones are (LCM, FLUX.1-dev)."""
        return getattr(self.denoiser.config, "time_cond_proj_dim", None) is not None

    def check_text_width(self, width: int, taken: int, encoder: str = "text encoder") -> None:
        """Raises `CheckpointError` unless an encoder's states are as wide as the network takes them."""
        if width != taken:
            network = _TITLES.get(self.denoiser_name, self.denoiser_name)
            raise CheckpointError(f"its {encoder} gives states {width} wide, its {network} takes {taken}")

    def check_latent_channels(self, taken: int) -> None:
        """Raises `CheckpointError` unless the autoencoder has the latent channels that the network takes."""
        if self.latent_channels != taken:
            network = _TITLES.get(self.denoiser_name, self.denoiser_name)
            raise CheckpointError(
                f"its autoencoder has {self.latent_channels} latent channels, its {network} takes {taken}"
            )

    def guidance_told(self, scale: float, count: int) -> dict[str, Any]:
        """The scale, as a network that knows guidance is told it: arrays [count, ...] by argument name."""
        w = jnp.full(count, scale - 1, jnp.float32)
        embedding = models.guidance_embedding(w, self.denoiser.config.time_cond_proj_dim)
        return {"timestep_cond": np.asarray(embedding)}

    def num_image_tokens(self, size: tuple[int, int]) -> int | None:
        """Tokens of an image of that (height, width), where the schedule shifts with them; else None."""
        if not self.shifts_with_size:
            return None
        return (size[0] // self.size_multiple) * (size[1] // self.size_multiple)

    def decode(self, latents: Float[Any, "N h w c"], **options: Any) -> Float[np.ndarray, "N H W C"]:
        """Images in [-1, 1] of latents; options `tiling`, `batch_size`, `devices` as there."""
        if self.autoencoder is None:
            return np.clip(np.asarray(latents, np.float32), -1.0, 1.0)
        return decode_images(self.autoencoder, latents, **options)

    def default_steps(self, solver: str | D.Solver | None = None) -> int:
        """The number of steps of a call that names none: 4 for the solvers of distilled models."""
        return self._default_steps(make_plan(self.scheduler, solver))

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(h, w, c) of the latents of images of that (height, width)."""
        factor = self.canvas.factor
        return size[0] // factor, size[1] // factor, self.latent_channels

    def make_grid(
        self,
        plan: Plan,
        num_inference_steps: int | None = None,
        spacing: str | None = None,
        sigmas: str | None = None,
        strength: float | None = None,
        part: tuple[float, float] = (0.0, 1.0),
        size: tuple[int, int] | None = None,
    ) -> D.Grid:
        """The rows that a call walks, padded; see `__call__` for the arguments, `size` is (height, width).

        Raises:
          InvalidArgumentError: steps, strength or parts out of range, or that leave nothing to walk.
          UnknownNameError: no such spacing or sigmas.
        """
        path = plan.schedule.make_path(self.num_image_tokens(size or self.default_size))
        options = dict(plan.grid_options)
        distilled = options.get("spacing") == "lcm"
        steps = self._default_steps(plan) if num_inference_steps is None else num_inference_steps
        if spacing is not None or sigmas is not None:
            kept = {name: options[name] for name in ("final",) if name in options}
            options = kept | {"spacing": spacing, "sigmas": sigmas}
            distilled = spacing == "lcm"
        if distilled and strength is not None:
            # The timesteps of the distillation below the strength, and not a part of those of a whole run.
            check_count(steps, "num_inference_steps", 1)
            original = options.get("original_steps", 50)
            times = D.lcm_timesteps(steps, path.num_train_timesteps, original, strength)
            grid = D.make_grid(path, timesteps=times)
        else:
            grid = D.make_grid(path, steps, **options)
            if strength is not None:
                grid = D.cut_by_strength(grid, strength, round_up=self.rounds_strength_up)
        first, last = part
        if not 0 <= first < last <= 1:
            raise InvalidArgumentError(
                f"denoising_start and denoising_end must be 0 <= start < end <= 1, not {first} and {last}"
            )
        if first > 0:
            grid = D.hand_over(grid, path, first)[1]
        if last < 1:
            grid = D.hand_over(grid, path, last)[0]
        walked = len(grid.t) - 1
        return D.pad(grid, -(-walked // STEPS_AT_ONCE) * STEPS_AT_ONCE)

    def _draw(self, settings, rows, how, batch_size, devices) -> Float[np.ndarray, "N K h w c"]:
        """`walk` in batches of one fixed size, split over the devices."""
        walked = functools.partial(walk_on_devices, how=how)
        return on_devices(walked, (self.denoiser, settings), rows, batch_size, devices)

    def _decode_all(self, latents, **options) -> Float[np.ndarray, "N K H W C"]:
        images = self.decode(latents.reshape(-1, *latents.shape[2:]), **options)
        return images.reshape(*latents.shape[:2], *images.shape[1:])

    def _check(self, output, previews, batch_size, denoising_start, latents, condition) -> None:
        known = [*inspect.signature(self.__call__).parameters, *inspect.signature(self.conditions).parameters]
        for name in condition:
            one_of(f"argument of {type(self).__name__}", name, [name for name in known if name not in _OWN])
        one_of("output", output, OUTPUTS)
        check_count(previews, "previews", 0)
        check_count(batch_size, "batch_size", 1)
        if denoising_start and latents is None:
            raise InvalidArgumentError("denoising_start needs latents=, as another model left them there")
        known = (self.latent_channels, INPAINTING_CHANNELS)
        if self.network_channels not in known:
            raise CheckpointError(
                f"the {self.denoiser_name} has {self.network_channels} input channels; pipelines here know "
                f"{known[0]} (text) and {known[1]} (inpainting)"
            )

    def _guidance_scales(
        self, guidance_scale: float | None, true_cfg_scale: float
    ) -> tuple[float | None, float]:
        """(what the network is told or None, the scale of classifier-free guidance)."""
        if guidance_scale is None:
            guidance_scale = self.default_guidance_scale
        for name, scale in (("guidance_scale", guidance_scale), ("true_cfg_scale", true_cfg_scale)):
            if not (np.isfinite(scale) and scale >= 0):
                raise InvalidArgumentError(
                    f"{name} must be a finite number of 0 or more, not {scale}: 1 is the model as trained, "
                    f"{self.default_guidance_scale:g} is a good start"
                )
        if self.knows_guidance or self.has_true_cfg:
            return float(guidance_scale) if self.knows_guidance else None, float(true_cfg_scale)
        if true_cfg_scale != 1:
            raise InvalidArgumentError(
                "true_cfg_scale is for networks that are told their guidance: give guidance_scale alone"
            )
        return None, float(guidance_scale)

    def _rows(self, keys, told, away, start: Start, copies: int) -> Rows:
        """The conditions of P prompts and the start of N = P x copies images, a row for each image."""
        told, away = jax.tree.map(lambda rows: np.repeat(rows, copies, axis=0), (told, away))
        if start.channels is not None:
            beside = {"channels": start.channels}
            told, away = told | beside, None if away is None else away | beside
        key = np.asarray(jax.random.key_data(keys))
        return Rows(key, told, away, start.latents, start.image, start.known, start.repaint)

    def _default_steps(self, plan: Plan) -> int:
        return 4 if plan.grid_options.get("spacing") == "lcm" else self.default_num_inference_steps


def _rescale(guidance_rescale: float) -> np.float32:
    if not 0 <= guidance_rescale <= 1:
        raise InvalidArgumentError(f"guidance_rescale must lie between 0 and 1, not {guidance_rescale}")
    return np.float32(guidance_rescale)
