"""The loss of a denoising network: its error, and what a recipe adds to that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.models.denoising_network import applied
from jaxldm.models.time_routed_dit import ROUTING
from jaxldm.training.conditions import Condition, label_condition
from jaxldm.training.denoiser_terms import (
    alignment_loss,
    kept_tokens,
    learned_log_variance,
    new_log_variance,
    new_projector,
    project,
)
from jaxldm.training.dynamic import begin_dynamic, routing_loss
from jaxldm.training.frozen_features import FrozenFeatures
from jaxldm.training.recipes import AlignmentRecipe, DiffusionRecipe
from jaxldm.training.state import Params

LOG_VARIANCE, PROJECTOR = "log_variance", "projector"  # trained next to the network
FEATURES = "features"  # the frozen parameters of an encoder


def new_params(
    recipe: DiffusionRecipe, module: nn.Module, key: PRNGKeyArray, features: FrozenFeatures | None = None
) -> Params:
    """Parameters of the network, and of what is trained next to it."""
    own = recipe.dynamic
    params = dict(models.init(module, key) if own is None else begin_dynamic(own, module, key))
    if recipe.learn_log_variance:
        params[LOG_VARIANCE] = new_log_variance()
    if features is not None:
        hidden = cast(AlignmentRecipe, recipe.alignment).hidden
        width = cast(Any, module).config.hidden_size
        params[PROJECTOR] = new_projector(jax.random.fold_in(key, 1), width, hidden, features.width)
    return params


def network_params(params: Params) -> Params:
    """Those of the network alone."""
    return {name: value for name, value in params.items() if name not in (LOG_VARIANCE, PROJECTOR)}


def make_loss(
    recipe: DiffusionRecipe,
    module: nn.Module,
    condition: Condition | None = None,
    features: FrozenFeatures | None = None,
) -> Callable[..., Any]:
    """`loss_fn(params, state, batch, key)` for `make_train_step`.

    `batch`: `mean` `[B, h, w, c]`, the condition's columns (`label` int32 `[B]` where it is None) and, to
    draw x_0 = mean + std N(0, 1) at each update, `std`; `image` where its features are aligned with.
    """
    on = label_condition(cast(Any, module).config.num_classes) if condition is None else condition
    weight, time = recipe.make_weight(), recipe.make_time()

    def loss_fn(params, state, batch, key):
        latent_key, loss_key, dropout_key = jax.random.split(key, 3)
        x_0 = batch["mean"]
        if "std" in batch:
            x_0 = x_0 + batch["std"] * jax.random.normal(latent_key, x_0.shape)
        call = _Call(recipe, module, network_params(params), dropout_key, tapped=[])
        log_variance = params.get(LOG_VARIANCE)
        loss, metrics = D.diffusion_loss(
            loss_key,
            call,
            recipe.prediction,
            x_0,
            on.of(batch),
            weight=weight,
            time=time,
            log_variance=log_variance and (lambda log_snr: learned_log_variance(log_variance, log_snr)),
            noise_offset=recipe.noise_offset,
            null_condition=on.nulls(batch),
            condition_dropout=recipe.condition_dropout,
        )
        if recipe.dynamic is not None:
            own, figures = routing_loss(recipe.dynamic, module, call.tapped[0], x_0)
            return loss + own, {**metrics, **figures}
        if features is None:
            return loss, metrics
        wanted = features.of(state.frozen[FEATURES], batch["image"])
        tokens, which = call.tapped[0]
        aligned = _alignment(params[PROJECTOR], tokens, which, wanted)
        weight_of_it = cast(AlignmentRecipe, recipe.alignment).weight
        return loss + weight_of_it * aligned, {**metrics, "alignment": aligned}

    return loss_fn


class _Call(NamedTuple):
    """The network as `D.diffusion_loss` calls it.

    Attributes:
        tapped: is given (tokens, which tokens these are or None) of the call, or what its routers say.
    """

    recipe: DiffusionRecipe
    module: nn.Module
    params: Params
    key: PRNGKeyArray
    tapped: list[Any]

    def __call__(self, x: Any, t: Any, condition: Any) -> Any:
        config = cast(Any, self.module).config
        route, tap = getattr(config, "route", None), getattr(config, "tap", None)
        if self.recipe.dynamic is not None:
            options = {"rngs": {"dropout": self.key}, "mutable": [ROUTING]}
            output, inside = applied(self.module)(self.params, x, t, condition, {"train": True}, **options)
            self.tapped.append(inside.get(ROUTING, {}))
            return output
        if route is None and tap is None:
            return models.network(self.module)(self.params, x, t, condition, dropout_key=self.key)
        kept, more = None, cast(dict[str, Any], {"train": True})
        if route is not None:
            rows, columns = config.grid_size
            route_key = jax.random.fold_in(self.key, 1)
            kept = kept_tokens(route_key, x.shape[0], rows * columns, self.recipe.route_share)
            more["kept"] = kept
        options = {"rngs": {"dropout": self.key}, "mutable": ["intermediates"]}
        output, inside = applied(self.module)(self.params, x, t, condition, more, **options)
        if tap is not None:
            on_route = route is not None and route[0] < tap < route[1]  # behind it the others are back
            self.tapped.append((inside["intermediates"]["tapped"][0], kept if on_route else None))
        return output


def _alignment(
    projector: Params, tokens: Float[Array, "B k C"], which: Any, features: Float[Array, "B N D"]
) -> Float[Array, ""]:
    """`alignment_loss` of the tokens that there are."""
    if which is not None:
        features = jnp.take_along_axis(features, which[..., None], axis=1)
    return alignment_loss(project(projector, tokens), features)
