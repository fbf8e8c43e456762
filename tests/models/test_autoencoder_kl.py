import dataclasses
from functools import partial

import diffusers
import jax
import numpy as np
import pytest
import torch
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError

CONFIGS = {
    "attention and quantisation convolutions": {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 3,
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
    """Pipelines of diffusers encode to (z - shift_factor) * scaling_factor and decode the inverse."""
    theirs, module, params = pair
    x = images(1, 8, 8, module.config.in_channels)
    encode, decode = (jax.jit(partial(way, module)) for way in (models.encode_latents, models.decode_latents))
    latents = encode(params, x)
    shift, scale = theirs.config.shift_factor or 0.0, theirs.config.scaling_factor
    with torch.no_grad():
        mean = theirs.encode(to_torch(x)).latent_dist.mean
        assert_agrees(latents, (mean - shift) * scale)
        assert_agrees(decode(params, latents), theirs.decode(mean).sample)


def test_diffusers_opens_what_we_save(pair, tmp_path, caplog, recwarn):
    theirs, module, params = pair
    checkpoints.save(tmp_path, module, params)
    diffusers.utils.logging.enable_propagation()
    opened = diffusers.AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert [record.getMessage() for record in caplog.records] + [str(w.message) for w in recwarn] == []
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
    assert opened.config.scaling_factor == theirs.config.scaling_factor
    assert opened.config.shift_factor == theirs.config.shift_factor


def test_fresh_parameters_have_the_published_names_and_spread(tmp_path):
    """What `init` starts from fills diffusers' model exactly, with the spread of its own start."""
    fields = CONFIGS["attention and quantisation convolutions"]
    module = models.build("sd-autoencoder", sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2,
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


def test_the_published_autoencoder_has_84_million_parameters():
    config = models.config_to_dict(models.PRESETS["sd-autoencoder"])
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(**{key: value for key, value in config.items() if key[0] != "_"})
    assert models.count_params("sd-autoencoder") == sum(p.numel() for p in theirs.parameters())


def test_configs_that_cannot_be(pair):
    config = pair[1].config
    with pytest.raises(InvalidArgumentError, match="groups"):
        dataclasses.replace(config, norm_num_groups=5)
    with pytest.raises(InvalidArgumentError, match="scaling_factor"):
        dataclasses.replace(config, scaling_factor=0.0)
    with pytest.raises(CheckpointError, match="latents_mean"):
        models.config_from_dict(models.config_to_dict(config) | {"latents_mean": [1.0]})
