import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError

COMMON = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_num_groups": 8}
CONFIGS = {
    "classes and attention": COMMON
    | {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "num_class_embeds": 11,
    },
    "three levels, scale and shift, no attention": COMMON
    | {
        "sample_size": (8, 12),
        "out_channels": 3,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
        "resnet_time_scale_shift": "scale_shift",
        "add_attention": False,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "norm_eps": 1e-3,
        "time_embedding_dim": 24,
    },
    "one wide head, mid attention of its own groups": COMMON
    | {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "attention_head_dim": None,
        "attn_norm_num_groups": 4,
    },
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The same random U-Net in diffusers and here, through a folder that diffusers wrote."""
    theirs = randomised(diffusers.UNet2DModel(**CONFIGS[request.param]))
    folder = tmp_path_factory.mktemp("unet")
    theirs.save_pretrained(folder)
    return theirs, *checkpoints.load(folder)


def labels_for(module, batch):
    return np.array([3, 10, 0])[:batch] if module.config.num_classes else None


@pytest.mark.parametrize("batch", [1, 3])
def test_agrees_with_diffusers(pair, batch):
    theirs, module, params = pair
    if batch == 1 and not module.config.num_classes:
        pytest.skip("one compilation of batch 1 is enough")
    size = module.config.sample_size
    x = images(batch, *((size, size) if isinstance(size, int) else size), 4)
    t, labels = np.array([0.0, 17.0, 980.0], np.float32)[:batch], labels_for(module, batch)
    ours = jax.jit(module.apply)({"params": params}, x, t, labels)
    with torch.no_grad():
        expected = theirs(
            to_torch(x), torch.from_numpy(t), None if labels is None else torch.from_numpy(labels)
        ).sample
    assert_agrees(ours, expected)


def test_diffusers_opens_what_we_save(pair, tmp_path, caplog, recwarn):
    theirs, module, params = pair
    checkpoints.save(tmp_path, module, params)
    diffusers.utils.logging.enable_propagation()
    opened = diffusers.UNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert [record.getMessage() for record in caplog.records] + [str(w.message) for w in recwarn] == []
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
    for key, value in theirs.config.items():
        if not key.startswith("_"):
            assert opened.config[key] == (list(value) if isinstance(value, tuple) else value), key


def test_odd_sizes_come_back_as_the_reference_blocks_do(tmp_path):
    """UNet2DModel refuses 7 x 5, but its blocks accept the size to return to: they are applied here."""
    theirs = randomised(diffusers.UNet2DModel(**CONFIGS["classes and attention"]))
    theirs.save_pretrained(tmp_path)
    module, params = checkpoints.load(tmp_path)
    x, t, labels = images(2, 7, 5, 4), np.array([5.0, 400.0], np.float32), np.array([1, 10])
    ours = jax.jit(module.apply)({"params": params}, x, t, labels)

    with torch.no_grad():
        emb = theirs.time_embedding(theirs.time_proj(torch.from_numpy(t)))
        emb = emb + theirs.class_embedding(torch.from_numpy(labels))
        h = theirs.conv_in(to_torch(x))
        skips = (h,)
        for block in theirs.down_blocks:
            h, outputs = block(h, emb)
            skips += outputs
        h = theirs.mid_block(h, emb)
        attention_level, last_level = theirs.up_blocks
        # AttnUpBlock2D passes no size on, so its upsampler is called here.
        upsampler, attention_level.upsamplers = attention_level.upsamplers[0], None
        h = upsampler(attention_level(h, skips[-2:], emb), (7, 5))
        h = last_level(h, skips[:-2], emb)
        expected = theirs.conv_out(theirs.conv_act(theirs.conv_norm_out(h)))
    assert_agrees(ours, expected)


def tiny(**overrides):
    fields = {
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
        "mid_block_type": None,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return models.build("mini-unet", **(fields | overrides))


def test_labels_without_classes_are_refused():
    module = tiny(num_classes=None)
    with pytest.raises(InvalidArgumentError, match="num_classes is None"):
        jax.eval_shape(
            module.apply,
            {"params": models.shapes(module)},
            images(1, 7, 7, 4),
            np.zeros(1, np.float32),
            np.zeros(1, int),
        )


def test_dropout_draws_from_the_key_of_training():
    module = tiny(dropout=0.5)
    params = models.init(module, jax.random.key(0))
    x, t = images(1, 7, 7, 4), np.zeros(1, np.float32)

    @jax.jit
    def apply_in_training(key):
        return module.apply({"params": params}, x, t, train=True, rngs={"dropout": key})

    first, again, other = (apply_in_training(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_bfloat16_stays_near_float32():
    module, half = tiny(), tiny(dtype="bfloat16")
    params = models.init(module, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    x, t = images(2, 7, 7, 4), np.array([1.0, 999.0], np.float32)
    exact, rounded = (jax.jit(m.apply)({"params": params}, x, t) for m in (module, half))
    assert rounded.dtype == jnp.float32 and np.isfinite(rounded).all()
    assert 0 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        ({"block_out_channels": (64, 100)}, InvalidArgumentError),
        ({"block_out_channels": (64, 128, 128)}, InvalidArgumentError),
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, UnknownNameError),
        ({"resnet_time_scale_shift": "spatial"}, UnknownNameError),
        ({"dtype": "float8"}, UnknownNameError),
        ({"widht": 3}, UnknownNameError),
    ],
)
def test_impossible_configs_are_refused(overrides, error):
    with pytest.raises(error):
        models.build("mini-unet", **overrides)


def test_config_survives_its_dictionary_and_names_what_it_cannot_do():
    config = dataclasses.replace(models.PRESETS["mini-unet"], dropout=0.1, dtype="bfloat16")
    entries = models.config_to_dict(config)
    assert models.count_params(models.from_config(dataclasses.replace(config, sample_size=None))) > 0
    assert entries["num_class_embeds"] == 11
    assert models.config_from_dict(entries) == config
    with pytest.raises(CheckpointError, match=r"time_embedding_type.*'fourier'.*'positional'"):
        models.config_from_dict(entries | {"time_embedding_type": "fourier"})
    with pytest.raises(CheckpointError, match=r"config\.json .*CrossAttnDownBlock2D"):
        models.config_from_dict(entries | {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]})
    with pytest.raises(CheckpointError, match="'surprise'"):
        models.config_from_dict(entries | {"surprise": 1})
    with pytest.raises(CheckpointError, match="'Nonsense'"):
        models.config_from_dict(entries | {"_class_name": "Nonsense"})
