"""`jaxldm sample FOLDER --prompt ...` on a tiny random folder that diffusers wrote."""

import json
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
from command_lines import complaint, run
from ip_adapter_files import write_adapter, write_encoder
from PIL import Image
from reference_pipelines import SIZE, controlnet, write_sd, write_sdxl

from jaxldm import pipelines
from jaxldm.commands.inspect_subject import words_of
from jaxldm.data import pictures as picture_files
from jaxldm.data import to_uint8

# What the command passes on, so that what it compiled serves here, too.
CALL = dict(num_inference_steps=2, solver="euler")
FEW_STEPS = ["--num-inference-steps", "2", "--solver", "euler"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sd(tmp_path_factory.mktemp("prompts") / "sd")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    root = tmp_path_factory.mktemp("prompts-xl")
    return [write_sdxl(root / name, refiner=name == "refiner") for name in ("base", "refiner")]


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / "cat.png")
    mask = np.zeros((20, 24), np.uint8)
    mask[:10] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def sample(capsys, folder, out, *words):
    code, output, error = run(capsys, "sample", folder, "--output-dir", out, *words, *FEW_STEPS)
    assert code == 0, error
    return np.load(out / "samples.npz")["images"], output, error


def test_prompts_repeat_and_are_what_the_pipeline_draws(capsys, folder, tmp_path):
    words = ["--prompt", "a cat", "the dog", "--negative-prompt", "bad", "--num-images", "3", "--seed", "4"]
    images, output, _ = sample(capsys, folder, tmp_path / "out", *words)
    assert "3 images" in output and sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "grid.png",
        *(f"image-{k:05d}.png" for k in range(3)),
        "samples.npz",
    ]
    expected = pipelines.load(folder)(jax.random.key(4), ["a cat", "the dog", "a cat"], "bad", **CALL)
    np.testing.assert_array_equal(images, to_uint8(expected))


def test_weak_guidance_and_free_u(capsys, folder, tmp_path):
    given = ["--weak-guidance", "perturbed-attention:2@up_blocks", "--free-u", 0.9, 0.2, 1.2, 1.6]
    images, *_ = sample(capsys, folder, tmp_path / "out", "--prompt", "a cat", *given)
    pipe = pipelines.with_free_u(pipelines.load(folder), 0.9, 0.2, 1.2, 1.6)
    weak = pipelines.PerturbedAttention(("up_blocks",), 2.0)
    np.testing.assert_array_equal(
        images, to_uint8(pipe(jax.random.key(0), "a cat", weak_guidance=weak, **CALL))
    )
    line = complaint(capsys, "sample", folder, "--prompt", "a cat", "--weak-guidance", "pag:3")
    assert "weak_guidance" in line and "perturbed-attention" in line


def test_words_over_the_picture_that_was_drawn_of_them(capsys, folder, tmp_path):
    words = ["--num-images", 1, "--num-inference-steps", 2, "--output-dir", tmp_path / "out"]
    code, _, err = run(capsys, "inspect", folder, "--prompt", "a cat", *words)
    assert code == 0 and not err
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Which word goes where" in page and "Words of &#x27;a cat&#x27; over the image" in page
    assert "add --prompt" in complaint(capsys, "inspect", folder, *words)
    tokenizer = pipelines.load(folder).tokenizer
    ids = np.asarray(tokenizer(["a cat"]).input_ids)[0]
    (first, places), (second, others) = words_of(tokenizer, "a cat")
    assert (first, second) == ("a", "cat") and places == (1,) and others[0] == 2
    assert not set(ids[[*places, *others]]) & {ids[0], ids[-1]}  # neither the start nor the end of the text


def test_a_picture_is_resized_and_drawn_again_where_the_mask_is_white(capsys, folder, pictures):
    size = ["--height", SIZE, "--width", SIZE]
    start = ["--prompt", "a cat", "--image", pictures / "cat.png", *size]
    part, *_ = sample(capsys, folder, pictures / "part", *start, "--mask", pictures / "mask.png")
    assert part.shape == (1, SIZE, SIZE, 3)
    with Image.open(pictures / "cat.png") as opened:
        resized = np.asarray(opened.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    pipe = pipelines.load(folder)
    mask = np.repeat(np.arange(SIZE) < SIZE // 2, SIZE).reshape(SIZE, SIZE)
    expected = pipe(jax.random.key(0), "a cat", image=resized, mask_image=mask, **CALL)
    np.testing.assert_array_equal(part, to_uint8(expected))


def test_a_picture_is_cropped_to_the_nearest_size(capsys, folder, pictures):
    """Its mask with it; without --resize its size must fit."""
    start = ["--prompt", "a cat", "--image", pictures / "cat.png", "--mask", pictures / "mask.png"]
    part, *_ = sample(capsys, folder, pictures / "crop", *start, "--resize", "crop", "--width", SIZE)
    pipe = pipelines.load(folder)
    with Image.open(pictures / "cat.png") as cat, Image.open(pictures / "mask.png") as mask:
        given = dict(image=cat, mask_image=mask, resize="crop", width=SIZE)
        expected = to_uint8(pipe(jax.random.key(0), "a cat", **given, **CALL))
    assert part.shape == (1, 20, SIZE, 3)
    np.testing.assert_array_equal(part, expected)
    line = complaint(capsys, "sample", folder, *start, "--resize", "shrink")
    assert "resize" in line and "crop, pad, stretch" in line


def test_what_lies_on_the_picture_is_of_its_proportions(capsys, folder, pictures, monkeypatch):
    """A mask or a control image of others would be stretched; a smaller one of the same is taken."""
    opened, open_picture = [], picture_files.open_picture
    monkeypatch.setattr(
        picture_files, "open_picture", lambda path: opened.append(Path(path).name) or open_picture(path)
    )
    size = ["--height", SIZE, "--width", SIZE]
    start = ["--prompt", "a cat", "--image", pictures / "cat.png", *size]
    white = Image.new("L", (16, 20))
    white.save(pictures / "tall.png")
    line = complaint(capsys, "sample", folder, *start, "--mask", pictures / "tall.png")
    sizes = "tall.png is 20x16 pixels (height x width), and --image 20x24: one of them would be stretched"
    assert f"--mask {pictures}/{sizes}" in line
    assert sorted(opened) == ["cat.png", "tall.png"]  # each is read once
    controlnet(16, 1).save_pretrained(pictures / "edges")
    control = ["--controlnet", pictures / "edges", "--control-image"]
    line = complaint(capsys, "sample", folder, *start, *control, pictures / "tall.png")
    assert f"--control-image {pictures}/{sizes}" in line
    assert sorted(opened) == ["cat.png", "cat.png", "tall.png", "tall.png"]
    drawn = []
    for number, factor in enumerate((1, 0.5)):
        file = pictures / f"mask-{number}.png"
        Image.fromarray(
            np.repeat(np.arange(20 * factor) < 10 * factor, 24 * factor).reshape(-1, int(24 * factor))
        ).save(file)
        drawn.append(sample(capsys, folder, pictures / "out", *start, "--mask", file)[0])
    np.testing.assert_array_equal(*drawn)


def test_pictures_as_prompts(capsys, folder, pictures):
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    file = write_adapter(pictures / "adapter.safetensors", unet)
    encoder = write_encoder(pictures / "encoder")
    start = ["--prompt", "a cat", "--ip-adapter", file]
    shown = ["--ip-adapter-image", pictures / "cat.png", pictures / "mask.png", "--ip-adapter-scale", "0.5"]
    drawn, *_ = sample(capsys, folder, pictures / "out", *start, *shown, "--image-encoder", encoder)
    pipe = pipelines.with_ip_adapter(pipelines.load(folder), file, encoder)
    with Image.open(pictures / "cat.png") as cat, Image.open(pictures / "mask.png") as mask:
        given = dict(ip_adapter_image=[[cat, mask]], ip_adapter_scale=0.5)
        expected = to_uint8(pipe(jax.random.key(0), "a cat", **given, **CALL))
    np.testing.assert_array_equal(drawn, expected)
    line = complaint(capsys, "sample", folder, *start)
    assert "--ip-adapter is of --ip-adapter-image" in line
    line = complaint(capsys, "sample", folder, *start, *shown[:2])
    assert "needs the image encoder" in line and "--image-encoder" in line
    line = complaint(capsys, "sample", folder, *start, *shown[:2], "--image-encoder", folder)
    assert f"{folder} holds a whole model, and an image encoder is wanted" in line


def test_the_refiner_takes_over(capsys, sdxl, tmp_path):
    base, refiner = sdxl
    words = ["--prompt", "a cat", "--refiner", refiner, "--refiner-start", "0.5"]
    numbers = ["--options", "target_size=[8,8]", "aesthetic_score=3"]  # of the one, and of the other
    images, *_ = sample(capsys, base, tmp_path / "out", *words, *numbers)
    key, first = jax.random.key(0), dict(denoising_end=0.5, output="latents", target_size=(8, 8))
    latents = pipelines.load(base)(key, "a cat", **first, **CALL)
    second = dict(denoising_start=0.5, latents=latents, aesthetic_score=3.0)
    expected = pipelines.load(refiner)(key, "a cat", **second, **CALL)
    np.testing.assert_array_equal(images, to_uint8(expected))


def test_the_refiner_keeps_what_the_mask_keeps(capsys, sdxl, pictures):
    base, refiner = sdxl
    size = dict(height=SIZE, width=SIZE, resize="stretch")
    words = [
        "--prompt",
        "a cat",
        "--refiner",
        refiner,
        "--refiner-start",
        "0.5",
        "--height",
        SIZE,
        "--width",
        SIZE,
    ]
    files = ["--image", pictures / "cat.png", "--mask", pictures / "mask.png", "--resize", "stretch"]
    drawn, *_ = sample(capsys, base, pictures / "out", *words, *files)
    key, pipe = jax.random.key(0), pipelines.load(refiner)
    with Image.open(pictures / "cat.png") as cat, Image.open(pictures / "mask.png") as mask:
        given = dict(image=cat, mask_image=mask, **size, **CALL)
        latents = pipelines.load(base)(key, "a cat", denoising_end=0.5, output="latents", **given)
        expected = pipe(key, "a cat", denoising_start=0.5, latents=latents, **given)
    np.testing.assert_array_equal(drawn, to_uint8(expected))
    without = pipe(key, "a cat", denoising_start=0.5, latents=latents, **CALL)
    assert np.abs(to_uint8(without)[:, SIZE // 2 :].astype(int) - drawn[:, SIZE // 2 :]).max() > 2


def test_a_folder_with_a_controlnet_of_its_own_wants_a_picture(capsys, folder, tmp_path):
    controlnet(16, 1).save_pretrained(tmp_path / "edges")
    pipelines.save(pipelines.load(folder, controlnet=tmp_path / "edges"), tmp_path / "with-edges")
    line = complaint(capsys, "sample", tmp_path / "with-edges", "--prompt", "a cat")
    assert "by its controlnet" in line and "--control-image" in line


def test_a_whole_model_or_a_file_in_the_place_of_a_folder(capsys, folder, tmp_path):
    line = complaint(capsys, "sample", folder, "--prompt", "a cat", "--vae", folder)
    wanted = f"{folder} holds a whole model, and an autoencoder is wanted: give that of it, {folder / 'vae'}"
    assert wanted in line
    unet = folder / "unet"
    line = complaint(capsys, "sample", folder, "--prompt", "a cat", "--vae", unet)
    assert "its vae is a UNet2DConditionModel, and no autoencoder: give one" in line
    line = complaint(capsys, "sample", folder, "--prompt", "a cat", "--lora", unet)
    assert f"{unet} holds a network, 'UNet2DConditionModel', and no LoRA" in line
    (tmp_path / "flux.gguf").write_bytes(b"GGUF")
    line = complaint(capsys, "sample", tmp_path / "flux.gguf", "--prompt", "a cat")
    assert "pipelines.load_original" in line and "checkpoints.load_single_file" in line


def test_a_refiner_of_other_latents_is_refused_before_it_is_loaded(capsys, folder, sdxl, tmp_path):
    for base, refiner, first, second in (
        (folder, sdxl[1], "StableDiffusion", "StableDiffusionXL"),
        (sdxl[0], folder, "StableDiffusionXL", "StableDiffusion"),
    ):
        words = ["--prompt", "a cat", "--refiner", refiner, "--output-dir", tmp_path / "out"]
        line = complaint(capsys, "sample", base, *words)
        assert f"is of the family {second}, and {base} of {first}, whose latents are others" in line
        assert not (tmp_path / "out").exists()


def test_words_that_are_not_seen_are_a_warning_on_stderr(capsys, folder, tmp_path):
    _, _, error = sample(capsys, folder, tmp_path / "out", "--prompt", "cat " * 75 + "at last")
    assert error.count("\n") == 1 and "jaxldm: warning" in error and "'at last'" in error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["draws from texts", "--prompt"]),
        (["--prompt"], ["prompt"]),
        (["--prompt", "a cat", "--class-labels", "3"], ["--class-labels", "draws from texts"]),
        (["--prompt", "a cat", "--solver", "dimm"], ["ddim", "did you mean"]),
        (["--prompt", "a cat", "--height", "17"], ["height 17", "16 and 18"]),
        (["--prompt", "a cat", "--num-images", "0"], ["1 or more"]),
        (["--prompt", "a cat", "--strength", "0.5"], ["strength", "image"]),
        (["--prompt", "a cat", "--image", "nowhere.png"], ["no picture nowhere.png"]),
        (["--prompt", "a cat", "--mask", "nowhere.png"], ["--image"]),
        (["--prompt", "a cat", "--lora-scale", "0.5"], ["--lora-scale is of --lora"]),
        (["--prompt", "a cat", "--refiner-start", "0.5"], ["--refiner-start is of --refiner"]),
        (["--prompt", "a cat", "--control-image", "cat.png"], ["--control-image is of --controlnet: give"]),
        (["--prompt", "a cat", "--guess-mode"], ["--guess-mode is of --controlnet: give --controlnet"]),
        (["--prompt", "a cat", "--width", "1000000000"], ["images of 16x1000000000 pixels", "GB"]),
        (["--prompt", "a cat", "--num-images", "1000000000000"], ["1000000000000 images need"]),
        (["--prompt", "a cat", "--strength", "nan"], ["--strength must be finite"]),
        (["--prompt", "a cat", "b", "--negative-prompt", "a", "b", "c"], ["3 negative prompts", "2 prompts"]),
        (["--prompt", "a cat", "--dtype", "half"], ["dtype", "float16"]),
        (["--prompt", "a cat", "--refiner", "nowhere"], ["nowhere does not exist"]),
        (["--prompt", "a cat", "--batch-size", "0"], ["batch_size"]),
        (["--prompt", "a cat", "--true-cfg-scale", "2"], ["true_cfg_scale", "give guidance_scale alone"]),
    ],
)
def test_a_mistake_is_one_line(capsys, folder, tmp_path, words, expected):
    line = complaint(capsys, "sample", folder, "--output-dir", tmp_path / "out", *words)
    assert all(part in line for part in expected), line
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_picture(capsys, folder, tmp_path):
    (tmp_path / "cat.png").write_text("no picture")
    words = ["--prompt", "a cat", "--image", tmp_path / "cat.png"]
    assert "cannot be read as a picture" in complaint(capsys, "sample", folder, *words)


def test_info_says_what_a_folder_is_and_how_to_draw(capsys, sdxl):
    code, out, _ = run(capsys, "info", sdxl[0])
    count = sum(leaf.size for part in pipelines.load(sdxl[0]).networks.values() for leaf in _leaves(part))
    assert code == 0 and f"{count:,} parameters" in out and f"jaxldm sample {sdxl[0]} --prompt" in out
    assert all(
        name in out for name in ("CLIPTextModelWithProjection", "AutoencoderKL", "EulerDiscreteSchedul")
    )


def _leaves(network):
    return jax.tree.leaves(network.params)


def test_a_folder_of_an_unknown_class(capsys, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    line = complaint(capsys, "sample", tmp_path, "--prompt", "a cat")
    assert "KandinskyPipeline" in line and "StableDiffusionPipeline" in line


def test_a_control_image(capsys, folder, pictures):
    """Resized to the sides that are given; its scale and steps are those of the pipeline's call."""
    controlnet(16, 1).save_pretrained(pictures / "edges")
    words = ["--prompt", "a cat", "--controlnet", pictures / "edges", "--height", SIZE, "--width", SIZE]
    control = ["--control-image", pictures / "cat.png", "--control-scale", "0.7", "--control-end", "0.5"]
    images, *_ = sample(capsys, folder, pictures / "out", *words, *control)
    with Image.open(pictures / "cat.png") as opened:
        resized = np.asarray(opened.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    given = dict(control_image=resized, controlnet_conditioning_scale=0.7, control_guidance_end=0.5)
    pipe = pipelines.load(folder, controlnet=pictures / "edges")
    np.testing.assert_array_equal(images, to_uint8(pipe(jax.random.key(0), "a cat", **given, **CALL)))
    line = complaint(capsys, "sample", folder, *words, *control, "0.3")
    assert "2 numbers for 1 control networks" in line
    line = complaint(capsys, "sample", folder, *words)
    assert "--controlnet is of --control-image: give --control-image" in line
    assert "--control-scale is of --control-image" in complaint(
        capsys, "sample", folder, *words, *control[2:4]
    )
