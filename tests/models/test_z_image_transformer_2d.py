import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers_reference import opened_by_diffusers
from safetensors.numpy import load_file, save_file
from torch_reference import assert_agrees, images, randomised, to_torch
from transformers_reference import perturbed

from jaxldm import checkpoints, models
from jaxldm.checkpoints.folder import load_as
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.models.z_image_transformer_2d import ZImageTransformerBlock

KIND = diffusers.ZImageTransformer2DModel
SMALL = {
    "in_channels": 4,
    "dim": 24,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 2,
    "cap_feat_dim": 10,
    "axes_dims": [4, 6, 2],
    "axes_lens": [100, 16, 16],
}
CONFIGS = {
    "as published, 32 tokens at once": (SMALL, {}),
    "other constants, blocks one by one": (
        SMALL
        | {
            "all_patch_size": [1],
            "n_refiner_layers": 1,
            "qk_norm": False,
            "norm_eps": 1e-2,
            "rope_theta": 30.0,
            "t_scale": 700.0,
        },
        {"_scan": False},
    ),
}
TIMES = np.array([0.3, 0.0, 0.95], np.float32)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    fields, own = CONFIGS[request.param]
    theirs = randomised(KIND(**fields))
    folder = tmp_path_factory.mktemp("z_image")
    theirs.save_pretrained(folder)
    module, params = load_as(checkpoints.read_config(folder) | own, folder)
    return theirs, module, params, jax.jit(module.apply), folder


def theirs_of(model, x, t, texts):
    """They take a list of images, each of one frame, and a list of texts, each of its own length."""
    with torch.no_grad():
        frames = [image[:, None] for image in to_torch(x)]
        states, (patch_size,) = [torch.from_numpy(text) for text in texts], model.all_patch_size
        drawn = model(frames, torch.from_numpy(t), states, patch_size=patch_size)
    return torch.stack(drawn.sample)[:, :, 0]


def padded(texts, length, width=10, filling=7.0):
    """Rows of one length and their mask; padding has values that must have no effect."""
    rows = np.full((len(texts), length, width), filling, np.float32)
    mask = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        rows[row, : len(text)], mask[row, : len(text)] = text, 1
    return rows, mask


def test_agrees_with_diffusers_on_one_text(pair):
    """37 tokens, which are filled up to 64, and 15 patches, or with patches of one latent 60."""
    theirs, _, params, apply, _ = pair
    x, text = images(1, 6, 10, 4), images(1, 37, 10, seed=1)
    drawn = apply({"params": params}, x, TIMES[:1], text)
    assert_agrees(drawn, theirs_of(theirs, x, TIMES[:1], text))


def test_agrees_with_diffusers_on_texts_of_different_lengths(pair):
    """3 tokens, 32, which need no filling, and 45: the image's place differs within the batch.

    Its 8 patches are filled up; the 32 of one latent are not.
    """
    theirs, _, params, apply, _ = pair
    x = images(3, 8, 4, 4)
    texts = [images(length, 10, seed=length) for length in (3, 32, 45)]
    drawn = apply({"params": params}, x, TIMES, *padded(texts, 50))
    assert_agrees(drawn, theirs_of(theirs, x, TIMES, texts))
    for row, text in enumerate(texts):  # alone, without a mask, each is what it is in company
        one = slice(row, row + 1)
        assert_agrees(drawn[one], theirs_of(theirs, x[one], TIMES[one], [text]))
    again = apply({"params": params}, x, TIMES, *padded(texts, 50, filling=-3.0))
    np.testing.assert_array_equal(again, drawn)


def test_diffusers_opens_what_we_change_and_save(pair, tmp_path, caplog, recwarn):
    theirs, module, params, apply, _ = pair
    params = perturbed(params)
    checkpoints.save(tmp_path, module, params)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    x, text = images(1, 6, 10, 4), images(1, 37, 10, seed=1)
    assert_agrees(apply({"params": params}, x, TIMES[:1], text), theirs_of(opened, x, TIMES[:1], text))
    again_module, again = checkpoints.load(tmp_path)
    assert again_module == module
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_bfloat16_stays_near_float32(pair):
    _, module, params, apply, _ = pair
    if not module.config.scan:
        pytest.skip("the same numbers")
    low = models.from_config(dataclasses.replace(module.config, dtype="bfloat16"))
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), jax.device_get(params))
    x, text = images(1, 6, 10, 4), images(1, 37, 10, seed=1)
    rounded = jax.jit(low.apply)({"params": narrow}, x, TIMES[:1], text)
    exact = apply({"params": params}, x, TIMES[:1], text)
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


def test_activations_are_computed_again_where_asked():
    for remat in (True, False):
        config = dataclasses.replace(models.ZImageTransformer2DConfig.from_dict(SMALL), remat=remat)
        module = models.from_config(config)
        inputs = ({"params": models.shapes(module)}, *module.example_inputs())
        assert ("remat" in str(jax.make_jaxpr(module.apply)(*inputs))) == remat


def test_the_preset_has_the_published_parameters():
    """ "6B" on the model's page; and its config.json."""
    config = models.config_to_dict(models.PRESETS["z-image"])
    with torch.device("meta"):
        theirs = KIND(**{key: value for key, value in config.items() if key[0] != "_"})
    count = models.count_params("z-image")
    assert count == sum(parameter.numel() for parameter in theirs.parameters()) == 6_154_908_736


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"all_patch_size": (2, 4), "all_f_patch_size": (1, 1)}, "one patch size"),
        ({"n_heads": 7, "n_kv_heads": 7}, "7 heads"),
        ({"n_kv_heads": 10}, "n_kv_heads"),
        ({"axes_dims": (32, 48)}, "three numbers"),
        ({"axes_dims": (32, 48, 50)}, "add up to a head's width, 128"),
        ({"axes_dims": (33, 47, 48)}, "even"),
    ],
)
def test_configs_that_cannot_be(fields, message):
    config = models.PRESETS["z-image"]
    with pytest.raises(InvalidArgumentError, match=message):
        dataclasses.replace(config, **fields)


def test_published_keys_that_are_not_supported_and_tensors_that_do_not_fit(pair, tmp_path):
    _, module, _, _, folder = pair
    entries = models.config_to_dict(module.config)
    with pytest.raises(CheckpointError, match="siglip_feat_dim = 1152"):
        models.config_from_dict(entries | {"siglip_feat_dim": 1152})
    with pytest.raises(CheckpointError, match="unknown key 'sample_size'"):
        models.config_from_dict(entries | {"sample_size": 128})
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    state["surprise"] = state.pop("x_pad_token")
    state["layers.1.attention.to_q.weight"] = state["layers.1.attention.to_q.weight"][:5]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(tmp_path)
    for part in (
        r"missing: x_pad_token (1, 24)",
        "left over: surprise",
        "to_q.weight is (5, 24) in the file",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("x", "text", "message"),
    [
        ((1, 8, 6, 3), (1, 4, 10), r"\[B, H, W, 4\]"),
        ((1, 8, 7, 4), (1, 4, 10), "8x7"),
        ((1, 34, 6, 4), (1, 4, 10), "axes_lens reach to 32x32"),
        ((1, 8, 6, 4), (1, 4, 11), r"\[B, T, 10\]"),
        ((1, 8, 6, 4), (1, 97, 10), "97 tokens, but axes_lens reach to 96"),
    ],
)
def test_inputs_that_do_not_fit(x, text, message):
    config = models.ZImageTransformer2DConfig.from_dict(SMALL)
    module = models.from_config(config)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x, (1,), text)]
    with pytest.raises(InvalidArgumentError, match=message):
        jax.eval_shape(module.apply, {"params": models.shapes(module)}, *arguments)


def test_the_doubled_feed_forward_is_as_wide_as_theirs():
    """int(dim / 3 * 8) rounds down where dim is no multiple of 3."""
    config = models.ZImageTransformer2DConfig.from_dict(SMALL | {"dim": 32, "axes_dims": [4, 6, 6]})
    block = ZImageTransformerBlock(config, modulation=False)
    x, table = np.zeros((1, 2, 32), np.float32), np.zeros((2, 8), np.float32)
    params = jax.eval_shape(block.init, jax.random.key(0), x, (table, table), None, None)["params"]
    assert params["feed_forward"]["w1"]["kernel"].shape == (32, 85)
