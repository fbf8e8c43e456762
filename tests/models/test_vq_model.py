import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers_reference import opened_by_diffusers
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError

CONFIGS = {
    "latent diffusion f8: attention in the levels, too": {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "norm_num_groups": 4,
        "num_vq_embeddings": 40,
        "scaling_factor": 1.0,
    },
    "aMUSEd: indices, no attention": {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "latent_channels": 6,
        "vq_embed_dim": 5,
        "num_vq_embeddings": 32,
        "mid_block_add_attention": False,
        "lookup_from_codebook": True,
        "force_upcast": True,
    },
    "Kandinsky 2: spatial norms of the latents": {
        "block_out_channels": (32, 32),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "norm_num_groups": 8,
        "latent_channels": 4,
        "vq_embed_dim": 4,
        "num_vq_embeddings": 24,
        "norm_type": "spatial",
    },
}


def random_reference(fields):
    theirs = randomised(diffusers.VQModel(**fields))
    torch.nn.init.normal_(theirs.quantize.embedding.weight, std=0.3)  # entries as far apart as latents are
    return theirs


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    theirs = random_reference(CONFIGS[request.param])
    folder = tmp_path_factory.mktemp("vq")
    theirs.save_pretrained(folder)
    module, params = checkpoints.load(folder)
    jitted = {
        way: jax.jit(lambda p, x, way=way: module.apply({"params": p}, x, method=way))
        for way in ("encode", "decode", "encode_indices", "decode_indices")
    }
    return theirs, module, params, jitted


def test_encoder_agrees_with_diffusers_on_odd_sizes(pair):
    theirs, _, params, jitted = pair
    x = images(3, 13, 10, 3)
    with torch.no_grad():
        assert_agrees(jitted["encode"](params, x), theirs.encode(to_torch(x)).latents)


def test_decoder_quantises_and_agrees_with_diffusers(pair):
    theirs, module, params, jitted = pair
    z = 0.3 * images(1, 3, 2, module.config.codebook_width)
    with torch.no_grad():
        expected = theirs.decode(to_torch(z)).sample
        unquantised = theirs.decode(to_torch(z), force_not_quantize=not module.config.lookup_from_codebook)
    assert_agrees(jitted["decode"](params, z), expected)
    if not module.config.lookup_from_codebook:
        assert not torch.allclose(unquantised.sample, expected)
        decode = jax.jit(lambda p, z: module.apply({"params": p}, z, quantize=False, method="decode"))
        assert_agrees(decode(params, z), unquantised.sample)


def test_indices_agree_with_diffusers_both_ways(pair):
    theirs, module, params, jitted = pair
    x = images(2, 12, 16, 3)
    with torch.no_grad():
        latents = theirs.encode(to_torch(x)).latents
        shape = (latents.shape[0], *latents.shape[2:])
        expected = theirs.quantize(latents)[2][2].reshape(shape)
        entries = theirs.quantize.get_codebook_entry(expected, (*shape, latents.shape[1]))
        spatial = module.config.norm_type == "spatial"
        decoded = theirs.decoder(theirs.post_quant_conv(entries), entries if spatial else None)
    indices = jitted["encode_indices"](params, x)
    assert indices.dtype == jnp.int32 and len(np.unique(indices)) >= 3
    np.testing.assert_array_equal(indices, expected)
    assert_agrees(jitted["decode_indices"](params, indices), decoded)
    if module.config.lookup_from_codebook:  # as the pipelines of aMUSEd call it
        with torch.no_grad():
            looked_up = theirs.decode(
                expected.reshape(shape[0], -1), force_not_quantize=True, shape=(*shape, latents.shape[1])
            )
        assert_agrees(jitted["decode_indices"](params, indices), looked_up.sample)


def test_latents_and_indices_are_two_ways_to_the_same_image(pair):
    """And the functions of `models` are those ways, with the scaling factor inside."""
    _, module, params, jitted = pair
    x = images(3, 13, 10, 3)

    @jax.jit
    def both_ways(params, x):
        latents = models.encode_latents(module, params, x)
        indices = models.encode_indices(module, params, x)
        decoded = models.decode_latents(module, params, latents)
        return latents, decoded, models.decode_indices(module, params, indices)

    latents, through_latents, through_indices = both_ways(params, x)
    encoded = jitted["encode"](params, x)
    np.testing.assert_allclose(latents, encoded * module.config.scaling_factor, atol=1e-5)
    np.testing.assert_allclose(through_latents, through_indices, atol=1e-4)


def test_gradients_pass_the_codebook(pair):
    _, module, params, _ = pair
    z = 0.3 * images(1, 3, 2, module.config.codebook_width)
    weights = jnp.asarray(images(1, 3, 2, module.config.codebook_width, seed=1))

    def weighted(z):
        quantised = module.apply({"params": params}, z, method=lambda module, z: module.quantize(z))
        return (weights * quantised).sum()

    np.testing.assert_array_equal(jax.grad(weighted)(jnp.asarray(z)), weights)


def test_diffusers_opens_what_we_change_and_save(pair, tmp_path, caplog, recwarn):
    theirs, module, params, jitted = pair
    params = jax.tree.map(
        lambda leaf: leaf + 0.01 * np.sin(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape),
        jax.device_get(params),
    )
    checkpoints.save(tmp_path, module, params)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    z = 0.3 * images(1, 3, 2, module.config.codebook_width)
    with torch.no_grad():
        assert_agrees(jitted["decode"](params, z), opened.decode(to_torch(z)).sample)
    again_module, again = checkpoints.load(tmp_path)
    assert again_module == module
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_sixteen_bits_stay_near_float32(pair):
    _, module, params, jitted = pair
    dtype = "float16" if module.config.force_upcast else "bfloat16"
    low = models.from_config(dataclasses.replace(module.config, dtype=dtype))
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), jax.device_get(params))
    indices = np.arange(6, dtype=np.int32).reshape(1, 2, 3)
    rounded = jax.jit(low.apply, static_argnames="method")({"params": half}, indices, method="decode_indices")
    expected = jitted["decode_indices"](params, indices)
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(rounded - expected).max() < 0.1 * np.abs(expected).max()


def test_fresh_codebooks_spread_as_those_of_diffusers():
    module = models.build("ldm-vq-f4", sample_size=8, block_out_channels=(8, 8, 8), norm_num_groups=4)
    codebook = models.init(module, jax.random.key(0))["quantize"]["embedding"]["embedding"]
    reference = diffusers.VQModel(num_vq_embeddings=8192).quantize.embedding.weight.detach().numpy()
    assert codebook.shape == reference.shape
    assert abs(codebook.std() / reference.std() - 1) < 0.05
    assert abs(np.abs(codebook).max() / np.abs(reference).max() - 1) < 0.01


PUBLISHED_COUNTS = {
    "ldm-vq-f4": 55_322_782,
    "ldm-vq-f8": 67_717_295,
    "amused-vq": 146_244_675,
    "kandinsky2-movq": 67_832_495,
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_presets_have_the_published_parameters(name):
    config = models.config_to_dict(models.PRESETS[name])
    with torch.device("meta"):
        theirs = diffusers.VQModel(**{key: value for key, value in config.items() if key[0] != "_"})
    count = models.count_params(name)
    assert count == sum(p.numel() for p in theirs.parameters()) == PUBLISHED_COUNTS[name]


def test_configs_that_cannot_be():
    config = models.PRESETS["amused-vq"]
    with pytest.raises(InvalidArgumentError, match="num_vq_embeddings must be from 1"):
        dataclasses.replace(config, num_vq_embeddings=0)
    with pytest.raises(UnknownNameError, match="AttnUpDecoderBlock2D"):
        dataclasses.replace(config, up_block_types=("AttnUpBlock2D",) * 5)
    with pytest.raises(CheckpointError, match="norm_type"):
        models.config_from_dict(models.config_to_dict(config) | {"norm_type": "layer"})
    with pytest.raises(InvalidArgumentError, match="48 channels cannot be split into 32 groups"):
        dataclasses.replace(config, norm_type="spatial", block_out_channels=(48,) * 5, norm_num_groups=8)
