"""The features of a set of images: one pass for all metrics, kept by the hash of weights and images."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxldm.arguments import (
    a_module,
    a_params,
    a_path,
    checked,
    choice,
    count,
    function,
    instance,
    optional,
    several,
    some_devices,
    text,
)
from jaxldm.errors import DataError, JaxldmError, one_of
from jaxldm.files import finish_interrupted, folder_written_whole
from jaxldm.metrics.image_sets import AN_IMAGE_SET, ImageSet
from jaxldm.metrics.resizing import VARIANTS, inception_inputs
from jaxldm.reading import check_regular, read_bytes, reading

Layers = Mapping[str, Array]
_SUM = ".sum"  # of a file with the checksum of the features of that name
_VERSION = 1  # of what a network's features mean here: raise it with every change


class FeatureNetwork(NamedTuple):
    """A network and how images are prepared for it.

    Attributes:
        name: for example "inception".
        variant: of the preparation, for example "tf1".
        sha256: of its weights.
        layers: names of what it computes.
        prepare: uint8 [B, H, W, 3] -> its input, on the host or the device.
        apply: (params, input) -> {layer: [B, D]}; compiled here.
        params: its parameters.
    """

    name: str
    variant: str
    sha256: str
    layers: tuple[str, ...]
    prepare: Callable[[UInt8[np.ndarray, "B H W 3"]], Any]
    apply: Callable[[Any, Array], Layers]
    params: Any


A_NETWORK = instance(FeatureNetwork, "a network from metrics.inception_network(...)")


@checked(module=a_module, params=a_params, sha256=text, variant=choice("resize variant", VARIANTS))
def inception_network(module: Any, params: Any, sha256: str, variant: str = "tf1") -> FeatureNetwork:
    """Return FID's network, of `models.InceptionV3`: layers pool, spatial and logits."""

    def apply(params: Any, x: Array) -> Layers:
        return module.apply({"params": params}, x)._asdict()

    def prepare(images: np.ndarray) -> Array:
        return inception_inputs(images, variant)

    return FeatureNetwork("inception", variant, sha256, ("pool", "spatial", "logits"), prepare, apply, params)


@checked(
    name=text,
    encode=function("(params, pixels)"),
    params=a_params,
    sha256=text,
    prepare=function("images -> pixels"),
)
def image_encoder_network(name: str, encode: Callable, params: Any, sha256: str, prepare: Callable):
    """Return an image encoder with one layer, `embedding`: `encode(params, pixels)` -> [B, D]."""

    def apply(params: Any, x: Array) -> Layers:
        return {"embedding": encode(params, x)}

    return FeatureNetwork(name, "bicubic", sha256, ("embedding",), prepare, apply, params)


@checked(
    images=AN_IMAGE_SET,
    network=A_NETWORK,
    layers=several(text),
    folder=a_path,
    batch_size=count(1),
    devices=optional(some_devices),
    progress=function("(number)"),
)
def extract(
    images: ImageSet,
    network: FeatureNetwork,
    layers: Sequence[str],
    folder: Path,
    *,
    batch_size: int = 32,
    devices: Sequence[Any] | None = None,
    progress: Callable[[int], Any] = lambda number: None,
) -> dict[str, Float[np.ndarray, "N D"]]:
    """Return {layer: features [N, D]} as arrays in files, computed unless the folder has them.

    The memory is that of one batch, whatever the number of images. On several devices every batch is split
    over all of them.

    Args:
        images: of one size.
        network: what computes the features.
        layers: names in `network.layers`.
        folder: of the cache: a file for each set, network and layer.
        batch_size: images at once.
        devices: of JAX; None: all.
        progress: called with the number of images that are done.

    Raises:
        DataError: images that cannot be read, of several sizes, features with NaN.
        StorageError: the folder cannot be written.
    """
    key = f"{_VERSION} {images.digest} {network.name} {network.variant} {network.sha256}"
    folder = Path(folder)
    for layer in layers:
        one_of(f"layer of {network.name}", layer, network.layers)
    place = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
    finish_interrupted(place)
    missing = [layer for layer in layers if not _is_whole(place, layer, images.count)]
    if missing:
        names = {f"{layer}{suffix}" for layer in missing for suffix in (".npy", _SUM)}
        with folder_written_whole(place, names.__contains__) as partial:
            files = {layer: partial / f"{layer}.npy" for layer in missing}
            _compute(images, network, files, batch_size, devices or jax.devices(), progress)
            for file in files.values():
                file.with_suffix(_SUM).write_text(_checksum(file))
    return {layer: np.load(place / f"{layer}.npy", mmap_mode="r") for layer in layers}


def _is_whole(place: Path, layer: str, count: int) -> bool:
    """Whether a file of features is there, with a row for each image, and as it was written."""
    file = place / f"{layer}.npy"
    try:
        check_regular(file, "file of features", DataError)
        with reading(file, DataError):
            found = np.load(file, mmap_mode="r", allow_pickle=False)
            fits = found.dtype == np.float32 and found.ndim == 2 and len(found) == count
            return fits and read_bytes(file.with_suffix(_SUM), 100).decode() == _checksum(file)
    except JaxldmError:
        return False


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()[:32]


def _compute(
    images: ImageSet,
    network: FeatureNetwork,
    files: Mapping[str, Path],
    batch_size: int,
    devices: Sequence[Any],
    progress: Callable[[int], Any],
) -> None:
    """Write the features of each layer into its file, a batch at a time."""
    run = _compiled(network, tuple(files), devices)
    batch_size = -(-min(batch_size, images.count) // len(devices)) * len(devices)
    written: dict[str, np.ndarray] = {}
    done = 0
    for batch in images.batches(batch_size):
        filled = np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), axis=0)])
        for layer, features in run(network.prepare(filled)).items():
            rows = np.asarray(features)[: len(batch)].astype(np.float32)
            if not np.isfinite(rows).all():
                raise DataError(f"{network.name} gives NaN for {images.name}: its weights are damaged")
            if layer not in written:
                shape = (images.count, rows.shape[1])
                written[layer] = np.lib.format.open_memmap(files[layer], "w+", np.float32, shape)
            written[layer][done : done + len(rows)] = rows
        done += len(batch)
        progress(len(batch))
    for array in written.values():
        array.flush()  # type: ignore[attr-defined]


def _compiled(
    network: FeatureNetwork, layers: tuple[str, ...], devices: Sequence[Any]
) -> Callable[[Any], Layers]:
    """The network with only these layers, in full float32, its batches split over the devices."""
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    spec = jax.sharding.PartitionSpec
    whole, split = (jax.sharding.NamedSharding(mesh, part) for part in (spec(), spec("data")))
    params, run = jax.device_put(network.params, whole), _jitted(network.apply, layers)
    return lambda x: run(params, jax.device_put(x, split))


@functools.lru_cache(maxsize=8)
def _jitted(apply: Callable[[Any, Array], Layers], layers: tuple[str, ...]) -> Callable[[Any, Array], Any]:
    """`apply` with only these layers; one function for all sets of images, so that it is compiled once."""

    @jax.jit
    def run(params: Any, x: Array) -> dict[str, Array]:
        with jax.default_matmul_precision("highest"):  # else 19 or 16 bits where the device has them
            found = apply(params, x)
        return {layer: found[layer] for layer in layers}

    return run
