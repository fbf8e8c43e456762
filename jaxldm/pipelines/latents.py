"""From noise to latents, and between latents and images: every network call, in batches of one fixed size.

XLA may round differently for batches of different sizes. Here a device always computes the same number of
images at a time, so that an image is the same to the last bit however many are drawn, and another number
of them compiles nothing new.

The sampling loop is one compiled function that takes the steps `first` to `last` of a grid. A call without
callbacks takes all of them at once. A call with callbacks takes one at a time and tells the caller between
two of them, on the host: a callback is never compiled into anything.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.arguments import array, checked, count, instance, optional, some_devices
from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.memory import check_computation, check_fits, most_in_step, size_of
from jaxldm.models.sharding import AXES, mesh_of
from jaxldm.pipelines.handed_in import check_channels, latent_channels
from jaxldm.pipelines.network import A_NETWORK, Network
from jaxldm.pipelines.sampling_run import Compiled, PerCall, PerImage, solver_and_denoiser
from jaxldm.pixels import check_not_pixels
from jaxldm.reading import shown

BATCHES = ("batch_size", "devices", "in_flight")  # options of `in_batches`
IMAGES, EVERYWHERE = PartitionSpec("images"), PartitionSpec()
SPLIT_IMAGES = PartitionSpec(("data", "fsdp"))  # of weights that are split by rule


class Progress(NamedTuple):
    """Whom to tell of each step, and whether to take any."""

    on_step: Callable[[Any, Any], None] | None = None
    progress: Callable[[Any, Any], None] | None = None
    compile_only: bool = False
    on_x0: Callable[[Any, Any, Any, Any], None] | None = None

    @property
    def listens(self) -> bool:
        """Whether any listener is given."""
        return any(listener is not None for listener in (self.on_step, self.progress, self.on_x0))


def denoise(
    network: Network,
    per_call: PerCall,
    per_image: PerImage,
    compiled: Compiled,
    progress: Progress,
    *,
    batch_size: int = 1,
    devices: Sequence[Any] | None = None,
    in_flight: int | None = None,
) -> tuple[Float[np.ndarray, "N h w c"], Float[np.ndarray, "N K h w c"]]:
    """Latents of N images, and K previews: x_0 as it was seen on the way.

    Args:
        batch_size, devices, in_flight: as in `in_batches`.
    """
    steps = D.steps_in(per_call.grid)
    last = 0 if progress.compile_only else int(steps)
    _check_step_fits(network, per_call, per_image, compiled, batch_size, devices)

    def run(shared, batch, mesh):
        carry = _empty_carry(shared, batch, compiled, mesh)
        take = functools.partial(_take_steps, shared, batch, compiled=compiled, mesh=mesh)
        if not progress.listens or last == 0:
            return take(carry, np.int32(0), np.int32(last))[1]
        for i in range(last):
            carry, (x, previews) = take(carry, np.int32(i), np.int32(i + 1))
            x.block_until_ready()
            _tell(progress, per_call.grid, i, x, carry[2])
            if progress.progress is not None:
                progress.progress(i + 1, last)
        return x, previews

    return in_batches(run, (network, per_call), per_image, batch_size, devices, in_flight)


def _tell(progress: Progress, grid: D.Grid, i: int, x: Any, x_0: Any) -> None:
    """Call the listeners to the latents behind step i, once for each device that computed some."""
    if progress.on_step is None and progress.on_x0 is None:
        return
    shards, seen = (a.addressable_shards[: 1 if a.is_fully_replicated else None] for a in (x, x_0))
    for ours, theirs in zip(shards, seen, strict=True):
        step, latents = int(grid.start) + i, np.asarray(ours.data)
        if progress.on_step is not None:
            progress.on_step(step, latents)
        if progress.on_x0 is not None:
            progress.on_x0(step, float(grid.t[i]), latents, np.asarray(theirs.data)[0])


def _check_step_fits(
    network: Network,
    per_call: PerCall,
    per_image: PerImage,
    compiled: Compiled,
    batch_size: int,
    devices: Sequence[Any] | None,
) -> None:
    """Raises `InvalidArgumentError` where a step of one batch cannot fit in the memory of a device."""
    height, width, channels = compiled.latent_shape

    def largest() -> int:
        batch = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype), per_image
        )
        carry = _first_carry.eval_shape(network, per_call, batch, compiled=compiled)
        steps = functools.partial(take_steps, compiled=compiled)
        return models.largest_product(steps, network, per_call, batch, carry, jnp.int32(0), jnp.int32(1))

    check_computation(
        size_of(network)
        + size_of(per_call.controls)
        + 4 * batch_size * (compiled.previews + 1) * height * width * channels,
        most_in_step(2 * batch_size, height, width),
        largest,
        _first_device(devices),
        f"steps of {shown(batch_size)} images of {height}x{width} latents need",
        "draw smaller images, or fewer at once with batch_size",
    )


def _first_device(devices: Sequence[Any] | None) -> Any:
    return (jax.local_devices() if devices is None else [*devices, *jax.local_devices()])[0]


@functools.partial(jax.jit, static_argnames="compiled")  # so that its shapes are found once, not per batch
def _first_carry(network: Network, per_call: PerCall, per_image: PerImage, compiled: Compiled) -> Any:
    """The solver's state at the first row, empty previews, and an x_0 that nobody saw yet."""
    solver, _ = solver_and_denoiser(network, per_call, per_image, compiled)
    keys = jax.random.wrap_key_data(per_image.key, impl=compiled.key_impl)
    grid, x = per_call.grid, per_image.latents
    if x is None:
        shape = (len(keys), *compiled.latent_shape)
        if per_image.image is None:
            x = compiled.sampler.initial_noise(keys, shape, grid)
        else:
            x = grid.alpha[0] * per_image.image + D.initial_noise(keys, shape, grid)
    x = jnp.asarray(x, jnp.float32)
    previews = jnp.zeros((len(keys), compiled.previews, *compiled.latent_shape), x.dtype)
    return solver.init(x), previews, jnp.zeros_like(x)


def _empty_carry(shared: Any, batch: PerImage, compiled: Compiled, mesh: Mesh) -> Any:
    """Zeros in the shape of `_first_carry` of each program; the first step does not read them."""
    programs = mesh.shape.get("images", 1)
    local = jax.tree.map(lambda a: jax.ShapeDtypeStruct((len(a) // programs, *a.shape[1:]), a.dtype), batch)
    carry = _first_carry.eval_shape(*shared, local, compiled=compiled)
    zeros = jax.tree.map(lambda leaf: np.zeros((programs, *leaf.shape), leaf.dtype), carry)
    spec = IMAGES if "images" in mesh.shape else EVERYWHERE
    return jax.device_put(zeros, NamedSharding(mesh, spec))  # as later carries are: one compilation


@functools.partial(jax.jit, static_argnames=("compiled", "mesh"), donate_argnames="carry")
def _take_steps(shared, per_image, carry, first, last, *, compiled, mesh):
    """(carry, (x, previews)) behind step `last` - 1. The carry has an axis for the programs in front.

    The carry is donated: the new one takes its memory.
    """

    def on_one_device(shared, rows):
        (shared, bounds), (per_image, carry) = shared, rows
        carry = jax.tree.map(lambda leaf: leaf[0], carry)
        carry = take_steps(
            *shared, per_image=per_image, carry=carry, first=bounds[0], last=bounds[1], compiled=compiled
        )
        x, previews = carry[0].x, carry[1]
        if per_image.repaint is not None:
            x = _with_known_part(x, shared[1].grid, bounds[1], per_image, compiled)
        return jax.tree.map(lambda leaf: leaf[None], carry), (x, previews)

    return over_images(on_one_device, mesh)((shared, (first, last)), (per_image, carry))


def take_steps(
    network: Network,
    per_call: PerCall,
    per_image: PerImage,
    carry: Any,
    first: Any,
    last: Any,
    compiled: Compiled,
) -> Any:
    """The carry (solver state, previews, last x_0) after the steps `first` to `last` - 1 of the grid. Pure.

    `D.sample` in pieces. Before step 0 the carry is not read.
    """
    grid, keys = per_call.grid, jax.random.wrap_key_data(per_image.key, impl=compiled.key_impl)
    solver, denoiser = solver_and_denoiser(network, per_call, per_image, compiled)
    places = (jnp.arange(compiled.previews) + 1) * D.steps_in(grid) // (compiled.previews + 1)

    def step(i, carry):
        state, previews, _ = carry
        state, x_0 = D.sample_step(keys, denoiser, solver, grid, state, i)
        here = (places == i)[None, :, None, None, None]
        return state, jnp.where(here, x_0[:, None], previews), x_0.astype(jnp.float32)

    begin = functools.partial(_first_carry, network, per_call, per_image, compiled)
    carry = jax.lax.cond(first == 0, begin, lambda: carry)
    return jax.lax.fori_loop(first, last, step, carry)


def _with_known_part(x: Any, grid: D.Grid, last: Any, per_image: PerImage, compiled: Compiled) -> Any:
    """At the end, the known part without noise: a grid that ends at sigma_min would leave its own there."""
    clean = (grid.t[-1] <= compiled.sampler.path.t_min) & (last == D.steps_in(grid))
    kept = (1 - cast(Any, per_image.repaint)) * clean.astype(jnp.float32)
    return kept * per_image.known + (1 - kept) * x


def scale_factor(vae: Network) -> int:
    """How many pixels high and wide one latent is: 8 in Stable Diffusion."""
    if hasattr(vae.config, "shrinks"):
        return vae.config.shrinks
    return 2 ** (len(vae.config.block_out_channels) - 1)


@checked(vae=A_NETWORK, images=array("floating", "[N, H, W, C]", axes=4, filled=True))
def encode_images(vae: Network, images: Float[Any, "N H W C"]) -> Float[np.ndarray, "N h w c"]:
    """The latents of images in [-1, 1]: the mean of q(z | x), scaled as diffusion models have them.

    Raises:
        InvalidArgumentError: images of other channels than the autoencoder's, or of numbers up to 255.
    """
    rows = np.asarray(images, np.float32)
    check_channels("images", rows, vae.config.in_channels)
    check_not_pixels("images", rows)
    one = jax.ShapeDtypeStruct((1, *rows.shape[1:]), jnp.float32)
    fix = "give a smaller image"
    _check_autoencoder_fits(_encode, vae, one, rows.shape[1:3], jax.local_devices()[0], "encoding", fix)
    return np.concatenate([np.asarray(_encode(vae, rows[k : k + 1])) for k in range(len(rows))])


@checked(
    vae=optional(A_NETWORK),
    latents=array("floating", "[N, h, w, c]", axes=4, filled=True),
    tiling=optional(instance(models.Tiling, "models.Tiling(...)")),
    image=optional(array("floating", "[N, H, W, C]", axes=4, filled=True)),
    mask=optional(array("floating", "[N, H, W, 1]", axes=4, filled=True)),
    batch_size=count(1),
    devices=optional(some_devices),
    in_flight=optional(count(1)),
)
def decode_images(
    vae: Network | None,
    latents: Float[Any, "N h w c"],
    *,
    tiling: models.Tiling | None = None,
    image: Float[Any, "N H W C"] | None = None,
    mask: Float[Any, "N H W 1"] | None = None,
    **batches: Any,
) -> Float[np.ndarray, "N H W C"]:
    """Images, float32 in [-1, 1], of latents as diffusion models draw them.

    Args:
        vae: None where the latents are pixels.
        tiling: decode large images in squares, in less memory.
        image, mask: what inpainting keeps, as in `models.decode_latents`.
        batches: batch_size, devices, in_flight of `in_batches`.

    Raises:
        InvalidArgumentError: latents of other channels than the autoencoder's; too large for the memory.
    """
    for name in batches:
        one_of("argument of decode_images", name, ("tiling", "image", "mask", *BATCHES))
    latents = np.asarray(latents, np.float32)
    if vae is None:
        return np.clip(latents, -1.0, 1.0)
    check_channels("latents", latents, latent_channels(vae.config))

    def run(vae, batch, mesh):
        return _decode(vae, batch, tiling=tiling, mesh=mesh)

    def decode_batch(vae, batch):
        return _images_of(vae, batch, tiling)

    rows = {"latents": latents} | {
        name: np.asarray(value, np.float32)
        for name, value in (("image", image), ("mask", mask))
        if value is not None
    }
    count = batches.get("batch_size", 1)
    batch = {name: jax.ShapeDtypeStruct((count, *a.shape[1:]), jnp.float32) for name, a in rows.items()}
    height, width = (side * scale_factor(vae) for side in latents.shape[1:3])
    fix = "draw smaller images, fewer at once with batch_size, or in squares with tiling=models.Tiling()"
    device = _first_device(batches.get("devices"))
    _check_autoencoder_fits(decode_batch, vae, batch, (height, width), device, "decoding", fix)
    return in_batches(run, vae, rows, **batches)


def _check_autoencoder_fits(
    function: Callable[..., Any],
    vae: Network,
    batch: Any,
    pixels: tuple[int, int],
    device: Any,
    what: str,
    fix: str,
) -> None:
    """Raises `InvalidArgumentError` where an autoencoder's work cannot fit in the memory of a device."""
    count, (height, width), factor = jax.tree.leaves(batch)[0].shape[0], pixels, scale_factor(vae)
    in_pixels = 4 * count * height * width * 1024
    check_computation(
        size_of(vae),
        in_pixels + most_in_step(count, -(-height // factor), -(-width // factor)),
        lambda: models.largest_product(function, vae, batch),
        device,
        f"{what} {count} images of {height}x{width} pixels needs",
        fix,
    )


@jax.jit
def _encode(vae: Network, images: Float[Array, "N H W C"]) -> Float[Array, "N h w c"]:
    return models.encode_latents(vae.module, vae.params, images).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("tiling", "mesh"))
def _decode(
    vae: Network, batch: dict[str, Array], *, tiling: models.Tiling | None, mesh: Mesh
) -> Float[Array, "N H W C"]:
    def on_one_device(vae, batch):
        return jnp.clip(_images_of(vae, batch, tiling).astype(jnp.float32), -1.0, 1.0)

    return over_images(on_one_device, mesh)(vae, batch)


def _images_of(
    vae: Network, batch: dict[str, Array], tiling: models.Tiling | None
) -> Float[Array, "N H W C"]:
    """Images of the latents of a batch, with the image and the mask of the kept part where it has them."""
    kept: dict[str, Any] = {name: batch[name] for name in ("image", "mask") if name in batch}
    return models.decode_latents(vae.module, vae.params, batch["latents"], tiling=tiling, **kept)


def over_images(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function(shared, per_image)` with the rows of `per_image` and of the result split over the mesh.

    Each device runs the same program on its own rows; nothing passes between devices. On a mesh of weights
    that are split by rule it is one program for all rows, in which the compiler splits what can be.
    """
    if mesh.axis_names == AXES:
        whole = NamedSharding(mesh, EVERYWHERE)  # of the result, for a caller on any host
        return lambda *inputs: jax.lax.with_sharding_constraint(function(*inputs), whole)
    specs = (EVERYWHERE, IMAGES)
    # check_vma: a solver's state starts the same on all devices and then differs, which the check refuses.
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=IMAGES, check_vma=False)


def in_batches(
    run: Callable[[Any, Any, Mesh], Any],
    shared: Any,
    per_image: Any,
    batch_size: int = 1,
    devices: Sequence[Any] | None = None,
    in_flight: int | None = None,
) -> Any:
    """`run(shared, batch, mesh)` on batches of the rows of the tree `per_image` [N, ...], joined on the host.

    Batches are filled up to `batch_size` rows on each device by repeating the last row.

    Args:
        run: returns a tree of arrays with a row for each row of the batch.
        shared: a tree that every device gets whole.
        batch_size: rows that a device computes at once.
        devices: None is the mesh over which `shared` is split by rule, or else the first alone, as weights
            are large.
        in_flight: as many batches as make this many images are started before the first result is waited
            for; None: one batch.

    Raises:
        InvalidArgumentError: no device at all.
    """
    num_rows = len(jax.tree.leaves(per_image)[0])
    mesh = computing_mesh(shared, num_rows, batch_size, devices)
    each = sum(math.prod(np.shape(leaf)[1:]) * leaf.dtype.itemsize for leaf in jax.tree.leaves(per_image))
    fix = "give a smaller batch_size"
    check_fits(each * batch_size, f"batches of {shown(batch_size)} images need", fix, mesh.devices.flat[0])
    if mesh.axis_names == AXES:
        whole, rows = NamedSharding(mesh, EVERYWHERE), NamedSharding(mesh, SPLIT_IMAGES)
        shared = jax.tree.map(lambda leaf: leaf if mesh_of(leaf) else jax.device_put(leaf, whole), shared)
    else:
        shared, rows = jax.device_put(shared, NamedSharding(mesh, EVERYWHERE)), None
    rows_per_batch = batch_size * num_batches_at_once(mesh)
    started: list[Any] = []
    results: list[Any] = []
    for batch in _batches(per_image, num_rows, rows_per_batch):
        batch = batch if rows is None else jax.device_put(batch, rows)
        started.append(run(shared, batch, mesh))
        if len(started) * rows_per_batch >= (in_flight or 1):
            results.append(jax.tree.map(np.asarray, started.pop(0)))
    results += [jax.tree.map(np.asarray, result) for result in started]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:num_rows], *results)


def computing_mesh(shared: Any, num_rows: int, batch_size: int, devices: Sequence[Any] | None) -> Mesh:
    """Where `in_batches` computes: the devices as an axis `images`, or the mesh over which `shared` is split.

    Raises:
        InvalidArgumentError: no device at all.
    """
    split = mesh_of(shared)
    if devices is None and split is not None:
        return split
    devices = list(jax.local_devices()[:1] if devices is None else devices)
    if not devices:
        raise InvalidArgumentError("devices is empty: leave it out, or name one or more of jax.devices()")
    return Mesh(np.asarray(devices if num_rows > batch_size else devices[:1]), ("images",))


def num_batches_at_once(mesh: Mesh) -> int:
    """How many batches are computed side by side."""
    return mesh.shape["data"] * mesh.shape["fsdp"] if mesh.axis_names == AXES else mesh.size


def _batches(per_image: Any, num_rows: int, rows_per_batch: int) -> Iterator[Any]:
    for start in range(0, num_rows, rows_per_batch):
        rows = np.minimum(np.arange(start, start + rows_per_batch), num_rows - 1)
        yield jax.tree.map(lambda column, rows=rows: np.asarray(column)[rows], per_image)
