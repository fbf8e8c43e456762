"""torch-fidelity's side of the benchmark of metrics, and how it is imported without torchvision.

torch-fidelity and lpips import torchvision, for data sets and weights that nothing here uses. It fits one
build of PyTorch only, and transformers changes where it is installed, so a stand-in takes its place while
they are imported, unless it is there. PyTorch is imported late: without it the rest can be used.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np


class _StandIn(types.ModuleType):
    """A module that has every name, each a class."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder:
    """Finds a stand-in for each module of torchvision."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(fullname, _Finder, is_package=True)  # type: ignore[arg-type]
        return None

    @staticmethod
    def create_module(spec):
        return _StandIn(spec.name)

    @staticmethod
    def exec_module(module):
        pass


@contextlib.contextmanager
def without_torchvision():
    """A stand-in for torchvision, inside of the block, where it is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    sys.meta_path.append(_Finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(_Finder)  # type: ignore[arg-type]
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]


def module(name: str) -> Any:
    """A module of torch-fidelity or lpips."""
    with without_torchvision():
        return importlib.import_module(name)


def save_weights(path: Path, state: dict[str, np.ndarray]) -> None:
    """Writes weights as PyTorch does."""
    import torch

    torch.save({name: torch.from_numpy(tensor) for name, tensor in state.items()}, path)


class TorchFidelity:
    """Features, FID and KID of torch-fidelity, with weights of a file, on so many threads."""

    def __init__(self, weights: Path, threads: int, batch_size: int):
        import torch

        torch.set_num_threads(threads)
        kind = module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        self.network, self.batch_size = kind("inception", ["2048"], str(weights)), batch_size

    def features(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] -> [N, 2048]."""
        import torch

        rows = []
        with torch.no_grad():
            for start in range(0, len(images), self.batch_size):
                batch = images[start : start + self.batch_size].transpose(0, 3, 1, 2)
                rows.append(self.network(torch.from_numpy(np.ascontiguousarray(batch)))[0].numpy())
        return np.concatenate(rows)

    def fid(self, x: np.ndarray, y: np.ndarray) -> float:
        """FID of two sets of features."""
        import torch

        theirs = module("torch_fidelity.metric_fid")
        statistics = [theirs.fid_features_to_statistics(torch.from_numpy(rows)) for rows in (x, y)]
        return float(theirs.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"])

    def kid(self, x: np.ndarray, y: np.ndarray, subset_size: int) -> float:
        """KID over 100 subsets."""
        import torch

        theirs = module("torch_fidelity.metric_kid")
        options = {"kid_subsets": 100, "kid_subset_size": subset_size, "verbose": False, "rng_seed": 2020}
        found = theirs.kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), **options)
        return float(found["kernel_inception_distance_mean"])
