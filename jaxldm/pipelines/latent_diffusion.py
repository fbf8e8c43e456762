"""Class labels -> latents -> images: condition, guidance, grid, solver and decoder put together.

`draw` is the whole of it, in a few lines; `LatentDiffusion` holds the weights, checks what it is asked for
and calls `draw` in batches of one fixed size.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.data import check_labels
from jaxldm.errors import InvalidArgumentError, UnknownNameError, one_of
from jaxldm.models.config import height_width
from jaxldm.pipelines.fixed_batches import (
    IMAGES_PER_DEVICE,
    image_mesh,
    in_fixed_batches,
    num_batches,
    over_images,
)
from jaxldm.pipelines.schedulers import Sampler, make_plan, named_solver

# Grids on a continuous path are padded to this many steps, so that another number of steps compiles nothing
# anew. (Those on a discrete path are padded to all of its timesteps.)
MAX_STEPS = 1000
MOST_CLASSES_AT_ONCE = 100  # that are drawn, once each, for a call that names none
OUTPUTS = ("images", "latents")


class Images(NamedTuple):
    """What is asked of each image of a batch.

    Attributes:
      number: which image it is.
      label: its class, None for a model without classes.
      negative_label: the class to steer away from.
      latents: x at the first row of the grid, in place of noise; None: noise.
    """

    number: Int[Array, " B"]
    label: Int[Array, " B"] | None
    negative_label: Int[Array, " B"] | None
    latents: Float[Array, "B h w c"] | None = None


class Settings(NamedTuple):
    """What all images of a call share. All of it is data to the compiled function."""

    key: Key[Array, ""]
    grid: D.Grid
    guidance_scale: Float[Array, ""]
    guidance_rescale: Float[Array, ""] | None


def draw(
    pipe: LatentDiffusion,
    settings: Settings,
    images: Images,
    sampler: Sampler,
    on_step: Callable[[Any, Any], None] | None = None,
    output: str = "images",
) -> Float[Array, "B H W C"]:
    """Images in [-1, 1]: noise, walked along the grid by the sampler's solver under guidance, and decoded.

    Pure; jit it. With `output="latents"` they are not decoded.
    """

    def network(x, t, labels):
        answer = models.network(pipe.denoiser)(pipe.denoiser_params, x, t, labels)
        # A network with a learned variance has it in the second half.
        return answer if sampler.learned_variance else answer[..., : x.shape[-1]]

    keys = jax.vmap(jax.random.fold_in, (None, 0))(settings.key, images.number)
    if images.label is None:
        predict = lambda x, t: network(x, t, None)  # noqa: E731
    else:
        predict = D.classifier_free_guidance(
            network,
            images.label,
            images.negative_label,
            settings.guidance_scale,
            rescale=0.0 if settings.guidance_rescale is None else settings.guidance_rescale,
            guided_channels=pipe.guided_channels,
        )
    denoise = sampler.make_denoiser(predict)
    x = images.latents
    if x is None:
        x = D.initial_noise(keys, (len(keys), *pipe.latent_shape), settings.grid)
    latents = D.sample(keys, denoise, sampler.solver, settings.grid, x, callback=on_step)
    return latents if output == "latents" else jnp.clip(pipe.decode(latents), -1.0, 1.0)


@flax.struct.dataclass
class LatentDiffusion:
    """A trained model that draws: `pipe(key, class_labels) -> images`. A pytree; `pipelines.load` makes one.

    Attributes:
      denoiser: the network, (x `[B, h, w, c]`, t `[B]`, labels `[B]`) -> `[B, h, w, c]`.
      denoiser_params: its parameters.
      schedule: the path that it was trained on and what it predicts.
      autoencoder: decodes latents into images; None where the network draws pixels.
      autoencoder_params: its parameters, or None.
      class_names: one for each label; empty when nobody named them.
      scheduler: the entries of the folder's scheduler_config.json, which name the solver and the grid of
        calls that name none; None: DDIM on the grid that fits the path.
      scale: of guidance, where a call names none.
      guided_channels: how many of the network's channels are guided, from the first on; None: all of them.
        The authors' samplers of DiT and SiT guide 3 of 4: `pipe.replace(guided_channels=3)`.
      images_per_device: images that a device always computes at once, see `fixed_batches`. 1 for the large
        models of folders; more is faster on a large device.

    >>> import jax                                                                            # doctest: +SKIP
    >>> from jaxldm import pipelines                                                          # doctest: +SKIP
    >>> pipe = pipelines.load("runs/mini-ldm")                                                # doctest: +SKIP
    >>> images = pipe(jax.random.key(0), [3, 7], num_inference_steps=20, guidance_scale=3.0)  # doctest: +SKIP
    >>> images.shape                                                                          # doctest: +SKIP
    (2, 28, 28, 1)
    """

    denoiser: nn.Module = flax.struct.field(pytree_node=False)
    denoiser_params: Any
    schedule: D.NoiseSchedule = flax.struct.field(pytree_node=False)
    autoencoder: nn.Module | None = flax.struct.field(pytree_node=False, default=None)
    autoencoder_params: Any = None
    class_names: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    scheduler: FrozenDict | None = flax.struct.field(pytree_node=False, default=None)
    scale: float = flax.struct.field(pytree_node=False, default=3.0)
    guided_channels: int | None = flax.struct.field(pytree_node=False, default=None)
    images_per_device: int = flax.struct.field(pytree_node=False, default=IMAGES_PER_DEVICE)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None for a model without them. The label `num_classes` is the null class."""
        return self.denoiser.config.num_classes

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of what the network works on."""
        config = self.denoiser.config
        return (*height_width(config.sample_size), config.in_channels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images."""
        return jax.eval_shape(self.decode, jax.ShapeDtypeStruct((1, *self.latent_shape), jnp.float32)).shape[
            1:
        ]

    @property
    def default_guidance_scale(self) -> float:
        """`scale`, or 1 for a model without classes."""
        return 1.0 if self.num_classes is None else self.scale

    @property
    def learns_variance(self) -> bool:
        """Whether the network says its variance, too: twice as many channels (Nichol & Dhariwal 2021)."""
        channels = self.denoiser.config.in_channels
        return getattr(self.denoiser.config, "out_channels", None) == 2 * channels

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        """Latents -> images, about [-1, 1]; a model of pixels has nothing to decode."""
        if self.autoencoder is None:
            return latents
        return models.decode_latents(self.autoencoder, self.autoencoder_params, latents)

    def __call__(
        self,
        key: Key[Array, ""],
        class_labels: Sequence[int | str] | None = None,
        *,
        num_images: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        negative_labels: int | str | Sequence[int | str] | None = None,
        solver: str | D.Solver | None = None,
        eta: float | None = None,
        variance: str | None = None,
        spacing: str | None = None,
        sigmas: str | None = None,
        latents: Any = None,
        output: str = "images",
        batch_size: int = 64,
        devices: Sequence[Any] | None = None,
        on_step: Callable[[Any, Any], None] | None = None,
    ) -> Float[np.ndarray, "N H W C"]:
        """Draws images, float32 `[N, H, W, C]` in [-1, 1].

        Image k depends on (key, k), its label and the options alone: not on the number of images, the batch
        size or the devices. Another seed, guidance scale, class or number of steps compiles nothing new.

        Args:
          key: image k draws its random numbers from fold_in(key, k).
          class_labels: in [0, num_classes), or names of classes, repeated in this order until there are
            `num_images`. None: every class once, of up to 100; always None for a model without
            classes.
          num_images: default one for each label.
          num_inference_steps: at most as many as the path has timesteps (1000 on a continuous path).
          guidance_scale: 1 is the conditional model, 0 the unconditional one. Default 3, or 1 without
            classes.
          guidance_rescale: phi of Lin et al. 2023, section 3.4, in [0, 1].
          negative_labels: told to the unconditional branch in place of the null class: one label, or several,
            repeated like `class_labels`.
          solver: a name in `jaxldm.diffusion.solvers.SOLVERS`, a `Solver` of your own, or None for the
            scheduler that the folder names (ddim where it names none).
          eta: for the solvers that have this option.
          variance: of solver "ddpm": "small", "large" or "learned", for networks that learned it (DiT).
          spacing, sigmas: as in `jaxldm.diffusion.make_grid`; None is what the folder says, or fits the path.
          latents: [N, h, w, c], x at the first row of the grid, as it is: noise of your own.
          output: "images", or "latents" as they are behind the last step, [N, h, w, c].
          batch_size: images under way at once; it is rounded up to whole fixed batches.
          devices: default all devices of this process.
          on_step: called on the host as on_step(step, x), by each device after each step of each batch.

        Raises:
          UnknownNameError, InvalidArgumentError, DataError: always before anything is compiled.
        """
        one_of("output", output, OUTPUTS)
        self._check_guided_channels()
        images = self._with_latents(self._images(class_labels, negative_labels, num_images), latents)
        mesh = image_mesh(len(images.number), devices, self.images_per_device)
        compiled = self.replace(scheduler=None, class_names=())  # what it does not depend on
        pipe, key = jax.device_put((compiled, key), NamedSharding(mesh, PartitionSpec()))
        sampler, grid_options = self._plan(solver, eta, variance)
        settings = Settings(
            key,
            self._grid(num_inference_steps, spacing, sigmas, grid_options),
            np.float32(self.check_guidance_scale(guidance_scale)),
            _rescale(guidance_rescale),
        )
        how = {"sampler": sampler, "mesh": mesh, "on_step": on_step, "output": output}
        return in_fixed_batches(
            lambda batch: _draw(pipe, settings, batch, **how),
            images,
            mesh,
            batch_size,
            self.images_per_device,
        )

    def count_steps(
        self, num_images: int, num_inference_steps: int, devices: Sequence[Any] | None = None
    ) -> int:
        """How often `on_step` will be called: the length of a progress bar."""
        mesh = image_mesh(num_images, devices, self.images_per_device)
        return num_batches(num_images, mesh, self.images_per_device) * mesh.size * num_inference_steps

    def cycle_labels(
        self, class_labels: Sequence[int | str] | None, num_images: int | None
    ) -> Int[np.ndarray, " N"] | None:
        """The label of each image, int32 [N]: the labels given, over and over. None for a model without
        classes.

        Raises:
          DataError: a label that is no class of this model.
          UnknownNameError: a name that is none.
          InvalidArgumentError: labels for a model without classes, none at all, fewer than one image, or
            every class of a model with many.
        """
        if num_images is not None and num_images < 1:
            raise InvalidArgumentError(f"num_images must be 1 or more, not {num_images}")
        if class_labels is None and num_images is None and (self.num_classes or 0) > MOST_CLASSES_AT_ONCE:
            raise InvalidArgumentError(
                f"this model knows {self.num_classes} classes: say which to draw (class labels, as 207 360), "
                "or how many images"
            )
        if self.num_classes is None:
            if class_labels is not None:
                raise InvalidArgumentError("this model knows no classes: leave the class labels out")
            return None
        given = self._checked(
            np.arange(self.num_classes) if class_labels is None else class_labels, "class labels"
        )
        return np.resize(given, len(given) if num_images is None else num_images)

    def _checked(self, labels: Any, name: str) -> Int[np.ndarray, " K"]:
        """One label or several as int32 [K], all of them classes of this model."""
        labels = [labels] if isinstance(labels, str) else labels
        if not np.isscalar(labels) and any(isinstance(label, str) for label in labels):
            names = self._labels_by_name()
            labels = [_label(label, names) if isinstance(label, str) else label for label in labels]
        labels = np.atleast_1d(np.asarray(labels))
        if labels.size == 0:
            raise InvalidArgumentError(f"no {name} were given: leave the option out, or give one or more")
        return check_labels(labels, len(labels), self.num_classes, name)

    def _labels_by_name(self) -> dict[str, int]:
        """The label of a class by its name, or by one of several: "tench" of "tench, Tinca tinca"."""
        return {
            one.strip(): label
            for label, several in enumerate(self.class_names)
            for one in (several, *several.split(","))
        }

    def _images(self, class_labels, negative_labels, num_images) -> Images:
        labels = self.cycle_labels(class_labels, num_images)
        if labels is None:
            if negative_labels is not None:
                raise InvalidArgumentError("this model knows no classes: leave the negative labels out")
            return Images(np.arange(1 if num_images is None else num_images, dtype=np.int32), None, None)
        if negative_labels is None:
            negative = np.full_like(labels, self.num_classes)
        else:
            negative = np.resize(self._checked(negative_labels, "negative labels"), len(labels))
        return Images(np.arange(len(labels), dtype=np.int32), labels, negative)

    def _check_guided_channels(self) -> None:
        channels = self.latent_shape[-1]
        if self.guided_channels is not None and not 1 <= self.guided_channels <= channels:
            raise InvalidArgumentError(
                f"guided_channels must lie between 1 and the network's {channels} channels, or be None for "
                f"all of them, not {self.guided_channels}"
            )

    def _with_latents(self, images: Images, latents: Any) -> Images:
        if latents is None:
            return images
        latents, wanted = np.asarray(latents, np.float32), (len(images.number), *self.latent_shape)
        if latents.shape != wanted:
            raise InvalidArgumentError(
                f"latents must be {list(wanted)}, channels last, one for each image; they are "
                f"{list(latents.shape)}"
            )
        return images._replace(latents=latents)

    def _plan(
        self, solver: str | D.Solver | None, eta: float | None, variance: str | None
    ) -> tuple[Sampler, dict[str, Any]]:
        """What walks the grid, and arguments of `make_grid`."""
        if variance is not None and solver not in ("ddpm", None):
            raise InvalidArgumentError('variance is an option of solver="ddpm"')
        if variance == "learned" and not self.learns_variance:
            raise InvalidArgumentError(
                'this network says no variance, half of 2C channels: leave variance="learned" out'
            )
        if variance is not None:
            solver = "ddpm"
        if self.scheduler is not None:
            sampler, grid_options = make_plan(self.scheduler, solver, eta=eta)
        else:
            if not isinstance(solver, D.Solver):
                solver = named_solver(solver or "ddim", eta)
            sampler, grid_options = Sampler(self.schedule, solver), {}
        if variance is not None:
            sampler = sampler._replace(solver=named_solver("ddpm", eta, variance=variance))
        learned = self.learns_variance and self.schedule.path != "edm"
        return sampler._replace(learned_variance=learned), grid_options

    def _grid(self, num_inference_steps, spacing, sigmas, grid_options) -> D.Grid:
        path = self.schedule.make_path()
        most = path.num_train_timesteps or MAX_STEPS
        if num_inference_steps > most:
            raise InvalidArgumentError(
                f"num_inference_steps={num_inference_steps} is more than the {most} steps that "
                "this model can be walked in: ask for that many or fewer"
            )
        if spacing is not None or sigmas is not None:
            grid_options = {"spacing": spacing, "sigmas": sigmas}
        return D.make_grid(path, num_inference_steps, **grid_options, max_steps=most)

    def check_guidance_scale(self, guidance_scale: float | None) -> float:
        """The scale, or the default for None. Raises `InvalidArgumentError` unless finite and 0 or more."""
        if guidance_scale is None:
            return self.default_guidance_scale
        if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
            raise InvalidArgumentError(
                f"guidance_scale must be a finite number of 0 or more, not {guidance_scale}: "
                "1 is the model as trained, 3 is a good start"
            )
        if self.num_classes is None and guidance_scale != 1:
            raise InvalidArgumentError(
                "this model knows no classes, so there is nothing to guide it by: leave the "
                "guidance scale out"
            )
        return guidance_scale


def _label(name: str, labels_by_name: dict[str, int]) -> int:
    if not labels_by_name:
        raise InvalidArgumentError(f"nobody named the classes of this model: give {name!r} as a number")
    if name not in labels_by_name:  # a thousand choices are no help
        raise UnknownNameError("class", name, difflib.get_close_matches(name, labels_by_name, 8, 0.0))
    return labels_by_name[name]


def _rescale(guidance_rescale: float) -> np.float32 | None:
    if not 0 <= guidance_rescale <= 1:
        raise InvalidArgumentError(f"guidance_rescale must lie between 0 and 1, not {guidance_rescale}")
    return np.float32(guidance_rescale) if guidance_rescale else None


@functools.partial(jax.jit, static_argnames=("sampler", "mesh", "on_step", "output"))
def _draw(pipe, settings, images, *, sampler, mesh, on_step, output):
    """`draw`, with the images split over the devices of the mesh."""

    def on_one_device(shared, images):
        return draw(*shared, images, sampler, on_step, output)

    return over_images(on_one_device, mesh)((pipe, settings), images)
