"""LPIPS' networks from torchvision's files: `vgg16-397923af.pth` and `alexnet-owt-7be5be79.pth`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxldm import models
from jaxldm.arguments import a_path, checked
from jaxldm.checkpoints.inception_weights import LoadedNetwork, file_hash, read_weights
from jaxldm.checkpoints.names import from_state_dict, published
from jaxldm.errors import CheckpointError

WHERE = "take torchvision's vgg16-397923af.pth or alexnet-owt-7be5be79.pth"
_FIRST_KERNELS = {(64, 3, 3, 3): "vgg", (64, 3, 11, 11): "alex"}


@checked(path=a_path)
def load_lpips(path: Path | str) -> LoadedNetwork:
    """LPIPS with the network of a file, VGG16 or AlexNet, and the published heads.

    Args:
        path: of torchvision's .pth file, or its tensors as .safetensors.

    Raises:
        CheckpointError: no such file, damaged, or of another network.
    """
    path = Path(path)
    tensors = read_weights(path)
    net = _FIRST_KERNELS.get(tensors.get("features.0.weight", np.zeros(0)).shape)
    if net is None:
        raise CheckpointError(f"{path} holds neither VGG16 nor AlexNet: {WHERE}")
    module = models.LPIPS(net)
    shapes = models.shapes(module)
    state = tensors | models.lpips_heads(net)
    wanted = {name: tensor.shape for name, tensor in published(shapes).items()}
    wrong = [name for name, shape in wanted.items() if name not in state or state[name].shape != shape]
    if wrong:
        raise CheckpointError(
            f"{path} is not torchvision's {net}: {len(wrong)} tensors are missing or of another shape, the "
            f"first {wrong[0]}: {WHERE}"
        )
    params = from_state_dict({name: np.asarray(state[name], np.float32) for name in wanted}, shapes)
    return LoadedNetwork(module, params, file_hash(path), path.name)
