import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import assert_agrees, images, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import InvalidArgumentError
from jaxldm.models import DiagonalGaussian


def in_torch(state: dict, groups: int | None) -> tuple[torch.nn.Sequential, torch.nn.Sequential]:
    """The lecture's autoencoder from PyTorch's own layers, with our exported weights."""
    nn = torch.nn

    def normalized(channels):
        return [] if groups is None else [nn.GroupNorm(groups, channels)]

    encoder = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(),
        nn.Conv2d(32, 64, 4, stride=2, padding=1), *normalized(64), nn.SiLU(),
        nn.Conv2d(64, 64, 4, stride=2, padding=1), *normalized(64), nn.SiLU(),
        nn.Conv2d(64, 8, 3, padding=1),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Conv2d(4, 64, 3, padding=1), *normalized(64), nn.SiLU(),
        nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1), *normalized(64), nn.SiLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), *normalized(32), nn.SiLU(),
        nn.Conv2d(32, 1, 3, padding=1), nn.Tanh(),
    )  # fmt: skip
    norms = [] if groups is None else ["norm"]
    names = {
        encoder: ["encoder." + name for name in with_norms(["conv_in"], norms, ["down.0", "down.1"])],
        decoder: [
            "decoder." + name
            for name in with_norms(["conv_in", *(n + "_in" for n in norms)], norms, ["up.0", "up.1"])
        ],
    }
    used = set()
    for module, ours in names.items():
        slots = [key.removesuffix(".weight") for key in module.state_dict() if key.endswith(".weight")]
        tensors = {
            f"{slot}.{kind}": torch.tensor(state[f"{name}.{kind}"])
            for slot, name in zip(slots, ours, strict=True)
            for kind in ("weight", "bias")
        }
        module.load_state_dict(tensors, strict=True)
        used |= {f"{name}.{kind}" for name in ours for kind in ("weight", "bias")}
    assert used == set(state)
    return encoder, decoder


def with_norms(first: list[str], norms: list[str], resampling: list[str]) -> list[str]:
    """Layer names in the order of the network: a norm after every resampling layer, if there are norms."""
    return (
        first
        + [n for i, name in enumerate(resampling) for n in (name, *(f"{m}.{i}" for m in norms))]
        + ["conv_out"]
    )


@pytest.fixture(scope="module")
def autoencoder():
    module = models.build("mini-autoencoder", scaling_factor=0.4, shift_factor=0.2)
    return module, models.init(module, jax.random.key(0))


@pytest.mark.parametrize("groups", [8, None])
def test_agrees_with_the_same_layers_in_torch(groups):
    module = models.build("mini-autoencoder", norm_num_groups=groups)
    params = models.init(module, jax.random.key(0))
    encoder, decoder = in_torch(checkpoints.to_state_dict(params), groups)
    x = images(3, 28, 28, 1)
    posterior = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode"))(params, x)
    image = jax.jit(lambda p, z: module.apply({"params": p}, z, method="decode"))(params, posterior.mean)
    with torch.no_grad():
        moments = encoder(to_torch(x))
        expected = decoder(moments[:, :4])
    assert posterior.mean.shape == (3, 7, 7, 4) and image.shape == (3, 28, 28, 1)
    assert_agrees(posterior.mean, moments[:, :4])
    assert_agrees(posterior.log_variance, moments[:, 4:])
    assert_agrees(image, expected)


def test_scaled_latents(autoencoder):
    module, params = autoencoder
    x = images(2, 28, 28, 1)

    @jax.jit
    def both_ways(params, x):
        latents = models.encode_latents(module, params, x)
        drawn = models.encode_latents(module, params, x, jax.random.key(1))
        mean = module.apply({"params": params}, x, method="encode").mean
        plain = module.apply({"params": params}, mean, method="decode")
        return latents, drawn, mean, plain, models.decode_latents(module, params, latents)

    latents, drawn, mean, plain, decoded = both_ways(params, x)
    np.testing.assert_allclose(latents, (mean - 0.2) * 0.4, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(decoded, plain, atol=1e-5)
    assert not np.allclose(drawn, latents)


def test_jit_agrees_with_eager_and_bfloat16_is_near(autoencoder):
    module, params = autoencoder
    x = images(2, 28, 28, 1)
    eager = module.apply({"params": params}, x)
    compiled = jax.jit(module.apply)({"params": params}, x)
    np.testing.assert_allclose(compiled, eager, atol=1e-6)
    half = jax.jit(models.build("mini-autoencoder", dtype="bfloat16").apply)({"params": params}, x)
    assert half.dtype == jnp.float32 and np.isfinite(half).all()
    assert 0 < np.abs(half - eager).max() < 0.05 * np.abs(eager).max()


def test_the_gaussian_draws_and_diverges_as_torch_distributions_say():
    rng = np.random.default_rng(0)
    mean, log_variance = rng.standard_normal((2, 2, 3, 3, 4)).astype(np.float32)
    gaussian = DiagonalGaussian(jnp.asarray(mean), jnp.asarray(log_variance))
    normal = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(np.exp(log_variance / 2)))
    standard = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(normal, standard).numpy()
    np.testing.assert_allclose(gaussian.kl(), expected, rtol=1e-4, atol=1e-6)
    draws = jax.vmap(gaussian.sample)(jax.random.split(jax.random.key(0), 4000))
    deviation = np.exp(log_variance / 2)
    assert np.abs((draws.mean(0) - mean) / deviation).max() < 5 / np.sqrt(4000)
    assert np.abs(draws.std(0) / deviation - 1).max() < 5 / np.sqrt(2 * 4000)


def test_sides_that_cannot_be_halved_are_refused():
    with pytest.raises(InvalidArgumentError, match="30"):
        models.build("mini-autoencoder", sample_size=30)
