"""IP-Adapters against diffusers: plain and plus, several, their negatives, what is refused."""

import diffusers
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from compilations import compilations
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from ip_adapter_files import ENCODER, write_adapter, write_encoder
from picture_checks import KEY, assert_images_agree, assert_latents_agree
from PIL import Image
from reference_pipelines import noise, open_reference, theirs, write_sd, write_sdxl

from jaxldm import checkpoints, pipelines
from jaxldm.checkpoints.names import published_name
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.ip_adapter import _cross_attention

STEPS = {"num_inference_steps": 3, "guidance_scale": 6.0}
CLASSES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def pictures(count, seed=0):
    """As large as the encoder takes them: how others are resized is tested with the encoder."""
    side = ENCODER["image_size"]
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("ip-adapter")
    write_sd(root / "sd")
    write_sdxl(root / "sdxl")
    write_encoder(root / "image_encoder")
    for model in CLASSES:
        unet = diffusers.UNet2DConditionModel.from_pretrained(root / model / "unet")
        for k, kind in enumerate(("plain", "plus")):
            write_adapter(root / f"{model}-{kind}.safetensors", unet, kind == "plus", seed=k)
    return root


def with_adapters(root, model, kinds):
    """(ours, theirs) with these adapters."""
    files = [root / f"{model}-{kind}.safetensors" for kind in kinds]
    reference = open_reference(CLASSES[model], root / model, "ddim")
    encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(root / "image_encoder")
    side = ENCODER["image_size"]
    extractor = transformers.CLIPImageProcessor(size=side, crop_size=side)
    reference.register_modules(image_encoder=encoder.eval(), feature_extractor=extractor)
    names = [str(file) for file in files]
    reference.load_ip_adapter(names, subfolder=[""] * len(files), weight_name=[file.name for file in files])
    pipe = pipelines.load(root / model)
    for file in files:
        pipe = pipelines.with_ip_adapter(pipe, file)  # the encoder lies next to it
    return pipe, reference


CASES = {
    "SD, plain": ("sd", ["plain"], [1], [0.6]),
    "SD, plain and plus": ("sd", ["plain", "plus"], [1, 1], [0.3, 1.2]),
    "SDXL, plus, two pictures": ("sdxl", ["plus"], [2], [0.8]),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_diffusers(root, case):
    model, kinds, counts, scales = CASES[case]
    pipe, reference = with_adapters(root, model, kinds)
    shown = [list(pictures(count, seed=k)) for k, count in enumerate(counts)]
    reference.set_ip_adapter_scale(scales)
    start = noise()
    latents = reference(
        "a cat",
        ip_adapter_image=[[Image.fromarray(one) for one in several] for several in shown],
        latents=theirs(start),
        output_type="latent",
        **STEPS,
    ).images
    call = dict(latents=start, solver="ddim", ip_adapter_scale=scales, **STEPS)
    drawn = pipe(KEY, "a cat", output="latents", ip_adapter_image=shown, **call)
    assert_latents_agree(drawn, latents)
    embeds = pipelines.encode_image_prompts(pipe, shown)
    again = pipe(KEY, "a cat", output="latents", ip_adapter_image_embeds=embeds, **call)
    np.testing.assert_array_equal(again, drawn)
    if case != "SD, plain":
        return
    assert_images_agree(pipe(KEY, "a cat", ip_adapter_image=shown, **call), reference, latents)
    other = call | {"ip_adapter_scale": 0.1}

    def another():
        return pipe(KEY, "a cat", output="latents", ip_adapter_image=[list(pictures(1, 7))], **other)

    assert compilations(another) == 0
    assert not np.allclose(another(), drawn)
    alone = pipe(KEY, "a cat", output="latents", ip_adapter_image_embeds=[embeds[0][1:]], **call)
    np.testing.assert_array_equal(alone, drawn)  # the negatives of a plain adapter are zeros
    nothing = pipe(KEY, "a cat", output="latents", ip_adapter_image=shown, **call | {"ip_adapter_scale": 0})
    without = pipe(KEY, "a cat", output="latents", latents=start, solver="ddim", **STEPS)
    np.testing.assert_allclose(nothing, without, atol=1e-5)


def test_layers_are_counted_as_in_the_files(tmp_path):
    """Down, up, middle; several transformers a level, several blocks each."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=4,
    )
    unet.save_pretrained(tmp_path)
    network = pipelines.Network(*checkpoints.load(tmp_path))
    places = _cross_attention(network)
    ours = [published_name((*place, "kernel")).removesuffix(".weight") for place in places]
    names = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    assert ours == names
    modules = dict(unet.named_modules())
    assert list(places.values()) == [modules[name].to_q.out_features for name in names]


def test_a_pickle_holds_the_same(root, tmp_path):
    tensors = safetensors.numpy.load_file(root / "sd-plus.safetensors")
    nested: dict = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        nested[group][rest] = torch.from_numpy(tensor)
    torch.save(nested, tmp_path / "adapter.bin")
    one, other = (
        checkpoints.load_ip_adapter(path) for path in (root / "sd-plus.safetensors", tmp_path / "adapter.bin")
    )
    assert one.module == other.module and one.takes_patches
    np.testing.assert_array_equal(one.params["latents"], other.params["latents"])
    for ours, others in zip(one.layers, other.layers, strict=True):
        np.testing.assert_array_equal(ours, others)


def changed(path, source, **tensors):
    """A copy of a file with other tensors; None leaves one out."""
    whole = safetensors.numpy.load_file(source) | {k.replace("__", "."): v for k, v in tensors.items()}
    safetensors.numpy.save_file({k: v for k, v in whole.items() if v is not None}, path)
    return path


def test_files_that_do_not_fit_are_refused(root, tmp_path):
    sd, plain = pipelines.load(root / "sd"), root / "sd-plain.safetensors"
    layer, one = "ip_adapter__5__to_k_ip__weight", np.zeros((1, 1), np.float32)
    nan = np.full((8, 16), np.nan, np.float32)
    cases = {
        "its tokens are 36 wide, this U-Net takes 16: give one": root / "sdxl-plain.safetensors",
        "no such|there is no|does not exist": tmp_path / "nowhere.safetensors",
        "is no IP-Adapter: it lacks image_proj": root / "sd" / "unet" / "diffusion_pytorch_model.safetensors",
        "ip_adapter.5 lacks to_k_ip or to_v_ip": changed(tmp_path / "a.safetensors", plain, **{layer: None}),
        "has 2 attention layers, this U-Net has 3": changed(
            tmp_path / "b.safetensors", plain, **{layer: None, layer.replace("k_ip", "v_ip"): None}
        ),
        "ip_adapter.5.to_k_ip.weight holds NaN": changed(tmp_path / "c.safetensors", plain, **{layer: nan}),
        "of another kind; known": changed(tmp_path / "d.safetensors", plain, image_proj__proj__weight=None),
        "is a FaceID adapter": changed(
            tmp_path / "e.safetensors", plain, image_proj__proj__weight=None, image_proj__proj__2__weight=one
        ),
        "ip_adapter.1.to_q is of another": changed(
            tmp_path / "f.safetensors", plain, ip_adapter__1__to_q=one
        ),
    }
    for words, path in cases.items():
        with pytest.raises(CheckpointError, match=words):
            pipelines.with_ip_adapter(sd, path)
    wide = write_encoder(tmp_path / "wide", projection_dim=10)
    with pytest.raises(CheckpointError, match="takes embeddings 6 wide, this image encoder gives 10"):
        pipelines.with_ip_adapter(sd, plain, wide)
    with pytest.raises(CheckpointError, match="takes the folder of a CLIPVisionModelWithProjection"):
        pipelines.with_ip_adapter(sd, plain, root / "sd" / "text_encoder")


def test_calls_that_do_not_fit_are_refused(root, tmp_path):
    plain = tmp_path / "plain.safetensors"  # no encoder next to it
    plain.write_bytes((root / "sd-plain.safetensors").read_bytes())
    bare = pipelines.load(root / "sd")
    blind = pipelines.with_ip_adapter(bare, plain)
    pipe = pipelines.with_ip_adapter(bare, plain, root / "image_encoder")
    image, embeds = pictures(1)[0], [np.zeros((2, 1, 6), np.float32)]
    cases = [
        (bare, {"ip_adapter_image": image}, "is for a model with an IP-Adapter"),
        (blind, {"ip_adapter_image": image}, "ip_adapter_image needs the image encoder"),
        (pipe, {"ip_adapter_scale": 0.5}, "ip_adapter_scale is of ip_adapter_image"),
        (pipe, {"ip_adapter_image": image, "ip_adapter_image_embeds": embeds}, "give one of them"),
        (pipe, {"ip_adapter_image": [image, image]}, "must be a list, one for the one IP-Adapter, got 2"),
        (pipe, {"ip_adapter_image": image, "ip_adapter_scale": [1, 2]}, "ip_adapter_scale must be a list"),
        (pipe, {"ip_adapter_image": image, "ip_adapter_scale": "much"}, "ip_adapter_scale must be"),
        (pipe, {"ip_adapter_image_embeds": embeds[0]}, "must be a list, one for the one IP-Adapter"),
        (pipe, {"ip_adapter_image_embeds": [embeds[0][0]]}, r"must hold \[2, n, 6\]"),
        (pipe, {"ip_adapter_image_embeds": [embeds[0] + np.nan]}, "NaN"),
    ]
    for model, options, words in cases:
        with pytest.raises(InvalidArgumentError, match=words):
            model(KEY, "a cat", **options)
    with pytest.raises(InvalidArgumentError, match="no folder holds an IP-Adapter"):
        pipelines.save(pipe, tmp_path / "saved")
    with pytest.raises(InvalidArgumentError, match="pipe has no IP-Adapter"):
        pipelines.encode_image_prompts(bare, image)
    plus = tmp_path / "plus.safetensors"
    plus.write_bytes((root / "sd-plus.safetensors").read_bytes())
    alone = [np.zeros((1, 1, 5, 8), np.float32)]
    with pytest.raises(InvalidArgumentError, match="give the negatives, too"):
        pipelines.with_ip_adapter(bare, plus)(KEY, "a cat", ip_adapter_image_embeds=alone)
