"""The valid calls that `misuse` starts from, of smaller networks: pruned ones, and merged tokens."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.faults.misuse_cases import KEY, VP, Case
from experiments.faults.small_folders import zeros
from jaxldm import diffusion as D
from jaxldm import models, nn, pipelines
from jaxldm.models import pruning

SIZES: dict[str, Any] = dict(sample_size=4, in_channels=1, patch_size=2, hidden_size=8, depth=1, num_heads=2)


def loss_of(params: Any, t: Any) -> Any:
    """A loss of parameters."""
    return jnp.sum(params["blocks_0"]["mlp"]["fc2"]["kernel"] * t)


def cases_of_smaller() -> list[Case]:
    """Trees, pipelines, tokens."""
    module = models.build("tiny-dit", **SIZES, num_classes=3)
    params = zeros(module).params
    pipe = pipelines.class_to_image(zeros(module), D.v(VP))
    units = pruning.Units(np.ones((1, 2)), np.ones((1, 32)))
    tree = {"module": module, "params": params}
    x = np.ones((1, 4, 8), np.float32)
    match = nn.match_tokens(jnp.asarray(x), (2, 2), 0.5)
    images, labels = np.zeros((2, 4, 4, 1), np.float32), np.zeros(2, np.int32)
    fit = "size must be|do not go together|must be"
    return [
        Case(
            "models.pruning.importance",
            pruning.importance,
            {**tree, "loss": loss_of, "times": np.ones(1, np.float32)},
            False,
            {"times": "times|t"},
        ),
        Case("models.pruning.mask", pruning.mask, {"importance": units, "heads": 0.5, "channels": 0.5}),
        Case("models.pruning.unit_counts", pruning.unit_counts, {"module": module}),
        Case("models.pruning.masked", pruning.masked, {**tree, "keep": pruning.mask(units)}, False),
        Case("models.pruning.sliced", pruning.sliced, {**tree, "keep": pruning.mask(units)}, False),
        Case("pipelines.prune", pipelines.prune, {"pipe": pipe, "keep": pruning.mask(units)}, False),
        Case(
            "pipelines.unit_importance",
            pipelines.unit_importance,
            {"pipe": pipe, "key": KEY, "images": images, "labels": labels, "num_times": 1, "batch_size": 2},
            False,
        ),
        Case(
            "pipelines.with_token_merging",
            pipelines.with_token_merging,
            {"pipe": pipe, "token_merging": 0.5},
            False,
        ),
        Case(
            "models.TokenMerging", models.TokenMerging, {"ratio": 0.5, "cross_attention": False, "mlp": True}
        ),
        Case(
            "nn.match_tokens",
            nn.match_tokens,
            {"x": x, "size": (2, 2), "ratio": 0.5},
            False,
            {"x": f"x|{fit}"},
        ),
        Case("nn.merge_tokens", nn.merge_tokens, {"x": x, "match": match}, False, {"x": f"x|{fit}"}),
        Case(
            "nn.unmerge_tokens", nn.unmerge_tokens, {"y": x[:, :2], "match": match}, False, {"y": f"y|{fit}"}
        ),
    ]
