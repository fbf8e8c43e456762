"""Dynamic transformers in training: what they begin as, and the loss that closes their gates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm import checkpoints, models, pipelines
from jaxldm.errors import InvalidArgumentError
from jaxldm.models.d2it import grain_loss, with_fine_grain
from jaxldm.models.registry import DYNAMIC
from jaxldm.models.time_routed_dit import TimeRoutedDiT
from jaxldm.pipelines.runs import check_finished
from jaxldm.training.dynamic_recipe import DynamicRecipe
from jaxldm.training.few_steps.teachers import denoiser_folder
from jaxldm.training.recipes import DiffusionRecipe
from jaxldm.training.state import Params


def check_dynamic(recipe: DiffusionRecipe, module: nn.Module) -> None:
    """Refuse a dynamic part of a recipe that does not fit its network, and a network that lacks it.

    Raises:
        InvalidArgumentError: a target for a network without routers of the time, or none for one with them;
            a source that is no trained DiT of the same size and prediction.
        CheckpointError: a source that is no finished run.
    """
    own = recipe.dynamic
    if models.class_name(cast(Any, module).config) not in DYNAMIC:
        if own is not None:
            raise InvalidArgumentError(
                f"{recipe.preset} is a {type(module).__name__}, which has no routers: leave dynamic out, or "
                "take tiny-dydit"
            )
        return
    if own is None:
        raise InvalidArgumentError(
            f"{recipe.preset} learns what to compute: give the recipe dynamic=DynamicRecipe(...)"
        )
    if isinstance(module, TimeRoutedDiT) and own.compute is None:
        raise InvalidArgumentError(
            f"{recipe.preset} has routers of the time: give the part of the compute that they are trained "
            "towards, as in compute=0.5"
        )
    if not isinstance(module, TimeRoutedDiT) and own.compute is not None:
        share = "fine_share" if isinstance(module, models.D2iT) else "token_capacity"
        raise InvalidArgumentError(
            f"{recipe.preset} costs the same at all times: give compute=None, and {share} in overrides"
        )
    if own.source is not None:
        _check_source(own.source, recipe, cast(Any, module))


def _check_source(source: str, recipe: DiffusionRecipe, module: Any) -> None:
    """Refuse a source that is not the plain DiT of the same size, with the same prediction."""
    if pipelines.kind_of(source) == "run":
        check_finished(Path(source))
    found = cast(Any, checkpoints.module_in(denoiser_folder(source)))
    if type(found.config) is not models.DiTConfig:
        raise InvalidArgumentError(f"{source} holds a {type(found).__name__}: give the run of a DiT")
    ours = {field.name: getattr(module.config, field.name) for field in dataclasses.fields(found.config)}
    for name, value in dataclasses.asdict(found.config).items():
        if name not in ("dtype", "remat", "scan", "dropout") and value != ours[name]:
            raise InvalidArgumentError(
                f"{source} has {name} {value}, the network of the recipe {ours[name]}: give it overrides "
                f"with {name}={value!r}"
            )
    prediction = pipelines.load(source).prediction
    if prediction != recipe.prediction:
        raise InvalidArgumentError(
            f"{source} was trained to predict {prediction.name} on a {prediction.path.name} path: give the "
            "recipe the same prediction"
        )


def begin_dynamic(own: DynamicRecipe, module: nn.Module, key: PRNGKeyArray) -> Params:
    """The parameters of the source with routers that leave all open, or new ones."""
    if own.source is None:
        return models.init(module, key)
    _, params = checkpoints.load(denoiser_folder(own.source))
    params = models.init_from(module, key, params)
    if isinstance(module, models.D2iT) and module.config.fine_share > 0:
        return with_fine_grain(params, module.config)
    return params


def routing_loss(
    own: DynamicRecipe, module: nn.Module, said: Mapping[str, Any], x_0: Float[Array, "B H W C"]
) -> tuple[Any, dict[str, Any]]:
    """What a network's routers add to the loss, and figures for the log.

    Args:
        own: of the recipe.
        module: the network.
        said: what it sowed in the collection "routing".
        x_0: the clean images.
    """
    if "compute" in said:
        (share,) = said["compute"]
        return compute_loss(own, share), {"compute": jnp.mean(share)}
    if "grains" in said:
        (logits,) = said["grains"]
        config = cast(Any, module).config
        term = grain_loss(logits, x_0, config.patch_size, config.num_fine(logits.shape[1]))
        return own.weight * term, {"grains": term}
    return 0.0, {}


def compute_loss(own: DynamicRecipe, share: Float[Array, " B"]) -> Float[Array, ""]:
    """The square of how far the mean share of the compute is from the target, times its weight.

    Zhao et al. 2024 (DyDiT), section 3.4.
    """
    return own.weight * jnp.square(jnp.mean(share) - cast(float, own.compute))


def as_drawn(module: nn.Module, params: Params) -> nn.Module:
    """The finished network: what its routers closed is no longer computed."""
    return models.fix_routers(module, params) if isinstance(module, TimeRoutedDiT) else module
