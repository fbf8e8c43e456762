"""Pruning the denoising network of a pipeline: how important its units are on pictures, and without some."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.arguments import array, checked, count, one_key, optional
from jaxldm.errors import InvalidArgumentError
from jaxldm.indices import check_indices
from jaxldm.models import pruning
from jaxldm.models.pruning import SOME_UNITS, Units, check_can_prune
from jaxldm.pipelines.latents import encode_images
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline
from jaxldm.pixels import check_not_pixels


@checked(
    pipe=A_PIPELINE,
    key=one_key,
    images=array("floating", "[N, H, W, C]", axes=4, filled=True, instead="x / 127.5 - 1 of 8-bit images"),
    labels=optional(array("whole", "[N]", axes=1)),
    num_times=count(1, 1000),
    batch_size=count(1),
)
def unit_importance(
    pipe: Pipeline,
    key: PRNGKeyArray,
    images: Float[Array, "N H W C"],
    labels: Int[Array, " N"] | None = None,
    *,
    num_times: int = 10,
    batch_size: int = 32,
) -> Units:
    """How much the training loss of a model on pictures depends on each head and channel.

    See `models.pruning.importance`. The times are those of a run of so many steps.

    Args:
        pipe: of DiT or SiT.
        key: of the noise, the same at every time.
        images: in [-1, 1]; a few hundred. Those behind the last whole batch are left out.
        labels: their classes; None: the null class.
        num_times: evenly spaced from the noise to the data.
        batch_size: images at once, for the memory alone: gradients are those of all.

    Raises:
        InvalidArgumentError: a model that cannot be pruned, a student of few steps; labels of other images,
            or that are none of its classes.
    """
    network = pipe.denoiser
    check_can_prune(network.module, network.params)
    if pipe.few_steps is not None:
        raise InvalidArgumentError(
            f"{pipe.few_steps.this} has another loss than pruning looks at: prune "
            + ("its teacher, and distil that" if pipe.few_steps.is_taught else "a model of many steps")
        )
    if labels is not None and len(labels) != len(images):
        raise InvalidArgumentError(f"labels must be {len(images)}, one for each image, got {len(labels)}")
    check_not_pixels("images", images)
    if labels is not None and pipe.num_classes is None:
        raise InvalidArgumentError("this model has no classes: leave labels out")
    if labels is not None:
        check_indices("labels", labels, cast(int, pipe.num_classes), where="the classes of this model")
    wanted = pipe.latent_spec.shape(pipe.default_size) if pipe.autoencoder is None else None
    if wanted is not None and images.shape[1:] != wanted:
        raise InvalidArgumentError(f"images must be [N, *{list(wanted)}], got {list(images.shape)}")
    x_0 = np.asarray(images) if pipe.autoencoder is None else encode_images(pipe.autoencoder, images)
    size = min(batch_size, len(x_0))
    parts = len(x_0) // size
    rows = {"x_0": x_0, "label": labels} if labels is not None else {"x_0": x_0}
    batches = {name: _batches(value, parts, size) for name, value in rows.items()}
    batches["key"] = jax.random.split(key, parts)
    prediction, channels = pipe.prediction, x_0.shape[-1]
    call = models.network(network.module)

    def loss(params: Any, t: Any) -> Any:
        def of_batch(batch: dict[str, Any]) -> Any:
            def denoise(x: Any, t: Any, condition: Any) -> Any:
                return call(params, x, t, condition)[..., :channels]

            time = functools.partial(_all_at, t)
            return D.diffusion_loss(
                batch["key"], denoise, prediction, batch["x_0"], batch.get("label"), time=time
            )[0]

        return jnp.mean(jax.lax.map(jax.checkpoint(of_batch), batches))

    times = jnp.asarray(D.make_grid(prediction.path, num_times).t[:-1], jnp.float32)
    return pruning.importance(network.module, network.params, loss, times)


def _batches(rows: Any, parts: int, size: int) -> Array:
    rows = np.asarray(rows)[: parts * size]
    return jnp.asarray(rows.reshape(parts, size, *rows.shape[1:]))


def _all_at(t: Any, key: Any, shape: Any, path: D.Path) -> Any:
    """In place of a distribution of times: one time for all examples."""
    return jnp.full(shape, t)


@checked(pipe=A_PIPELINE, keep=SOME_UNITS)
def prune(pipe: Pipeline, keep: Units) -> Pipeline:
    """The model without the heads and channels that `models.pruning.mask` leaves out.

    It draws, is trained and is saved as any other. It draws worse than before until it is trained a little:
    save it, and `training.finetune_recipe(folder, data, "full")`.

    Raises:
        InvalidArgumentError: a model that cannot be pruned, or units of another one.

    >>> found = pipelines.unit_importance(pipe, key, images, labels)                # doctest: +SKIP
    >>> keep = models.pruning.mask(found, heads=0.5, channels=0.5)                  # doctest: +SKIP
    >>> pipelines.save(pipelines.prune(pipe, keep), "smaller")                      # doctest: +SKIP
    """
    network = pipe.denoiser
    return pipe.replace(denoiser=Network(*pruning.sliced(network.module, network.params, keep)))
