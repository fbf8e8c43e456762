"""Distribution matching distillation: DMD and DMD2 (Yin et al. 2024), without a discriminator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real

from jaxldm.arguments import array, checked, function, one_key
from jaxldm.diffusion.denoiser import A_DENOISER, Denoiser
from jaxldm.diffusion.paths import A_PATH, Path, per_image
from jaxldm.few_steps.jumps import A_LATENT, TIMESTEPS, check_batch, noised, squares_of, stopped, times_on
from jaxldm.functions import returned
from jaxldm.indices import check_indices


@checked(real=A_DENOISER, fake=A_DENOISER, images=A_LATENT, path=A_PATH, epsilon=A_LATENT, t=TIMESTEPS)
def distribution_matching_gradient(
    real: Denoiser | Callable[[Any, Any], Any],
    fake: Denoiser | Callable[[Any, Any], Any],
    images: Float[Array, "B ..."],
    path: Path,
    epsilon: Float[Array, "B ..."],
    t: Real[Array, " B"],
) -> Float[Array, "B ..."]:
    """(fake(x_t) - real(x_t)) / mean |images - real(x_t)|: where images should not go, of unit order.

    The difference of the two denoisers is, up to a factor that depends on t alone, that of the scores of the
    images that the generator draws and of the data; its mean over t is the gradient of their Kullback-Leibler
    divergence. Where both are the same distribution it is 0 everywhere.

    Args:
        real: the teacher, (x_t, t) -> x_0, with guidance where there is guidance.
        fake: the critic, trained on the generator's images by `D.diffusion_loss`.
        images: what the generator drew, [B, ...].
        path: of both denoisers.
        epsilon: noise; t: [B], away from both ends (0.02 to 0.98 of the timesteps).

    Source: Yin et al. 2024 (One-step diffusion with distribution matching distillation), eq. 7 and 8.
    """
    check_batch(images=images, epsilon=epsilon, t=t)
    (t,) = times_on(path, images, t=t)
    x_t = noised(path, images, epsilon, t)
    wanted, drawn = (
        returned(name, denoise(x_t, t), x_t.shape) for name, denoise in (("real", real), ("fake", fake))
    )
    scale = jnp.mean(jnp.abs(images - wanted), axis=tuple(range(1, images.ndim)))
    smallest = jnp.finfo(scale.dtype).tiny
    return (drawn - wanted) / per_image(jnp.maximum(scale, smallest), images)


@checked(images=A_LATENT, gradient=A_LATENT)
def distribution_matching_loss(
    images: Float[Array, "B ..."], gradient: Float[Array, "B ..."]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """mean |x - sg(x - gradient)|^2 / 2, whose gradient with respect to the images is `gradient` / B.

    Returns:
        (loss, {"gradient": the root mean square of the gradient}).
    """
    check_batch(images=images, gradient=gradient)
    rms = jnp.sqrt(jnp.mean(gradient**2))
    goal = stopped(images - gradient)
    return jnp.mean(squares_of(images - goal)) / 2, {"gradient": rms}


@checked(
    key=one_key,
    generator=function("(x_t, t) -> x_0"),
    path=A_PATH,
    noise=A_LATENT,
    times=array("real", "[N]", axes=1, filled=True),
    row=array("whole", axes=0),
)
def backward_simulation(
    key: PRNGKeyArray,
    generator: Callable[[Any, Any], Any],
    path: Path,
    noise: Float[Array, "B ..."],
    times: Sequence[float] | Real[Any, " N"],
    row: Int[Array, ""] | int,
) -> Float[Array, "B ..."]:
    """x at times[row], as the generator itself gets there from noise: draw x_0, add new noise, and again.

    A generator of several steps is trained on what it will see when it draws, not on noised data, which it
    never sees (DMD2, section 4.5). No gradient flows through.

    Args:
        key: of the noise that is added on the way.
        generator: (x_t [B, ...], t [B]) -> x_0 [B, ...].
        path: of the generator.
        noise: x at times[0].
        times: from noisy to clean, those at which the generator will draw: 999, 749, 499, 249 in the paper.
        row: may be traced: every row costs the same program.
    """
    check_indices("row", row, len(times))
    t = jnp.asarray(times, jnp.float32)
    size = noise.shape[:1]

    def step(i, x):
        x_0 = returned("generator", generator(x, jnp.broadcast_to(t[i], size)), x.shape)
        epsilon = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        return noised(path, x_0, epsilon, jnp.broadcast_to(t[i + 1], size)).astype(x.dtype)

    return stopped(jax.lax.fori_loop(0, row, step, noise))
