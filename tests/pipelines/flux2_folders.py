"""Tiny random folders of FLUX.2 klein and dev, written by diffusers."""

import importlib
from unittest import mock

import diffusers
import tokenizers
import torch
import transformers
import transformers.processing_utils  # before `pixtral_class` hides what it asks for
from reference_pipelines import SIZE, open_reference, shaken
from tokenizers.pre_tokenizers import ByteLevel
from z_image_folders import tokenizer

WIDTH, LAYERS = 12, (1, 2)  # of the text encoder, and those of which the transformer takes the states
CHANNELS = 12  # 2x2 latents of 3


def text_encoder(vocabulary, seed=5):
    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rope_theta=1e6,
        max_position_embeddings=128,
    )
    torch.manual_seed(seed)
    return shaken(transformers.Qwen3ForCausalLM(config), seed, 0.2)


def autoencoder(seed=3):
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLFlux2(
        sample_size=SIZE,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=CHANNELS // 4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    torch.nn.init.uniform_(vae.bn.running_mean, -0.5, 0.5)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.5)
    return shaken(vae, seed)


def transformer(seed=1, guidance=False):
    torch.manual_seed(seed)
    made = diffusers.Flux2Transformer2DModel(
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=len(LAYERS) * WIDTH,
        axes_dims_rope=(2, 4, 4, 2),
        guidance_embeds=guidance,
    )
    return shaken(made, seed, 0.1)


def write_flux2_klein(folder):
    words, _ = tokenizer()
    thinking = [transformers.AddedToken(f"<{sign}think>", normalized=False) for sign in ("", "/")]
    words.add_tokens(thinking)
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        transformer=transformer(),
    )
    pipe.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- dev

# As Mistral's tokens begin.
SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>")
SPECIAL += ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + message.content[0].text + '[/SYSTEM_PROMPT]' }}{% else %}{{ '[INST]' }}"
    "{% for block in message.content %}{{ block.text if block.type == 'text' else '[IMG]' }}{% endfor %}"
    "{{ '[/INST]' }}{% endif %}{% endfor %}"
)  # what the published one comes to for these messages


def mistral_tokenizer(side="left"):
    """Bytes, and two words; the beginning of text is added in front, as in the published file."""
    merges = [("a", "t"), ("c", "at"), ("Ġ", "cat")]
    vocabulary = [*SPECIAL, *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    numbers = {text: number for number, text in enumerate(vocabulary)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(numbers, merges))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", numbers["<s>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL[3:]),
        padding_side=side,
    )


def pixtral_class():
    """The class of the processor, which transformers hides where torchvision is not installed."""
    with mock.patch("transformers.utils.is_vision_available", lambda: False):
        return importlib.import_module("transformers.models.pixtral.processing_pixtral").PixtralProcessor


def pixtral_processor(words):
    """The processor of a tokenizer."""
    pictures = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
    return pixtral_class()(pictures.PixtralImageProcessorPil(), words, chat_template=MISTRAL_TEMPLATE)


def mistral(vocabulary, seed=5):
    """The whole Mistral 3, with its tower of images."""
    text = {
        "model_type": "mistral",
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
        "sliding_window": None,
    }
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "pixtral", "head_dim": 4, "image_size": 28, "patch_size": 14}
    torch.manual_seed(seed)
    config = transformers.Mistral3Config(text_config=text, vision_config=vision)
    return shaken(transformers.Mistral3ForConditionalGeneration(config), seed, 0.2)


def write_flux2(folder, side="left"):
    processor = pixtral_processor(mistral_tokenizer(side))
    pipe = diffusers.Flux2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=mistral(len(processor.tokenizer)),
        tokenizer=processor,
        transformer=transformer(guidance=True),
    )
    pipe.save_pretrained(folder)
    return folder


def open_flux2(folder):
    """diffusers' pipeline of a folder, its processor among what it opens."""
    with mock.patch.object(transformers, "PixtralProcessor", pixtral_class()):
        return open_reference(diffusers.Flux2Pipeline, folder)
