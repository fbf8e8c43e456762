"""Under which names ComfyUI looks for the layers of an adapter: its rules, in our words.

Source: github.com/Comfy-Org/ComfyUI, comfy/lora.py (`model_lora_keys_unet`, at 17358c8f73b5), comfy/utils.py
(`unet_to_diffusers` and the like, at 09708eae709a), comfy/weight_adapter/lora.py (`LoRAAdapter.load`, at
6f98b150e065). It goes from the model to the file: of each layer that it knows by diffusers' name it makes all
spellings, and takes the tensors that are there. What no layer has asked for is left, with a warning.
"""

import re

# Layers of a U-Net that have a spelling, by their names in diffusers.
_BLOCK = r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)|norm[123])"
_UNET = (
    r"((down|up)_blocks\.\d+|mid_block)\."
    r"(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj|norm1|norm2)"
    rf"|attentions\.\d+\.(proj_in|proj_out|norm|{_BLOCK})|(down|up)samplers\.0\.conv)"
    r"|conv_in|conv_out|conv_norm_out|(time|add|class)_embedding\.linear_[12]"
)
# Of transformers; embeddings and last layers are left out.
_JOINT = r"to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out"
_TRANSFORMERS = {
    "SD 3": rf"transformer_blocks\.\d+\.(attn\.({_JOINT})|attn2\.(to_[qkv]|to_out\.0)"
    r"|(ff|ff_context)\.net\.(0\.proj|2)|(norm1|norm1_context)\.linear)",
    "FLUX": rf"transformer_blocks\.\d+\.(attn\.({_JOINT})|(ff|ff_context)\.net\.(0\.proj|2)"
    r"|(norm1|norm1_context)\.linear)"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)",
    "FLUX.2": rf"transformer_blocks\.\d+\.(attn\.({_JOINT})|(ff|ff_context)\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
    "PixArt": r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))",
    "Z-Image": r"(layers|context_refiner|noise_refiner)\.\d+\."
    r"(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)",
    "Qwen-Image": r".*",  # its own network has diffusers' names
}
FAMILIES = {"Stable Diffusion": _UNET, "SDXL": _UNET, **_TRANSFORMERS}
# (up, down) behind a spelling.
_FACTORS = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
)


def spellings(family, module):
    """Of a layer, by its name in diffusers; empty for one that ComfyUI does not know."""
    if not re.fullmatch(FAMILIES[family], module):
        return []
    flat = module.replace(".", "_")
    if family in _TRANSFORMERS:
        return [f"transformer.{module}"]
    older = module.replace(".to_", ".processor.to_")  # of the attention processors that held the factors
    older = older.removesuffix(".0") if older.endswith(".to_out.0") else older
    return [f"lora_unet_{flat}", f"lycoris_{flat}", older, f"unet.{older}"]


def read(family, shapes, tensors):
    """(change of each layer that is found, tensors that are left).

    Args:
        shapes: layer, by its name in diffusers -> shape of its weight.
        tensors: of the file, by their names.
    """
    changes, used = {}, set()
    for module, shape in shapes.items():
        for name in spellings(family, module):
            for up, down in _FACTORS:
                if name + up not in tensors:
                    continue
                left, right = tensors[name + up], tensors[name + down]
                alpha = tensors.get(f"{name}.alpha")
                scale = 1.0 if alpha is None else alpha.item() / len(right)
                changes[module] = scale * (left.flatten(1) @ right.flatten(1)).reshape(shape)
                used |= {name + up, name + down, f"{name}.alpha"}
    return changes, set(tensors) - used
