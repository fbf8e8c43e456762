"""Images <-> latents through an autoencoder, in batches of one fixed size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxldm import models
from jaxldm.pipelines.fixed_batches import image_mesh, in_fixed_batches, over_images
from jaxldm.pipelines.network import Network


def scale_factor(vae: Network) -> int:
    """How many pixels high and wide one latent is: 8 in Stable Diffusion."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def mesh_of(num_images: int, devices: Sequence[Any] | None, batch_size: int) -> Mesh:
    """The devices that share the images; the first alone where none are named, as weights are large."""
    return image_mesh(num_images, jax.local_devices()[:1] if devices is None else devices, batch_size)


def on_devices(
    compiled: Callable[..., Array], shared: Any, rows: Any, batch_size: int, devices: Sequence[Any] | None
) -> np.ndarray:
    """`compiled(shared, batch, mesh=mesh)` of N rows, in batches of one fixed size, split over the devices.

    Args:
      shared: a tree that every device gets whole.
      rows: a tree of arrays [N, ...].
      batch_size: rows that a device computes at once.
      devices: None is the first.
    """
    mesh = mesh_of(len(jax.tree.leaves(rows)[0]), devices, batch_size)
    shared = jax.device_put(shared, NamedSharding(mesh, PartitionSpec()))
    return in_fixed_batches(
        lambda batch: compiled(shared, batch, mesh=mesh), rows, mesh, batch_size, batch_size
    )


def encode_images(vae: Network, images: Float[Any, "N H W C"]) -> Float[np.ndarray, "N h w c"]:
    """The latents of images in [-1, 1]: the mean of q(z | x), scaled as diffusion models have them."""
    rows = np.asarray(images, np.float32)
    return np.concatenate([np.asarray(_encode(vae, rows[k : k + 1])) for k in range(len(rows))])


def decode_images(
    vae: Network,
    latents: Float[Any, "N h w c"],
    *,
    tiling: models.Tiling | None = None,
    batch_size: int = 1,
    devices: Sequence[Any] | None = None,
) -> Float[np.ndarray, "N H W C"]:
    """Images, float32 in [-1, 1], of latents as diffusion models draw them."""
    rows = np.asarray(latents, np.float32)
    return on_devices(functools.partial(_decode, tiling=tiling), vae, rows, batch_size, devices)


@jax.jit
def _encode(vae: Network, images: Float[Array, "N H W C"]) -> Float[Array, "N h w c"]:
    return models.encode_latents(vae.module, vae.params, images).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("tiling", "mesh"))
def _decode(
    vae: Network, latents: Float[Array, "N h w c"], *, tiling: models.Tiling | None, mesh: Mesh
) -> Float[Array, "N H W C"]:
    def on_one_device(vae, latents):
        images = models.decode_latents(vae.module, vae.params, latents, tiling=tiling)
        return jnp.clip(images.astype(jnp.float32), -1.0, 1.0)

    return over_images(on_one_device, mesh)(vae, latents)
