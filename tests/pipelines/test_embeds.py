"""States in place of texts, output types and callbacks, against the pipelines of diffusers."""

import jax
import numpy as np
import pytest
import torch
from compilations import COMPILATIONS
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from picture_checks import KEY, assert_latents_agree, states_of
from reference_pipelines import SIZE, noise, open_reference, theirs, write_sd, write_sdxl

from jaxldm import pipelines
from jaxldm.errors import InvalidArgumentError, JaxldmError

STEPS = {"num_inference_steps": 4, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("embeds")
    return {"sd": write_sd(root / "sd", "sd2"), "sdxl": write_sdxl(root / "sdxl")}


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: pipelines.load(folder) for name, folder in folders.items()}


def states(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_states_of_any_length_as_diffusers_takes_them(folders, pipes):
    reference = open_reference(StableDiffusionPipeline, folders["sd"])
    given = {"prompt_embeds": states(1, 2, 100, 16), "negative_prompt_embeds": states(2, 2, 100, 16)}
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    latents = reference(latents=theirs(noise(2)), output_type="latent", **tensors, **STEPS).images
    drawn = pipes["sd"](KEY, latents=noise(2), output="latents", **given, **STEPS)
    assert_latents_agree(drawn, latents)


@pytest.mark.parametrize("with_negative", [True, False])
def test_pooled_states(folders, pipes, with_negative):
    """Without a negative the other branch is zeros, however long the states are."""
    reference = open_reference(StableDiffusionXLPipeline, folders["sdxl"])
    given = {"prompt_embeds": states(1, 1, 90, 36), "pooled_prompt_embeds": states(2, 1, 12)}
    if with_negative:
        given |= {"negative_prompt_embeds": states(3, 1, 90, 36)}
        given |= {"negative_pooled_prompt_embeds": states(4, 1, 12)}
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    latents = reference(latents=theirs(noise()), output_type="latent", **tensors, **STEPS).images
    drawn = pipes["sdxl"](KEY, latents=noise(), output="latents", **given, **STEPS)
    assert_latents_agree(drawn, latents)


def test_clip_skip_of_sdxl(folders, pipes):
    """The reference skips layers for the prompt, and zeros are the other branch."""
    reference = open_reference(StableDiffusionXLPipeline, folders["sdxl"])
    call = dict(clip_skip=1, **STEPS)
    latents = reference("a cat", latents=theirs(noise()), output_type="latent", **call).images
    drawn = pipes["sdxl"](KEY, "a cat", latents=noise(), output="latents", **call)
    assert_latents_agree(drawn, latents)
    assert (
        np.abs(drawn - pipes["sdxl"](KEY, "a cat", latents=noise(), output="latents", **STEPS)).max() > 0.01
    )
    with pytest.raises(InvalidArgumentError, match="3 layers of the text encoder cannot be skipped"):
        pipes["sdxl"](KEY, "a cat", clip_skip=2)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_what_encode_prompts_returns_draws_what_the_texts_draw(pipes, name):
    pipe = pipes[name]
    given = states_of(pipe, ["a cat", "a dog"], ["bad", "bat"])
    call = dict(num_images_per_prompt=2, output="latents", **STEPS)
    before = pipe(KEY, ["a cat", "a dog"], ["bad", "bat"], **call)
    count = COMPILATIONS.count
    np.testing.assert_array_equal(pipe(KEY, **given, **call), before)
    assert COMPILATIONS.count == count
    one = {key: value for key, value in given.items() if not key.startswith("negative")}
    with_texts = pipe(KEY, None, ["bad", "bat"], **one, **call)
    np.testing.assert_array_equal(with_texts, before)


GOOD = {"prompt_embeds": states(1, 1, 77, 36), "pooled_prompt_embeds": states(2, 1, 12)}

NEGATIVE = {f"negative_{name}": value for name, value in GOOD.items()}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"prompt_embeds": states(1, 1, 77, 35)}, ["prompt_embeds must be [P, T, 36]", "35"]),
        ({"pooled_prompt_embeds": states(1, 1, 13)}, ["pooled_prompt_embeds must be [P, 12]"]),
        ({"pooled_prompt_embeds": None}, ["pooled_prompt_embeds is missing"]),
        ({"prompt_embeds": None}, ["prompt_embeds is missing"]),
        ({"pooled_prompt_embeds": states(1, 2, 12)}, ["first axes"]),
        ({"prompt_embeds": np.full((1, 77, 36), np.nan)}, ["NaN"]),
        ({"prompt": "a cat"}, ["prompt and prompt_embeds", "one of them"]),
        ({"prompt_2": "a cat"}, ["prompt_2 and prompt_embeds"]),
        ({"prompt_attention_mask": np.ones((1, 77))}, ["leave it out"]),
        ({"negative_prompt_embeds": states(1, 1, 77, 36)}, ["negative_pooled_prompt_embeds is missing"]),
        (
            {
                "negative_prompt_embeds": states(1, 3, 77, 36),
                "negative_pooled_prompt_embeds": states(1, 3, 12),
            },
            ["3 texts", "1 prompts"],
        ),
        ({"prompt_embeds": states(1, 1, 80, 36), "negative_prompt": "bad"}, ["80 tokens", "negative 77"]),
        ({"output_type": "np", "output": "latents"}, ["output_type", "leave it out"]),
        ({"output_type": "jpeg"}, ["output_type", "pil"]),
        ({"output_type": "latent"}, ["output_type", 'write output="latents"']),
        ({"negative_prompt_2": "a", **NEGATIVE}, ["negative_prompt_2 and negative_prompt_embeds"]),
    ],
)
def test_embeds_that_do_not_fit_are_refused(pipes, call, words):
    with pytest.raises(JaxldmError) as error:
        pipes["sdxl"](KEY, **{**GOOD, **call})
    text = str(error.value)
    assert all(word in text for word in words) and "\n" not in text, text


def test_what_encode_prompts_returns_is_refused_with_the_entry_to_write(pipes):
    for name, entry in (("sd", "encoder_hidden_states"), ("sdxl", "text_embeds")):
        pair = pipes[name].encode_prompts(["a cat"])
        option = "prompt_embeds" if name == "sd" else "pooled_prompt_embeds"
        with pytest.raises(InvalidArgumentError, match=rf'{option}=cond\["{entry}"\] of cond, uncond = pipe'):
            pipes[name](KEY, **{option: pair})
        with pytest.raises(InvalidArgumentError, match=rf'write negative_{option}=uncond\["{entry}"\]'):
            pipes[name](KEY, **{f"negative_{option}": pair[1]})


@pytest.mark.parametrize("option", [{"clip_skip": 1}, {"prompt_syntax": "weights"}])
def test_options_of_texts_are_refused_where_no_text_is_encoded(pipes, option):
    """With zeros (SDXL) or nothing in the other branch; a text in it is encoded with them."""
    (name,) = option
    calls = (
        ("sd", {"guidance_scale": 1.0}),
        ("sd", {"negative_prompt_embeds": states(2, 1, 9, 16)}),
        ("sdxl", {}),
    )
    for model, more in calls:
        given = GOOD if model == "sdxl" else {"prompt_embeds": states(1, 1, 9, 16)}
        with pytest.raises(InvalidArgumentError, match=f"{name}=.* is of texts, .*leave it out"):
            pipes[model](KEY, **given, **more, **option)
    call = dict(output="latents", latents=noise(), **STEPS)
    alone = {"prompt_embeds": states(1, 1, 77, 16)}
    drawn = [pipes["sd"](KEY, **alone, **call, **more) for more in ({}, {"clip_skip": 1}, {"clip_skip": 0})]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-4 and np.array_equal(drawn[0], drawn[2])


def test_none_is_the_default_as_in_diffusers(pipes):
    """What its pages write: clip_skip=None, denoising_end=None."""
    pipe, call = pipes["sdxl"], dict(output="latents", latents=noise(), **STEPS)
    none = dict.fromkeys(("clip_skip", "denoising_start", "denoising_end", "crops_coords_top_left"))
    np.testing.assert_array_equal(pipe(KEY, "a cat", **call, **none), pipe(KEY, "a cat", **call))
    (cond, _), (same, _) = pipe.encode_prompts(["a cat"], clip_skip=None), pipe.encode_prompts(["a cat"])
    np.testing.assert_array_equal(cond["encoder_hidden_states"], same["encoder_hidden_states"])


def test_output_types(pipes):
    pipe, call = pipes["sd"], dict(num_inference_steps=2, previews=1)
    images, seen = pipe(KEY, ["a cat"], **call)
    numbers, seen_numbers = pipe(KEY, ["a cat"], output_type="np", **call)
    np.testing.assert_allclose(numbers, images / 2 + 0.5, atol=1e-6)
    np.testing.assert_allclose(seen_numbers, seen / 2 + 0.5, atol=1e-6)
    (picture,), ((preview,),) = pipe(KEY, ["a cat"], output_type="pil", **call)
    assert picture.size == preview.size == (SIZE, SIZE) and picture.mode == "RGB"
    # As diffusers rounds them.
    np.testing.assert_array_equal(np.asarray(picture), (numbers[0] * 255).round().astype(np.uint8))


def test_x_0_and_t_of_each_step_compile_nothing(folders, pipes):
    """The reference's scheduler says x_0; t is that of its steps."""
    pipe, call = pipes["sd"], dict(solver="ddim", output="latents", **STEPS)
    plain = pipe(KEY, "a cat", latents=noise(), **call)
    count, seen = COMPILATIONS.count, []
    drawn = pipe(KEY, "a cat", latents=noise(), on_x0=lambda *step: seen.append(step), **call)
    assert COMPILATIONS.count == count
    np.testing.assert_array_equal(drawn, plain)
    reference, expected = open_reference(StableDiffusionPipeline, folders["sd"], "ddim"), []
    step = reference.scheduler.step

    def record(output, t, sample, **options):
        result = step(output, t, sample, return_dict=True)
        expected.append((int(t), result.prev_sample, result.pred_original_sample))
        return (result.prev_sample,)

    reference.scheduler.step = record
    reference("a cat", latents=theirs(noise()), output_type="latent", **STEPS)
    assert [step[0] for step in seen] == [0, 1, 2, 3]
    assert [round(step[1]) for step in seen] == [each[0] for each in expected]
    for (_, _, latents, x_0), (_, theirs_next, theirs_x_0) in zip(seen, expected, strict=True):
        assert_latents_agree(latents, theirs_next)
        assert_latents_agree(x_0, theirs_x_0)
    assert isinstance(seen[0][2], np.ndarray) and not isinstance(seen[0][3], jax.Array)
