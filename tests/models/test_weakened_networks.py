"""Networks called in another way with the same parameters: FreeU, layers left out of scans."""

import dataclasses

import diffusers
import jax
import numpy as np
import torch
from torch_reference import randomised

from jaxldm import checkpoints, models

UNET = {
    "sample_size": 8,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "layers_per_block": 1,
}


def test_free_u_in_both_up_blocks(tmp_path):
    theirs = randomised(diffusers.UNet2DConditionModel(**UNET)).eval()
    theirs.save_pretrained(tmp_path)
    module, params = checkpoints.load(tmp_path)
    rng = np.random.default_rng(0)
    x, states = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 7, 6, 4), (2, 5, 12)))
    t = np.full(2, 500.0, np.float32)
    for setting in ((0.9, 0.2, 1.5, 1.6), (0.5, 0.7, 1.2, 0.8)):
        theirs.enable_freeu(*setting)
        with torch.no_grad():
            inputs = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(t)
            wanted = theirs(*inputs, torch.from_numpy(states)).sample.numpy().transpose(0, 2, 3, 1)
        found = module.clone(free_u=setting).apply({"params": params}, x, t, states)
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(module.apply({"params": params}, x, t, states) - wanted).max() > 1e-3


def test_layers_are_left_out_of_a_scan_as_of_single_blocks():
    config = models.SD3Transformer2DConfig(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )
    scanned = models.SD3Transformer2DModel(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), models.shapes(scanned)
    )
    single = models.SD3Transformer2DModel(dataclasses.replace(config, scan=False))
    state = checkpoints.to_state_dict(params)
    of_single = checkpoints.from_state_dict(state, models.shapes(single))
    x, text, pooled = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((1, 8, 8, 4), (1, 3, 6), (1, 10))
    )
    inputs = (x, np.full(1, 500, np.float32), text, pooled)

    def drawn(module, params, skip):
        return module.clone(skip_layers=skip).apply({"params": params}, *inputs)

    all_of_them = drawn(scanned, params, ())
    for skip in ((1, 2), (0, 4)):
        found = drawn(scanned, params, skip)
        np.testing.assert_allclose(found, drawn(single, of_single, skip), atol=1e-5 * np.abs(found).max())
        assert np.abs(found - all_of_them).max() > 1e-2
