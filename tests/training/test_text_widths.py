"""Widths of text encoders against those that a recipe's overrides name, by the configs alone."""

import dataclasses
import json

import pytest

from jaxldm import models, training
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.diffusion import build_denoiser
from jaxldm.training.text import text_fields

CLIP = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
ENCODERS = {
    "minilm": CLIP,
    "clip-l": CLIP,
    "openclip-bigg": {**CLIP, "projection_dim": 6},
    "t5-base": {"d_model": 10},
}
OF_CLIPS = {"encoder": "openclip-bigg", "encoder_2": "openclip-bigg"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The recipe of encoders by their presets, of which there are configs alone."""
    folder = tmp_path_factory.mktemp("encoders")
    for preset, changes in ENCODERS.items():
        config = dataclasses.replace(models.PRESETS[preset], **changes)
        entries = models.config_to_dict(config) | {"architectures": [models.class_name(config)]}
        (folder / preset).mkdir()
        (folder / preset / "config.json").write_text(json.dumps(entries))

    def make(**encoders):
        return training.TextRecipe(**{name: str(folder / preset) for name, preset in encoders.items()})

    return make


@pytest.mark.parametrize(
    ("preset", "encoders", "overrides", "said"),
    [
        (
            "sd15-unet",
            {"encoder": "minilm"},
            {"cross_attention_dim": 16},
            "cross_attention_dim 16, .* make 8:",
        ),
        ("sd15-unet", {"encoder": "minilm"}, {"cross_attention_dim": (8, 16)}, r"\(8, 16\), .* make 8:"),
        ("sd15-unet", {"encoder": "minilm"}, {"encoder_hid_dim": 4}, "encoder_hid_dim 4, .* make 8:"),
        ("pixart-sigma", {"encoder": "t5-base"}, {"caption_channels": 8}, "caption_channels 8, .* make 10:"),
        (
            "flux-schnell",
            {"encoder": "clip-l", "encoder_2": "t5-base"},
            {"joint_attention_dim": 8},
            "joint_attention_dim 8, .* make 10:",
        ),
        ("sdxl-unet", OF_CLIPS, {"cross_attention_dim": 8}, "cross_attention_dim 8, .* make 16:"),
        ("sd3-medium", OF_CLIPS, {"joint_attention_dim": 15}, "joint_attention_dim 15, .* make 16:"),
        ("sd3-medium", OF_CLIPS, {"pooled_projection_dim": 13}, "pooled_projection_dim 13, .* make 12:"),
        ("sd3-medium", OF_CLIPS | {"encoder_3": "t5-base"}, {}, "encoder_3 are 10 wide, and .* 16:"),
    ],
)
def test_another_width_is_refused(text, preset, encoders, overrides, said):
    with pytest.raises(InvalidArgumentError, match=said) as caught:
        text_fields(text(**encoders), models.PRESETS[preset], overrides)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("preset", "encoders", "overrides"),
    [
        ("sd15-unet", {"encoder": "minilm"}, {"cross_attention_dim": 8}),
        ("sd15-unet", {"encoder": "minilm"}, {"encoder_hid_dim": 8, "cross_attention_dim": 32}),
        ("sd15-unet", {"encoder": "minilm"}, {"encoder_hid_dim": None}),
        # SD3 has zeros in the place of T5 and of a CLIP that it lacks.
        ("sd3-medium", OF_CLIPS, {"joint_attention_dim": 4096}),
        ("sd3-medium", {"encoder": "openclip-bigg", "encoder_3": "t5-base"}, {"pooled_projection_dim": 12}),
    ],
)
def test_what_fits_is_built(text, preset, encoders, overrides):
    fields = text_fields(text(**encoders), models.PRESETS[preset], overrides)
    models.build(preset, **{**fields, **overrides})


def test_it_is_found_before_the_first_stage(text):
    """By what builds every network of a recipe before anything is written."""
    own = training.RECIPES["captioned-shapes"]
    wrong = {**own.diffusion.overrides, "cross_attention_dim": 384}
    recipe = dataclasses.replace(
        own, text=text(encoder="minilm"), diffusion=dataclasses.replace(own.diffusion, overrides=wrong)
    )
    with pytest.raises(InvalidArgumentError, match="cross_attention_dim 384, and its text encoders make 8"):
        build_denoiser(recipe, (32, 32, 3), 1)
