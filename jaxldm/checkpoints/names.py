"""Flax parameters <-> the flat, PyTorch-shaped tensors of published checkpoints.

Submodules carry their published names, so one rule serves every model, in both directions:

| parameter | published name | tensor |
|---|---|---|
| `down_blocks_0/conv1/kernel` | `down_blocks.0.conv1.weight` | `[h, w, in, out]` -> `[out, in, h, w]` |
| `to_out_0/kernel` | `to_out.0.weight` | `[in, out]` -> `[out, in]` |
| `norm1/scale`, `class_embedding/embedding` | `norm1.weight`, `class_embedding.weight` | unchanged |
| other leaves: `bias`, `weight` (already in published layout), `pos_embed` | the same | unchanged |
| `blocks_0to27/fc1/kernel` | `blocks.0.fc1.weight` to `blocks.27...` | `[28, in, out]` -> 28 `[out, in]` |

The last row is a stack of blocks in one `nn.scan`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from flax import traverse_util

from jaxldm import models
from jaxldm.arguments import a_module, a_params, checked, instance, optional, refuse
from jaxldm.arguments import function as a_function
from jaxldm.checkpoints.safetensors_file import Tensor
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.reading import some_of

Path = tuple[str, ...]
if TYPE_CHECKING:
    Device: TypeAlias = Any  # jax.Device is no type to a type checker
else:
    Device = jax.Device
Placement: TypeAlias = (
    Device | jax.sharding.Sharding | Callable[[Path, tuple[int, ...]], jax.sharding.Sharding] | None
)

# Published names that end in _<number> and are no item of a list, so that the number stays:
NAMES_WITH_NUMBERS = frozenset(
    {
        "linear_1",
        "linear_2",
        "proj_out_1",
        "proj_out_2",
        "channelwise_linear_1",
        "channelwise_linear_2",
        "wi_0",
        "wi_1",
        # The layers of a branch in InceptionV3:
        *(
            f"{branch}_{number}"
            for branch, count in (
                ("branch3x3", 2),
                ("branch3x3dbl", 3),
                ("branch5x5", 2),
                ("branch7x7", 3),
                ("branch7x7dbl", 5),
                ("branch7x7x3", 4),
            )
            for number in range(1, count + 1)
        ),
    }
)
# Attention projections in checkpoints written by early diffusers:
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Transformers writes an encoder with one of these in front of every tensor, or without it:
ENCODER_PREFIXES = (
    *("text_model.", "vision_model.", "bert.", "model.", "model.language_model."),
    "language_model.model.",
)

_BLOCK = 2**19  # bytes that are converted at a time
_READERS = 2  # threads: one waits for the disk or for new pages of memory while the other converts
_STACK = re.compile(r"(.+_)(\d+)to(\d+)")  # a stack of modules: the blocks of a scan


COMPONENTS = instance(Mapping, "the components by name, such as checkpoints.load_components(folder)")


def a_state(name: str, value: Any) -> Any:
    """Tensors, in memory or in a file, by their names."""
    fits = isinstance(value, Mapping) and all(
        isinstance(key, str) and hasattr(tensor, "shape") and hasattr(tensor, "dtype")
        for key, tensor in value.items()
    )
    if not fits:
        raise refuse(name, "a dictionary of tensors by their published names", value)
    return value


def several_networks(name: str, value: Any) -> Any:
    """Networks by the names of their components."""
    fits = isinstance(value, Mapping) and all(
        isinstance(part, tuple) and len(part) == 2 for part in value.values()
    )
    if not fits:
        raise refuse(name, "networks by name, such as {'unet': (module, params)}", value)
    for key, (module, params) in value.items():
        a_module(f"{name}[{key!r}][0]", module)
        a_params(f"{name}[{key!r}][1]", params)
    return value


def a_float_dtype(name: str, value: Any) -> Any:
    """Any dtype of floating-point numbers, or its name."""
    try:
        dtype = np.dtype(value) if value is not None else None
    except TypeError:
        dtype = None
    if dtype is None or not jax.numpy.issubdtype(dtype, jax.numpy.floating):
        raise refuse(name, "a dtype of floating-point numbers such as 'bfloat16'", value)
    return value


def a_placement(name: str, value: Any) -> Any:
    """A device, a sharding, or a function that gives one for each parameter."""
    if isinstance(value, (jax.Device, jax.sharding.Sharding)):
        return value
    return a_function("(path, shape) -> sharding, a sharding or one of jax.devices()")(name, value)


def published_name(path: tuple[str, ...]) -> str:
    """("blocks_0", "attn", "qkv", "kernel") -> "blocks.0.attn.qkv.weight"."""
    *modules, leaf = path
    modules = [name if name in NAMES_WITH_NUMBERS else re.sub(r"_(\d+)$", r".\1", name) for name in modules]
    return ".".join([*modules, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])


def _published_axes(path: Path, rank: int) -> tuple[int, ...]:
    """The axis of the parameter for each axis of the published tensor, which has (out, in) first."""
    if path[-1] != "kernel" or rank < 2:
        return tuple(range(rank))
    return (rank - 1, rank - 2, *range(rank - 2))


@dataclasses.dataclass(frozen=True)
class PublishedTensor:
    """A parameter in the layout of its published tensor: `np.asarray(it)` fetches it from its device.

    Attributes:
        path: of the parameter.
        value: the parameter, or its shape and dtype.
        block: the index in a parameter that is a stack of blocks `[blocks, ...]`; None for other parameters.
    """

    path: Path
    value: Any
    block: int | None = None

    @property
    def axes(self) -> tuple[int, ...]:
        """The axis of the parameter, or of its block of the parameter, for each axis of this tensor."""
        return _published_axes(self.path, len(self.value.shape) - (self.block is not None))

    @property
    def shape(self) -> tuple[int, ...]:
        """As published."""
        ours = self.value.shape if self.block is None else self.value.shape[1:]
        return tuple(ours[axis] for axis in self.axes)

    @property
    def dtype(self) -> np.dtype:
        """That of the parameter."""
        return np.dtype(self.value.dtype)

    @property
    def all_blocks(self) -> list[PublishedTensor]:
        """The tensors of the parameter: this one, or one for each block of a stack."""
        if self.block is None:
            return [self]
        return [dataclasses.replace(self, block=block) for block in range(self.value.shape[0])]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        value = self.value
        if isinstance(value, models.Quantized):
            value = models.dequantize({"kernel": value})["kernel"]
        value = value if self.block is None else value[self.block]
        return np.array(np.asarray(value).transpose(self.axes), dtype, copy=copy, order="C")


@checked(params=a_params)
def published(params: Mapping) -> dict[str, PublishedTensor]:
    """Nested Flax parameters, or their shapes -> {published name: its tensor, not fetched yet}.

    A quantised kernel is several tensors, in our layout: `blocks.0.attn.qkv.kernel.codes`, `.scales`, ...
    """
    arrays: dict[Path, Any] = {}
    for path, value in traverse_util.flatten_dict(params).items():
        if isinstance(value, models.Quantized):
            arrays |= {(*path, name): array for name, array in value.arrays.items()}
        else:
            arrays[path] = value
    return published_whole(arrays)


def published_whole(flat: Mapping[Path, Any]) -> dict[str, PublishedTensor]:
    """{path: parameter} -> {published name: tensor}, a quantised kernel as one."""
    tensors = {}
    for path, value in flat.items():
        place = next((n for n, name in enumerate(path) if _STACK.fullmatch(name)), None)
        if place is None:
            tensors[published_name(path)] = PublishedTensor(path, value)
            continue
        name, first, last = _STACK.fullmatch(path[place]).groups()  # pyright: ignore[reportOptionalMemberAccess]
        for block, number in enumerate(range(int(first), int(last) + 1)):
            one = (*path[:place], f"{name}{number}", *path[place + 1 :])
            tensors[published_name(one)] = PublishedTensor(path, value, block)
    return tensors


@checked(params=a_params)
def to_state_dict(params: Mapping) -> dict[str, np.ndarray]:
    """Nested Flax parameters -> {published name: tensor}, in host memory, values unchanged bit for bit."""
    return {name: np.asarray(tensor) for name, tensor in published(params).items()}


@checked(
    state=a_state, template_params=a_params, dtype=optional(a_float_dtype), sharding=optional(a_placement)
)
def from_state_dict(
    state: Mapping[str, Tensor],
    template_params: Mapping,
    *,
    dtype: str | None = None,
    sharding: Placement = None,
) -> dict:
    """{published name: tensor} -> nested Flax parameters: the inverse of `to_state_dict`.

    Two tensors at a time are read, converted and put on their devices.

    Args:
        state: arrays, or tensors in a file that are not read yet.
        template_params: parameters of the same structure, or their `jax.ShapeDtypeStruct`; the result has
            their dtypes.
        dtype: another dtype, for all floating-point parameters, except the arrays of quantised kernels.
        sharding: a device or a sharding for all parameters, or a function (path, shape) -> sharding; None:
            the default device. Each device gets only its part of a split parameter.

    Raises:
        CheckpointError: tensors missing, left over or of another shape, named with both shapes; of many the
            first of each kind, and how many more.
        InvalidArgumentError: a parameter cannot be split by its `sharding`.
    """
    wanted = published(template_params)
    state = _with_current_names(state, wanted)
    _check(
        {name: tensor.shape for name, tensor in wanted.items()},
        {name: tuple(tensor.shape) for name, tensor in state.items()},
    )
    _check_dtypes(wanted, state)
    stored: dict[Path, list[Tensor]] = {}
    for name, tensor in wanted.items():
        stored.setdefault(tensor.path, []).append(state[name])
    firsts = {tensor.path: tensor for tensor in reversed(wanted.values())}  # of a stack, one for all blocks
    whole = traverse_util.flatten_dict(template_params)
    packed = {path: leaf for path, leaf in whole.items() if isinstance(leaf, models.Quantized)}

    def parameter(path: Path) -> jax.Array:
        tensor = firsts[path]
        floating = jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating) and path[:-1] not in packed
        kind = np.dtype(dtype) if dtype is not None and floating else tensor.dtype
        return placed(stored[path], tensor, kind, _placement(sharding, path, tuple(tensor.value.shape)))

    with ThreadPoolExecutor(_READERS) as pool:
        params = dict(zip(stored, pool.map(parameter, stored), strict=True))
    for path, leaf in packed.items():
        arrays = {name: params.pop((*path, name)) for name in leaf.arrays}
        params[path] = dataclasses.replace(leaf, **arrays)  # pyright: ignore[reportArgumentType]
    return traverse_util.unflatten_dict(params)


def _placement(
    sharding: Placement, path: Path, shape: tuple[int, ...]
) -> Device | jax.sharding.Sharding | None:
    if callable(sharding):
        sharding = sharding(path, shape)
    if not isinstance(sharding, jax.sharding.Sharding):
        return sharding
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise InvalidArgumentError(
            f"{'/'.join(path)}, {shape}, cannot be split by {sharding} ({error}): give a function "
            "(path, shape) -> sharding that does not split such parameters"
        ) from error
    return sharding


def placed(
    tensors: Sequence[Tensor],
    like: PublishedTensor,
    dtype: np.dtype,
    where: Device | jax.sharding.Sharding | None,
) -> jax.Array:
    """A published tensor, or those of all blocks of a stack, as a parameter like `like`, on its devices.

    Of a tensor in a file each device's part alone is read. Waits for each transfer, so that the next part is
    read after this one has left the host's memory.
    """
    ours = [np.asarray(tensor).transpose(np.argsort(like.axes)) for tensor in tensors]
    shape = tuple(like.value.shape)

    def part(index: Any) -> np.ndarray:
        if like.block is None:
            return _ready(np.asarray(ours[0][index]), dtype)  # a number becomes an array again
        return _owned([np.asarray(block[index[1:]]) for block in ours[index[0]]], dtype)

    if not isinstance(where, jax.sharding.Sharding):
        return jax.device_put(part((slice(None),) * len(shape)), where).block_until_ready()
    parts = [
        jax.device_put(part(index), device).block_until_ready()  # one part at a time in the host's memory
        for device, index in where.addressable_devices_indices_map(shape).items()
    ]
    return jax.make_array_from_single_device_arrays(shape, where, parts)


def _ready(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """What is put on a device in place of a view, which may be a file.

    A transposed view JAX has to copy to a device in any case, and it does so twice as fast as NumPy.
    """
    if view.flags.c_contiguous:
        return _owned([view], dtype).reshape(view.shape)
    return view.astype(dtype, order="K", copy=False)


def _owned(views: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """A contiguous copy of the views along a new first axis, aligned to 64 bytes.

    JAX on a CPU uses aligned memory without a further copy. The views themselves may be a file, which can
    change or end while the parameters are in use.
    """
    shape = (len(views), *views[0].shape)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + size].view(dtype).reshape(shape)
    for n, view in enumerate(views):
        _fill(copy[n : n + 1].reshape(view.shape), view)
    return copy


def _fill(copy: np.ndarray, view: np.ndarray) -> None:
    """Copies in blocks that are contiguous in `view` and fit the processor's cache.

    Converting and transposing a whole tensor at once is two to eight times slower, or needs a second copy.
    """
    if view.size == 0 or view.ndim == 0:
        copy[...] = view
        return
    axis = int(np.argmax(view.strides))
    step = max(1, _BLOCK // (view.nbytes // view.shape[axis]))
    for first in range(0, view.shape[axis], step):
        block = (slice(None),) * axis + (slice(first, first + step),)
        copy[block] = view[block].astype(copy.dtype, order="K", copy=False)


def _with_current_names(state: Mapping[str, Tensor], known: Mapping[str, Any]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        early = ".".join(OLD_NAMES.get(part, part) for part in name.split("."))
        longer = (prefix + name for prefix in ENCODER_PREFIXES)
        shorter = (name.removeprefix(prefix) for prefix in ENCODER_PREFIXES)
        current = next((other for other in (name, early, *longer, *shorter) if other in known), name)
        if current in renamed:
            raise CheckpointError(f"the weights hold {current} under two of its names")
        renamed[current] = tensor
    return renamed


def _check_dtypes(wanted: Mapping[str, PublishedTensor], given: Mapping[str, Tensor]) -> None:
    """Refuse whole or complex numbers in place of floating ones: such weights need a rule of their own.

    Codes of one byte are of their own type: of another they would be other numbers.
    """
    issubdtype = jax.numpy.issubdtype
    for name, tensor in wanted.items():
        kind = np.dtype(given[name].dtype)
        if issubdtype(tensor.dtype, jax.numpy.floating) and not issubdtype(kind, jax.numpy.floating):
            raise CheckpointError(
                f"the weights do not fit the model: {name} is {kind} in the file, floating in the model"
            )
        own = np.dtype(tensor.dtype)
        if own.itemsize == 1 and kind != own:
            raise CheckpointError(
                f"the weights do not fit the model: {name} is {kind} in the file, {own} in the model"
            )


def _check(wanted: Mapping[str, tuple], given: Mapping[str, tuple]) -> None:
    kinds = (
        [f"missing: {name} {wanted[name]}" for name in wanted if name not in given],
        [f"left over: {name} {given[name]}" for name in given if name not in wanted],
        [
            f"another shape: {name} is {given[name]} in the file, {shape} in the model"
            for name, shape in wanted.items()
            if name in given and given[name] != shape
        ],
    )
    # Of several kinds the first of each come first.
    problems = [kind[place] for place in range(max(map(len, kinds))) for kind in kinds if place < len(kind)]
    if problems:
        raise CheckpointError(f"the weights do not fit the model: {some_of(problems)}")
