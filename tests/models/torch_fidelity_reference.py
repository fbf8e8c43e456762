"""Modules of torch-fidelity and lpips, imported without torchvision."""

import importlib.util

import pytest

from experiments.benchmarks.torch_fidelity_side import module


def reference(name: str):
    """A module of torch-fidelity or lpips; skips the test where they are not installed."""
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install --no-deps torch-fidelity lpips")
    return module(name)
