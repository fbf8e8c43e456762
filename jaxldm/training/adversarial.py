"""Autoencoders against a discriminator, as VQ-GAN and latent diffusion train them.

    autoencoder:    nll + adaptive weight x generator loss (+ KL or codebook terms)
    discriminator:  hinge or vanilla loss of real and decoded images

Esser et al. 2021, equations 6 and 7; Rombach et al. 2022, appendix G. Latent diffusion sums over the pixels
of an image where this takes means, so that its learning rate is another for each image size. Dividing its
whole loss by the H W C numbers of an image gives this one; the bound of the adaptive weight is divided, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.arguments import array, check_shapes, checked, choice, number
from jaxldm.errors import one_of
from jaxldm.functions import returned

Images = Float[Array, "B H W C"]
Scalar = Float[Array, ""]
Perceptual = Callable[[Images, Images], Float[Array, " B"]]
Distance = Callable[[Images], tuple[Scalar, dict[str, Scalar]]]
LARGEST_WEIGHT = 1e4
RECONSTRUCTIONS = ("mse", "l1")


def hinge_loss(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Scalar:
    """(E[max(0, 1 - real)] + E[max(0, 1 + fake)]) / 2 of logits (Lim and Ye 2017; half, as VQ-GAN has it)."""
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def vanilla_loss(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Scalar:
    """(E[softplus(-real)] + E[softplus(fake)]) / 2: binary cross-entropy (Goodfellow et al. 2014)."""
    return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))


DISCRIMINATOR_LOSSES = {"hinge": hinge_loss, "vanilla": vanilla_loss}
_LOGITS = array("floating", "[B, h, w, 1]", axes=(1, 64), filled=True)


@checked(real=_LOGITS, fake=_LOGITS, kind=choice("discriminator loss", DISCRIMINATOR_LOSSES))
def discriminator_loss(
    real: Float[Array, "..."], fake: Float[Array, "..."], kind: str = "hinge"
) -> tuple[Scalar, dict[str, Scalar]]:
    """The discriminator's loss of its logits for real and decoded images, and their means.

    Args:
        real: logits of images, large for real.
        fake: logits of decoded images. No gradient should reach the autoencoder: decode with its parameters
            held fixed.
        kind: "hinge" or "vanilla".

    Returns:
        (loss, {"real": mean logit, "fake": mean logit}), float32.
    """
    real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
    loss = DISCRIMINATOR_LOSSES[one_of("discriminator loss", kind, DISCRIMINATOR_LOSSES)](real, fake)
    return loss, {"real": jnp.mean(real), "fake": jnp.mean(fake)}


def generator_loss(fake: Float[Array, "..."]) -> Scalar:
    """-E[fake] of the discriminator's logits for decoded images, for both of its losses."""
    return -jnp.mean(fake.astype(jnp.float32))


@checked(
    nll_gradient=array("floating", axes=(0, 64)),
    generator_gradient=array("floating", axes=(0, 64)),
    largest=number(above=0),
)
def adaptive_weight(
    nll_gradient: Float[Array, "..."],
    generator_gradient: Float[Array, "..."],
    largest: float = LARGEST_WEIGHT,
) -> Scalar:
    """min(|nll gradient| / (|generator gradient| + 1e-4), largest), without a gradient of its own.

    Both gradients are those of the kernel of the decoder's last layer, so that the discriminator pulls at it
    as hard as the reconstruction does. Esser et al. 2021, equation 7, with latent diffusion's constants.
    """
    ratio = jnp.linalg.norm(nll_gradient.ravel()) / (jnp.linalg.norm(generator_gradient.ravel()) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, largest))


class Adversary(NamedTuple):
    """The discriminator as the autoencoder's loss sees it.

    Attributes:
        logits: images -> logits of patches, parameters closed over.
        kernel: of the decoder's last layer.
        decode: (kernel, z) -> images: the decoder with that kernel in its place.
        weight: of the generator's loss, times the adaptive weight; may be traced.
        started: whether the discriminator counts yet; may be traced. Before, it does nothing.
        largest: bound of the adaptive weight.
    """

    logits: Callable[[Images], Float[Array, "..."]]
    kernel: Float[Array, "..."]
    decode: Callable[[Any, Any], Images]
    weight: Any = 1.0
    started: Any = True
    largest: float = LARGEST_WEIGHT


def with_gradient(value: Scalar, x: Images, gradient: Images) -> Scalar:
    """`value`, whose gradient with respect to x is `gradient`, computed before."""
    product = jnp.sum(x * jax.lax.stop_gradient(gradient))
    return jax.lax.stop_gradient(value) + (product - jax.lax.stop_gradient(product))


def adversarial_loss(
    z: Float[Array, "B h w c"],
    distance: Distance,
    log_variance: Scalar | float,
    adversary: Adversary,
) -> tuple[Scalar, Images, dict[str, Scalar]]:
    """nll + weight x adaptive weight x generator loss of the decoded images of z.

    The gradients of both losses with respect to the decoded images are computed once: they are pulled back
    to the last kernel for the adaptive weight, and from there they take part in the gradient of everything.

    Args:
        z: what is decoded.
        distance: decoded images -> (their distance from the images, metrics).
        log_variance: s in nll = distance / exp(s) + s.
        adversary: the discriminator.

    Returns:
        (loss, decoded images, metrics).
    """
    decoded, pull_back = jax.vjp(lambda kernel: adversary.decode(kernel, z), adversary.kernel)
    fixed = jax.lax.stop_gradient(decoded)
    (of_images, metrics), gradient = jax.value_and_grad(distance, has_aux=True)(fixed)

    # Computed before the start, too: inside of a conditional XLA's CPU backend takes five times as long.
    against = jax.value_and_grad(lambda x: generator_loss(adversary.logits(x)))
    generator, generator_gradient = jax.tree.map(
        lambda computed: jnp.where(adversary.started, computed, 0.0), against(fixed)
    )
    (of_nll,) = pull_back(gradient * jnp.exp(-jax.lax.stop_gradient(jnp.float32(log_variance))))
    (of_generator,) = pull_back(generator_gradient)
    weight = adversary.weight * adaptive_weight(of_nll, of_generator, adversary.largest)
    weight = jnp.where(adversary.started, weight, 0.0)
    loss = nll(with_gradient(of_images, decoded, gradient), log_variance)
    loss = loss + weight * with_gradient(generator, decoded, generator_gradient)
    return loss, decoded, metrics | {"generator": generator, "adaptive_weight": weight}


def nll(distance: Scalar, log_variance: Scalar | float) -> Scalar:
    """distance / exp(s) + s: the negative log-likelihood of a pixel, up to a constant and its scale."""
    return distance * jnp.exp(-jnp.float32(log_variance)) + log_variance


def image_distance(images: Images, reconstruction: str, perceptual: Perceptual | None = None) -> Distance:
    """decoded -> (mean error of a pixel + mean perceptual distance, both as metrics), float32.

    Raises `UnknownNameError`, and when it is called `InvalidArgumentError` for another shape.
    """
    one_of("reconstruction", reconstruction, RECONSTRUCTIONS)

    def distance(decoded: Images) -> tuple[Scalar, dict[str, Scalar]]:
        check_shapes(decoded=returned("decode", decoded), images=images)
        error = decoded.astype(jnp.float32) - images
        pixel = jnp.mean(jnp.square(error) if reconstruction == "mse" else jnp.abs(error))
        metrics = {"reconstruction": pixel}
        if perceptual is not None:
            apart = perceptual(images, decoded.astype(jnp.float32))
            metrics["perceptual"] = jnp.mean(returned("perceptual", apart))
        return sum(metrics.values(), jnp.zeros(())), metrics

    return distance


def reconstruction_loss(
    z: Float[Array, "B h w c"],
    decode: Callable[[Any], Images],
    distance: Distance,
    log_variance: Scalar | float = 0.0,
    adversary: Adversary | None = None,
) -> tuple[Scalar, Images, dict[str, Scalar]]:
    """(loss, decoded images, metrics) of the latents z: `nll`, or `adversarial_loss` where one is given."""
    if adversary is not None:
        return adversarial_loss(z, distance, log_variance, adversary)
    decoded = decode(z)
    of_images, metrics = distance(decoded)
    return nll(of_images, log_variance), decoded, metrics
