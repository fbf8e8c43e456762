"""A tiny random folder of Z-Image, written by diffusers."""

import diffusers
import torch
import transformers
from reference_pipelines import shaken
from sd3_folders import autoencoder
from tokenizers.pre_tokenizers import ByteLevel

SPECIAL = ["<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)  # what Qwen3's own comes to for one question


def tokenizer():
    """Bytes, and two words."""
    merges = [("a", "t"), ("c", "at"), ("Ġ", "cat")]
    vocabulary = [
        *sorted(ByteLevel.alphabet()),
        *("".join(pair) for pair in merges),
        "<|endoftext|>",
        *SPECIAL,
    ]
    made = transformers.Qwen2Tokenizer(
        vocab={text: number for number, text in enumerate(vocabulary)},
        merges=merges,
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL,
        model_max_length=131072,
    )
    made.chat_template = CHAT_TEMPLATE
    return made, len(vocabulary)


def text_encoder(vocabulary, width=12, seed=5):
    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rope_theta=1e6,
    )
    torch.manual_seed(seed)
    return shaken(transformers.Qwen3Model(config), seed, 0.2)


def transformer(channels, width=12, seed=1):
    torch.manual_seed(seed)
    made = diffusers.ZImageTransformer2DModel(
        in_channels=channels,
        dim=24,
        n_heads=2,
        n_kv_heads=2,
        n_layers=2,
        n_refiner_layers=1,
        cap_feat_dim=width,
        axes_dims=[4, 6, 2],
        axes_lens=[100, 16, 16],
    )
    return shaken(made, seed, 0.1)


def write_z_image(folder):
    vae, (words, size) = autoencoder(), tokenizer()
    pipe = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder(size),
        tokenizer=words,
        transformer=transformer(vae.config.latent_channels),
    )
    pipe.save_pretrained(folder)
    return folder
