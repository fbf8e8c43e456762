"""Every denoising network is called with the t of a path and answers with its sign."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.errors import InvalidArgumentError
from jaxldm.models.registry import ARCHITECTURES, DYNAMIC

T = np.array([0.0, 0.3, 1.0], np.float32)
RNG = np.random.default_rng(0)

# Preset and what makes it small; its condition; the published form of t and of the output.
PUBLISHED = {
    "sit-s-2": (
        {"sample_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3},
        {"labels": np.array([0, 2, 3])},
        lambda apply: lambda x, t, **c: -apply(x, 1 - t, **c),
    ),
    "sd3-medium": (
        {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "caption_projection_dim": 8}
        | {"joint_attention_dim": 6, "pooled_projection_dim": 5, "pos_embed_max_size": 8, "in_channels": 4}
        | {"out_channels": 4, "sample_size": 8},
        {"encoder_hidden_states": (3, 4, 6), "pooled_projections": (3, 5)},
        lambda apply: lambda x, t, **c: apply(x, 1000 * t, **c),
    ),
    "z-image": (
        {"dim": 24, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "n_refiner_layers": 1}
        | {"axes_dims": (4, 4, 4), "axes_lens": (64, 8, 8), "cap_feat_dim": 6, "in_channels": 4},
        {"encoder_hidden_states": (3, 4, 6)},
        lambda apply: lambda x, t, **c: -apply(x, 1 - t, **c),
    ),
    "flux-dev": (
        {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 1}
        | {"in_channels": 16, "axes_dims_rope": (2, 2, 4), "joint_attention_dim": 6}
        | {"pooled_projection_dim": 5},
        {"encoder_hidden_states": (3, 4, 6), "pooled_projections": (3, 5), "guidance": (3,)},
        lambda apply: apply,
    ),
    "mini-unet": (
        {"sample_size": 8, "in_channels": 4, "out_channels": 4},
        {"labels": np.array([0, 2, 3])},
        lambda apply: apply,
    ),
}
DENOISERS = [
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiT",
    "SiT",
    *DYNAMIC,
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "ZImageTransformer2DModel",
    "QwenImageTransformer2DModel",
    "WuerstchenPrior",
    "WuerstchenDiffNeXt",
]


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_published_form_is_turned_to_that_of_a_path(preset):
    overrides, condition, of_path = PUBLISHED[preset]
    module = models.build(preset, **overrides)
    condition = {name: normal(*v) if isinstance(v, tuple) else v for name, v in condition.items()}
    params = jax.tree.map(lambda leaf: 0.3 * normal(*leaf.shape), models.shapes(module))
    x = normal(3, 8, 8, 4)

    @jax.jit
    def both(params, x, t, condition):
        published = of_path(functools.partial(module.apply, {"params": params}))
        return models.network(module)(params, x, t, condition), published(x, t, **condition)

    ours, expected = both(params, x, T, condition)
    assert np.abs(expected).max() > 0.1 and np.isfinite(expected).all()
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    (first, *more) = condition.values()
    if not more:  # the argument after t by itself: labels, or the states of a text
        alone = jax.jit(models.network(module))(params, x, T, first)
        np.testing.assert_allclose(alone, ours, atol=1e-5)


@pytest.mark.parametrize("name", DENOISERS)
def test_every_denoiser_is_called_in_one_way(name):
    presets = [config for config in models.PRESETS.values() if models.class_name(config) == name]
    module = models.from_config(presets[0] if presets else ARCHITECTURES[name][1]())
    x, t, *more = module.example_inputs()
    condition = more[0] if len(more) == 1 else None
    if len(more) > 1:
        names = list(inspect.signature(module.__call__).parameters)[2:]
        condition = {name: value for name, value in zip(names, more, strict=False) if value is not None}
    output = jax.eval_shape(models.network(module), models.shapes(module), x, t, condition)
    assert output.shape[:3] == x.shape[:3] and output.dtype == x.dtype


class ExactSiT(models.SiT):
    """The velocity of Gaussian data, in SiT's own time and sign."""

    path: D.Path = None
    mean: float = 0.3
    std: float = 0.5

    def __call__(self, x, t, labels=None, train=False):
        t = (1 - t).reshape(-1, 1, 1, 1)
        (alpha, sigma), (alpha_slope, sigma_slope) = (
            (self.path.alpha(t), self.path.sigma(t)),
            self.path.derivatives(t),
        )
        residual = (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        return -(alpha_slope * (self.mean + alpha * self.std**2 * residual) + sigma_slope * sigma * residual)


@pytest.mark.parametrize("gamma", [None, (0.001, 0.1)])
@pytest.mark.parametrize("name", D.interpolants.INTERPOLANTS)
def test_the_exact_sit_denoises_exactly(name, gamma, x64):
    path = D.Interpolant(name, gamma=gamma)
    sit = ExactSiT(models.SiTConfig(), path=path)
    x, t = jnp.linspace(-2, 2, 16).reshape(4, 1, 1, 4), jnp.array([0.01, 0.4, 0.8, 0.99])
    denoise = D.denoiser(functools.partial(models.network(sit), {}), D.velocity(path))
    exact = D.gaussian_denoiser(path, sit.mean, sit.std)(x, t)
    np.testing.assert_allclose(denoise(x, t), exact, rtol=1e-8, atol=1e-10)
    counts = models.convention(sit)  # its own inverse
    np.testing.assert_allclose(counts.time(counts.time(t)), t, rtol=1e-12)
    np.testing.assert_allclose(counts.output(counts.output(x)), x, rtol=1e-12)


def test_dropout_takes_a_key():
    module = models.build("mini-unet", sample_size=8, dropout=0.5)
    params = jax.tree.map(lambda leaf: 0.3 * normal(*leaf.shape), models.shapes(module))
    x = normal(3, 8, 8, module.config.in_channels)
    call = jax.jit(models.network(module))
    plain = call(params, x, T)
    np.testing.assert_array_equal(call(params, x, T), plain)
    first, second = (call(params, x, T, dropout_key=jax.random.key(seed)) for seed in (0, 1))
    assert not np.allclose(first, plain) and not np.allclose(first, second)


@pytest.mark.parametrize(
    ("preset", "condition", "words"),
    [
        ("sd3-medium", None, "SD3Transformer2DModel: missing .*encoder_hidden_states"),
        ("sit-s-8", {"label": 0}, "SiT: .*label"),
        ("amused-512", None, "UVit2DModel: missing"),
    ],
)
def test_conditions_that_do_not_fit(preset, condition, words):
    with pytest.raises(InvalidArgumentError, match=words):
        models.network(models.build(preset))({}, normal(3, 8, 8, 4), T, condition)


@pytest.mark.unchecked
def test_inputs_of_other_shapes_are_refused_in_one_line():
    module = models.build("tiny-dit", sample_size=8, in_channels=4, hidden_size=8, depth=1, num_heads=2)
    call, params = models.network(module), models.shapes(module)
    labels = jnp.zeros(2, jnp.int32)
    for x, t, words in (
        (jnp.zeros((2, 4, 8, 8)), jnp.zeros(2), r"x must be \[B, H, W, 4\].*looks like \[B, C, H, W\]"),
        (jnp.zeros((8, 8, 4)), jnp.zeros(8), r"x must be \[B, H, W, 4\], got shape \[8, 8, 4\]"),
        (jnp.zeros((2, 4)), jnp.zeros(2), r"x must be \[B, H, W, 4\], got shape \[2, 4\]"),
        (jnp.zeros((2, 8, 8, 4)), jnp.zeros(3), "t must be"),
        (jnp.zeros((2, 6, 8, 4)), jnp.zeros(2), "6x8 cannot be cut into whole 4x4 patches"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            jax.eval_shape(call, params, x, t, labels)
