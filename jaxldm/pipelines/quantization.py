"""The denoising network of a pipeline in fewer bits, and the calibration that smoothing needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from jaxldm import models
from jaxldm.arguments import a_key, checked, instance, optional
from jaxldm.errors import InvalidArgumentError
from jaxldm.models.quantization import A_QUANTIZATION, check_can_quantize
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline

A_CALIBRATION = instance(dict, "what pipelines.calibrate_quantization(pipe, key, ...) returns")


@checked(pipe=A_PIPELINE, how=A_QUANTIZATION, input_max=optional(A_CALIBRATION))
def quantize(
    pipe: Pipeline, how: models.Quantization, input_max: dict[tuple[str, ...], Any] | None = None
) -> Pipeline:
    """The model with its denoising network in fewer bits; the one that was given stays as it is.

    It draws, is cached, takes a LoRA and is saved as any other; `load` reads what `save` writes.

    Args:
        how: `models.quantization("int8")`, "fp8", "int4", or settings of your own.
        input_max: of `calibrate_quantization`, for settings with `smooth`.

    Raises:
        InvalidArgumentError: a model that is quantised already, or of whose network nothing is known here;
            smoothing without a calibration, or the other way round.

    >>> from jaxldm import models, pipelines                                        # doctest: +SKIP
    >>> pipe = pipelines.load("stable-diffusion-v1-5", dtype="bfloat16")            # doctest: +SKIP
    >>> small = pipelines.quantize(pipe, models.quantization("int8"))               # doctest: +SKIP
    >>> pipelines.save(small, "stable-diffusion-v1-5-int8")                         # doctest: +SKIP
    """
    if input_max is not None and how.smooth is None:
        raise InvalidArgumentError(
            "input_max is for smoothing, which these settings leave out: give smooth=0.5 to "
            "models.quantization, or leave input_max out"
        )
    network = pipe.denoiser
    params = models.quantize(network.module, network.params, how, input_max)
    return pipe.replace(**{pipe.denoiser_name: Network(network.module, params)})


@checked(pipe=A_PIPELINE, key=a_key)
def calibrate_quantization(
    pipe: Pipeline, key: Any, *prompts: Any, **options: Any
) -> dict[tuple[str, ...], np.ndarray]:
    """Draw the call pipe(key, *prompts, **options), and watch what goes into each layer.

    Pooled over the images and over all steps of the run, as in Q-Diffusion (Li et al. 2023, arXiv:2302.04304,
    section 3.3): inputs of early steps have other ranges than those of late ones, and all use the same
    weights. A few images in 20 evenly spaced steps will do.

    Returns:
        {path of a layer: the largest absolute input of each channel}.

    Raises:
        InvalidArgumentError, UnknownNameError, DataError: as the call itself; a network that cannot be
            quantised, or is; a cache.

    >>> found = pipelines.calibrate_quantization(pipe, key, ["a cat"])  # doctest: +SKIP
    >>> how = models.quantization("int8", smooth=0.5)  # doctest: +SKIP
    >>> small = pipelines.quantize(pipe, how, found)  # doctest: +SKIP
    """
    network = pipe.denoiser
    check_can_quantize(network.module, network.params)
    for name in ("cache", "compile_only"):
        if options.get(name):
            raise InvalidArgumentError(f"a calibration computes every step: leave {name} out")
    found: dict[tuple[str, ...], np.ndarray] = {}

    def pool(maxima: Any) -> None:
        for path, value in traverse_util.flatten_dict(maxima).items():
            value, before = np.asarray(value), found.get(path[:-1])
            found[path[:-1]] = value if before is None else np.maximum(before, value)

    watched = Network(_watched(network.module, pool), network.params)
    pipe.replace(**{pipe.denoiser_name: watched})(key, *prompts, **options | {"output": "latents"})
    jax.effects_barrier()
    return found


def _watched(module: Any, sink: Callable[[Any], None]) -> Any:
    """The same module, which hands the largest inputs of its layers to the host at every call."""
    kind: Any = type(module)

    class Watched(kind):
        """A network of the same class and config: the pipeline sees no difference."""

        def apply(self, variables: Any, *inputs: Any, **more: Any) -> Any:
            output, kept = super().apply(variables, *inputs, **more, mutable=["calibration"])
            jax.debug.callback(sink, kept["calibration"])
            return output

    return Watched(module.config)
