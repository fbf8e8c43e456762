"""T2I-Adapters against diffusers."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers_reference import opened_by_diffusers
from torch_reference import assert_agrees, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import InvalidArgumentError

KINDS = {
    "full_adapter": {"channels": [4, 6, 8], "num_res_blocks": 1, "downscale_factor": 2},
    "full_adapter_xl": {"channels": [4, 6, 8, 8], "num_res_blocks": 1, "downscale_factor": 2},
    "light_adapter": {"channels": [4, 8], "num_res_blocks": 2, "downscale_factor": 4, "in_channels": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_features_agree_with_diffusers(kind, tmp_path, caplog, recwarn):
    """Features of an odd size among them: the last row of a mean is narrower."""
    theirs = randomised(diffusers.T2IAdapter(adapter_type=kind, **KINDS[kind]), 1)
    theirs.save_pretrained(tmp_path)
    module, params = checkpoints.load(tmp_path)
    shape = (2, 12, 20, module.config.in_channels)
    picture = np.random.default_rng(0).random(shape).astype(np.float32)
    ours = jax.jit(lambda params, x: module.apply({"params": params}, x))(params, picture)
    features = ours["down_intrablock_additional_residuals"]
    with torch.no_grad():
        others = theirs(to_torch(picture))
    assert len(features) == len(others) == len(module.config.widths)
    for own, other in zip(features, others, strict=True):
        assert_agrees(own, other)
    checkpoints.save(tmp_path / "again", module, params)
    opened = opened_by_diffusers(theirs, tmp_path / "again", caplog, recwarn)
    with torch.no_grad():
        np.testing.assert_array_equal(opened(to_torch(picture))[-1], others[-1])


@pytest.mark.parametrize(
    ("shape", "words"), [((1, 16, 16, 1), "has 1 channels"), ((1, 12, 16, 3), "takes multiples of 8")]
)
def test_wrong_pictures_are_refused(shape, words):
    adapter = models.build("sd15-t2i-adapter")
    with pytest.raises(InvalidArgumentError, match=words):
        jax.eval_shape(adapter.apply, {"params": models.shapes(adapter)}, np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("sd15-t2i-adapter", 77_369_280),
        ("sdxl-t2i-adapter", 79_028_160),
        ("sd15-light-t2i-adapter", 18_689_200),
    ],
)
def test_presets_have_as_many_parameters_as_the_published_models(preset, published):
    assert models.count_params(preset) == published
