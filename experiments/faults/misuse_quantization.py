"""The valid calls that `misuse` starts from, of networks in fewer bits and of dynamic ones."""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.faults.misuse_cases import KEY, VP, Case
from experiments.faults.small_folders import zeros
from jaxldm import diffusion as D
from jaxldm import models, pipelines

SIZES: dict[str, Any] = dict(sample_size=4, in_channels=1, patch_size=2, hidden_size=8, depth=1, num_heads=2)


def cases_of_quantization() -> list[Case]:
    """Settings, trees, pipelines."""
    module = models.build("tiny-dit", **SIZES, num_classes=3)
    params, how = zeros(module).params, models.quantization("int8")
    pipe = pipelines.class_to_image(zeros(module), D.v(VP))
    tree = {"module": module, "params": params}
    fields = {field.name: getattr(how, field.name) for field in dataclasses.fields(how)}
    routed = models.build("tiny-dydit", **SIZES, channel_groups=2, num_classes=3)
    dynamic = zeros(routed).params
    words = {"weights": "weights", "modulation": "modulation", "activations": "activations"}
    return [
        Case("models.fix_routers", models.fix_routers, {"module": routed, "params": dynamic}, False),
        Case(
            "models.planned_groups",
            models.planned_groups,
            {"module": models.fix_routers(routed, dynamic)},
            False,
        ),
        Case("models.Quantization", models.Quantization, fields, words=words),
        Case("models.quantization", models.quantization, {"bits": "int8"}),
        Case("models.quantize", models.quantize, {**tree, "how": how, "input_max": None}, False),
        Case("models.quantized_shapes", models.quantized_shapes, {"module": module, "how": how}, False),
        Case("models.dequantize", models.dequantize, {"params": params}),
        Case("models.how_quantized", models.how_quantized, {"params": params}),
        Case("models.param_count", models.param_count, {"params": params}),
        Case("models.param_bytes", models.param_bytes, {"params": params}),
        Case("pipelines.quantize", pipelines.quantize, {"pipe": pipe, "how": how, "input_max": None}, False),
        Case(
            "pipelines.calibrate_quantization",
            pipelines.calibrate_quantization,
            {"pipe": pipe, "key": KEY, "num_inference_steps": 1},
            False,
            {"num_inference_steps": "steps"},
        ),
    ]
