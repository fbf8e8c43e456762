"""Stage one: a KL autoencoder, trained on reconstruction and beta KL, and the scale of its latents."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxldm import models
from jaxldm.arguments import (
    array,
    checked,
    optional,
)
from jaxldm.data.batches import Rows, map_batches
from jaxldm.metrics.health import check_channels, check_reconstruction
from jaxldm.metrics.pictures import labelled_grid, save_png
from jaxldm.models import DiagonalGaussian
from jaxldm.training.autoencoder_players import (
    LEAST_LOG_VARIANCE,
    build_discriminator,
    has_codebook,
    make_game,
)
from jaxldm.training.perceptual import check_perceptual
from jaxldm.training.recipes import AutoencoderRecipe, Recipe
from jaxldm.training.runs import save_autoencoder
from jaxldm.training.stages import (
    Context,
    Job,
    Task,
    build_model,
    of_one_shape,
    report_health,
    sample_size,
    with_names,
)
from jaxldm.training.state import Params

STAGE = "autoencoder"


@checked(
    mean=array("floating", "[N, h, w, c]", axes=(1, 64), filled=True),
    log_variance=optional(array("floating")),
)
def latent_scale(
    mean: Float[np.ndarray, "N h w c"], log_variance: Float[np.ndarray, "N h w c"] | None
) -> tuple[float, float]:
    """(scaling_factor, shift_factor) that give latents drawn from these posteriors mean 0 and variance 1.

        shift = E[mean],  scale = 1 / sqrt(Var[mean] + E[exp(log_variance)])

    over all examples, places and channels. Source: Rombach et al. 2022, appendix G (without the shift).
    Without log_variance the second term is left out: for a diffusion model that is trained on the means,
    which with a strong KL term vary much less than the draws.
    """
    mean = np.asarray(mean, np.float64)
    spread = 0.0 if log_variance is None else np.exp(np.asarray(log_variance, np.float64)).mean()
    return float(1 / np.sqrt(mean.var() + spread)), float(mean.mean())


class Moments(NamedTuple):
    """What posteriors N(m, s^2) are on average, over all examples and places.

    Attributes:
        mean, square, spread: of m, m^2 and s^2, over the channels too.
        kl: of each channel to N(0, 1), in nats per number.
    """

    mean: float
    square: float
    spread: float
    kl: Float[np.ndarray, " c"]

    def scale(self, on_means: bool) -> tuple[float, float]:
        """What `latent_scale` is of the posteriors, or of their means."""
        variance = self.square - self.mean**2 + (0.0 if on_means else self.spread)
        return float(1 / np.sqrt(variance)), float(self.mean)


def posterior_moments(module: nn.Module, params: Params, rows: Rows, at_once: int = 256) -> Moments:
    """The moments of the posteriors of any number of images, of which so many are in memory at once."""
    encode = _encoder(module)

    def of(batch: Any) -> dict[str, Any]:
        posterior = encode(params, batch)
        mean, log_variance = (np.asarray(part, np.float64) for part in posterior)
        square, spread = mean**2, np.exp(log_variance)
        kl = 0.5 * (square + spread - 1 - log_variance)
        each = {"mean": mean, "square": square, "spread": spread}
        means = {name: part.reshape(len(part), -1).mean(axis=1) for name, part in each.items()}
        return means | {"kl": kl.reshape(len(kl), -1, kl.shape[-1]).mean(axis=1)}

    return Moments(**{name: part.mean(axis=0) for name, part in map_batches(of, rows, at_once).items()})


def build_autoencoder(recipe: Recipe, image_shape: tuple[int, int, int]) -> nn.Module:
    """The autoencoder of a recipe, and what its loss needs once, so that it fails now where it would later.

    Raises `UnknownNameError`, `InvalidArgumentError`, `CheckpointError`.
    """
    own = cast(AutoencoderRecipe, recipe.autoencoder)
    check_perceptual(own, image_shape)
    if own.discriminator is not None:
        build_discriminator(own, image_shape)
    return build_model(
        own,
        sample_size=sample_size(image_shape),
        in_channels=image_shape[-1],
        out_channels=image_shape[-1],
    )


def as_posterior(encoded: Any) -> DiagonalGaussian:
    """What an autoencoder's `encode` gives, latents before a codebook as a posterior without spread."""
    if isinstance(encoded, DiagonalGaussian):
        return encoded
    return DiagonalGaussian(encoded, jnp.full_like(encoded, LEAST_LOG_VARIANCE))


def encode_all(
    module: nn.Module, params: Params, images: Float[np.ndarray, "N H W C"] | Rows, at_once: int = 256
) -> DiagonalGaussian:
    """The posteriors of any number of images, so many at once, not scaled, on the host."""
    encode = _encoder(module)
    return map_batches(lambda batch: encode(params, batch), images, at_once)


@functools.lru_cache(maxsize=4)  # so that the shards of a run compile it once
def _encoder(module: nn.Module) -> Callable[[Params, Any], DiagonalGaussian]:
    def encode(params: Any, batch: Any) -> DiagonalGaussian:
        return as_posterior(cast(Any, module.apply({"params": params}, batch, method="encode")))

    return jax.jit(encode)


def prepare(context: Context) -> Job:
    """The autoencoder of a run, which is written with its scaling_factor into `vae`."""
    recipe, folder = cast(AutoencoderRecipe, context.recipe.autoencoder), context.run.stage(STAGE)
    module = build_autoencoder(context.recipe, context.dataset.image_shape)
    rows = context.train_rows()
    held_out = context.some("validation")[0]
    reconstruct = jax.jit(lambda params, batch: module.apply({"params": params}, batch))
    game = make_game(context, recipe, module, len(rows))

    def preview(params: Params, step: int) -> None:
        decoded = np.asarray(reconstruct(game.network(params), held_out[:32]))
        save_reconstructions(folder.path / "reconstructions.png", held_out[:32], decoded)

    def finish(params: Params) -> None:
        network = game.network(params)
        moments = posterior_moments(module, network, of_one_shape(rows))
        decoded = map_batches(lambda batch: reconstruct(network, batch), held_out)
        save_reconstructions(folder.path / "reconstructions.png", held_out[:32], decoded[:32])
        scaled = with_scale(context, module, moments)
        findings = list(check_reconstruction(held_out, decoded))
        if not has_codebook(module):
            findings += check_channels(moments.kl)
        report_health(context, folder, findings)
        save_autoencoder(context.run, scaled, network)

    return Job(game.init, game.loss, with_names(rows, image="image"), finish, preview, frozen=game.frozen)


TASK = Task(lambda recipe, shape, classes: build_autoencoder(recipe, shape), prepare)


def with_scale(context: Context, module: nn.Module, moments: Moments) -> nn.Module:
    """The autoencoder with the scaling_factor and shift_factor of its latents in its config."""
    diffusion, config = context.recipe.diffusion, cast(Any, module).config
    on_means = diffusion is not None and not diffusion.sample_latents
    scale, shift = moments.scale(on_means)
    # diffusers knows no shift in Stable Diffusion's pipeline, nor of an autoencoder with a codebook.
    has_shift = hasattr(config, "shift_factor") and context.recipe.text is None
    if not has_shift:
        scale, shift = float(1 / np.sqrt(scale**-2 + shift**2)), 0.0
    context.log(
        f"autoencoder: latents have mean {shift:+.3f} and standard deviation {1 / scale:.3f}; "
        f"scaling_factor {scale:.4f}"
    )
    shifted = {"shift_factor": shift} if hasattr(config, "shift_factor") else {}
    return models.from_config(dataclasses.replace(config, scaling_factor=scale, **shifted))


def save_reconstructions(
    path: Path, images: Float[np.ndarray, "N H W C"], decoded: Float[np.ndarray, "N H W C"]
) -> None:
    """Write rows of eight images, each with the row of its reconstructions below it."""
    decoded = np.clip(np.nan_to_num(np.asarray(decoded)), -1, 1)  # a diverged one is drawn as well
    starts = range(0, len(images), 8)
    rows = [part[start : start + 8] for start in starts for part in (images, decoded)]
    title = "Images that were not trained on, and their reconstructions"
    labels = ["image", "decoded"] * len(starts)
    columns = min(8, len(images))
    grid = labelled_grid(np.concatenate(rows), columns, title=title, row_labels=labels, scale=2)
    save_png(path, grid)
