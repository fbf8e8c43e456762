"""DeepFloyd IF's pipelines against those of diffusers, on tiny random folders."""

import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers import (
    IFImg2ImgPipeline,
    IFImg2ImgSuperResolutionPipeline,
    IFInpaintingPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
)
from diffusers.pipelines.deepfloyd_if import (
    pipeline_if,
    pipeline_if_img2img,
    pipeline_if_img2img_superresolution,
    pipeline_if_superresolution,
    timesteps,
)
from diffusers.schedulers import scheduling_ddpm
from picture_checks import KEY, assert_latents_agree, states_of
from reference_pipelines import ours, shaken, theirs
from t5_parts import t5_encoder, t5_tokenizer

from jaxldm import diffusion as D
from jaxldm import pipelines
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError
from jaxldm.pipelines.families import deepfloyd_if

# scheduler_config.json as published; stage II has a sample_max_value of 1.
DDPM = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.95,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.5,
    "thresholding": True,
    "variance_type": "learned_range",
    "lambda_min_clipped": -5.1,
}
SIZE = 8
PROMPTS = {"prompt": "The cat at the zoo.", "negative_prompt": "a DOG"}
STEPS = {"num_inference_steps": 4, "guidance_scale": 4.0}
AS_IT_IS = {"clean_caption": False, "output_type": "pt"}  # of the reference; x as it is, not clipped


def unet(seed, **more):
    torch.manual_seed(seed)
    return shaken(
        diffusers.UNet2DConditionModel(
            sample_size=SIZE,
            out_channels=6,
            block_out_channels=(8,),
            down_block_types=("SimpleCrossAttnDownBlock2D",),
            mid_block_type=None,
            up_block_types=("ResnetUpsampleBlock2D",),
            layers_per_block=1,
            norm_num_groups=4,
            act_fn="gelu",
            attention_head_dim=4,
            cross_attention_dim=32,
            encoder_hid_dim=16,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            resnet_time_scale_shift="scale_shift",
            cross_attention_norm="group_norm",
            **more,
        ),
        seed,
        0.1,
    )


def write_if(folder, stage):
    parts = {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5_encoder(),
        "unet": unet(1, in_channels=3),
        "scheduler": diffusers.DDPMScheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }
    config, kind = dict(DDPM), IFPipeline
    if stage == "II":
        kind, config["sample_max_value"] = IFSuperResolutionPipeline, 1.0
        parts["unet"] = unet(2, in_channels=6, class_embed_type="timestep", time_embedding_act_fn="gelu")
        parts["image_noising_scheduler"] = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    kind(**parts).save_pretrained(folder)
    entries = {"_class_name": "DDPMScheduler", **config}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {stage: write_if(tmp_path_factory.mktemp(f"stage_{stage}"), stage) for stage in ("I", "II")}


@pytest.fixture(scope="module")
def pipes(folders):
    return {stage: pipelines.load(folder) for stage, folder in folders.items()}


def opened(kind, folder):
    judges = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
    pipe = kind.from_pretrained(folder, **judges)
    assert not pipe.config.requires_safety_checker  # diffusers would say that there is none
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noises(count, steps, size=(SIZE, SIZE), first=0):
    """What our run draws: the noise to start from, that of the enlarged image, and that of each step.

    The first is of variance 1, as the reference starts, which ignores the first timestep's variance:
    where both shall agree to the end, ours is handed it as `latents`.
    """
    keys = D.image_keys(KEY, count)
    zeros = np.zeros((count, *size, 3), np.float32)

    def drawn(number):
        return D.solvers.noise_like(jax.vmap(jax.random.fold_in, (0, None))(keys, np.uint32(number)), zeros)

    start = D.initial_noise(KEY, zeros.shape, D.Grid(np.zeros(2), np.zeros(2), np.ones(2)))
    each = [theirs(np.asarray(drawn(first + step))) for step in range(steps)]
    return theirs(np.asarray(start)), theirs(np.asarray(drawn(2**32 - 2))), each


def feed(monkeypatch, module, at_the_start, steps):
    """The reference draws these in place of its own: the pipeline's first ones, and the scheduler's."""
    queues = {module: list(at_the_start), scheduling_ddpm: list(steps)}
    for module, queue in queues.items():
        monkeypatch.setattr(module, "randn_tensor", lambda *args, queue=queue, **more: queue.pop(0))


def picture(size=SIZE, count=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def as_tensor(pixels):
    return theirs(pixels / np.float32(127.5) - np.float32(1))


@pytest.mark.parametrize("spacing", [None, "fast27"])
def test_stage_1(folders, pipes, monkeypatch, spacing):
    """DDPM with the learned variance, x_0 under dynamic thresholding. Capital letters count for nothing."""
    reference = opened(IFPipeline, folders["I"])
    steps = dict(STEPS) if spacing is None else {"timesteps": timesteps.fast27_timesteps, "guidance_scale": 4}
    start, _, each = noises(1, 27)
    feed(monkeypatch, pipeline_if, [start], each)
    expected = reference(**PROMPTS, **steps, **AS_IT_IS).images
    call = STEPS if spacing is None else {"guidance_scale": 4.0, "spacing": spacing}
    drawn = pipes["I"](KEY, **PROMPTS, latents=ours(start), output="latents", **call)
    assert_latents_agree(drawn, expected)
    lower = {name: text.lower() + " " for name, text in PROMPTS.items()}
    images = pipes["I"](KEY, **lower, latents=ours(start), **call)
    np.testing.assert_array_equal(images, np.clip(drawn, -1, 1))


def test_another_solver_starts_where_the_folder_says(folders, pipes, monkeypatch):
    """DPM-Solver++ leaves out the noisiest timesteps, and the variance.

    Without guidance: x_0 is seen through 1 / alpha = 160 at the first step, and so is float32's rounding.
    """
    reference = opened(IFPipeline, folders["I"])
    kind = diffusers.DPMSolverMultistepScheduler
    reference.scheduler = kind.from_config(reference.scheduler.config, algorithm_type="dpmsolver++")
    start, _, _ = noises(2, 0)
    feed(monkeypatch, pipeline_if, [start], [])
    prompts = ["a cat", "the cat at the zoo, a dog!"]
    call = {"num_inference_steps": 4, "guidance_scale": 1.0}
    expected = reference(prompts, **call, **AS_IT_IS).images
    call |= {"solver": "dpmpp_2m", "output": "latents", "batch_size": 2}
    drawn = pipes["I"](KEY, prompts, latents=ours(start), **call)
    assert_latents_agree(drawn, expected)
    assert reference.scheduler.timesteps[0] < 999


def test_stage_1_from_an_image(folders, pipes, monkeypatch):
    reference = opened(IFImg2ImgPipeline, folders["I"])
    start, _, each = noises(1, 2, first=2)
    feed(monkeypatch, pipeline_if_img2img, [start], each)
    call = dict(**PROMPTS, **STEPS, strength=0.5)
    expected = reference(**call, image=as_tensor(picture()), **AS_IT_IS).images
    drawn = pipes["I"](KEY, **call, image=picture(), output="latents")
    assert_latents_agree(drawn, expected)


def test_inpainting_keeps_what_the_mask_leaves(folders, pipes):
    """Noised to the level of each step, as other families do; the reference shows it clean throughout."""
    mask = np.zeros((SIZE, SIZE), np.float32)
    mask[:, :4] = 1
    image = as_tensor(picture())
    clean = ours(image)[:, :, 4:]
    seen = {"ours": [], "theirs": []}
    call = {"on_step": lambda step, x: seen["ours"].append(np.asarray(x)[:, :, 4:]), **STEPS}
    drawn = pipes["I"](KEY, "a cat", image=picture(), mask_image=mask, **call)
    np.testing.assert_allclose(drawn[:, :, 4:], clean, atol=1e-5)
    assert np.abs(drawn - ours(image))[:, :, :4].mean() > 0.1
    reference = opened(IFInpaintingPipeline, folders["I"])
    call = {"callback": lambda step, t, x: seen["theirs"].append(ours(x)[:, :, 4:]), **STEPS}
    reference("a cat", image=image, mask_image=torch.from_numpy(mask)[None, None], **call, **AS_IT_IS)
    assert [len(states) for states in seen.values()] == [4, 4]
    for our_state, their_state in zip(seen["ours"][:2], seen["theirs"][:2], strict=True):
        assert (our_state - clean).std() > 0.1
        np.testing.assert_array_equal(their_state, clean)


@pytest.mark.parametrize("noise_level", [250, 0])
def test_stage_2(folders, pipes, monkeypatch, noise_level):
    """Two prompts, a small image for each, enlarged with its corners where they are, and noised."""
    reference = opened(IFSuperResolutionPipeline, folders["II"])
    prompts, small = ["a cat", "the cat at the zoo, a dog!"], picture(3, 2)
    start, on_the_image, each = noises(2, 27)
    feed(monkeypatch, pipeline_if_superresolution, [start, on_the_image], each)
    call = {"image": as_tensor(small), "noise_level": noise_level, "guidance_scale": 4.0}
    expected = reference(prompts, timesteps=timesteps.super27_timesteps, **call, **AS_IT_IS).images
    call |= {"image": small, "spacing": "super27"}
    assert_latents_agree(pipes["II"](KEY, prompts, output="latents", **call), expected)


def test_stage_2_from_a_large_image(folders, pipes, monkeypatch):
    reference = opened(IFImg2ImgSuperResolutionPipeline, folders["II"])
    start, on_the_image, each = noises(1, 2, first=2)
    feed(monkeypatch, pipeline_if_img2img_superresolution, [start, on_the_image], each)
    call = dict(**PROMPTS, **STEPS, strength=0.5)
    small, large = picture(3, seed=1), picture()
    expected = reference(image=as_tensor(small), original_image=as_tensor(large), **call, **AS_IT_IS).images
    drawn = pipes["II"](KEY, image=small, original_image=large, output="latents", **call)
    assert_latents_agree(drawn, expected)


def test_an_image_is_the_same_in_every_batch(pipes):
    small = picture(4, 2)
    call = {"num_inference_steps": 2, "num_images_per_prompt": 2}
    four = pipes["II"](KEY, ["a cat", "a dog"], image=small, **call)
    each = np.repeat(small, 2, axis=0)
    np.testing.assert_array_equal(pipes["II"](KEY, ["a cat", "a dog"], image=each, **call), four)
    call["num_images_per_prompt"] = 1
    np.testing.assert_array_equal(pipes["II"](KEY, ["a cat"], image=small[:1], **call), four[:1])
    assert np.abs(four[0] - four[1]).max() > 0.1


@pytest.mark.parametrize("name", deepfloyd_if.RESPACINGS)
def test_grids_are_the_published_ones(pipes, name):
    published = getattr(timesteps, f"{name}_timesteps")
    assert deepfloyd_if.respaced_timesteps(deepfloyd_if.RESPACINGS[name]) == published
    callbacks = pipes["II"].num_callbacks(3, spacing=name, image=picture(), batch_size=2)
    assert callbacks == 2 * len(published)


def test_a_folder_that_ours_wrote_is_opened_by_diffusers(pipes, tmp_path):
    for stage, kind in (("I", IFPipeline), ("II", IFSuperResolutionPipeline)):
        pipelines.save(pipes[stage], tmp_path / stage)
        reference = opened(kind, tmp_path / stage)
        assert reference.scheduler.config.variance_type == "learned_range"
        again = pipelines.load(tmp_path / stage)
        assert again.family is pipes[stage].family and again.scheduler == pipes[stage].scheduler
        assert not [row for row in pipelines.compare(again, pipes[stage]) if row.difference]


def test_a_text_encoder_may_be_shared(folders, pipes, tmp_path):
    folder = tmp_path / "without"
    shutil.copytree(folders["II"], folder)
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    alone, call = pipelines.load(folder), {"image": picture(4), "num_inference_steps": 2}
    with pytest.raises(InvalidArgumentError, match="without a text encoder"):
        alone(KEY, "a cat", **call)
    shared = {name: getattr(pipes["I"], name) for name in ("text_encoder", "tokenizer")}
    drawn = alone.replace(**shared)(KEY, "a cat", **call)
    np.testing.assert_array_equal(drawn, pipes["II"](KEY, "a cat", **call))
    given = states_of(pipes["I"], ["a cat"], [""])
    np.testing.assert_array_equal(alone(KEY, **given, num_images_per_prompt=2, **call)[:1], drawn)
    with pytest.raises(InvalidArgumentError, match=r"or prompt_embeds=cond.*stage_1\.encode_prompts"):
        alone(KEY, prompt_embeds=given["prompt_embeds"], **call)
    with pytest.raises(InvalidArgumentError, match="prompt and prompt_embeds: give one of them"):
        alone(KEY, "a cat", **given, **call)


@pytest.mark.parametrize(
    ("stage", "call", "error", "message"),
    [
        ("I", {"spacing": "smart28"}, UnknownNameError, "smart27"),
        ("I", {"spacing": "no_such_package:rows"}, InvalidArgumentError, "No module named"),
        ("I", {"spacing": "smart27", "num_inference_steps": 50}, InvalidArgumentError, "its 27"),
        ("I", {"spacing": "smart27", "sigmas": "karras"}, InvalidArgumentError, "leave out sigmas"),
        ("I", {"noise_level": 3}, UnknownNameError, "noise_level"),
        ("II", {}, InvalidArgumentError, "needs image="),
        ("II", {"image": picture(4), "noise_level": 1000}, InvalidArgumentError, "from 0 to 999, got 1000"),
        ("II", {"image": picture(4), "noise_level": 2.5}, InvalidArgumentError, "noise_level"),
        ("II", {"image": picture(4, 3)}, InvalidArgumentError, "3 arrays in image"),
        ("II", {"image": "cat.png"}, InvalidArgumentError, r"write PIL\.Image\.open"),
        ("II", {"image": picture(4), "strength": 0.5}, InvalidArgumentError, "strength"),
        ("II", {"image": picture(4), "crop": 1}, UnknownNameError, "crop"),
    ],
)
def test_bad_calls_are_refused_before_anything_is_compiled(pipes, stage, call, error, message):
    with pytest.raises(error, match=message):
        pipes[stage](KEY, "a cat", **call)


def test_parts_of_other_models_are_refused(folders, tmp_path):
    for stage, name, change, message in (
        ("I", "text_encoder", None, "24 wide, its U-Net takes 16"),
        ("I", "unet", {"in_channels": 6}, "takes 6 channels and draws 6"),
        ("II", "unet", {"in_channels": 6}, "takes no noise level"),
        ("I", "unet", {"in_channels": 3, "out_channels": 3}, "wants a learned variance"),
    ):
        folder = tmp_path / f"{stage}-{message[:4]}"
        shutil.copytree(folders[stage], folder)
        shutil.rmtree(folder / name)
        part = t5_encoder(width=24) if change is None else None
        if part is None:
            config = diffusers.UNet2DConditionModel.load_config(folders["I"] / "unet")
            part = diffusers.UNet2DConditionModel.from_config(dict(config) | change)
        part.save_pretrained(folder / name)
        with pytest.raises(CheckpointError, match=f"mixes two models: .*{message}"):
            pipelines.load(folder)
