"""A tiny random folder of Qwen-Image, written by diffusers."""

import diffusers
import torch
import transformers
from reference_pipelines import shaken
from z_image_folders import tokenizer

# scheduler_config.json as published.
SCHEDULER = {
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}


def text_encoder(vocabulary, width=24, seed=5):
    """The whole Qwen2.5-VL, with its tower of images."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 1]},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": width}
    torch.manual_seed(seed)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return shaken(transformers.Qwen2_5_VLForConditionalGeneration(config), seed, 0.2)


def write_qwen_image(folder):
    words, size = tokenizer()
    torch.manual_seed(1)
    transformer = diffusers.QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(2, 4, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True]
    )
    pipe = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=shaken(vae, 3, 0.1),
        text_encoder=text_encoder(size),
        tokenizer=words,
        transformer=shaken(transformer, 1, 0.1),
    )
    pipe.save_pretrained(folder)
    return folder
