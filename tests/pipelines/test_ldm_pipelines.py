"""Latent diffusion's own text-to-image and super-resolution against the pipelines of diffusers."""

import diffusers
import numpy as np
import pytest
import torch
from compilations import COMPILATIONS
from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion_superresolution as enlarging_module
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from picture_checks import KEY, as_tensor, assert_images_agree, assert_latents_agree, states_of
from reference_pipelines import LATENT, SIZE, autoencoder, noise, ours, shaken, theirs, unet
from transformers import BertTokenizer

from jaxldm import models, pipelines
from jaxldm.cli import main
from jaxldm.errors import CheckpointError, InvalidArgumentError

STEPS = {"num_inference_steps": 3}
SMALL = np.random.default_rng(0).integers(0, 256, (LATENT, LATENT, 3), dtype=np.uint8)
DDIM = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}


def tokenizer(folder):
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "##s", "the"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return BertTokenizer(str(folder / "vocab.txt"), model_max_length=77)


def text_encoder():
    """Its heads together are narrower than its states."""
    torch.manual_seed(0)
    options = {"encoder_layers": 2, "encoder_ffn_dim": 16, "encoder_attention_heads": 2, "head_dim": 3}
    return shaken(LDMBertModel(LDMBertConfig(vocab_size=10, d_model=16, **options)), 0, 0.2)


def vq_model():
    torch.manual_seed(3)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    options = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 3}
    return shaken(diffusers.VQModel(**options, **kinds, layers_per_block=1, num_vq_embeddings=16), 3, 0.2)


def unet_of_pictures():
    torch.manual_seed(5)
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    options = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    model = diffusers.UNet2DModel(
        sample_size=LATENT, in_channels=6, out_channels=3, attention_head_dim=4, **options, **kinds
    )
    return shaken(model, 5, 0.05)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("ldm")
    text = diffusers.LDMTextToImagePipeline(
        vqvae=autoencoder(),
        bert=text_encoder(),
        tokenizer=tokenizer(root / "words"),
        unet=unet(16),
        scheduler=diffusers.DDIMScheduler(**DDIM),
    )
    enlarging = diffusers.LDMSuperResolutionPipeline(
        vqvae=vq_model(), unet=unet_of_pictures(), scheduler=diffusers.DDIMScheduler(**DDIM)
    )
    text.save_pretrained(root / "text")
    enlarging.save_pretrained(root / "enlarging")
    return {"text": root / "text", "enlarging": root / "enlarging"}


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: pipelines.load(folder) for name, folder in folders.items()}


def opened(kind, folder):
    reference = kind.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    return reference


def test_text_to_image(folders, pipes, monkeypatch):
    reference = opened(diffusers.LDMTextToImagePipeline, folders["text"])
    seen, decode = [], reference.vqvae.decode
    monkeypatch.setattr(reference.vqvae, "decode", lambda z: seen.append(z) or decode(z))
    prompts, call = ["a cat", "the dogs"], STEPS | {"guidance_scale": 4.0}
    start = noise(2)
    # Their latents have an eighth of the sides whatever the autoencoder is; this one has a half.
    reference(prompts, latents=theirs(start), height=8 * LATENT, width=8 * LATENT, output_type="np", **call)
    latents = seen[-1] * reference.vqvae.config.scaling_factor
    pipe = pipes["text"]
    drawn = pipe(KEY, prompts, latents=start, output="latents", **call)
    assert_latents_agree(drawn, latents)
    reference.vae = reference.vqvae
    monkeypatch.undo()
    assert_images_agree(pipe.decode(drawn), reference, latents)
    given = states_of(pipe, prompts, ["", ""])
    np.testing.assert_array_equal(pipe(KEY, latents=start, output="latents", **given, **call), drawn)


def test_the_text_encoder(folders, pipes):
    reference = opened(diffusers.LDMTextToImagePipeline, folders["text"]).bert
    tokens = np.array([[2, 5, 6, 3, 0, 0], [2, 9, 7, 8, 3, 0]])
    mask = (tokens != 0).astype(np.int64)
    for given in (None, mask):
        with torch.no_grad():
            states = reference(
                torch.from_numpy(tokens), attention_mask=None if given is None else torch.from_numpy(given)
            )[0].numpy()
        encoded = pipes["text"].bert(tokens.astype(np.int32), given)
        np.testing.assert_allclose(encoded.last_hidden_state, states, atol=1e-4)
    assert models.count_params("ldm-bert") == 581_994_042


def test_super_resolution(folders, pipes, monkeypatch):
    reference = opened(diffusers.LDMSuperResolutionPipeline, folders["enlarging"])
    pictures, start = np.stack([SMALL, SMALL[::-1]]), noise(2, channels=3)
    monkeypatch.setattr(enlarging_module, "randn_tensor", lambda *args, **options: theirs(start))
    seen, decode = [], reference.vqvae.decode
    monkeypatch.setattr(reference.vqvae, "decode", lambda z: seen.append(z) or decode(z))
    tensors = torch.cat([as_tensor(each) for each in pictures])
    expected = reference(tensors, output_type="np", **STEPS).images
    pipe, call = pipes["enlarging"], {"image": pictures, "latents": start, **STEPS}
    drawn = pipe(KEY, output="latents", **call)
    np.testing.assert_allclose(drawn, ours(seen[0]), atol=1e-3 * np.abs(ours(seen[0])).max())
    images = pipe(KEY, **call)
    assert images.shape == (2, SIZE, SIZE, 3) and np.ptp(expected) > 0.1
    assert np.abs(images / 2 + 0.5 - expected).max() * 255 <= 2
    assert pipe(KEY, image=SMALL, num_images=2, **STEPS).shape == (2, SIZE, SIZE, 3)


def test_folders_both_ways(pipes, tmp_path):
    kinds = {"text": diffusers.LDMTextToImagePipeline, "enlarging": diffusers.LDMSuperResolutionPipeline}
    for name, kind in kinds.items():
        pipelines.save(pipes[name], tmp_path / name)
        assert type(opened(diffusers.DiffusionPipeline, tmp_path / name)) is kind
        again = pipelines.load(tmp_path / name)
        assert not [row for row in pipelines.compare(again, pipes[name]) if row.difference]


def test_the_command(folders, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(SMALL).save(tmp_path / "small.png")
    words = ["--num-inference-steps", "1", "--quiet", "--output-dir", str(tmp_path / "out")]
    enlarging = ["sample", str(folders["enlarging"]), *words]
    assert main([*enlarging, "--image", str(tmp_path / "small.png"), "--num-images", "2"]) == 0
    assert np.load(tmp_path / "out" / "samples.npz")["images"].shape == (2, SIZE, SIZE, 3)
    capsys.readouterr()
    assert main(enlarging) == 2 and "super-resolution needs image=" in capsys.readouterr().err
    assert main([*enlarging, "--prompt", "a cat"]) == 2
    assert "--prompt is not for a model of the family LDMSuperResolution" in capsys.readouterr().err
    assert main(["sample", str(folders["text"]), *words]) == 2
    assert "draws from texts: give one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, "super-resolution needs image="),
        ({"image": SMALL, "prompt": "a cat"}, "draws no texts: leave it out"),
        ({"image": SMALL, "guidance_scale": 2.0}, "guidance_scale is not for LDMSuperResolution"),
        ({"image": SMALL, "strength": 0.5}, "strength is not for LDMSuperResolution"),
        ({"image": SMALL, "height": LATENT, "width": LATENT}, "image is 16x16 pixels"),
        ({"image": np.stack([SMALL] * 3), "num_images": 2}, "3 arrays in image"),
    ],
)
def test_wrong_calls(pipes, call, words):
    count = COMPILATIONS.count
    with pytest.raises(InvalidArgumentError, match=words):
        pipes["enlarging"](KEY, **call)
    assert COMPILATIONS.count == count


def test_parts_of_different_models_are_refused(pipes):
    with pytest.raises(CheckpointError, match="takes 4 channels and draws 4, not the 6"):
        pipes["enlarging"].replace(unet=pipes["text"].unet).check_parts()
