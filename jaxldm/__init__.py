"""`jaxldm`: latent diffusion as pure functions in JAX and Flax.

The rooms (`jaxldm.diffusion`, `jaxldm.models`, `jaxldm.data`, ...) are imported when first touched, so
`import jaxldm` itself costs almost nothing.
"""

import importlib

__version__ = "0.2.0"
__all__ = [
    "checkpoints",
    "data",
    "diffusion",
    "errors",
    "few_steps",
    "host",
    "metrics",
    "models",
    "nn",
    "pipelines",
    "training",
]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"jaxldm.{name}")
    raise AttributeError(f"module 'jaxldm' has no attribute {name!r}")


def __dir__():
    return sorted([*__all__, "__version__"])
