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
from diffusers.pipelines.deprecated.score_sde_ve import ScoreSdeVePipeline, pipeline_score_sde_ve
from diffusers.schedulers import scheduling_consistency_models, scheduling_ddpm, scheduling_sde_ve
from reference_pipelines import shaken, theirs

from jaxldm import pipelines, training
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError

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


CALLS = {
    "several steps": ({"num_inference_steps": 3}, {}),
    "numbers of levels": ({"num_inference_steps": None, "timesteps": [22, 0]}, {}),
    "classes": ({"num_inference_steps": 2}, {"num_class_embeds": 3}),
}


@pytest.fixture(scope="module")
def consistency(tmp_path_factory):
    """with classes or not -> (their model, its folder)."""
    known = {}

    def model(**options):
        if bool(options) not in known:
            folder = tmp_path_factory.mktemp("consistency")
            unet, scheduler = network(**RESNET, **options), diffusers.CMStochasticIterativeScheduler()
            theirs = diffusers.ConsistencyModelPipeline(unet, scheduler)
            theirs.save_pretrained(folder)
            theirs.set_progress_bar_config(disable=True)
            known[bool(options)] = theirs, folder
        return known[bool(options)]

    return model


@pytest.mark.parametrize("kind", CALLS)
def test_a_consistency_model(consistency, tmp_path, monkeypatch, kind):
    """Several steps, with their noise: the pipeline gives the scheduler unit noise, ours is at its level.

    Every label is a class, and the last one, too: 2 of 3.
    """
    call, options = CALLS[kind]
    model, folder = consistency(**options)
    start = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    queue = [step_noise(step) for step in range(3)]
    monkeypatch.setattr(pipeline_consistency_models, "randn_tensor", lambda *args, **options: theirs(start))
    module = scheduling_consistency_models
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: queue.pop(0))
    labels = {"class_labels": [2, 0]} if options else {}
    drawn = model(batch_size=2, output_type="np", **call, **labels).images

    pipe = pipelines.load(folder)
    assert pipe.defaults.num_inference_steps == 1 and pipe.num_classes == options.get("num_class_embeds")
    labels = {"class_labels": [2, 0]} if options else {"num_images": 2}
    ours = pipe(KEY, latents=80 * start, **call, **labels)
    np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), drawn, atol=2e-3)
    assert np.abs(drawn - drawn.mean()).max() > 0.05
    pipelines.save(pipe, tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == "ConsistencyModelPipeline"
    assert pipelines.load(tmp_path / "again").num_classes == pipe.num_classes
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")) is type(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"guidance_scale": 2.0}, "no null class, so there is nothing to guide it by"),
        ({"negative_labels": 1}, "no null class and is not guided"),
        ({"class_labels": [3]}, "3"),
        ({"timesteps": [0, 22]}, r"from 39 to 0, the largest first .* got \[0\.0, 22\.0\]"),
        ({"timesteps": [40]}, "from 39 to 0"),
        ({"timesteps": [1.5, 0]}, "whole numbers"),
    ],
)
def test_calls_of_a_consistency_model_that_cannot_be(consistency, call, message):
    pipe = pipelines.load(consistency(num_class_embeds=3)[1])
    with pytest.raises((InvalidArgumentError, DataError), match=message):
        pipe(KEY, **{"class_labels": [2]} | call)


def test_a_consistency_model_of_classes_is_not_trained_on(consistency):
    """Its last label is a class, which the training would take for none."""
    with pytest.raises(CheckpointError, match="is a consistency model, which this loss would spoil"):
        training.finetune_recipe(consistency(num_class_embeds=3)[1], "pictures")


def test_a_consistency_model_of_classes_is_no_teacher(consistency):
    """Its last label is a class, which `distill` would count as the null class."""
    with pytest.raises(CheckpointError, match=r"is a consistency model, which has no trajectories.*: take a"):
        training.distill_recipe(consistency(num_class_embeds=3)[1], "progressive", dataset="mnist5k")


SCORE = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (4, 8),
    "down_block_types": ("SkipDownBlock2D",) * 2,
    "up_block_types": ("SkipUpBlock2D",) * 2,
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": 2**0.5,
    "norm_num_groups": None,
}


def test_a_score_based_model(tmp_path, monkeypatch):
    """NCSN++ with Langevin steps; its pictures are numbers in [0, 1]."""
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_max=20.0)
    model = ScoreSdeVePipeline(network(**SCORE), scheduler)
    model.save_pretrained(tmp_path)
    model.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    start, steps = rng.standard_normal((2, 8, 8, 3)).astype(np.float32), 4

    def drawn(step, k):
        keys = [jax.random.fold_in(jax.random.fold_in(KEY, image), step) for image in range(2)]
        return theirs(np.stack([jax.random.normal(jax.random.fold_in(key, k), (8, 8, 3)) for key in keys]))

    queue = [drawn(step, k) for step in range(steps) for k in (0, 1)]
    monkeypatch.setattr(scheduling_sde_ve, "randn_tensor", lambda *args, **options: queue.pop(0))
    monkeypatch.setattr(pipeline_score_sde_ve, "randn_tensor", lambda *args, **options: theirs(start))
    expected = model(batch_size=2, num_inference_steps=steps, output_type="np").images
    assert not queue and np.ptp(expected) > 0.1

    pipe = pipelines.load(tmp_path, reference_quirks=True)
    assert pipe.defaults.num_inference_steps == 2000 and pipe.num_classes is None
    pipe = pipe.replace(images_per_device=2)  # all of a batch have one length of the Langevin steps there
    ours = pipe(KEY, num_images=2, latents=20 * start, num_inference_steps=steps)
    np.testing.assert_allclose(ours / 2 + 0.5, expected, atol=2e-3)
    pipelines.save(pipe, tmp_path / "again")
    assert pipelines.load(tmp_path / "again").diffusers_class == "ScoreSdeVePipeline"
    assert isinstance(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again"), ScoreSdeVePipeline)
