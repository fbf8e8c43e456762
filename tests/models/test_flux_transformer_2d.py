"""FLUX's transformer against diffusers, on small random models."""

import copy
import dataclasses
import functools
import tempfile

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers_reference import opened_by_diffusers
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.models.flux_transformer_2d import FluxTransformer2DConfig, clip_to_float16, pack, unpack

SMALL = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (4, 6, 6),
}
CONFIGS = {
    "dev: guidance-distilled": SMALL
    | {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "guidance_embeds": True},
    "schnell, with an image after the latents": SMALL
    | {"in_channels": 24, "out_channels": 16, "num_layers": 1, "num_single_layers": 3},
}


def inputs(config: FluxTransformer2DConfig, batch: int, height: int, width: int, seed: int = 0):
    """(x, t, states, pooled, guidance) for ours."""
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((batch, 7, config.joint_attention_dim)).astype(np.float32)
    pooled = rng.standard_normal((batch, config.pooled_projection_dim)).astype(np.float32)
    t = np.linspace(0.13, 1.0, batch, dtype=np.float32)
    guidance = np.linspace(1.0, 3.5, batch, dtype=np.float32) if config.guidance_embeds else None
    return images(batch, height, width, config.latent_channels, seed=seed), t, states, pooled, guidance


def reference(theirs, x, t, states, pooled, guidance, dtype=torch.float32):
    """Theirs on the same, packed, numbered and unpacked as their pipeline does it: [B, C, H, W]."""
    batch, height, width, channels = x.shape
    tokens = FluxPipeline._pack_latents(to_torch(x), batch, channels, height, width).to(dtype)
    ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32)
    extra = {} if guidance is None else {"guidance": torch.from_numpy(guidance)}
    with torch.no_grad():
        out = theirs(
            tokens,
            encoder_hidden_states=torch.from_numpy(states).to(dtype),
            pooled_projections=torch.from_numpy(pooled).to(dtype),
            timestep=torch.from_numpy(t),
            img_ids=ids,
            txt_ids=torch.zeros(states.shape[1], 3),
            **extra,
        ).sample
    return FluxPipeline._unpack_latents(out, 8 * height, 8 * width, 8)


@functools.cache
def opened(name):
    """(theirs, our module, its parameters, the function compiled), by way of a folder that they saved."""
    theirs = randomised(diffusers.FluxTransformer2DModel(**CONFIGS[name]))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        module, params = checkpoints.load(folder)
    return theirs, module, params, jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    return opened(request.param)


@pytest.mark.parametrize(("batch", "height", "width"), [(3, 6, 10), (1, 2, 14)])
def test_agrees_with_diffusers(pair, batch, height, width):
    theirs, module, params, jitted = pair
    given = inputs(module.config, batch, height, width)
    assert_agrees(jitted(params, *given), reference(theirs, *given))


def test_diffusers_opens_what_we_change_and_save(pair, tmp_path, caplog, recwarn):
    theirs, module, params, jitted = pair

    def waved(leaf):
        return leaf + 0.01 * np.sin(np.arange(leaf.size).reshape(leaf.shape)).astype(leaf.dtype)

    params = jax.tree.map(waved, jax.device_get(params))
    checkpoints.save(tmp_path, module, params)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    given = inputs(module.config, 1, 2, 14, seed=2)
    assert_agrees(jitted(params, *given), reference(opened, *given))
    again_module, again = checkpoints.load(tmp_path)
    assert again_module == module
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.fixture(scope="module")
def dev():
    return opened("dev: guidance-distilled")


def test_without_scan_it_is_the_same(dev):
    theirs, module, params, _ = dev
    written_out = models.from_config(dataclasses.replace(module.config, scan=False, remat=True))
    state = checkpoints.to_state_dict(params)
    by_block = checkpoints.from_state_dict(state, models.shapes(written_out))
    given = inputs(module.config, 1, 2, 14, seed=1)
    assert_agrees(jax.jit(written_out.apply)({"params": by_block}, *given), reference(theirs, *given))


def test_sixteen_bits_stay_near_float32_and_are_told_times_exactly(dev):
    """The reference rounds t to the network's dtype before it is embedded: 0.999 is 1 to it."""
    theirs, module, params, jitted = dev
    low = models.from_config(dataclasses.replace(module.config, dtype="bfloat16"))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), jax.device_get(params))
    x, _, *extra = inputs(module.config, 1, 2, 14)
    near, one = np.array([0.999], np.float32), np.array([1.0], np.float32)
    draw = jax.jit(lambda t: low.apply({"params": half}, x, t, *extra))
    rounded, expected = draw(near), jitted(params, x, near, *extra)
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(rounded - expected).max() < 0.1 * np.abs(expected).max()
    assert np.abs(rounded - draw(one)).max() > 0
    theirs = copy.deepcopy(theirs).bfloat16()
    same = [reference(theirs, x, t, *extra, torch.bfloat16) for t in (near, one)]
    assert torch.equal(*same)


def test_numbers_beyond_float16_stop_at_its_largest():
    grown = jnp.array([-jnp.inf, 1.0, jnp.inf], jnp.float16)
    np.testing.assert_array_equal(clip_to_float16(grown), np.array([-65504, 1, 65504], np.float16))
    assert np.isinf(clip_to_float16(grown.astype(jnp.bfloat16))[0])


def test_latents_are_packed_as_there():
    x = images(2, 4, 6, 3)
    tokens = pack(jnp.asarray(x))
    np.testing.assert_array_equal(tokens, FluxPipeline._pack_latents(to_torch(x), 2, 3, 4, 6).numpy())
    np.testing.assert_array_equal(unpack(tokens, 4, 6), x)


PUBLISHED_COUNTS = {"flux-dev": 11_901_408_320, "flux-schnell": 11_891_178_560}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_presets_have_the_published_parameters(name):
    config = models.config_to_dict(models.PRESETS[name])
    with torch.device("meta"):
        theirs = diffusers.FluxTransformer2DModel.from_config(config)
    count = models.count_params(name)
    assert count == sum(p.numel() for p in theirs.parameters()) == PUBLISHED_COUNTS[name]


def test_published_config_is_the_preset():
    """config.json of FLUX.1-dev as it was published."""
    published = {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": "0.30.0.dev0",
        "_name_or_path": "../checkpoints/flux-dev/transformer",
        "attention_head_dim": 128,
        "guidance_embeds": True,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "patch_size": 1,
        "pooled_projection_dim": 768,
    }
    assert models.config_from_dict(published) == models.PRESETS["flux-dev"]


def test_configs_that_cannot_be():
    for fields, message in (
        ({"in_channels": 18}, "2x2 latents"),
        ({"axes_dims_rope": (16, 56, 58)}, "add up to the 128"),
        ({"axes_dims_rope": (15, 57, 56)}, "even numbers"),
        ({"num_layers": -1}, "from 0 to"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            FluxTransformer2DConfig(**fields)
    with pytest.raises(CheckpointError, match="patch_size = 2"):
        models.config_from_dict({"_class_name": "FluxTransformer2DModel", "patch_size": 2})
    with pytest.raises(CheckpointError, match="qk_norm"):
        models.config_from_dict({"_class_name": "FluxTransformer2DModel", "qk_norm": "rms_norm"})


def test_inputs_that_cannot_be():
    module = models.from_config(FluxTransformer2DConfig(**CONFIGS["dev: guidance-distilled"]))
    untold = models.from_config(dataclasses.replace(module.config, guidance_embeds=False))
    x, t, states, pooled, guidance = inputs(module.config, 1, 4, 6)

    def call(x=x, states=states, pooled=pooled, guidance=guidance, module=module):
        jax.eval_shape(lambda *given: module.init(jax.random.key(0), *given), x, t, states, pooled, guidance)

    for given, message in (
        ({"x": images(1, 3, 6, 4)}, "3x6 cannot be cut"),
        ({"x": images(1, 4, 6, 16)}, "16 channels; this transformer takes 4"),
        ({"states": states[..., :5]}, "encoder_hidden_states are 5 wide.*joint_attention_dim"),
        ({"pooled": pooled[..., :5]}, "pooled_projections are 5 wide"),
        ({"guidance": None}, "needs guidance"),
        ({"module": untold}, "guidance given to"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            call(**given)


@pytest.mark.parametrize("harm", ["missing", "left over", "another shape"])
def test_tensors_that_do_not_fit(pair, harm):
    _, module, params, _ = pair
    state = checkpoints.to_state_dict(params)
    name = "single_transformer_blocks.1.attn.norm_q.weight"
    if harm == "missing":
        del state[name]
    elif harm == "left over":
        name = "transformer_blocks.7.attn.to_q.weight"
        state[name] = np.zeros((3, 3), np.float32)
    else:
        state[name] = state[name][:-1]
    with pytest.raises(CheckpointError, match=f"{harm}: {name}"):
        checkpoints.from_state_dict(state, models.shapes(module))
