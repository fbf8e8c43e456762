"""ControlNets of SD 3 and FLUX against diffusers: alone, and as what they add to a transformer."""

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
from jaxldm.diffusion import caching
from jaxldm.errors import CheckpointError, InvalidArgumentError

HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
SD3 = HEADS | {
    "sample_size": 8,
    "in_channels": 4,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 6,
}
FLUX = HEADS | {
    "in_channels": 16,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (2, 2, 4),
}
T = np.array([0.3, 0.9], np.float32)
X, PICTURE = images(2, 4, 6, 4, seed=1), images(2, 4, 6, 4, seed=2)
TEXT, POOLED = images(2, 5, 12, seed=3), images(2, 10, seed=4)


def through_a_folder(theirs, folder):
    theirs.save_pretrained(folder)
    return checkpoints.load(folder)


def apply(module, params, *inputs, **more):
    run = jax.jit(lambda params, inputs, more: module.apply({"params": params}, *inputs, **more))
    return run(params, inputs, more)


def as_tokens(array):
    return diffusers.FluxPipeline._pack_latents(to_torch(array), 2, 4, 4, 6)


def flux_call(theirs, **more):
    """Of theirs, whose time is a part of 1 and whose positions are given."""
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(2, 2, 3, "cpu", torch.float32)
    with torch.no_grad():
        return theirs(
            hidden_states=as_tokens(X),
            encoder_hidden_states=torch.from_numpy(TEXT),
            pooled_projections=torch.from_numpy(POOLED),
            timestep=torch.from_numpy(T),
            img_ids=ids,
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
            **more,
        )


def sd3_call(theirs, **more):
    with torch.no_grad():
        return theirs(
            hidden_states=to_torch(X),
            encoder_hidden_states=torch.from_numpy(TEXT),
            pooled_projections=torch.from_numpy(POOLED),
            timestep=torch.from_numpy(1000 * T),
            return_dict=False,
            **more,
        )[0]


def test_sd3(tmp_path, caplog, recwarn):
    options = {"num_layers": 2, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    theirs = randomised(diffusers.SD3ControlNetModel(**SD3 | options), 1)
    module, params = through_a_folder(theirs, tmp_path)
    ours = apply(module, params, X, 1000 * T, TEXT, POOLED, PICTURE)["block_controlnet_hidden_states"]
    others = sd3_call(theirs, controlnet_cond=to_torch(PICTURE))
    assert len(ours) == len(others) == module.config.num_residuals
    for own, other in zip(ours, others, strict=True):
        assert_agrees(own, other)
    checkpoints.save(tmp_path / "again", module, params)
    opened = opened_by_diffusers(theirs, tmp_path / "again", caplog, recwarn)
    again = sd3_call(opened, controlnet_cond=to_torch(PICTURE))
    np.testing.assert_array_equal(again[-1], others[-1])


def test_sd35_large(tmp_path, caplog, recwarn):
    """Without a text and a first layer of its own, which is lent by the transformer."""
    lender = randomised(diffusers.SD3Transformer2DModel(**SD3 | {"num_layers": 1, "out_channels": 4}), 3)
    options = {"num_layers": 1, "joint_attention_dim": None, "use_pos_embed": False}
    theirs = randomised(diffusers.SD3ControlNetModel(**SD3 | options), 1)
    module, params = through_a_folder(theirs, tmp_path)
    checkpoints.save(tmp_path / "again", module, params)
    opened_by_diffusers(theirs, tmp_path / "again", caplog, recwarn)
    with pytest.raises(InvalidArgumentError, match="needs the first layer"):
        jax.eval_shape(module.apply, {"params": params}, X, T, TEXT, POOLED, PICTURE)
    _, of_lender = through_a_folder(lender, tmp_path / "lender")
    module, params = module.clone(borrows=True), params | {"pos_embed": of_lender["pos_embed"]}
    ours = apply(module, params, X, 1000 * T, TEXT, POOLED, PICTURE)["block_controlnet_hidden_states"]
    with torch.no_grad():
        (other,) = theirs(
            hidden_states=lender.pos_embed(to_torch(X)),
            pooled_projections=torch.from_numpy(POOLED),
            timestep=torch.from_numpy(1000 * T),
            controlnet_cond=to_torch(PICTURE),
            return_dict=False,
        )[0]
    assert_agrees(ours[0], other)


@pytest.mark.parametrize("count", [1, 2])
def test_sd3_takes_residuals(tmp_path, count):
    """One for all blocks but the last, or one for two in a row; a scan and a cache do not change it."""
    theirs = randomised(diffusers.SD3Transformer2DModel(**SD3 | {"num_layers": 4, "out_channels": 4}), 2)
    module, params = through_a_folder(theirs, tmp_path)
    given = tuple(images(2, 6, 16, seed=10 + i) for i in range(count))
    output = sd3_call(theirs, block_controlnet_hidden_states=list(map(torch.from_numpy, given)))
    inputs = (X, 1000 * T, TEXT, POOLED)
    assert_agrees(apply(module, params, *inputs, block_controlnet_hidden_states=given), output)
    more = {
        "encoder_hidden_states": TEXT,
        "pooled_projections": POOLED,
        "block_controlnet_hidden_states": given,
    }
    call = jax.jit(functools.partial(models.caching_network(module, params), caching.fora(2), None, 0))
    assert_agrees(call(X, T, more)[0], output)
    wrong = {"block_controlnet_hidden_states": (images(2, 5, 16),)}
    with pytest.raises(InvalidArgumentError, match="a control network gives residuals"):
        jax.eval_shape(module.apply, {"params": params}, *inputs, **wrong)


def test_flux(tmp_path, caplog, recwarn, monkeypatch):
    """A union of three kinds with guidance."""
    # The reference warns of a class that it uses itself.
    monkeypatch.setattr(diffusers.models.embeddings, "deprecate", lambda *given, **options: None)
    options = {"num_layers": 1, "num_single_layers": 2, "num_mode": 3, "guidance_embeds": True}
    theirs = randomised(diffusers.FluxControlNetModel(**FLUX | options), 1)
    module, params = through_a_folder(theirs, tmp_path)
    checkpoints.save(tmp_path / "again", module, params)
    opened = opened_by_diffusers(theirs, tmp_path / "again", caplog, recwarn)
    guidance, mode = np.array([3.0, 4.0], np.float32), np.array([2, 0])
    ours = apply(module, params, X, T, TEXT, POOLED, PICTURE, guidance, mode)
    more = {
        "controlnet_cond": as_tokens(PICTURE),
        "controlnet_mode": torch.from_numpy(mode)[:, None],
        "guidance": torch.from_numpy(guidance),
    }
    others = flux_call(theirs, **more)
    assert module.config.num_residuals == 3
    for name, group in zip(
        ("controlnet_block_samples", "controlnet_single_block_samples"), others, strict=True
    ):
        for own, other in zip(ours[name], group, strict=True):
            assert_agrees(own, other)
    np.testing.assert_array_equal(flux_call(opened, **more)[1][-1], others[1][-1])
    with pytest.raises(InvalidArgumentError, match="is a union"):
        jax.eval_shape(module.apply, {"params": params}, X, T, TEXT, POOLED, PICTURE, guidance)


def test_flux_without_single_blocks(tmp_path):
    theirs = randomised(diffusers.FluxControlNetModel(**FLUX | {"num_layers": 1, "num_single_layers": 0}), 1)
    module, params = through_a_folder(theirs, tmp_path)
    ours = apply(module, params, X, T, TEXT, POOLED, PICTURE)
    assert list(ours) == ["controlnet_block_samples"]
    assert_agrees(
        ours["controlnet_block_samples"][0], flux_call(theirs, controlnet_cond=as_tokens(PICTURE))[0][0]
    )


def test_flux_takes_residuals(tmp_path):
    """Three double blocks share two, three single blocks one."""
    theirs = randomised(
        diffusers.FluxTransformer2DModel(**FLUX | {"num_layers": 3, "num_single_layers": 3}), 2
    )
    module, params = through_a_folder(theirs, tmp_path)
    doubles = tuple(images(2, 6, 16, seed=10 + i) for i in range(2))
    singles = (images(2, 6, 16, seed=20),)
    output = flux_call(
        theirs,
        controlnet_block_samples=list(map(torch.from_numpy, doubles)),
        controlnet_single_block_samples=list(map(torch.from_numpy, singles)),
    )[0]
    output = diffusers.FluxPipeline._unpack_latents(output, 4, 6, 1)
    more = {"controlnet_block_samples": doubles, "controlnet_single_block_samples": singles}
    assert_agrees(apply(module, params, X, T, TEXT, POOLED, **more), output)
    condition = {"encoder_hidden_states": TEXT, "pooled_projections": POOLED, **more}
    call = jax.jit(functools.partial(models.caching_network(module, params), caching.fora(2), None, 0))
    assert_agrees(call(X, T, condition)[0], output)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            {"_class_name": "SD3ControlNetModel", "pos_embed_type": None},
            "pos_embed_type = None; only 'sincos'",
        ),
        (
            {"_class_name": "FluxControlNetModel", "conditioning_embedding_channels": 4},
            "only None is supported",
        ),
    ],
)
def test_forms_that_are_not_supported_are_refused(entries, words):
    with pytest.raises(CheckpointError, match=words):
        models.config_from_dict(entries)


def test_a_picture_of_another_size_is_refused():
    module = models.build("sd3-controlnet")
    params = models.shapes(module)
    x, t = jnp.zeros((1, 4, 4, 16)), jnp.zeros(1)
    text, pooled = jnp.zeros((1, 7, 4096)), jnp.zeros((1, 2048))
    with pytest.raises(InvalidArgumentError, match="control_image must be latents of 4x4"):
        jax.eval_shape(module.apply, {"params": params}, x, t, text, pooled, x[:, :2])
