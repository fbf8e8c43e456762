"""NCSN++ against diffusers, both ways through folders."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError

SMALL = {
    "sample_size": 8,
    "time_embedding_type": "fourier",
    "norm_eps": 1e-6,
    "norm_num_groups": None,
    "mid_block_scale_factor": 2**0.5,
    "layers_per_block": 1,
}
CONFIGS = {
    # As in the tests of diffusers, with fewer channels where nothing attends.
    "attention in a level": SMALL
    | {
        "block_out_channels": (32, 32, 32),
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
        "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    },
    "two layers, plain middle": SMALL
    | {
        "block_out_channels": (8, 12),
        "down_block_types": ("SkipDownBlock2D",) * 2,
        "up_block_types": ("SkipUpBlock2D",) * 2,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "attention_head_dim": None,
        "add_attention": False,
        "time_embedding_dim": 20,
        "sample_size": (4, 8),
    },
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The same random network in diffusers and here, through a folder that diffusers wrote."""
    theirs = randomised(diffusers.UNet2DModel(**CONFIGS[request.param]))
    folder = tmp_path_factory.mktemp("ncsnpp")
    theirs.save_pretrained(folder)
    return theirs, *checkpoints.load(folder)


def test_agrees_with_diffusers(pair):
    theirs, module, params = pair
    assert isinstance(module, models.NCSNppModel)
    size = module.config.sample_size
    x = images(2, *((size, size) if isinstance(size, int) else size), 3)
    t = np.array([0.02, 300.0], np.float32)
    ours = jax.jit(module.apply)({"params": params}, x, t)
    with torch.no_grad():
        expected = theirs(to_torch(x), torch.from_numpy(t)).sample
    for row in range(2):  # the output of the lower level is thousands of times as large
        assert_agrees(ours[row : row + 1], expected[row : row + 1])


def test_diffusers_opens_what_we_save(pair, tmp_path):
    theirs, module, params = pair
    checkpoints.save(tmp_path, module, params)
    opened = diffusers.UNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
    for key, value in theirs.config.items():
        if not key.startswith("_"):
            assert opened.config[key] == (list(value) if isinstance(value, tuple) else value), key
    again, _ = checkpoints.load(tmp_path)
    assert again == module


def test_sides_that_cannot_be_halved_are_refused():
    module = models.from_config(models.config_from_dict({"_class_name": "UNet2DModel"} | SMALL_ENTRIES))
    with pytest.raises(InvalidArgumentError, match="sides divisible by 2, which"):
        jax.eval_shape(module.apply, {"params": models.shapes(module)}, images(1, 7, 8, 3), np.ones(1))


SMALL_ENTRIES = CONFIGS["two layers, plain middle"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_embedding_type": "positional"}, "time_embedding_type is 'fourier' in a U-Net with skip"),
        ({"norm_num_groups": 4}, "norm_num_groups is None in a U-Net with skip blocks, not 4"),
        ({"in_channels": 4}, "in_channels is 3"),
        ({"up_block_types": ["UpBlock2D", "SkipUpBlock2D"]}, "UpBlock2D"),
        ({"down_block_types": ["AttnSkipDownBlock2D", "SkipDownBlock2D"]}, "multiples of 32, not 8"),
        ({"up_block_types": ["SkipUpBlock2D", "AttnSkipUpBlock2D"]}, "multiples of 32, not 8"),
        ({"block_out_channels": [8, 10]}, "multiples of 4, not 10"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"num_class_embeds": 3}, "num_class_embeds"),
    ],
)
def test_configs_that_cannot_be(change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        models.config_from_dict({"_class_name": "UNet2DModel"} | SMALL_ENTRIES | change)
    assert "\n" not in str(caught.value)
