import dataclasses
import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers_reference import opened_by_diffusers
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError

CONFIGS = {
    "attention, quantisation convolutions, latents per channel": {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 3,
        "latents_mean": (-1.5, 2.0, 0.25),
        "latents_std": (8.0, 5.5, 0.5),
        "scaling_factor": 0.5,
    },
    "bare, three levels, another scale and shift": {
        "in_channels": 1,
        "out_channels": 2,
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    fields = CONFIGS[request.param]
    levels = len(fields["block_out_channels"])
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    theirs = randomised(diffusers.AutoencoderKL(**fields, **kinds))
    folder = tmp_path_factory.mktemp("vae")
    theirs.save_pretrained(folder)
    return theirs, *checkpoints.load(folder)


def test_encoder_agrees_with_diffusers_on_odd_sizes(pair):
    theirs, module, params = pair
    x = images(3, 13, 10, module.config.in_channels)
    ours = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode"))(params, x)
    with torch.no_grad():
        expected = theirs.encode(to_torch(x)).latent_dist
    assert_agrees(ours.mean, expected.mean)
    assert_agrees(ours.log_variance, expected.logvar)


def test_decoder_agrees_with_diffusers(pair):
    theirs, module, params = pair
    z = images(1, 3, 2, module.config.latent_channels)
    ours = jax.jit(lambda p, z: module.apply({"params": p}, z, method="decode"))(params, z)
    with torch.no_grad():
        expected = theirs.decode(to_torch(z)).sample
    assert_agrees(ours, expected)


def test_scaled_latents_follow_the_reference_pipelines(pair):
    """Pipelines of diffusers encode to (z - shift) * scale, or per channel with statistics in the config."""
    theirs, module, params = pair
    x = images(1, 8, 8, module.config.in_channels)
    encode, decode = (
        jax.jit(functools.partial(way, module)) for way in (models.encode_latents, models.decode_latents)
    )
    latents = encode(params, x)
    shift, scale = theirs.config.shift_factor or 0.0, theirs.config.scaling_factor
    if theirs.config.latents_mean is not None:
        shift = torch.tensor(theirs.config.latents_mean).reshape(1, -1, 1, 1)
        scale = scale / torch.tensor(theirs.config.latents_std).reshape(1, -1, 1, 1)
    with torch.no_grad():
        mean = theirs.encode(to_torch(x)).latent_dist.mean
        assert_agrees(latents, (mean - shift) * scale)
        assert_agrees(decode(params, latents), theirs.decode(mean).sample)


def test_diffusers_opens_what_we_change_and_save(pair, tmp_path, caplog, recwarn):
    theirs, module, params = pair
    params = jax.tree.map(
        lambda leaf: leaf + 0.01 * np.sin(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape),
        jax.device_get(params),
    )
    checkpoints.save(tmp_path, module, params)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    for name, tensor in checkpoints.to_state_dict(params).items():
        assert np.array_equal(opened.state_dict()[name].numpy(), tensor), name
    z = images(1, 3, 2, module.config.latent_channels)
    ours = jax.jit(lambda p, z: module.apply({"params": p}, z, method="decode"))(params, z)
    with torch.no_grad():
        assert_agrees(ours, opened.decode(to_torch(z)).sample)
    again_module, again = checkpoints.load(tmp_path)
    assert again_module == module
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_fresh_parameters_have_the_published_names_and_spread(tmp_path):
    """What `init` starts from fills diffusers' model exactly, with the spread of its own start."""
    fields = CONFIGS["attention, quantisation convolutions, latents per channel"]
    module = models.build("sd-vae", sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2,
                          up_block_types=("UpDecoderBlock2D",) * 2, **fields)  # fmt: skip
    state = checkpoints.to_state_dict(models.init(module, jax.random.key(0)))
    theirs = diffusers.AutoencoderKL(**models.config_to_dict(module.config) | {"_class_name": None})
    expected = theirs.state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    for name, tensor in state.items():
        if tensor.size > 500:
            reference = expected[name].numpy()
            assert abs(tensor.std() / reference.std() - 1) < 0.1, name
            assert abs(np.abs(tensor).max() / np.abs(reference).max() - 1) < 0.1, name


PUBLISHED_COUNTS = {
    "sd-vae": 83_653_863,
    "sdxl-vae": 83_653_863,
    "playground-vae": 83_653_863,
    "sd3-vae": 83_819_683,
    "flux-vae": 83_819_683,
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_presets_have_the_published_parameters(name):
    config = models.config_to_dict(models.PRESETS[name])
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(**{key: value for key, value in config.items() if key[0] != "_"})
    count = models.count_params(name)
    assert count == sum(p.numel() for p in theirs.parameters()) == PUBLISHED_COUNTS[name]


def test_a_config_without_force_upcast_is_upcast_as_in_diffusers():
    entries = models.config_to_dict(models.PRESETS["sdxl-vae"])
    assert models.config_from_dict(entries).force_upcast
    del entries["force_upcast"]
    assert models.config_from_dict(entries).force_upcast


@functools.cache
def small_sdxl():
    kinds = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    module = models.build(
        "sdxl-vae", sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **kinds
    )
    return module, jax.jit(module.apply)


@pytest.mark.parametrize(
    ("dtype", "force_upcast", "gain", "finite"),
    [
        ("float16", True, 5e4, True),
        ("bfloat16", True, 5e4, True),
        ("float16", False, 5e4, False),
        ("float16", False, 1.0, True),
    ],
)
def test_activations_beyond_float16_survive(dtype, force_upcast, gain, finite):
    """As in the SDXL autoencoder: a residual stream beyond 65504, though every weight fits float16."""
    module, apply_exactly = small_sdxl()
    params = models.init(module, jax.random.key(0))
    for side in ("encoder", "decoder"):
        params[side]["mid_block"]["resnets_0"]["conv2"]["kernel"] *= gain
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), jax.device_get(params))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(half))
    x = images(1, 8, 8, 3)
    low = models.from_config(dataclasses.replace(module.config, dtype=dtype, force_upcast=force_upcast))
    rounded = jax.jit(low.apply)({"params": half}, x.astype(dtype))
    assert rounded.dtype == jnp.dtype(dtype)
    assert bool(jnp.isfinite(rounded).all()) == finite
    if finite:
        exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
        expected = apply_exactly({"params": exact}, x)
        assert np.abs(rounded.astype(np.float32) - expected).max() < 0.1 * np.abs(expected).max()


def test_configs_that_cannot_be(pair):
    config = pair[1].config
    with pytest.raises(InvalidArgumentError, match="groups"):
        dataclasses.replace(config, norm_num_groups=5)
    with pytest.raises(InvalidArgumentError, match="scaling_factor"):
        dataclasses.replace(config, scaling_factor=0.0)
    with pytest.raises(InvalidArgumentError, match="exclude"):
        dataclasses.replace(
            config, shift_factor=0.1, latents_mean=(1.0,) * 3, latents_std=(1.0,) * 3, latent_channels=3
        )
    with pytest.raises(CheckpointError, match="latents_mean and latents_std come together"):
        models.config_from_dict(models.config_to_dict(config) | {"latents_mean": [1.0], "latents_std": None})
    with pytest.raises(CheckpointError, match="act_fn"):
        models.config_from_dict(models.config_to_dict(config) | {"act_fn": "gelu"})
