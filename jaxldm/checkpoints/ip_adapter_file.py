"""Files of IP-Adapters, plain and plus, for Stable Diffusion 1.5 and XL.

| tensors | of |
|---|---|
| `image_proj.proj`, `image_proj.norm` | the plain adapter: four tokens of the embedding of a picture |
| `image_proj.latents`, `.layers.0.0.to_kv`, ... | the plus adapter: a resampler of all patches |
| `ip_adapter.1.to_k_ip`, `.to_v_ip`, `ip_adapter.3...` | the keys and values of each cross-attention layer |

A .bin is a pickle, of which `torch_file` reads arrays and nothing else. The numbers count the attention
layers of the U-Net, down, up and then in the middle; those to a text are the odd ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxldm import models
from jaxldm.arguments import a_dtype, a_path, checked, optional
from jaxldm.checkpoints.file_kinds import check_kind_of_file
from jaxldm.checkpoints.names import from_state_dict
from jaxldm.checkpoints.safetensors_file import open_safetensors
from jaxldm.checkpoints.torch_file import PICKLES, read_torch_file
from jaxldm.errors import CheckpointError
from jaxldm.models.ip_adapter import HEAD_DIM, PLAIN_TOKENS, ImageProjection, Resampler
from jaxldm.reading import reading, some_of

OTHERS = {
    "proj.3.weight": "a full-face adapter",
    "perceiver_resampler.proj_in.weight": "a FaceID plus adapter",
    "proj.2.weight": "a FaceID adapter",
}
_LAYER = re.compile(r"(\d+)\.to_([kv])_ip\.weight")


class IPAdapter(NamedTuple):
    """What a file holds.

    Attributes:
        module, params: of the projection, `ImageProjection` or `Resampler`.
        layers: (K, V) of each cross-attention layer, in the order of the file, [features, channels] each.
    """

    module: nn.Module
    params: dict[str, Any]
    layers: tuple[tuple[Float[np.ndarray, "D C"], Float[np.ndarray, "D C"]], ...]

    @property
    def takes_patches(self) -> bool:
        """Whether it takes the states of all patches (plus), or the embedding of the picture (plain)."""
        return isinstance(self.module, Resampler)


@checked(path=a_path, dtype=optional(a_dtype))
def load_ip_adapter(path: Path | str, *, dtype: str | None = None) -> IPAdapter:
    """The projection and the attention layers of an IP-Adapter.

    Args:
        path: a published file, such as ip-adapter_sd15.safetensors or ip-adapter-plus_sdxl_vit-h.bin.
        dtype: of the parameters and of what the projection computes in; None: float32.

    Raises:
        CheckpointError: no such file, a damaged one, one of something else or of another kind; NaN.
    """
    path = Path(path)
    tensors = read_torch_file(path) if path.suffix in PICKLES else open_safetensors(path).tensors
    check_kind_of_file(path, tensors, "an IP-Adapter")
    groups: dict[str, dict[str, Any]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups.get(group, {})[rest] = tensor
    missing = [f"{name}.*" for name, found in groups.items() if not found]
    if missing:
        there = some_of(list(tensors)) or "nothing"
        raise CheckpointError(f"{path} is no IP-Adapter: it lacks {' and '.join(missing)}, it has {there}")
    with reading(path):
        projection, dtype = groups["image_proj"], dtype or "float32"
        module = _module_of(projection, dtype)
        params = from_state_dict(projection, models.shapes(module), dtype=dtype)
        return IPAdapter(module, params, _layers(groups["ip_adapter"], dtype))


def _module_of(tensors: Mapping[str, Any], dtype: str) -> nn.Module:
    """The projection that these tensors are of."""
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(shape.get("proj.weight", ())) == 2:
        rows, width = shape["proj.weight"]
        return ImageProjection(width, rows // PLAIN_TOKENS, dtype)
    needed = ("latents", "proj_in.weight", "proj_out.weight", "layers.0.0.to_q.weight", "layers.0.1.1.weight")
    if all(len(shape.get(name, ())) >= 2 for name in needed):
        latents, proj_in, proj_out, to_q, ffn = (shape[name] for name in needed)
        layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
        sizes = (proj_in[1], proj_out[0], latents[-1], latents[-2], to_q[0] // HEAD_DIM)
        if all(sizes):
            return Resampler(*sizes, len(layers), ffn[0], dtype)
    other = next((words for name, words in OTHERS.items() if name in shape), "of another kind")
    raise CheckpointError(f"it is {other}; known are the plain and the plus adapters")


def _layers(tensors: Mapping[str, Any], dtype: str) -> tuple:
    """(K, V) of each layer, by their numbers."""
    found: dict[int, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        place = _LAYER.fullmatch(name)
        if place is None:
            raise CheckpointError(f"ip_adapter.{name} is of another kind of adapter; known: 1.to_k_ip.weight")
        number, kind = int(place[1]), place[2]
        found.setdefault(number, {})[kind] = np.asarray(tensor)
    for number, pair in found.items():
        shapes = {kernel.shape for kernel in pair.values()}
        if len(pair) != 2 or len(shapes) != 1 or any(len(shape) != 2 or 0 in shape for shape in shapes):
            raise CheckpointError(f"ip_adapter.{number} lacks to_k_ip or to_v_ip, or they differ in shape")
        for kind, kernel in pair.items():
            if not np.isfinite(kernel.astype(np.float32)).all():
                name = f"ip_adapter.{number}.to_{kind}_ip.weight"
                raise CheckpointError(f"{name} holds NaN or infinity: copy the file again")
    kernels = [found[number] for number in sorted(found)]
    return tuple(tuple(pair[kind].T.astype(jnp.dtype(dtype)) for kind in "kv") for pair in kernels)
