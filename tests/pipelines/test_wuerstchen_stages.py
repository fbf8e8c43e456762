"""Wuerstchen's prior, decoder and both in one against the pipelines of diffusers, on tiny random folders."""

import dataclasses
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated import wuerstchen
from diffusers.pipelines.deprecated.wuerstchen import pipeline_wuerstchen, pipeline_wuerstchen_prior
from diffusers.schedulers import scheduling_ddpm_wuerstchen
from picture_checks import KEY, assert_latents_agree, states_of
from reference_pipelines import ours, theirs
from wuerstchen_folders import EMBEDDINGS, LATENTS, SIZE, write_wuerstchen

from jaxldm import diffusion as D
from jaxldm import models, pipelines
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError

PROMPTS = ["a cat", "the dog sat"]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return write_wuerstchen(tmp_path_factory.mktemp("wuerstchen"))


@pytest.fixture(scope="module")
def pipes(references):
    return {name: pipelines.load(references.root / name) for name in ("prior", "decoder", "whole")}


def noise(count, shape, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def drawn_noise(keys, number, shape):
    """What our run draws in step `number` of the images of these keys, as torch has it."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, np.uint32(number))
    return theirs(np.asarray(D.solvers.noise_like(keys, np.zeros((len(keys), *shape), np.float32))))


def feed(monkeypatch, *runs):
    """The reference draws what ours draws. A run: keys, steps, shape, and whether it starts from noise."""
    queue = []
    for keys, steps, shape, starts in runs:
        queue += [drawn_noise(keys, 2**32 - 1, shape)] * starts
        queue += [drawn_noise(keys, step, shape) for step in range(steps)]
    for module in (scheduling_ddpm_wuerstchen, pipeline_wuerstchen, pipeline_wuerstchen_prior):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: queue.pop(0))
    return queue


def test_prior(references, pipes, monkeypatch):
    """Two prompts, two images of each, another size than a square, guidance away from a text."""
    x, keys = noise(4, EMBEDDINGS), D.image_keys(KEY, 4)
    call = dict(num_inference_steps=5, guidance_scale=3.0, num_images_per_prompt=2, **SIZE)
    queue = feed(monkeypatch, (keys, 5, EMBEDDINGS, False))
    negative = ["bad", "at"]
    expected = references.prior(PROMPTS, negative_prompt=negative, latents=theirs(x), **call)
    embeddings = pipes["prior"](KEY, PROMPTS, negative, latents=x, **call)
    assert not queue
    assert_latents_agree(embeddings, expected.image_embeddings)
    latents = pipes["prior"](KEY, PROMPTS, negative, latents=x, output="latents", **call)
    np.testing.assert_allclose(embeddings, 42 * latents - 1, rtol=1e-6)
    given = states_of(pipes["prior"], PROMPTS, negative)
    np.testing.assert_array_equal(pipes["prior"](KEY, latents=x, **given, **call), embeddings)


def test_prior_on_the_published_timesteps(references, pipes, monkeypatch):
    x = noise(1, EMBEDDINGS)
    feed(monkeypatch, (D.image_keys(KEY, 1), 29, EMBEDDINGS, False))
    times = wuerstchen.DEFAULT_STAGE_C_TIMESTEPS
    expected = references.prior(PROMPTS[0], latents=theirs(x), timesteps=times, **SIZE)
    call = dict(num_inference_steps=29, spacing="stage_c", **SIZE)  # under the default guidance of both
    assert_latents_agree(pipes["prior"](KEY, PROMPTS[0], latents=x, **call), expected.image_embeddings)


def test_another_solver_walks_the_same_path(references, pipes):
    """DDIM by hand with the reference's network: diffusers has no other scheduler for it."""
    x, steps, scheduler = noise(1, EMBEDDINGS), 4, references.prior.scheduler
    states, _ = references.prior.encode_prompt("cpu", 1, False, prompt=PROMPTS[0])
    times = torch.linspace(1, 0, steps + 1)
    square = scheduler._alpha_cumprod(times, torch.device("cpu"))
    moving = theirs(x)
    with torch.no_grad():
        for i in range(steps):
            eps = references.prior.prior(moving, times[i : i + 1], states)
            x_0 = (moving - (1 - square[i]).sqrt() * eps) / square[i].sqrt()
            moving = square[i + 1].sqrt() * x_0 + (1 - square[i + 1]).sqrt() * eps
    call = dict(num_inference_steps=steps, guidance_scale=1.0, solver="ddim", output="latents", **SIZE)
    assert_latents_agree(pipes["prior"](KEY, PROMPTS[0], latents=x, **call), moving)
    other = pipes["prior"](KEY, PROMPTS[0], latents=x, **call | {"solver": "dpmpp_2m"})
    assert np.isfinite(other).all() and np.abs(other - ours(moving)).max() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_decoder(references, pipes, monkeypatch, scale):
    """At 1 as it is published, without guidance; at 3 the other branch knows nothing of the image."""
    x, embeddings = noise(1, LATENTS, 1), 3 * noise(1, EMBEDDINGS, 2)
    feed(monkeypatch, *[(D.image_keys(KEY, 1), 4, LATENTS, False)] * 2)
    call = dict(num_inference_steps=4, guidance_scale=scale)
    given = dict(prompt=PROMPTS[0], negative_prompt="bad", latents=theirs(x), **call)
    latents = references.decoder(theirs(embeddings), output_type="latent", **given).images
    pictures = references.decoder(theirs(embeddings), output_type="np", **given).images
    call |= {"latents": x, "image_embeddings": embeddings, "prompt": PROMPTS[0]}
    call |= {"negative_prompt": "bad"} if scale != 1 else {}
    assert_latents_agree(pipes["decoder"](KEY, output="latents", **call), latents)
    images = pipes["decoder"](KEY, **call)
    assert images.shape == (1, 128, 256, 3) and np.ptp(pictures) > 0.1
    assert np.abs(images / 2 + 0.5 - pictures).max() * 255 <= 2


def test_decoder_of_several_prompts(references, pipes, monkeypatch):
    """The reference repeats each prompt for every embedding, and no embedding for its images: it fails with
    two of either. One after the other they are drawn.
    """
    x, embeddings = noise(2, LATENTS, 1), 3 * noise(2, EMBEDDINGS, 2)
    keys = D.image_keys(KEY, 2)
    feed(monkeypatch, *((keys[k : k + 1], 2, LATENTS, False) for k in range(2)))
    given = dict(num_inference_steps=2, output_type="latent")
    with pytest.raises(RuntimeError):
        references.decoder(theirs(embeddings), PROMPTS, latents=theirs(x), **given)
    with pytest.raises(RuntimeError):
        references.decoder(theirs(embeddings[:1]), "a", num_images_per_prompt=2, latents=theirs(x), **given)
    call = dict(num_inference_steps=2, output="latents", latents=x, image_embeddings=embeddings)
    drawn = pipes["decoder"](KEY, PROMPTS, **call)
    for k, prompt in enumerate(PROMPTS):
        one = slice(k, k + 1)
        latents = references.decoder(theirs(embeddings[one]), prompt, latents=theirs(x[one]), **given).images
        assert_latents_agree(drawn[one], latents)
    swapped = pipes["decoder"](KEY, PROMPTS, **call | {"image_embeddings": embeddings[::-1]})
    assert np.abs(swapped - drawn).max() > 1e-3
    shared = pipes["decoder"](KEY, PROMPTS, **call | {"image_embeddings": embeddings[:1]})
    np.testing.assert_array_equal(shared[0], drawn[0])
    assert np.abs(shared[1] - drawn[1]).max() > 1e-3
    given = states_of(pipes["decoder"], PROMPTS, ["", ""], image_embeddings=embeddings)
    np.testing.assert_array_equal(pipes["decoder"](KEY, **given, **call), drawn)


def test_all_stages_in_one(references, pipes, monkeypatch):
    of_prior, of_decoder = (
        D.image_keys(jax.random.fold_in(D.image_keys(KEY, 1)[0], n)[None], 1) for n in (0, 1)
    )
    feed(monkeypatch, (of_prior, 4, EMBEDDINGS, True), (of_decoder, 3, LATENTS, True))
    pictures = references.whole(
        PROMPTS[0],
        negative_prompt="bad",
        prior_num_inference_steps=4,
        num_inference_steps=3,
        output_type="np",
        **SIZE,
    ).images
    ticks, whole = [], pipes["whole"]
    call = dict(num_inference_steps=4, progress=lambda done, total: ticks.append(int(done)), **SIZE)
    alone = pipes["prior"](of_prior, PROMPTS[0], "bad", guidance_scale=4.0, **call)
    embeddings = whole(KEY, PROMPTS[0], "bad", output="image_embeddings", **call)
    np.testing.assert_array_equal(embeddings, alone)
    jax.effects_barrier()
    ticks.clear()
    call["decoder_num_inference_steps"] = 3
    images = whole(KEY, PROMPTS[0], "bad", **call)
    assert np.abs(images / 2 + 0.5 - pictures).max() * 255 <= 2
    jax.effects_barrier()
    assert len(ticks) == whole.num_callbacks(1, **call) == 7
    assert whole.num_callbacks(3, batch_size=2) == 2 * (60 + 12)
    joined = pipelines.join_wuerstchen(pipes["prior"], pipes["decoder"])
    np.testing.assert_array_equal(joined(KEY, PROMPTS[0], "bad", **call), images)


def test_folders_that_ours_wrote_are_opened_by_diffusers(pipes, references, tmp_path, monkeypatch):
    """Their index names the package that the published folders name, `diffusers.pipelines.wuerstchen`. It has
    moved since, and diffusers says of the folders that it writes now that its public classes are in them, of
    which these are none: it opens neither, until the package is where it was.
    """
    with pytest.raises(ValueError, match="has no class"):
        wuerstchen.WuerstchenPriorPipeline.from_pretrained(references.root / "prior")
    monkeypatch.setattr(diffusers.pipelines, "wuerstchen", wuerstchen, raising=False)
    for name, pipe in pipes.items():
        pipelines.save(pipe, tmp_path / name)
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert {index[key][0] for key in ("prior", "prior_prior", "decoder", "vqgan") if key in index} == {
            "wuerstchen"
        }
        reference = getattr(references, name)
        opened = type(reference).from_pretrained(tmp_path / name)
        assert [opened.config[option] for option in pipe.options] == [*pipe.options.values()]
        for part, module in opened.components.items():
            if isinstance(module, torch.nn.Module):
                before, after = reference.components[part].state_dict(), module.state_dict()
                assert before.keys() == after.keys()
                assert all(torch.equal(before[key], after[key]) for key in before)
        again = pipelines.load(tmp_path / name)
        assert not any(row.difference for row in pipelines.compare(pipe, again))
        assert again.options == pipe.options


def test_sizes_that_the_decoder_cannot_draw_are_refused(pipes):
    with pytest.raises(InvalidArgumentError, match=r"4x6 .* 42x64 latents.* multiples of 4.*such as 128x256"):
        pipes["whole"](KEY, "a cat", height=160, width=256)
    with pytest.raises(InvalidArgumentError, match="height must be"):
        pipes["prior"](KEY, "a cat", height=0)


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("decoder", {}, "give image_embeddings="),
        ("decoder", {"image_embeddings": np.zeros((1, 3, 6, 5))}, r"\[N, h, w, 4\].*not \[1, 3, 6, 5\]"),
        ("decoder", {"image_embeddings": np.full((1, 3, 6, 4), np.nan)}, "NaN"),
        ("decoder", {"image_embeddings": np.zeros((3, 3, 6, 4))}, "3 image_embeddings for 1 prompts"),
        ("decoder", {"image_embeddings": np.zeros((1, 3, 6, 4)), "height": 64}, "leave it out"),
        ("prior", {"image": np.zeros((8, 8, 3), np.uint8)}, "image is not for WuerstchenPrior"),
        ("prior", {"latents": np.zeros((1, 3, 6, 5))}, r"latents must be \[N, h, w, 4\]"),
        ("prior", {"latents": np.zeros((1, 3, 6, 4)), "height": 512}, "latents is 128x256"),
        ("whole", {"guidance_scale": -1.0, **SIZE}, "guidance_scale"),
    ],
)
def test_bad_options_are_named(pipes, stage, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        pipes[stage](KEY, "a cat", **options)


def test_parts_that_do_not_fit_are_refused(pipes):
    with pytest.raises(UnknownNameError, match="output"):
        pipes["whole"](KEY, "a cat", output="embeddings")
    prior, decoder = pipes["prior"], pipes["decoder"]
    with pytest.raises(CheckpointError, match="12 wide, its prior takes 16"):
        prior.replace(text_encoder=decoder.text_encoder).check_parts()
    with pytest.raises(CheckpointError, match="16 wide, its decoder takes 12"):
        decoder.replace(text_encoder=prior.text_encoder).check_parts()
    with pytest.raises(InvalidArgumentError, match=r"latent_mean is 2\.0"):
        pipelines.join_wuerstchen(prior.replace(latent_mean=2.0), decoder)
    wider = dataclasses.replace(decoder.decoder.config, effnet_embd=5)
    network = decoder.decoder.replace(module=models.from_config(wider))
    with pytest.raises(CheckpointError, match="embeddings of 4 channels, its decoder takes 5"):
        pipelines.join_wuerstchen(prior, decoder.replace(decoder=network))
    wider = dataclasses.replace(decoder.vqgan.config, latent_channels=5)
    network = decoder.vqgan.replace(module=models.from_config(wider))
    with pytest.raises(CheckpointError, match="5 latent channels, its decoder takes 4"):
        decoder.replace(vqgan=network).check_parts()
