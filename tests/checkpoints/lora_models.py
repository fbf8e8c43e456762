"""Configs of diffusers' models that are small enough for every LoRA file to be tried on them."""

UNET = {"sample_size": 8, "norm_num_groups": 4, "cross_attention_dim": 12, "block_out_channels": (8, 16)}
UNET |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1}
SD15 = UNET | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2}
SDXL = SD15 | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 34,
}
SD3 = {"sample_size": 12, "in_channels": 4, "out_channels": 4, "attention_head_dim": 8, "num_layers": 2}
SD3 |= {"num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 12}
SD3 |= {"pooled_projection_dim": 10, "pos_embed_max_size": 8}
FLUX = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12, "in_channels": 16}
FLUX |= {"pooled_projection_dim": 10, "axes_dims_rope": (4, 6, 6), "num_layers": 2, "num_single_layers": 2}
FLUX2 = {"in_channels": 12, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
FLUX2 |= {"num_attention_heads": 2, "joint_attention_dim": 10, "axes_dims_rope": (4, 4, 4, 4)}
QWEN_IMAGE = {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 12}
QWEN_IMAGE |= {"num_attention_heads": 2, "joint_attention_dim": 10, "axes_dims_rope": (2, 4, 6)}
PIXART = {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "num_layers": 2}
PIXART |= {"sample_size": 8, "caption_channels": 10, "use_additional_conditions": False}
Z_IMAGE = {"in_channels": 4, "dim": 24, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "cap_feat_dim": 10}
Z_IMAGE |= {"axes_dims": [4, 6, 2], "axes_lens": [100, 16, 16]}
DIT = {"sample_size": 8, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2}
DIT |= {"in_channels": 4, "out_channels": 8, "norm_type": "ada_norm_zero", "num_embeds_ada_norm": 5}
DEEPFLOYD_IF = {"sample_size": 8, "in_channels": 3, "out_channels": 6, "block_out_channels": (8, 16)}
DEEPFLOYD_IF |= {"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")}
DEEPFLOYD_IF |= {
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
DEEPFLOYD_IF |= {"up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "act_fn": "gelu"}
DEEPFLOYD_IF |= {"cross_attention_dim": 32, "encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"}
DEEPFLOYD_IF |= {"attention_head_dim": 8, "addition_embed_type": "text", "addition_embed_type_num_heads": 3}
DEEPFLOYD_IF |= {"resnet_time_scale_shift": "scale_shift", "cross_attention_norm": "group_norm"}
WUERSTCHEN = {"c_in": 4, "c": 16, "c_cond": 16, "c_r": 6, "depth": 2, "nhead": 2}
AMUSED = {"hidden_size": 24, "cond_embed_dim": 10, "micro_cond_encode_dim": 4, "micro_cond_embed_dim": 20}
AMUSED |= {"encoder_hidden_size": 18, "vocab_size": 24, "codebook_size": 20, "in_channels": 12}
AMUSED |= {"num_hidden_layers": 2, "num_attention_heads": 3, "block_num_heads": 2, "intermediate_size": 40}
AMUSED |= {"sample_size": 6, "block_out_channels": 16, "num_res_blocks": 1}
