"""Text -> latents -> images: what the pipelines of all text-to-image families share.

`TextToImage.__call__` is the composition: encode the condition, make grid and solver, `walk`, decode. A
family is a subclass that says what its network is told of a prompt, in `conditions`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, UInt32

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of
from jaxldm.pipelines.fixed_batches import in_fixed_batches, over_images
from jaxldm.pipelines.latent_images import decode_images, mesh_of, scale_factor
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.prompts import as_texts, for_each
from jaxldm.pipelines.schedulers import Plan, make_plan
from jaxldm.pipelines.starts import INPAINTING_CHANNELS, Start, make_start, strength_of

# Grids are padded to a multiple of this many steps: numbers of steps up to it share one compiled function.
STEPS_AT_ONCE = 64
OUTPUTS = ("images", "latents")
_OWN = ("prompts", "negative_prompts", "size", "condition", "more")  # parameters that no caller gives


class Settings(NamedTuple):
    """What all images of a call share. All of it is data to the compiled function."""

    grid: D.Grid
    guidance_scale: Float[Array, ""]
    guidance_rescale: Float[Array, ""]


class Rows(NamedTuple):
    """What each of N images has of its own; a part that is None is not there.

    Attributes:
      key: [N, 2], the numbers of its key.
      condition: arrays [N, ...] by the names of the network's arguments; "channels" are added to x.
      negative: the same for the branch to steer away from; None without guidance.
      latents: [N, h, w, c], x at the first row of the grid, in place of noise.
      image: [N, h, w, c], the latents of the image to start from, to be noised.
      known: [N, h, w, c], the latents that are put back after each step where `repaint` is 0.
      repaint: [N, h, w, 1].
    """

    key: UInt32[Any, "N 2"]
    condition: dict[str, Any]
    negative: dict[str, Any] | None
    latents: Float[Any, "N h w c"] | None = None
    image: Float[Any, "N h w c"] | None = None
    known: Float[Any, "N h w c"] | None = None
    repaint: Float[Any, "N h w 1"] | None = None


class Walk(NamedTuple):
    """What is compiled into a run, besides shapes; another value of it compiles anew. See `Plan`."""

    schedule: D.NoiseSchedule
    solver: D.Solver
    timestep_scaling: float | None
    latent_shape: tuple[int, int, int]
    key_kind: Any
    previews: int
    on_step: Callable[[Any, Any], None] | None
    progress: Callable[[Any, Any], None] | None


def walk(unet: Network, settings: Settings, rows: Rows, how: Walk) -> Float[Array, "N K h w c"]:
    """Latents of N images, and x_0 as it was seen on the way in K - 1 places, behind them. Pure; jit it."""
    keys, grid, solver = jax.random.wrap_key_data(rows.key, impl=how.key_kind), settings.grid, how.solver
    denoise = how.schedule.make_denoiser(guided(unet, settings, rows))
    if how.timestep_scaling is not None:
        denoise = D.consistency_function(denoise, how.timestep_scaling)
    if rows.repaint is not None:
        solver = D.inpaint(solver, rows.known, 1 - rows.repaint)
    x = rows.latents
    if x is None:
        x = D.initial_noise(keys, (len(keys), *how.latent_shape), grid)
        x = x if rows.image is None else grid.alpha[0] * rows.image + x
    run = functools.partial(D.sample, keys, denoise, solver, grid, x, callback=how.on_step)
    if how.previews:
        latents, predictions = run(progress=how.progress, return_predictions=True)
        places = (jnp.arange(how.previews) + 1) * grid.num_steps // (how.previews + 1)
        predictions = jnp.moveaxis(predictions[places], 0, 1)
    else:
        latents, predictions = run(progress=how.progress), jnp.zeros((len(keys), 0, *how.latent_shape))
    if rows.repaint is not None:  # a grid that ends at sigma_min would leave its noise in the known part
        kept = (1 - rows.repaint) * (grid.t[-1] <= denoise.path.t_min).astype(jnp.float32)
        latents = kept * rows.known + (1 - kept) * latents
    return jnp.concatenate([latents[:, None], predictions], axis=1)


def guided(unet: Network, settings: Settings, rows: Rows) -> Callable[[Any, Any], Any]:
    """`predict(x, t)`: the network's answer, under classifier-free guidance where there is a negative."""

    def network(x, t, condition):
        condition = dict(condition)
        channels = condition.pop("channels", None)
        return unet(x if channels is None else jnp.concatenate([x, channels], axis=-1), t, **condition)

    if rows.negative is None:
        return lambda x, t: network(x, t, rows.condition)
    branches = D.condition_branches(network, rows.condition, rows.negative)

    def predict(x, t):
        negative, positive = branches.ask(x, t)
        mixed = D.guide(negative, positive, settings.guidance_scale)
        return D.rescale_guidance(mixed, positive, settings.guidance_rescale)

    return predict


@functools.partial(jax.jit, static_argnames=("how", "mesh"))
def _walk(unet, settings, rows, *, how, mesh):
    def on_one_device(shared, rows):
        return walk(*shared, rows, how)

    return over_images(on_one_device, mesh)((unet, settings), rows)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TextToImage:
    """A text-to-image model. `pipelines.load` makes one; `dataclasses.replace` swaps a part of it.

    Attributes:
      unet: the denoising network.
      vae: the autoencoder.
      scheduler: the entries of scheduler_config.json: path, prediction, and the default grid and solver.
    """

    unet: Network
    vae: Network
    scheduler: Mapping[str, Any]

    default_guidance_scale: ClassVar[float] = 7.5
    default_strength: ClassVar[float] = 0.8

    def conditions(
        self, prompts: list[str], negative_prompts: list[str] | None, size: tuple[int, int], **more: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the network is told of P prompts, and of the P negatives: arrays [P, ...] by argument name."""
        raise NotImplementedError

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
          num_inference_steps: default 50, or 4 for the solvers of distilled models (lcm, tcd).
          guidance_scale: 1 is the model as trained, without a negative prompt; None is the family's default.
            A network that was distilled with guidance (LCM) is told the scale instead.
          guidance_rescale: phi of Lin et al. 2023, section 3.4, in [0, 1].
          height, width: in pixels, divisible by the autoencoder's factor (8); default the size of `image`,
            or the one that the model was trained on.
          solver: a name in `jaxldm.diffusion.solvers.SOLVERS`, a `Solver` of your own, or None for the
            scheduler that the folder names.
          eta: for the solvers that have this option.
          spacing, sigmas: as in `jaxldm.diffusion.make_grid`, in place of what the folder says.
          image: start from this image: 8-bit pixels or floats in [-1, 1], [H, W, 3] or [N, H, W, 3], PIL
            images, or latents [N, h, w, c].
          strength: in (0, 1]; the last int(steps x strength) steps are walked, from the noised image. Default
            0.8 (0.3 for SDXL), or 1 with a mask, which starts from pure noise.
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
        copies = _count(num_images_per_prompt, "num_images_per_prompt", 1)
        keys = D.image_keys(key, copies * len(prompts))
        self._check(output, previews, batch_size, denoising_start, latents, condition)

        strength = strength_of(image, strength, mask_image, self.default_strength)
        plan = make_plan(self.scheduler, solver, eta=eta, stops_early=denoising_end < 1)
        part = (denoising_start, denoising_end)
        grid = self.make_grid(plan, num_inference_steps, spacing, sigmas, strength, part)
        scale = self._guidance_scale(guidance_scale)
        settings = Settings(grid, np.float32(scale), _rescale(guidance_rescale))

        given = {"image": image, "strength": strength, "mask_image": mask_image, "latents": latents}
        start = make_start(self.unet, self.vae, len(keys), height, width, **given)
        told, away = self.conditions(prompts, negatives, start.size, **condition)
        rows = self._rows(keys, told, away, scale, start, copies)

        shape, key_kind = self.latent_shape(start.size), jax.random.key_impl(keys)
        how = Walk(
            plan.schedule, plan.solver, plan.timestep_scaling, shape, key_kind, previews, on_step, progress
        )
        drawn = self._draw(settings, rows, how, batch_size, devices)
        if output == "images":
            drawn = self._decode_all(drawn, tiling=tiling, batch_size=batch_size, devices=devices)
        return (drawn[:, 0], drawn[:, 1:]) if previews else drawn[:, 0]

    @property
    def networks(self) -> dict[str, Network]:
        """The networks by the names of their fields, which are those of their folders."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: part for name, part in parts.items() if isinstance(part, Network)}

    def decode(self, latents: Float[Any, "N h w c"], **options: Any) -> Float[np.ndarray, "N H W C"]:
        """Images in [-1, 1] of latents; options `tiling`, `batch_size`, `devices` as there."""
        return decode_images(self.vae, latents, **options)

    def default_steps(self, solver: str | D.Solver | None = None) -> int:
        """The number of steps of a call that names none: 4 for the solvers of distilled models, else 50."""
        return _default_steps(make_plan(self.scheduler, solver))

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(h, w, c) of the latents of images of that (height, width)."""
        factor = scale_factor(self.vae)
        return size[0] // factor, size[1] // factor, self.vae.config.latent_channels

    @property
    def knows_guidance(self) -> bool:
        """Whether the network is told the guidance scale, as distilled ones are (LCM)."""
        return getattr(self.unet.config, "time_cond_proj_dim", None) is not None

    def make_grid(
        self,
        plan: Plan,
        num_inference_steps: int | None = None,
        spacing: str | None = None,
        sigmas: str | None = None,
        strength: float | None = None,
        part: tuple[float, float] = (0.0, 1.0),
    ) -> D.Grid:
        """The rows that a call walks, padded; see `__call__` for the arguments.

        Raises:
          InvalidArgumentError: steps, strength or parts out of range, or that leave nothing to walk.
          UnknownNameError: no such spacing or sigmas.
        """
        path, options = plan.schedule.make_path(), dict(plan.grid_options)
        distilled = options.get("spacing") == "lcm"
        steps = _default_steps(plan) if num_inference_steps is None else num_inference_steps
        if spacing is not None or sigmas is not None:
            kept = {name: options[name] for name in ("final",) if name in options}
            options = kept | {"spacing": spacing, "sigmas": sigmas}
            distilled = spacing == "lcm"
        if distilled and strength is not None:
            # The timesteps of the distillation below the strength, and not a part of those of a whole run.
            _count(steps, "num_inference_steps", 1)
            original = options.get("original_steps", 50)
            times = D.lcm_timesteps(steps, path.num_train_timesteps, original, strength)
            grid = D.make_grid(path, timesteps=times)
        else:
            grid = D.make_grid(path, steps, **options)
            grid = grid if strength is None else D.cut_by_strength(grid, strength)
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
        mesh = mesh_of(len(rows.key), devices, batch_size)
        shared = jax.device_put((self.unet, settings), NamedSharding(mesh, PartitionSpec()))
        return in_fixed_batches(
            lambda batch: _walk(*shared, batch, how=how, mesh=mesh), rows, mesh, batch_size, batch_size
        )

    def _decode_all(self, latents, **options) -> Float[np.ndarray, "N K H W C"]:
        images = self.decode(latents.reshape(-1, *latents.shape[2:]), **options)
        return images.reshape(*latents.shape[:2], *images.shape[1:])

    def _check(self, output, previews, batch_size, denoising_start, latents, condition) -> None:
        known = [*inspect.signature(self.__call__).parameters, *inspect.signature(self.conditions).parameters]
        for name in condition:
            one_of(f"argument of {type(self).__name__}", name, [name for name in known if name not in _OWN])
        one_of("output", output, OUTPUTS)
        _count(previews, "previews", 0)
        _count(batch_size, "batch_size", 1)
        if denoising_start and latents is None:
            raise InvalidArgumentError("denoising_start needs latents=, as another model left them there")
        wanted = self.vae.config.latent_channels
        known = (wanted, INPAINTING_CHANNELS)
        if self.unet.config.in_channels not in known:
            raise CheckpointError(
                f"the U-Net has {self.unet.config.in_channels} input channels; pipelines here know "
                f"{known[0]} (text) and {known[1]} (inpainting)"
            )

    def _guidance_scale(self, guidance_scale: float | None) -> float:
        if guidance_scale is None:
            return 8.5 if self.knows_guidance else self.default_guidance_scale
        if not (np.isfinite(guidance_scale) and guidance_scale >= 0):
            raise InvalidArgumentError(
                f"guidance_scale must be a finite number of 0 or more, not {guidance_scale}: 1 is the model "
                f"as trained, {self.default_guidance_scale:g} is a good start"
            )
        return float(guidance_scale)

    def _rows(self, keys, told, away, scale, start: Start, copies: int) -> Rows:
        """The conditions of P prompts and the start of N = P x copies images, a row for each image."""
        told, away = jax.tree.map(lambda rows: np.repeat(rows, copies, axis=0), (told, away))
        if self.knows_guidance:
            w = jnp.full(len(keys), scale - 1, jnp.float32)
            embedding = models.guidance_embedding(w, self.unet.config.time_cond_proj_dim)
            told |= {"timestep_cond": np.asarray(embedding)}
        if start.channels is not None:
            told, away = (branch | {"channels": start.channels} for branch in (told, away))
        return Rows(
            np.asarray(jax.random.key_data(keys)),
            told,
            None if self.knows_guidance or scale == 1 else away,
            start.latents,
            start.image,
            start.known,
            start.repaint,
        )


def _default_steps(plan: Plan) -> int:
    return 4 if plan.grid_options.get("spacing") == "lcm" else 50


def _count(number: Any, name: str, lowest: int) -> int:
    if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < lowest:
        raise InvalidArgumentError(f"{name} must be a whole number of at least {lowest}, not {number!r}")
    return int(number)


def _rescale(guidance_rescale: float) -> np.float32:
    if not 0 <= guidance_rescale <= 1:
        raise InvalidArgumentError(f"guidance_rescale must lie between 0 and 1, not {guidance_rescale}")
    return np.float32(guidance_rescale)
