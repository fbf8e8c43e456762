"""Two pipelines compared tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np

from jaxldm import checkpoints
from jaxldm.arguments import checked
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline


@checked(pipe=A_PIPELINE)
def components(pipe: Pipeline) -> Iterator[tuple[str, Any, Any]]:
    """(name of the subfolder, module, parameters) of each network of a pipeline, the denoiser last."""
    names = sorted(pipe.networks, key=lambda name: name == pipe.denoiser_name)
    yield from ((name, pipe.networks[name].module, pipe.networks[name].params) for name in names)


class TensorComparison(NamedTuple):
    """One tensor in two places. `difference` describes what differs; empty where all bits are equal."""

    name: str
    shape: tuple[int, ...]
    difference: str


@checked(first=A_PIPELINE, second=A_PIPELINE)
def compare(first: Pipeline, second: Pipeline) -> list[TensorComparison]:
    """Compare two pipelines tensor by tensor, under the names that the safetensors files use, bit by bit."""
    tensors = [
        {
            f"{name}/{key}": np.asarray(value)
            for name, _, params in components(pipe)
            for key, value in checkpoints.to_state_dict(params).items()
        }
        for pipe in (first, second)
    ]
    return [
        _compare_tensor(name, *(side.get(name) for side in tensors))
        for name in sorted(tensors[0] | tensors[1])
    ]


def _compare_tensor(name: str, first: np.ndarray | None, second: np.ndarray | None) -> TensorComparison:
    present = cast(np.ndarray, first if first is not None else second)
    if first is None or second is None:
        return TensorComparison(name, present.shape, f"only in the {'second' if first is None else 'first'}")
    if first.shape != second.shape or first.dtype != second.dtype:
        return TensorComparison(
            name, first.shape, f"{first.dtype}{list(first.shape)} and {second.dtype}{list(second.shape)}"
        )
    # Bytes and not numbers: -0.0 is not 0.0, and NaN is equal to itself.
    bits = [np.ascontiguousarray(side).view(np.uint8).reshape(*side.shape, -1) for side in (first, second)]
    differing = int((bits[0] != bits[1]).any(axis=-1).sum())
    return TensorComparison(
        name, first.shape, f"{differing} of {first.size} numbers differ" if differing else ""
    )
