"""The adversarial loss against latent diffusion's formulas in PyTorch, gradient by gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from patch_gan_reference import patch_gan, trained_tensors
from torch_reference import images, randomised, to_torch

from jaxldm import checkpoints, models, training
from jaxldm.models import DiagonalGaussian
from jaxldm.training.adversarial import Adversary, adversarial_loss, generator_loss, with_gradient
from jaxldm.training.autoencoder_losses import autoencoder_loss

WIDTHS, SIDE, CHANNELS = (4, 6), 8, 2
PIXELS = SIDE * SIDE * CHANNELS
KL_WEIGHT, GENERATOR_WEIGHT, PERCEPTUAL_WEIGHT = 1e-3, 0.5, 0.7


@pytest.fixture(scope="module")
def discriminator():
    theirs = randomised(patch_gan(CHANNELS, WIDTHS)).train()
    module = models.build("patch-gan", sample_size=SIDE, in_channels=CHANNELS, block_out_channels=WIDTHS)
    state = {name: tensor.numpy() for name, tensor in trained_tensors(theirs).items()}
    return theirs, module, checkpoints.from_state_dict(state, models.shapes(module))


def starting_params():
    """Moments of latents, a decoder of two 1x1 convolutions, and the log-variance of a pixel."""
    numbers = np.random.default_rng(3)
    shapes = {"mean": (3, SIDE, SIDE, 3), "log_variance": (3, SIDE, SIDE, 3)}
    shapes |= {"first": (3, 5), "last": (5, CHANNELS), "pixel": ()}
    return {name: 0.5 * numbers.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def ours(params, images, noise_key, started, logits):
    def decode(kernel, z):
        return jnp.tanh(z @ params["first"]) @ kernel

    adversary = Adversary(logits, params["last"], decode, GENERATOR_WEIGHT, started, largest=1e4 / PIXELS)
    return autoencoder_loss(
        noise_key,
        lambda x: DiagonalGaussian(params["mean"], params["log_variance"]),
        lambda z: decode(params["last"], z),
        images,
        beta=KL_WEIGHT,
        reconstruction="l1",
        perceptual=lambda x, y: PERCEPTUAL_WEIGHT * jnp.mean((jnp.sin(x) - jnp.sin(y)) ** 2, (1, 2, 3)),
        log_variance=params["pixel"],
        adversary=adversary,
    )


def latent_diffusion(params, x, noise, started, logits_of):
    """`LPIPSWithDiscriminator` for the autoencoder, written from its formulas: sums over the pixels."""
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
    z = tensors["mean"] + torch.exp(0.5 * tensors["log_variance"]) * noise
    decoded = torch.tanh(z @ tensors["first"]) @ tensors["last"]
    perceptual = (torch.sin(x) - torch.sin(decoded)).square().mean((1, 2, 3), keepdim=True)
    rec = (x - decoded).abs() + PERCEPTUAL_WEIGHT * perceptual
    nll = (rec / torch.exp(tensors["pixel"]) + tensors["pixel"]).sum() / len(x)
    mean, log_variance = tensors["mean"], tensors["log_variance"]
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / len(x)
    g = -logits_of(decoded.permute(0, 3, 1, 2)).mean()
    of_nll, of_g = (torch.autograd.grad(part, tensors["last"], retain_graph=True)[0] for part in (nll, g))
    weight = torch.clamp(of_nll.norm() / (of_g.norm() + 1e-4), 0.0, 1e4).detach() * GENERATOR_WEIGHT
    loss = nll + KL_WEIGHT * kl + weight * (1.0 if started else 0.0) * g
    loss.backward()
    return loss, weight, {name: tensor.grad for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("started", "strength"),
    [(True, 1.0), (True, 1e-7), (False, 1.0)],
    ids=["adaptive", "at the bound", "before the start"],
)
def test_loss_and_every_gradient_are_those_of_latent_diffusion(discriminator, started, strength):
    theirs, module, disc_params = discriminator
    params, x, key = starting_params(), np.tanh(images(3, SIDE, SIDE, CHANNELS)), jax.random.key(5)
    noise = np.asarray(jax.random.normal(key, params["mean"].shape))
    loss, weight, gradients = latent_diffusion(
        params, torch.tensor(x), torch.tensor(noise), started, lambda y: strength * theirs.main(y)
    )

    def both(params, disc_params, started):
        logits = lambda y: strength * module.apply({"params": disc_params}, y)  # noqa: E731
        return ours(params, x, key, started, logits)

    of_both = jax.jit(jax.value_and_grad(both, (0, 1), has_aux=True))
    (found, aux), (of_params, of_disc) = of_both(params, disc_params, jnp.bool_(started))
    np.testing.assert_allclose(found * PIXELS, loss.item(), rtol=1e-5)
    if started:
        np.testing.assert_allclose(aux["adaptive_weight"] * PIXELS, weight.item(), rtol=1e-4)
        assert (weight.item() == 1e4 * GENERATOR_WEIGHT) == (strength < 1)
    else:
        assert aux["adaptive_weight"] == 0
    for name, gradient in gradients.items():
        largest = gradient.abs().max().item()
        np.testing.assert_allclose(of_params[name] * PIXELS, gradient, atol=2e-4 * largest, err_msg=name)
    # The generator's loss moves the autoencoder alone: the logits' parameters get exactly nothing.
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(of_disc))


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_the_discriminators_loss_and_gradients(discriminator, kind):
    theirs, module, disc_params = discriminator
    x, y = np.tanh(images(3, SIDE, SIDE, CHANNELS)), np.tanh(images(3, SIDE, SIDE, CHANNELS, seed=1))
    real, fake = theirs.main(to_torch(x)), theirs.main(to_torch(y))
    if kind == "hinge":
        expected = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    else:
        softplus = torch.nn.functional.softplus
        expected = 0.5 * (softplus(-real).mean() + softplus(fake).mean())
    theirs.zero_grad()
    expected.backward()

    def loss(params):
        logits = [module.apply({"params": params}, batch) for batch in (x, y)]
        return training.discriminator_loss(*logits, kind)

    (found, aux), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(disc_params)
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(
        [aux["real"], aux["fake"]], [real.mean().item(), fake.mean().item()], rtol=1e-4
    )
    tensors = checkpoints.to_state_dict(gradients)
    for name, tensor in theirs.named_parameters():
        np.testing.assert_allclose(tensors[name], tensor.grad, atol=1e-5, err_msg=name)


def test_the_adaptive_weight_makes_both_pull_alike():
    a, b = np.float32([[3.0, 4.0]]), np.float32([[0.0, 2.0]])
    np.testing.assert_allclose(training.adaptive_weight(a, b), 5 / 2.0001, rtol=1e-6)
    assert training.adaptive_weight(a, 0 * b) == 1e4  # 5 / 1e-4, bounded
    assert training.adaptive_weight(0 * a, b) == 0
    slope = jax.grad(lambda a: training.adaptive_weight(a, b))(a)
    assert (slope == 0).all()


def test_a_discriminator_does_nothing_before_its_start():
    """A discriminator of NaNs does no harm until it counts."""

    def loss(kernel, started):
        adversary = Adversary(
            lambda y: jnp.nan * y, kernel, lambda kernel, z: z @ kernel, started=jnp.bool_(started)
        )
        z = jnp.ones((1, 2, 2, 2))
        return adversarial_loss(z, lambda y: (jnp.mean(y**2), {}), 0.0, adversary)[0]

    values, gradients = zip(
        *(jax.value_and_grad(loss)(jnp.ones((2, 1)), started) for started in (False, True)), strict=True
    )
    assert values[0] == 4 and np.isfinite(gradients[0]).all()
    assert np.isnan(values[1])


def test_a_gradient_that_was_computed_before_is_used():
    x = jnp.arange(3.0).reshape(1, 1, 3, 1)
    seven = lambda x: with_gradient(jnp.float32(7), jnp.sin(x), jnp.full_like(x, 2))  # noqa: E731
    value, gradient = jax.value_and_grad(seven)(x)
    np.testing.assert_allclose(gradient, 2 * jnp.cos(x), rtol=1e-6)
    assert value == 7 and generator_loss(jnp.float32([1.0, 3.0])) == -2
