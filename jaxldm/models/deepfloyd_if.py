"""The U-Nets of DeepFloyd IF, the open Imagen: presets of `UNet2DConditionModel`. Saharia et al. 2022.

Stage I generates 64x64 pixels from a text; stage II upsamples them to 256x256, conditioned on the amount of
noise that was added to the small image. All attend to T5-XXL's hidden states, 77 tokens of 4096 channels, and
predict eps and a variance.
"""

from __future__ import annotations

from jaxldm.models.unet_2d_condition import UNet2DConditionConfig

_SQRT_2 = 1 / 0.7071  # as the published configs round it


def _stage_1(width: int) -> UNet2DConditionConfig:
    return UNet2DConditionConfig(
        sample_size=64,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        block_out_channels=(width, 2 * width, 3 * width, 4 * width),
        layers_per_block=3,
        act_fn="gelu",
        cross_attention_dim=4 * width,
        encoder_hid_dim=4096,
        encoder_hid_dim_type="text_proj",
        attention_head_dim=64,
        addition_embed_type="text",
        resnet_time_scale_shift="scale_shift",
        cross_attention_norm="group_norm",
    )


def _stage_2(width: int) -> UNet2DConditionConfig:
    channels = (width, 2 * width, 4 * width, 6 * width, 8 * width)
    return UNet2DConditionConfig(
        sample_size=256,
        in_channels=6,
        out_channels=6,
        down_block_types=(*("ResnetDownsampleBlock2D",) * 3, *("SimpleCrossAttnDownBlock2D",) * 2),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 2, *("ResnetUpsampleBlock2D",) * 3),
        block_out_channels=channels,
        layers_per_block=(2, 2, 3, 5, 5),
        mid_block_scale_factor=_SQRT_2,
        act_fn="gelu",
        cross_attention_dim=channels[-1],
        encoder_hid_dim=4096,
        encoder_hid_dim_type="text_proj",
        attention_head_dim=64,
        class_embed_type="timestep",
        addition_embed_type="text",
        resnet_time_scale_shift="scale_shift",
        resnet_skip_time_act=True,
        resnet_out_scale_factor=_SQRT_2,
        time_embedding_dim=channels[-1],
        time_embedding_act_fn="gelu",
        cross_attention_norm="group_norm",
    )


PRESETS = {
    # "if-i-xl" and "if-ii-l" are the published configs. The widths of the others follow from the numbers of
    # parameters on their model cards.
    "if-i-xl": _stage_1(704),  # 4,304,695,110 parameters, "4.3B"
    "if-i-l": _stage_1(320),  # 935,365,830, "900M"
    "if-i-m": _stage_1(192),  # 371,605,830, "400M"
    "if-ii-l": _stage_2(160),  # 1,243,277,190, "1.2B"
    "if-ii-m": _stage_2(96),  # 482,483,334, "450M"
}
