"""Pipelines of diffusers without classes: the folder's solver, spacing and clipping, its class kept."""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.consistency_models import pipeline_consistency_models
from diffusers.pipelines.ddim import pipeline_ddim
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.pipelines.deprecated.pndm import pipeline_pndm
from diffusers.schedulers import scheduling_consistency_models, scheduling_ddpm
from reference_pipelines import shaken, theirs

from jaxldm import pipelines
from jaxldm.errors import CheckpointError

KEY = jax.random.key(0)
BETAS = {"beta_end": 0.01, "timestep_spacing": "leading", "steps_offset": 1}
PIPELINES = {
    "DDPMPipeline": (pipeline_ddpm, diffusers.DDPMScheduler(**BETAS, clip_sample_range=0.7)),
    "DDIMPipeline": (pipeline_ddim, diffusers.DDIMScheduler(**BETAS, clip_sample=False)),
    "PNDMPipeline": (pipeline_pndm, diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True)),
}


SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (4,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 2,
    "attention_head_dim": 4,
    "add_attention": False,
}
# The levels of the published consistency models.
RESNET = {
    "block_out_channels": (4, 4, 8),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 2,
    "add_attention": True,
}


def network(**options):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**SMALL | options)
    return shaken(unet, 0)


def step_noise(step):
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, image), step) for image in range(2)]
    return theirs(np.stack([jax.random.normal(key, (8, 8, 1)) for key in keys]))


@pytest.mark.parametrize("name", PIPELINES)
def test_what_the_folder_says_is_drawn(tmp_path, monkeypatch, name):
    module, scheduler = PIPELINES[name]
    reference = getattr(diffusers, name)(network(), scheduler)
    reference.save_pretrained(tmp_path)
    reference.set_progress_bar_config(disable=True)
    start = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    queue = [step_noise(step) for step in range(5)]
    monkeypatch.setattr(module, "randn_tensor", lambda *arguments, **options: theirs(start))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *arguments, **options: queue.pop(0))
    drawn = reference(batch_size=2, num_inference_steps=5, output_type="np").images

    pipe = pipelines.load(tmp_path)
    assert pipe.defaults.num_inference_steps == (1000 if name == "DDPMPipeline" else 50)
    ours = pipe(KEY, num_images=2, latents=start, num_inference_steps=5)
    np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), drawn, atol=2e-3)
    pipelines.save(pipe, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == name
    assert pipelines.load(tmp_path / "again").defaults == pipe.defaults


def test_a_consistency_model(tmp_path, monkeypatch):
    """Several steps, with their noise: the pipeline gives the scheduler unit noise, ours is at its level."""
    model = diffusers.ConsistencyModelPipeline(network(**RESNET), diffusers.CMStochasticIterativeScheduler())
    model.save_pretrained(tmp_path)
    model.set_progress_bar_config(disable=True)
    start = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    queue = [step_noise(step) for step in range(3)]
    monkeypatch.setattr(pipeline_consistency_models, "randn_tensor", lambda *args, **options: theirs(start))
    module = scheduling_consistency_models
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: queue.pop(0))
    drawn = model(batch_size=2, num_inference_steps=3, output_type="np").images

    pipe = pipelines.load(tmp_path)
    assert pipe.defaults.num_inference_steps == 1
    ours = pipe(KEY, num_images=2, latents=80 * start, num_inference_steps=3)
    np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), drawn, atol=2e-3)
    assert np.abs(drawn - drawn.mean()).max() > 0.05
    pipelines.save(pipe, tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == "ConsistencyModelPipeline"
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")) is type(model)


def test_a_consistency_model_of_classes_is_refused(tmp_path):
    unet = network(num_class_embeds=3)
    diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler()).save_pretrained(
        tmp_path
    )
    with pytest.raises(CheckpointError, match="no null class"):
        pipelines.load(tmp_path)
