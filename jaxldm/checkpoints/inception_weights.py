"""FID's InceptionV3 from any of the files in which its weights are passed on.

| file | project | names |
|---|---|---|
| `pt_inception-2015-12-05-6726825d.pth` | pytorch-fid | `Mixed_5b.branch1x1.conv.weight` |
| `weights-inception-2015-12-05-6726825d.pth` | torch-fidelity | the same |
| `inception-2015-12-05.pt` (TorchScript) | NVIDIA's StyleGAN, clean-fid | `layers.mixed.conv.weight` |
| `classify_image_graph_def.pb` | TensorFlow | `mixed/conv/conv2d_params` |
| `inception_v3_fid.pickle` | jax-fid | `Mixed_5b.branch1x1.conv.kernel` |
| `.safetensors` | any of them, converted | any of the above |

All hold the numbers of one network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxldm import models
from jaxldm.arguments import a_path, checked, several
from jaxldm.checkpoints.names import from_state_dict, published
from jaxldm.checkpoints.safetensors_file import read_safetensors
from jaxldm.checkpoints.tensorflow_graph import read_tensorflow_graph
from jaxldm.checkpoints.torch_file import read_torch_file
from jaxldm.errors import CheckpointError
from jaxldm.reading import check_regular, reading

WHERE = (
    "take pt_inception-2015-12-05-6726825d.pth from the releases of pytorch-fid, inception-2015-12-05.pt of "
    "NVIDIA's StyleGAN3 or classify_image_graph_def.pb of TensorFlow"
)

# The branches of each kind of block: ours -> the path below `mixed_N/` in TensorFlow's graph.


def _in_a_row(name: str, tower: str, count: int) -> dict[str, str]:
    return {f"{name}_{n + 1}": f"{tower}/conv{'' if n == 0 else f'_{n}'}" for n in range(count)}


_FIRST_AND_POOL = {"branch1x1": "conv", "branch_pool": "tower_2/conv"}
_A = _FIRST_AND_POOL | _in_a_row("branch5x5", "tower", 2) | _in_a_row("branch3x3dbl", "tower_1", 3)
_B = {"branch3x3": "conv"} | _in_a_row("branch3x3dbl", "tower", 3)
_C = _FIRST_AND_POOL | _in_a_row("branch7x7", "tower", 3) | _in_a_row("branch7x7dbl", "tower_1", 5)
_D = _in_a_row("branch3x3", "tower", 2) | _in_a_row("branch7x7x3", "tower_1", 4)
_E = {
    **_FIRST_AND_POOL,
    "branch3x3_1": "tower/conv",
    "branch3x3_2a": "tower/mixed/conv",
    "branch3x3_2b": "tower/mixed/conv_1",
    "branch3x3dbl_1": "tower_1/conv",
    "branch3x3dbl_2": "tower_1/conv_1",
    "branch3x3dbl_3a": "tower_1/mixed/conv",
    "branch3x3dbl_3b": "tower_1/mixed/conv_1",
}
_BLOCKS = ("5b", _A), ("5c", _A), ("5d", _A), ("6a", _B), ("6b", _C), ("6c", _C), ("6d", _C), ("6e", _C)
_LAST_BLOCKS = ("7a", _D), ("7b", _E), ("7c", _E)
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")

# Every convolution with its normalisation: ours -> TensorFlow's scope.
SCOPES: dict[str, str] = {name: "conv" if n == 0 else f"conv_{n}" for n, name in enumerate(_STEM)} | {
    f"Mixed_{name}.{branch}": f"{'mixed' if n == 0 else f'mixed_{n}'}/{scope}"
    for n, (name, branches) in enumerate((*_BLOCKS, *_LAST_BLOCKS))
    for branch, scope in branches.items()
}
# The tensors of such a pair: ours -> (TensorFlow's, NVIDIA's, jax-fid's).
_PARTS = {
    "conv.weight": ("conv2d_params", "weight", "conv.kernel"),
    "bn.weight": ("batchnorm/gamma", None, "bn.scale"),  # NVIDIA left it out, as it is 1
    "bn.bias": ("batchnorm/beta", "beta", "bn.bias"),
    "bn.running_mean": ("batchnorm/moving_mean", "mean", "bn.mean"),
    "bn.running_var": ("batchnorm/moving_variance", "var", "bn.var"),
}


class LoadedNetwork(NamedTuple):
    """A network whose features a metric needs.

    Attributes:
        module: of `jaxldm.models`.
        params: its parameters.
        sha256: of the file they are from: two numbers can be compared where these are equal.
        file: its name.
    """

    module: Any
    params: dict
    sha256: str
    file: str


@checked(path=a_path)
def load_inception(path: Path | str) -> LoadedNetwork:
    """FID's InceptionV3 from a file in any of the forms above.

    Raises:
        CheckpointError: no such file, damaged, of another network, torchvision's, or a pickle that wants to
            run something.
    """
    path = Path(path)
    tensors = read_weights(path)
    state = {name: np.asarray(value) for name, value in inception_state(tensors).items()}
    module = models.InceptionV3()
    shapes = models.shapes(module)
    _check(path, state, {name: tensor.shape for name, tensor in published(shapes).items()})
    params = from_state_dict({name: state[name].astype(np.float32) for name in published(shapes)}, shapes)
    return LoadedNetwork(module, params, file_hash(path), path.name)


@checked(path=a_path)
def read_weights(path: Path | str) -> dict[str, np.ndarray]:
    """The tensors of a file of any form that is known here, by the names in it.

    Raises:
        CheckpointError: no such file, damaged, of an unknown form, or a pickle that wants to run something.
    """
    path = Path(path)
    check_regular(path, "weight file")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return read_safetensors(path)
    if start.startswith((b"PK", b"\x80")):
        return read_torch_file(path)
    if start.startswith((b"\x1f\x8b", b"7z", b"BZ")):
        raise CheckpointError(f"{path} is an archive: unpack it, and give the file of weights in it")
    if path.suffix == ".pb":
        return read_tensorflow_graph(path)
    raise CheckpointError(
        f"{path} is of an unknown form: .pth and .pt of PyTorch, .pb of TensorFlow, pickles of NumPy arrays "
        "and .safetensors are read"
    )


def file_hash(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    check_regular(path, "weight file")
    with reading(path), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@checked(paths=several(a_path))
def hash_of_files(paths: Iterable[Path]) -> str:
    """The SHA-256 of the hashes of several files, in this order."""
    return hashlib.sha256(" ".join(file_hash(path) for path in paths).encode()).hexdigest()


def inception_state(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under PyTorch's names and in its layout, whatever names they have."""
    if "conv/conv2d_params" in tensors:
        return _renamed(tensors, {ours: (scope, "/") for ours, scope in SCOPES.items()}, 0)
    if "layers.conv.weight" in tensors:
        # Within a block of the kind E, NVIDIA joined the names by underscores.
        return _renamed(tensors, {ours: (_nvidia_scope(scope), ".") for ours, scope in SCOPES.items()}, 1)
    if "Conv2d_1a_3x3.conv.kernel" in tensors:
        return _renamed(tensors, {ours: (ours, ".") for ours in SCOPES}, 2)
    return tensors


def _nvidia_scope(scope: str) -> str:
    block, *rest = scope.split("/")
    inside = "_".join(rest) if block in ("mixed_9", "mixed_10") else ".".join(rest)
    return f"layers.{block}.{inside}" if rest else f"layers.{block}"


def _renamed(
    tensors: dict[str, np.ndarray], scopes: dict[str, tuple[str, str]], form: int
) -> dict[str, np.ndarray]:
    weight, bias = (("softmax/weights", "softmax/biases"), ("output.weight", "output.bias"),
                    ("fc.kernel", "fc.bias"))[form]  # fmt: skip
    state = {}
    for ours, (scope, separator) in scopes.items():
        for part, names in _PARTS.items():
            name = names[form]
            if name is None:
                name = f"{scope}{separator}beta"
                if name in tensors:
                    state[f"{ours}.{part}"] = np.ones_like(tensors[name])
                continue
            tensor = tensors.get(f"{scope}{separator}{name}")
            if tensor is not None:
                transpose = part == "conv.weight" and form != 1 and tensor.ndim == 4
                state[f"{ours}.{part}"] = tensor.transpose(3, 2, 0, 1) if transpose else tensor
    if weight in tensors:
        state["fc.weight"] = tensors[weight] if form == 1 else tensors[weight].T
    if bias in tensors:
        state["fc.bias"] = tensors[bias]
    return state


def _check(path: Path, state: dict[str, np.ndarray], wanted: dict[str, tuple[int, ...]]) -> None:
    if state.get("fc.weight", np.zeros(0)).shape == (1000, 2048):
        raise CheckpointError(
            f"{path} holds torchvision's InceptionV3 (1000 classes), whose numbers are not FID's: {WHERE}"
        )
    wrong = [name for name, shape in wanted.items() if name not in state or state[name].shape != shape]
    if wrong:
        raise CheckpointError(
            f"{path} is not FID's InceptionV3: {len(wrong)} of {len(wanted)} tensors are missing or of "
            f"another shape, the first {wrong[0]}: {WHERE}"
        )
    bad = next((name for name in wanted if not np.isfinite(state[name]).all()), None)
    if bad is not None:
        raise CheckpointError(f"{path} has NaN or infinity in {bad}: copy or download it again")
