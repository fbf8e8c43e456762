"""Stage one: a KL autoencoder, trained on reconstruction and beta KL, and the scale of its latents."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm import models
from jaxldm.arguments import (
    array,
    checked,
    count,
    function,
    instance,
    number,
    one_key,
    optional,
)
from jaxldm.data.batches import Rows, map_batches
from jaxldm.exact import round_product
from jaxldm.metrics.health import check_posterior_collapse, check_reconstruction
from jaxldm.metrics.pictures import labelled_grid, save_png
from jaxldm.models import DiagonalGaussian
from jaxldm.training.adversarial import (
    Adversary,
    Perceptual,
    image_distance,
    reconstruction_loss,
)
from jaxldm.training.recipes import AutoencoderRecipe, DiffusionRecipe, Recipe
from jaxldm.training.runs import save_autoencoder
from jaxldm.training.stages import (
    Context,
    Job,
    Task,
    build_model,
    report_health,
    sample_size,
    with_names,
)
from jaxldm.training.state import Params

STAGE = "autoencoder"


@checked(posterior=instance(DiagonalGaussian, "a models.DiagonalGaussian"))
def kl_per_channel(posterior: DiagonalGaussian) -> Float[Array, " c"]:
    """KL(q(z | x) || N(0, 1)) in nats of each latent channel: summed over its places, mean over the batch.

    Source: Kingma and Welling 2014, appendix B.
    """
    return jnp.mean(jnp.sum(posterior.kl(), axis=(1, 2)), axis=0)


@checked(beta=number(0), warmup_steps=count(0), step=array("real", axes=0))
def annealed_beta(beta: float, warmup_steps: int, step: Any) -> Float[Array, ""]:
    """beta min(1, step / warmup_steps); beta at once for 0 warm-up steps.

    Source: Bowman et al. 2016, section 3.1.
    """
    if warmup_steps == 0:
        return jnp.float32(beta)
    return beta * jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / warmup_steps)


@checked(
    key=one_key,
    encode=function("images -> posterior"),
    decode=function("z -> images"),
    images=array("floating", "[B, H, W, C]", axes=4, filled=True),
    beta=array("real", axes=0),
    free_bits=array("real", axes=0),
    perceptual=optional(function("(images, decoded) -> distances")),
    log_variance=array("real", axes=0),
    adversary=optional(instance(Adversary, "a training.Adversary(...)")),
)
def autoencoder_loss(
    key: PRNGKeyArray,
    encode: Callable[[Any], DiagonalGaussian],
    decode: Callable[[Any], Any],
    images: Float[Array, "B H W C"],
    *,
    beta: Any = 1e-3,
    free_bits: Float[Array, ""] | float = 0.0,
    reconstruction: str = "mse",
    perceptual: Perceptual | None = None,
    log_variance: Any = 0.0,
    adversary: Adversary | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The negative evidence bound per pixel, with a weight on its KL term.

        loss = R / exp(s) + s + beta / (H W C) sum_k max(free_bits, KL_k) + adversarial term

    with R the mean squared ("mse") or absolute ("l1") error of a pixel for one drawn z = mean + std eps, plus
    the perceptual distance, s the log-variance, and KL_k the nats of latent channel k (`kl_per_channel`).
    All terms are divided by the numbers of an image, so beta means the same as where they are sums (latent
    diffusion has 1e-6), at every image size.

    Args:
        key: draws z.
        encode: images -> posterior; decode: z, not scaled -> images. Closed over the parameters.
        images: `[B, H, W, C]` in [-1, 1].
        beta: weight, may be traced (see `annealed_beta`).
        free_bits: nats of each channel that cost nothing, so that it does not collapse.
        perceptual: (images, decoded) -> a distance of each pair `[B]`, its weight included.
        log_variance: s, a number or a trained parameter; 0 in latent diffusion, where it starts.
        adversary: the discriminator; None trains against none. `decode` is then that of the adversary.

    Returns:
        (loss, {"reconstruction": mean error of a pixel, "kl": nats of an image, "kl_channel": nats of each
        channel [c], "beta", and of the terms that are used "perceptual", "generator", "adaptive_weight"}),
        float32.

    Sources: Higgins et al. 2017, eq. 4 (beta); Kingma et al. 2016, eq. 16 (free bits); Rombach et al. 2022,
      appendix G.
    """
    distance = image_distance(images, reconstruction, perceptual)
    posterior = encode(images)
    posterior = DiagonalGaussian(*(moment.astype(jnp.float32) for moment in posterior))
    z = posterior.sample(key)
    loss, _, metrics = reconstruction_loss(z, decode, distance, log_variance, adversary)
    kl = kl_per_channel(posterior)
    pixels = images.size // images.shape[0]
    loss = loss + beta * jnp.sum(jnp.maximum(free_bits, kl)) / pixels
    return loss, {**metrics, "kl": jnp.sum(kl), "kl_channel": kl, "beta": jnp.float32(beta)}


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


def build_autoencoder(recipe: Recipe, image_shape: tuple[int, int, int]) -> nn.Module:
    """The autoencoder of a recipe. Raises `UnknownNameError`, `InvalidArgumentError`."""
    return build_model(
        cast(AutoencoderRecipe, recipe.autoencoder),
        sample_size=sample_size(image_shape),
        in_channels=image_shape[-1],
        out_channels=image_shape[-1],
    )


def make_loss(recipe: AutoencoderRecipe, module: nn.Module, warmup_steps: int):
    """`loss_fn(params, state, batch, key)` for `make_train_step`; `batch["image"]` is `[B, H, W, C]`."""

    def loss_fn(params, state, batch, key):
        def apply(method: str) -> Callable[[Any], Any]:
            return lambda x: module.apply({"params": params}, x, method=method)

        return autoencoder_loss(
            key,
            apply("encode"),
            apply("decode"),
            batch["image"],
            beta=annealed_beta(recipe.beta, warmup_steps, state.step),
            free_bits=recipe.free_bits,
            reconstruction=recipe.reconstruction,
        )

    return loss_fn


def encode_all(
    module: nn.Module, params: Params, images: Float[np.ndarray, "N H W C"] | Rows
) -> DiagonalGaussian:
    """The posteriors of any number of images, not scaled, on the host."""
    encode = jax.jit(lambda params, batch: module.apply({"params": params}, batch, method="encode"))
    return map_batches(lambda batch: encode(params, batch), images)


def prepare(context: Context) -> Job:
    """The autoencoder of a run, which is written with its scaling_factor into `vae`."""
    recipe, folder = cast(AutoencoderRecipe, context.recipe.autoencoder), context.run.stage(STAGE)
    module = build_autoencoder(context.recipe, context.dataset.image_shape)
    rows = context.train_rows()
    held_out = context.some("validation")[0]
    reconstruct = jax.jit(lambda params, batch: module.apply({"params": params}, batch))

    def preview(params: Params, step: int) -> None:
        decoded = reconstruct(params, held_out[:32])
        save_reconstructions(folder.path / "reconstructions.png", held_out[:32], decoded)

    warmup_steps = round_product(recipe.beta_warmup_epochs, len(rows) // recipe.batch_size)
    loss = make_loss(recipe, module, warmup_steps)

    def finish(params: Params) -> None:
        posterior = cast(Any, encode_all(module, params, rows))  # of NumPy arrays
        decoded = map_batches(lambda batch: reconstruct(params, batch), held_out)
        save_reconstructions(folder.path / "reconstructions.png", held_out[:32], decoded[:32])
        scaled = with_scale(context, module, posterior)
        findings = [*check_reconstruction(held_out, decoded), *check_posterior_collapse(*posterior)]
        report_health(context, folder, findings)
        save_autoencoder(context.run, scaled, params)

    init = functools.partial(models.init, module)
    return Job(init, loss, with_names(rows, image="image"), finish, preview)


TASK = Task(lambda recipe, shape, classes: build_autoencoder(recipe, shape), prepare)


def with_scale(context: Context, module: nn.Module, posterior: Any) -> nn.Module:
    """The autoencoder with the scaling_factor and shift_factor of its latents in its config."""
    diffusion = cast(DiffusionRecipe, context.recipe.diffusion)  # masked image models have no autoencoder
    seen = posterior.log_variance if diffusion.sample_latents else None
    scale, shift = latent_scale(posterior.mean, seen)
    if context.recipe.text is not None:  # diffusers knows no shift in Stable Diffusion's pipeline
        scale, shift = float(1 / np.sqrt(scale**-2 + shift**2)), 0.0
    context.log(
        f"autoencoder: latents have mean {shift:+.3f} and standard deviation {1 / scale:.3f}; "
        f"scaling_factor {scale:.4f}"
    )
    config = dataclasses.replace(cast(Any, module).config, scaling_factor=scale, shift_factor=shift)
    return models.from_config(config)


def save_reconstructions(
    path: Path, images: Float[np.ndarray, "N H W C"], decoded: Float[np.ndarray, "N H W C"]
) -> None:
    """Write rows of eight images, each with the row of its reconstructions below it."""
    decoded = np.nan_to_num(np.asarray(decoded))
    starts = range(0, len(images), 8)
    rows = [part[start : start + 8] for start in starts for part in (images, decoded)]
    title = "Images that were not trained on, and their reconstructions"
    labels = ["image", "decoded"] * len(starts)
    columns = min(8, len(images))
    grid = labelled_grid(np.concatenate(rows), columns, title=title, row_labels=labels, scale=2)
    save_png(path, grid)
