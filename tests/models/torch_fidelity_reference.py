"""Modules of torch-fidelity and lpips, which import torchvision for data sets and weights that no test uses.

torchvision fits one build of PyTorch only, and transformers changes where it is installed, so a stand-in
takes its place while they are imported, unless it is there.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types

import pytest


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
            return importlib.machinery.ModuleSpec(fullname, _Finder, is_package=True)
        return None

    @staticmethod
    def create_module(spec):
        return _StandIn(spec.name)

    @staticmethod
    def exec_module(module):
        pass


@contextlib.contextmanager
def without_torchvision():
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    sys.meta_path.append(_Finder)
    try:
        yield
    finally:
        sys.meta_path.remove(_Finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]


def reference(name: str):
    """A module of torch-fidelity or lpips; skips the test where they are not installed."""
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install --no-deps torch-fidelity lpips")
    with without_torchvision():
        return importlib.import_module(name)
