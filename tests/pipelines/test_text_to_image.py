"""What all text-to-image pipelines promise: batches, keys, compilations, previews, folders, and mistakes."""

import functools
import json
import shutil
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy
from compilations import COMPILATIONS
from diffusers import StableDiffusionPipeline
from flax import traverse_util
from picture_checks import KEY, picture
from PIL import Image
from reference_pipelines import LATENT, SIZE, noise, open_reference, write_sd

from jaxldm import diffusion as D
from jaxldm import pipelines
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError, UnknownNameError
from jaxldm.pipelines.families.stable_diffusion import STABLE_DIFFUSION

PROMPTS = ["a cat", "the dog sat", "hello"]
EULER = {"solver": "euler", "num_inference_steps": 4, "output": "latents"}


def assert_near(drawn, expected, tolerance=1e-5):
    """As a part of the largest number."""
    assert np.abs(np.asarray(drawn) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sd(tmp_path_factory.mktemp("text-to-image") / "sd")


@pytest.fixture(scope="module")
def pipe(folder):
    return pipelines.load(folder)


@pytest.fixture(scope="module")
def three(pipe):
    return pipe(KEY, PROMPTS, "bad", **EULER)


def test_an_image_is_the_same_to_the_last_bit_alone_and_in_a_batch(pipe, three):
    for k, prompt in enumerate(PROMPTS):
        own_key = jax.random.fold_in(KEY, k)[None]
        np.testing.assert_array_equal(pipe(own_key, prompt, "bad", **EULER)[0], three[k])
    assert np.abs(three[0] - three[1]).max() > 0.1


def test_several_images_a_prompt_and_a_negative_for_each(pipe, three):
    twice = pipe(KEY, PROMPTS[:2], ["bad", "bad"], num_images_per_prompt=2, **EULER)
    np.testing.assert_array_equal(twice[0], three[0])
    same = pipe(jax.random.fold_in(KEY, 2)[None], PROMPTS[1], "bad", **EULER)
    np.testing.assert_array_equal(twice[2], same[0])
    assert len(twice) == 4 and np.abs(twice[0] - twice[1]).max() > 0.1


def test_larger_batches_and_more_devices_draw_the_same(pipe, three):
    drawn = pipe(KEY, PROMPTS, "bad", batch_size=2, devices=jax.devices()[:2], **EULER)
    assert_near(drawn, three)


def test_another_seed_scale_prompt_or_number_of_steps_compiles_nothing(pipe):
    call = dict(solver="dpmpp_2m", guidance_rescale=0.1)
    before = COMPILATIONS.count
    pipe(KEY, "a cat", num_inference_steps=2, guidance_scale=3.0, **call)
    first = COMPILATIONS.count
    assert first > before
    call["guidance_rescale"] = 0.7
    pipe(jax.random.key(9), "a dog, at last", "sad", num_inference_steps=5, guidance_scale=7.5, **call)
    assert COMPILATIONS.count == first


def test_another_callback_compiles_nothing(pipe):
    """Nor does the first one: callbacks run between the calls of the compiled function."""
    call = dict(solver="euler", num_inference_steps=3, output="latents")
    pipe(KEY, "a cat", **call)
    before, seen = COMPILATIONS.count, []
    pipe(KEY, "a cat", progress=lambda done, total: seen.append(done), **call)
    pipe(KEY, "a cat", progress=lambda done, total: seen.append(-done), **call)
    pipe(KEY, "a cat", on_step=lambda step, x: seen.append(x.shape), **call)
    assert seen == [1, 2, 3, -1, -2, -3] + 3 * [(1, LATENT, LATENT, 4)]
    assert COMPILATIONS.count == before


def test_after_a_warm_up_nothing_is_compiled(pipe):
    """And it takes no step: with an image to start from, what is decoded is that image under noise."""
    own = pipe.replace(scheduler=dict(pipe.scheduler) | {"beta_end": 0.0121})  # not compiled by other tests
    before, seen = COMPILATIONS.count, []
    own.warm_up("a dog", solver="heun", num_inference_steps=4, progress=lambda *steps: seen.append(steps))
    first = COMPILATIONS.count
    assert first > before and not seen
    images = own(KEY, "a cat", "bad", solver="heun", num_inference_steps=6, guidance_scale=3.0)
    assert COMPILATIONS.count == first
    assert images.shape == (1, SIZE, SIZE, 3)


def test_karras_may_be_typed_as_a_spacing(pipe):
    drawn, expected = (
        pipe(KEY, "a cat", **option, **EULER) for option in (dict(spacing="karras"), dict(sigmas="karras"))
    )
    np.testing.assert_array_equal(drawn, expected)
    assert np.abs(drawn - pipe(KEY, "a cat", **EULER)).max() > 0.01


def test_a_solver_from_outside_is_named_by_its_module(pipe):
    drawn = pipe(KEY, "a cat", **EULER | {"solver": "jaxldm.diffusion.solvers.euler:euler"})
    np.testing.assert_array_equal(drawn, pipe(KEY, "a cat", **EULER | {"solver": D.solvers.euler()}))


def test_a_spacing_from_outside_is_named_by_its_module(pipe, tmp_path, monkeypatch):
    """It need not have the option `final`, which the folder's own rows have."""
    lines = "from jaxldm import diffusion as D", "def rows(path, count):", "    return D.karras(path, count)"
    (tmp_path / "own_spacings.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    own = pipe.grid(spacing="own_spacings:rows", num_inference_steps=4)[1]
    expected = D.pad(D.karras(pipe.prediction.path, 4), len(own.t) - 1)
    jax.tree.map(np.testing.assert_array_equal, own, expected)


def test_previews_are_x_0_as_seen_on_the_way(pipe):
    """Euler's last step goes where x_0 is seen, so the last of as many previews as steps is the image."""
    images, previews = pipe(KEY, "a cat", solver="euler", num_inference_steps=4, previews=4)
    assert images.shape == (1, SIZE, SIZE, 3) and previews.shape == (1, 4, SIZE, SIZE, 3)
    np.testing.assert_allclose(previews[:, -1], images, atol=1e-5)
    apart = [np.abs(previews[0, k] - images[0]).mean() for k in range(4)]
    assert apart == sorted(apart, reverse=True) and apart[0] > 0.01


def test_callbacks_are_called_after_each_step(pipe):
    steps, done = [], []
    call = dict(num_inference_steps=4, solver="euler", output="latents")
    latents = pipe(
        KEY,
        "a cat",
        on_step=lambda i, x: steps.append((int(i), np.array(x))),
        progress=lambda i, total: done.append((int(i), int(total))),
        **call,
    )
    jax.effects_barrier()
    assert sorted(done) == [(1, 4), (2, 4), (3, 4), (4, 4)]
    steps = dict(steps)
    assert sorted(steps) == [0, 1, 2, 3]
    np.testing.assert_array_equal(steps[3], latents)


def test_latents_go_out_and_in(pipe):
    """Decoding what came out is what the whole call draws; a start of one's own replaces the noise."""
    images = pipe(KEY, "a cat", num_inference_steps=4, solver="euler")
    latents = pipe(KEY, "a cat", **EULER)
    np.testing.assert_array_equal(pipe.decode(latents), images)
    _, grid = pipe.grid(solver="euler", num_inference_steps=4)
    start = D.initial_noise(KEY, (1, LATENT, LATENT, 4), grid)
    assert_near(pipe(KEY, "a cat", latents=start, **EULER), latents)


def test_both_parts_of_a_cut_run_are_the_whole_run(pipe):
    whole = pipe(KEY, "a cat", **EULER)
    first = pipe(KEY, "a cat", denoising_end=0.7, **EULER)
    both = pipe(KEY, "a cat", latents=first, denoising_start=0.7, **EULER)
    assert_near(both, whole)
    assert np.abs(first - whole).max() > 0.01


def test_a_part_is_swapped(pipe):
    """Another solver object, other weights, another schedule: each is one replacement."""
    flat = jax.tree.map(np.zeros_like, pipe.vae.params)
    changed = pipe.replace(vae=pipe.vae.replace(params=flat))
    assert not changed(KEY, "a cat", solver="euler", num_inference_steps=4).any()
    own = pipe(KEY, "a cat", solver=D.solvers.ddim(), num_inference_steps=4, output="latents")
    named = pipe(KEY, "a cat", num_inference_steps=4, output="latents", solver="ddim")
    assert_near(own, named)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_stay_near(folder, three, dtype):
    """Weights, text states and network in 16 bits; the arithmetic of the sampler stays in float32."""
    pipe = pipelines.load(folder, dtype=dtype)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(pipe.unet.params)} == {dtype}
    drawn = pipe(KEY, PROMPTS[0], "bad", **EULER)
    assert drawn.dtype == np.float32
    assert_near(drawn[0], three[0], 0.1)
    images = pipe(KEY, PROMPTS[0], "bad", solver="euler", num_inference_steps=4)
    assert np.isfinite(images).all() and images.dtype == np.float32


def test_a_folder_that_ours_wrote_is_opened_by_diffusers(pipe, tmp_path):
    pipelines.save(pipe, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference = open_reference(StableDiffusionPipeline, tmp_path / "out")
    assert not reference.config.requires_safety_checker  # diffusers would say that there is none
    assert type(reference.scheduler).__name__ == "PNDMScheduler"
    assert reference.tokenizer("a cat").input_ids == pipe.tokenizer(["a cat"], 4).input_ids[0].tolist()
    again = pipelines.load(tmp_path / "out")
    assert not any(row.difference for row in pipelines.compare(pipe, again))


def test_a_lora_file_is_merged_into_a_copy(pipe, tmp_path):
    module = ("down_blocks_0", "attentions_0", "transformer_blocks_0", "attn1", "to_q")
    rng = np.random.default_rng(0)
    down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 8), (8, 2)))
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    file = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    safetensors.numpy.save_file(file, tmp_path / "lora.safetensors")
    merged = pipelines.with_lora(pipe, tmp_path / "lora.safetensors", scale=0.5)

    def weight(of):
        return np.asarray(functools.reduce(lambda tree, key: tree[key], module, of.unet.params)["kernel"])

    np.testing.assert_allclose(weight(merged), weight(pipe) + 0.5 * (up @ down).T, atol=1e-6)
    changed = [row.name for row in pipelines.compare(pipe, merged) if row.difference]
    assert changed == [name.replace("unet.", "unet/", 1) + ".weight"]


def test_adapters_are_swapped_without_compiling(pipe, tmp_path):
    """Another file, scale, or two of them; a DoRA and a LoHa too."""
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    rng = np.random.default_rng(0)
    shapes = {"lora_down.weight": (2, 8), "lora_up.weight": (8, 2), "dora_scale": (8, 1)}
    shapes = {"dora": shapes, "loha": {f"hada_{w}": (8, 8) for w in ("w1_a", "w1_b", "w2_a", "w2_b")}}
    for kind, parts in shapes.items():
        file = {f"{module}.{part}": rng.standard_normal(shape, np.float32) for part, shape in parts.items()}
        safetensors.numpy.save_file(file, tmp_path / f"{kind}.safetensors")
    dora, loha = (tmp_path / f"{kind}.safetensors" for kind in shapes)
    call = dict(num_inference_steps=2, output="latents", solver="euler")
    drawn = [pipe(KEY, "a cat", **call)]
    count = COMPILATIONS.count
    for path, scale in ((dora, 1.0), (loha, 0.5), ([dora, loha], 0.5), ([dora, loha], [0.5, 1.0])):
        drawn.append(pipelines.with_lora(pipe, path, scale)(KEY, "a cat", **call))
    assert COMPILATIONS.count == count
    apart = [np.abs(one - other).max() for k, one in enumerate(drawn) for other in drawn[:k]]
    assert min(apart) > 1e-4
    np.testing.assert_array_equal(pipe(KEY, "a cat", **call), drawn[0])
    with pytest.raises(InvalidArgumentError, match=r"dora\.safetensors is given twice: give it once"):
        pipelines.with_lora(pipe, [dora, loha, str(dora)])
    with pytest.raises(InvalidArgumentError, match="2 numbers for 1 LoRAs"):
        pipelines.with_lora(pipe, dora, [1.0, 1.0])


def test_rows_that_are_written_down_say_how_many(pipe):
    for rows in (dict(timesteps=[900, 500]), dict(sigmas=[10.0, 1.0]), dict(sigmas=np.array([10.0, 1.0]))):
        grid = pipe.grid(**rows)[1]
        assert D.steps_in(grid) == 2
        if "timesteps" in rows:
            np.testing.assert_array_equal(grid.t[:2], rows["timesteps"])
        else:
            np.testing.assert_allclose((grid.sigma / grid.alpha)[:2], rows["sigmas"], rtol=1e-5)


def test_words_that_the_encoder_does_not_see_are_named(pipe):
    with pytest.warns(UserWarning, match="does not see 'zebra at last'"):
        pipe.encode_prompts(["cat " * 75 + "zebra at last"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.encode_prompts(["cat " * 75])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (dict(prompt=[]), ["prompt", "empty list"]),
        (dict(prompt=[3]), ["texts", "3"]),
        (dict(prompt=None), ["prompt", "None"]),
        (dict(negative_prompt=["a", "b"]), ["negative_prompt", "2 texts", "1 prompts"]),
        (dict(height=17), ["height 17", "16 and 18"]),
        (dict(width=1), ["width 1", "2"]),
        (dict(height=-8), ["height", "-8"]),
        (dict(num_inference_steps=0), ["num_inference_steps", "at least 1"]),
        (dict(num_inference_steps=1001), ["1001", "1000"]),
        (dict(guidance_scale=float("nan")), ["guidance_scale", "finite"]),
        (dict(guidance_scale=-1.0), ["0 or more"]),
        (dict(guidance_rescale=2.0), ["in [0, 1]"]),
        (dict(num_images_per_prompt=0), ["num_images_per_prompt"]),
        (dict(batch_size=0), ["batch_size"]),
        (dict(previews=-1), ["previews"]),
        (dict(strength=0.5), ["strength", "image"]),
        (dict(image=picture(), strength=0.0), ["(0, 1]"]),
        (dict(image=picture(), strength=0.01), ["none of 50 steps"]),
        (dict(mask_image=picture()), ["mask_image", "give image"]),
        (dict(image=picture(), latents=noise()), ["both a start"]),
        (dict(image=np.dstack([picture(), picture()[..., :1]])), ["3 channels (RGB), it has 4", "Latents"]),
        (dict(image=noise()), ["3 channels (RGB), it has 4", "Latents"]),
        (dict(image=pipelines.Latents(noise()[..., :3])), ["image=Latents", "4"]),
        (dict(latents=noise()[..., :3]), ["latents", "4"]),
        (dict(latents=noise() * np.nan), ["NaN"]),
        (dict(latents=noise(2)), ["2 arrays in latents", "1 images"]),
        (dict(image=picture(), height=32), ["image is 16x16", "32x16"]),
        (dict(denoising_start=0.5), ["denoising_start", "latents"]),
        (dict(denoising_end=1.5), ["denoising_end"]),
        (dict(eta=0.5, solver="dpmpp_2m"), ["eta"]),
        (dict(timesteps=[999, 500], spacing="trailing"), ["timesteps=[...]", "with spacing: leave one"]),
        (dict(timesteps=[999, 500], sigmas="karras"), ["timesteps=[...]", "with sigmas: leave one"]),
        (dict(sigmas=[3.0, 1.0], spacing="karras"), ["sigmas=[...]", "with spacing: leave one of them out"]),
        (dict(timesteps=[999, 500], num_inference_steps=3), ["2 values were given"]),
        (dict(variance="learned"), ["no learned variance"]),
        (dict(latents=noise(), eta=0.5, solver=D.solvers.ddim()), ["eta"]),
    ],
)
def test_a_mistake_is_named_before_anything_is_compiled(pipe, call, words):
    before = COMPILATIONS.count
    with pytest.raises(InvalidArgumentError) as error:
        pipe(KEY, **({"prompt": "a cat"} | call))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert COMPILATIONS.count - before <= 1  # keys and the like, no network


@pytest.mark.parametrize("output_type", [None, "pil"])
@pytest.mark.parametrize(
    "part, path, tensor",
    [
        ("unet", ("conv_in", "kernel"), "conv_in.weight"),
        ("vae", ("decoder", "conv_out", "bias"), "decoder.conv_out.bias"),
        ("text_encoder", ("text_model", "final_layer_norm", "scale"), "text_model.final_layer_norm.weight"),
    ],
)
def test_a_parameter_that_is_not_finite_is_named(pipe, part, path, tensor, output_type):
    """And not the guidance scale, or pixels that cannot be converted."""
    flat = traverse_util.flatten_dict(pipe.parts[part].params)
    broken = np.array(flat[path])
    broken.reshape(-1)[0] = np.nan
    params = traverse_util.unflatten_dict(flat | {path: broken})
    broken = pipe.replace(**{part: pipe.parts[part].replace(params=params)})
    with pytest.raises(CheckpointError, match=f"^{part} holds NaN or infinity, in {tensor}: copy it again"):
        broken(KEY, "a cat", num_inference_steps=2, output_type=output_type)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (dict(solver="dimm"), ["solver", "did you mean 'ddim'"]),
        (dict(spacing="even"), ["spacing", "trailing"]),
        (dict(output="pil"), ["output", "latents"]),
        (dict(num_inference_step=3), ["num_inference_step", "did you mean 'num_inference_steps'"]),
        (dict(prompt_2="a dog"), ["prompt_2", "StableDiffusion"]),
    ],
)
def test_a_name_that_does_not_exist(pipe, call, words):
    with pytest.raises(UnknownNameError) as error:
        pipe(KEY, "a cat", **call)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        dict(image=picture()[..., 0]),
        dict(image="cat.png"),
        dict(image=picture().astype(np.float32)),
        dict(image=[picture(), picture()[:8]]),
        dict(image=Image.new("F", (SIZE, SIZE))),
        dict(image=picture(), mask_image=Image.fromarray(picture())),
        dict(image=picture(), mask_image=picture()),
        dict(image=picture(), mask_image=np.full((SIZE, SIZE), 2.0)),
    ],
)
def test_what_is_no_picture(pipe, call):
    with pytest.raises((DataError, InvalidArgumentError)):
        pipe(KEY, "a cat", **call)


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        (
            "_class_name",
            "KandinskyPipeline",
            ["unknown class", "KandinskyPipeline", "StableDiffusionXLPipeline"],
        ),
        ("unet", [None, None], ["lacks unet"]),
        ("tokenizer", [None, None], ["lacks tokenizer"]),
    ],
)
def test_a_model_index_that_does_not_fit(folder, tmp_path, entry, value, words):
    index = json.loads((folder / "model_index.json").read_text()) | {entry: value}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as error:
        pipelines.load(tmp_path)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_family_of_ones_own(folder, tmp_path, monkeypatch, three):
    """Another pipeline class around the same parts, with a default and a stage of its own."""
    shutil.copytree(folder, tmp_path / "mine")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "MyPipeline"}
    (tmp_path / "mine" / "model_index.json").write_text(json.dumps(index))

    def shouted(pipe, request):
        return STABLE_DIFFUSION.encode(
            pipe, request._replace(prompts=[text + "!" for text in request.prompts])
        )

    mine = STABLE_DIFFUSION._replace(
        name="Mine",
        folder=STABLE_DIFFUSION.folder._replace(class_names=("MyPipeline",)),
        defaults=lambda pipe: pipelines.Defaults(guidance_scale=2.0, num_inference_steps=4),
        encode=shouted,
    )
    monkeypatch.setitem(pipelines.PIPELINES, "MyPipeline", mine)
    pipe = pipelines.load(tmp_path / "mine")
    drawn = pipe(KEY, PROMPTS, "bad", solver="euler", output="latents")
    expected = pipelines.Pipeline(STABLE_DIFFUSION, pipe.parts)(
        KEY, [text + "!" for text in PROMPTS], "bad", guidance_scale=2.0, **EULER
    )
    np.testing.assert_array_equal(drawn, expected)
    assert np.abs(drawn - three).max() > 0.01


def test_an_unknown_dtype(folder):
    with pytest.raises(UnknownNameError, match="bfloat16"):
        pipelines.load(folder, dtype="bf16")
