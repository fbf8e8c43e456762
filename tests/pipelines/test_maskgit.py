"""The family of masked image models: tokens of diffusers' scheduler one by one, folders, options."""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from amused_folders import FedNumbers
from compilations import COMPILATIONS

from jaxldm import diffusion as D
from jaxldm import models, pipelines
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError
from jaxldm.pipelines.families.maskgit import maskgit
from jaxldm.pipelines.network import Network

KEY = jax.random.key(5)
SIDE, VALUES, MASK = 8, 5, 5
SMALL = {"sample_size": SIDE, "codebook_size": VALUES, "block_out_channels": (8,), "norm_num_groups": 2}
SMALL |= {"hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}


def random_network(**overrides):
    module = models.build("tiny-maskgit", **SMALL | overrides)
    rng = np.random.default_rng(0)
    return Network(
        module, jax.tree.map(lambda s: 0.4 * rng.standard_normal(s.shape, np.float32), models.shapes(module))
    )


@pytest.fixture(scope="module")
def pipe():
    return maskgit(random_network(), class_names=("zero", "one", "two"))


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("maskgit") / "folder"
    pipelines.save(pipe, path)
    return path


@pytest.mark.parametrize(("steps", "scale", "temperature"), [(7, 3.0, (4.5, 0.0)), (4, 1.0, (2.0, 2.0))])
def test_the_tokens_are_those_of_diffusers_scheduler(pipe, folder, monkeypatch, steps, scale, temperature):
    """Read from our folder by diffusers, fed our random numbers, and guided by hand."""
    labels, shape = np.array([2, 0, 1], np.int32), (3, SIDE, SIDE)
    reference = diffusers.AmusedScheduler.from_pretrained(folder / "scheduler")
    assert reference.config.mask_token_id == MASK
    ask = jax.jit(lambda network, tokens, labels: network(tokens, labels))
    FedNumbers(monkeypatch, D.image_keys(KEY, 3), SIDE, SIDE)
    reference.set_timesteps(steps, (temperature[0], temperature[1]))
    tokens = torch.full(shape, MASK)
    for timestep in reference.timesteps:
        cond, uncond = (
            np.asarray(ask(pipe.transformer, tokens.numpy().astype(np.int32), of))
            for of in (labels, np.full_like(labels, 3))
        )
        logits = torch.from_numpy(uncond + np.float32(scale) * (cond - uncond)).permute(0, 3, 1, 2)
        tokens = reference.step(logits, timestep, tokens, return_dict=False)[0]
    monkeypatch.undo()
    options = {"num_inference_steps": steps, "guidance_scale": scale, "temperature": temperature}
    ours = pipe(KEY, labels, **options, output="latents")
    np.testing.assert_array_equal(ours, tokens.numpy())
    images = pipe(KEY, labels, **options)
    np.testing.assert_allclose(images[..., 0], tokens.numpy() / 2 - 1, atol=1e-6)
    assert images.shape == (3, SIDE, SIDE, 1) and len(np.unique(ours)) > 2


def test_an_image_does_not_depend_on_the_others_and_nothing_compiles_again(pipe):
    many = pipe(KEY, ["two", "zero"], num_images=5)
    before = COMPILATIONS.count
    again = pipe(
        KEY, ["two", "zero"], num_images=5, num_inference_steps=9, guidance_scale=2.0, temperature=1.0
    )
    pipe(jax.random.key(1), [1], num_images=5)
    assert COMPILATIONS.count == before and not np.array_equal(again, many)
    np.testing.assert_array_equal(pipe(KEY, [2, 0, 2], batch_size=1), many[:3])
    np.testing.assert_array_equal(pipe(KEY, [2, 0], num_images=5, batch_size=3), many)
    small = pipe.replace(images_per_device=2)
    np.testing.assert_array_equal(small(KEY, [2, 0], num_images=5, devices=jax.devices()[:2]), many)
    told = []
    pipe(KEY, [2, 0], num_images=5, progress=lambda done, total: told.append((int(done), int(total))))
    jax.effects_barrier()
    assert len(told) == pipe.num_callbacks(5) == 12


def test_known_tokens_stay(pipe):
    drawn = pipe(KEY, [0, 1], output="latents")
    start = drawn.copy()
    start[:, 4:] = MASK
    completed = pipe(jax.random.key(8), [0, 1], latents=start, output="latents")
    np.testing.assert_array_equal(completed[:, :4], drawn[:, :4])
    assert (completed != MASK).all() and (completed[:, 4:] != drawn[:, 4:]).any()
    np.testing.assert_array_equal(pipe.image_tokens(pipe.decode(drawn)), drawn)


def test_guidance_of_a_class_away_from_another(pipe):
    plain, away = pipe(KEY, [0]), pipe(KEY, [0], negative_labels="one")
    assert not np.array_equal(plain, away)
    np.testing.assert_array_equal(pipe(KEY, [0], negative_labels=0), pipe(KEY, [0], guidance_scale=1.0))


def test_a_folder_is_opened_again(pipe, folder, tmp_path):
    again = pipelines.load(folder)
    assert again.family is pipe.family and again.options == pipe.options
    assert not [row for row in pipelines.compare(pipe, again) if row.difference]
    np.testing.assert_array_equal(pipe(KEY, [1]), again(KEY, ["one"]))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "MaskGITPipeline" and index["scheduler"] == [
        "diffusers",
        "AmusedScheduler",
    ]
    assert pipelines.kind_of(folder) == "export"
    pipelines.save(pipe.replace(default_guidance_scale=2.0, images_per_device=4), tmp_path / "other")
    other = pipelines.load(tmp_path / "other")
    assert (other.default_guidance_scale, other.images_per_device) == (2.0, 4)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"solver": "ddim"}, "solver is not for MaskGIT"),
        ({"sigmas": [1.0]}, "sigmas is not for MaskGIT"),
        ({"image": np.zeros((8, 8, 3))}, "image is not for MaskGIT"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"temperature": (1.0, 2.0, 3.0)}, "temperature"),
        ({"latents": np.zeros((1, 4, 4), int)}, "4x4 tokens, 8x8 are needed"),
        ({"latents": np.full((1, 8, 8), 6)}, "latents must lie in .* or be 5, got 6"),
        ({"latents": np.zeros((1, 8, 8, 1))}, "whole numbers"),
    ],
)
def test_what_has_no_meaning_is_refused(pipe, wrong, words):
    with pytest.raises(InvalidArgumentError, match=words):
        pipe(KEY, [0], **wrong)


def test_schedules_and_parts_that_do_not_fit(pipe):
    with pytest.raises(UnknownNameError, match="cosine"):
        pipe(KEY, [0], mask_schedule="cosin")
    with pytest.raises(CheckpointError, match="mask is token 4, its transformer's 5"):
        pipe.replace(scheduler={**pipe.scheduler, "mask_token_id": 4}).check_parts()
    with pytest.raises(CheckpointError, match="AmusedScheduler"):
        pipe.replace(scheduler={"_class_name": "DDIMScheduler"}).check_parts()
    with pytest.raises(CheckpointError, match="MaskGITTransformer is needed"):
        pipe.replace(transformer=Network(models.build("tiny-dit"), {})).check_parts()
    unconditional = maskgit(random_network(num_classes=None))
    assert unconditional(KEY, num_images=2).shape == (2, SIDE, SIDE, 1)
    with pytest.raises(InvalidArgumentError, match="no classes"):
        unconditional(KEY, num_images=2, guidance_scale=2.0)


def test_a_masked_image_model_is_no_teacher(folder):
    from jaxldm.training import distill_recipe

    with pytest.raises(CheckpointError, match=r"masked image model, which has no noise.*take a denoising"):
        distill_recipe(folder, "lcm", dataset="mnist5k")
