"""SiT: half the output of DiT's network. The reference is DiT in diffusers, the same architecture."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models


@pytest.fixture(scope="module")
def sit_and_reference():
    theirs = randomised(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=3,
            out_channels=6,
            num_layers=2,
            sample_size=6,
            num_embeds_ada_norm=5,
            norm_eps=1e-6,
        )
    )
    state = theirs.state_dict()
    for name in [name for name in state if name.startswith("transformer_blocks.1.norm1.emb.")]:
        state[name].copy_(state[name.replace(".1.", ".0.", 1)])
    module = models.DiTTransformer2DModel(
        models.config_from_dict({"_class_name": "DiTTransformer2DModel", **theirs.config})
    )
    tensors = {name: tensor.numpy() for name, tensor in state.items()}
    params = checkpoints.from_state_dict(tensors, models.shapes(module))
    dit, params = checkpoints.dit_from_diffusers(module, params, freq_shift=1)
    fields = {field.name: getattr(dit.config, field.name) for field in dataclasses.fields(dit.config)}
    return models.SiT(models.SiTConfig(**fields)), params, theirs


def test_the_velocity_is_the_first_half_of_the_output(sit_and_reference):
    module, params, theirs = sit_and_reference
    x, t, labels = images(3, 6, 6, 3), np.array([0.0, 0.3, 1.0], np.float32), np.array([3, 5, 0])
    with torch.no_grad():
        expected = theirs(to_torch(x), torch.from_numpy(t), torch.from_numpy(labels)).sample[:, :3]
    assert_agrees(jax.jit(module.apply)({"params": params}, x, t, labels), expected)
    assert module.config.out_channels == 3


def test_the_folder_remembers_that_it_is_a_sit(sit_and_reference, tmp_path):
    module, params, _ = sit_and_reference
    checkpoints.save(tmp_path, module, params)
    loaded_module, loaded = checkpoints.load(tmp_path)
    assert type(loaded_module) is models.SiT and loaded_module == module
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(("size", "millions"), [("s", 33), ("b", 130), ("l", 458), ("xl", 675)])
def test_presets_have_the_published_number_of_parameters(size, millions):
    count = models.count_params(f"sit-{size}-2")
    assert abs(count / 1e6 - millions) < 1
    for patch in (2, 4, 8):
        sit, dit = (dataclasses.asdict(models.PRESETS[f"{kind}-{size}-{patch}"]) for kind in ("sit", "dit"))
        assert sit == dit
