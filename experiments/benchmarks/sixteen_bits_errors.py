"""The errors in 16 bits of a network here and of the reference's, on the same weights and inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from experiments.benchmarks.sixteen_bits import Errors
from experiments.benchmarks.sixteen_bits_cases import CASES, Case
from jaxldm import checkpoints


def randomised(model: torch.nn.Module, generator: torch.Generator, dtype: torch.dtype) -> torch.nn.Module:
    """The model with every parameter moved, none at its special start, rounded to `dtype`."""
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 / max(1.0, parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 2.0)
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
            parameter.copy_(parameter.to(dtype).to(parameter.dtype))
    return model.eval()


def reference(case: Case, model: torch.nn.Module, inputs: dict[str, np.ndarray], dtype: torch.dtype) -> Any:
    """The output of the reference in a dtype, float64, channels last."""

    def tensor(name: str, value: np.ndarray) -> torch.Tensor:
        first = torch.from_numpy(np.moveaxis(value, -1, 1).copy() if is_image(value) else value)
        exact = name in case.exact or not first.is_floating_point()
        return first if exact else first.to(dtype)

    with torch.no_grad():
        output = case.theirs(model, {name: tensor(name, value) for name, value in inputs.items()})
    output = output.double().numpy()
    return np.moveaxis(output, 1, -1) if output.ndim == 4 else output


def is_image(value: np.ndarray) -> bool:
    """Whether an input is [B, H, W, C]."""
    return value.ndim == 4


def exact(case: Case, folder: Path | str, kind: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The reference in float64, or in float32 where some of it knows nothing wider."""
    try:
        return reference(case, opened(kind, folder, torch.float64), inputs, torch.float64)
    except (RuntimeError, TypeError):
        return reference(case, opened(kind, folder, torch.float32), inputs, torch.float32)


def opened(kind: Any, folder: Path | str, dtype: torch.dtype) -> torch.nn.Module:
    """The reference's model as its pipelines open it: T5 in float16 keeps some weights in float32."""
    model = kind.from_pretrained(folder, torch_dtype=dtype).eval()
    return model.to(dtype) if kind.__module__.startswith("diffusers") else model


def measure(name: str, dtype: str, seeds: Sequence[int], **options: Any) -> Errors:
    """The errors of a case in a dtype, over all seeds.

    Args:
        options: of the compiler.
    """
    case, narrow, apply = CASES[name], getattr(torch, dtype), None
    squares = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = randomised(case.make(), torch.Generator().manual_seed(seed), narrow)
        inputs = case.inputs(np.random.default_rng(seed))
        floats = {key: value for key, value in inputs.items() if value.dtype == np.float32}
        inputs |= {key: torch.from_numpy(value).to(narrow).float().numpy() for key, value in floats.items()}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            truth = exact(case, folder, type(model), inputs)
            theirs = reference(case, opened(type(model), folder, narrow), inputs, narrow)
            module, params = checkpoints.load(folder, dtype=dtype)
        if apply is None:

            def forward(params, values, names=tuple(inputs), module=module):
                more = dict(zip(names[3:], values[3:], strict=True))
                output = module.apply({"params": params}, *values[:3], **more, method=case.method)
                return case.ours(output)

            apply = jax.jit(forward, compiler_options=options or None)
        ours = np.asarray(apply(params, tuple(inputs.values()))).astype(np.float64)
        assert ours.shape == truth.shape == theirs.shape, (ours.shape, truth.shape, theirs.shape)
        squares.append([np.square(x).mean() for x in (ours - truth, theirs - truth, truth)])
    ours, theirs, whole = np.sqrt(np.sum(squares, axis=0))
    return Errors(float(ours / whole), float(theirs / whole))
