"""The losses of autoencoders: reconstruction and beta KL, or reconstruction and commitment to a codebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm.arguments import array, checked, count, function, instance, number, one_key, optional
from jaxldm.functions import returned
from jaxldm.models import DiagonalGaussian
from jaxldm.pixels import in_unit_range
from jaxldm.training.adversarial import Adversary, Perceptual, image_distance, reconstruction_loss
from jaxldm.training.codebook import quantization_losses

A_PERCEPTUAL = optional(function("(images, decoded) -> distances"))
A_POSTERIOR = instance(DiagonalGaussian, "a models.DiagonalGaussian")
AN_ADVERSARY = optional(instance(Adversary, "a training.Adversary(...)"))


@checked(posterior=A_POSTERIOR)
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
    images=in_unit_range(array("floating", "[B, H, W, C]", axes=4, filled=True)),
    beta=array("real", axes=0),
    free_bits=array("real", axes=0),
    perceptual=A_PERCEPTUAL,
    log_variance=array("real", axes=0),
    adversary=AN_ADVERSARY,
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
    posterior = A_POSTERIOR("what encode returns", encode(images))
    posterior = DiagonalGaussian(*(moment.astype(jnp.float32) for moment in posterior))
    z = posterior.sample(key)
    loss, _, metrics = reconstruction_loss(z, decode, distance, log_variance, adversary)
    kl = kl_per_channel(posterior)
    pixels = images.size // images.shape[0]
    loss = loss + beta * jnp.sum(jnp.maximum(free_bits, kl)) / pixels
    return loss, {**metrics, "kl": jnp.sum(kl), "kl_channel": kl, "beta": jnp.float32(beta)}


@checked(
    encode=function("images -> latents"),
    decode=function("latents -> images"),
    table=array("floating", "[K, c]", axes=2, filled=True),
    images=in_unit_range(array("floating", "[B, H, W, C]", axes=4, filled=True)),
    commitment=number(0),
    codebook_weight=number(0),
    perceptual=A_PERCEPTUAL,
    log_variance=array("real", axes=0),
    adversary=AN_ADVERSARY,
)
def vq_autoencoder_loss(
    encode: Callable[[Any], Any],
    decode: Callable[[Any], Any],
    table: Float[Array, "K c"],
    images: Float[Array, "B H W C"],
    *,
    commitment: float = 0.25,
    codebook_weight: float = 0.0,
    reconstruction: str = "mse",
    perceptual: Perceptual | None = None,
    log_variance: Any = 0.0,
    adversary: Adversary | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of an autoencoder with a codebook.

        loss = R / exp(s) + s + commitment |z - sg(e)|^2 + codebook_weight |sg(z) - e|^2 + adversarial term

    with e the entry nearest to z, mean squares, sg without gradient, and R and s as in `autoencoder_loss`.

    Args:
        encode: images -> latents z before the codebook.
        decode: z -> images; it takes the nearest entries itself, and its gradients pass through to z.
        table: the entries.
        images: `[B, H, W, C]` in [-1, 1].
        commitment: 0.25 in VQ-GAN.
        codebook_weight: 1 where the entries are trained by this loss, as in VQ-GAN; 0 where they are moving
            averages (`update_codebook`).
        reconstruction, perceptual, log_variance, adversary: as in `autoencoder_loss`.

    Returns:
        (loss, {"reconstruction", "commitment": mean square, "perplexity": of the entries, and as in
        `autoencoder_loss` those of the terms that are used}), float32.

    Sources: van den Oord et al. 2017, eq. 3; Esser et al. 2021, eq. 4 and 6.
    """
    distance = image_distance(images, reconstruction, perceptual)
    z = returned("encode", encode(images))
    loss, _, metrics = reconstruction_loss(z, decode, distance, log_variance, adversary)
    found = quantization_losses(z, table)
    loss = loss + commitment * found.commitment + codebook_weight * found.codebook
    return loss, {**metrics, "commitment": found.commitment, "perplexity": found.perplexity}
