"""Tiny random text-to-image pipelines of diffusers, saved as folders: what ours are compared with."""

import json

import diffusers
import numpy as np
import torch
import transformers

torch.set_num_threads(1)
SIZE = 16  # of the pictures; latents are half as wide
LATENT = SIZE // 2
SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
# scheduler_config.json as published: SD 1.5's is silent about its spacing, SDXL's names it.
SCHEDULERS = {
    "sd15": SD | {"_class_name": "PNDMScheduler"},
    "sd2": SD | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "sdxl": SD
    | {
        "_class_name": "EulerDiscreteScheduler",
        "timestep_spacing": "leading",
        "prediction_type": "epsilon",
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
    },
    "lcm": SD | {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0},
}
# Solver -> the scheduler of diffusers.
REFERENCE = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz,!"


def write_tokenizer(folder, pad="<|endoftext|>"):
    """A CLIP tokenizer of letters and two merges, in the files that the published folders have."""
    folder.mkdir(parents=True)
    merges = [("a", "t</w>"), ("c", "at</w>")]
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    entries = special | {"pad_token": pad, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(entries))
    return transformers.CLIPTokenizer.from_pretrained(folder), len(words)


def shaken(module, seed, scale=0.05):
    """The module with every weight moved: fresh ones are too even, and zero in places."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return module.eval()


def text_encoder(vocabulary, width, seed, projection=None, layers=2):
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=projection or width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    torch.manual_seed(seed)
    return shaken(kind(config), seed, 0.2)


def autoencoder(seed=3):
    torch.manual_seed(seed)
    return shaken(
        diffusers.AutoencoderKL(
            sample_size=SIZE,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            latent_channels=4,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        seed,
    )


def unet(width, seed=1, **more):
    """As few layers as can be: they are compiled for every solver, and are compared elsewhere."""
    torch.manual_seed(seed)
    return shaken(
        diffusers.UNet2DConditionModel(
            sample_size=LATENT,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=width,
            down_block_types=("CrossAttnDownBlock2D",),
            mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D",),
            **more,
        ),
        seed,
        0.02,
    )


def write_sd(folder, scheduler="sd15", **unet_options):
    """A folder of the Stable Diffusion 1.x / 2.x type."""
    tokenizer, size = write_tokenizer(folder / "tokenizer")
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet(16, **unet_options),
        vae=autoencoder(),
        text_encoder=text_encoder(size, 16, 2),
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _saved(pipe, folder, scheduler)


def write_sdxl(folder, refiner=False, **unet_options):
    """A folder of SDXL's base or of its refiner."""
    ids = 5 if refiner else 6
    tokenizer, size = write_tokenizer(folder / "tokenizer")
    tokenizer_2, _ = write_tokenizer(folder / "tokenizer_2", pad="!")
    options = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 12 + 4 * ids,
        "use_linear_projection": True,
        **unet_options,
    }
    parts = {
        "unet": unet(20 if refiner else 36, seed=4 if refiner else 1, **options),
        "vae": autoencoder(),
        "text_encoder": None if refiner else text_encoder(size, 16, 5, layers=3),
        "tokenizer": None if refiner else tokenizer,
        "text_encoder_2": text_encoder(size, 20, 6, projection=12, layers=3),
        "tokenizer_2": tokenizer_2,
        "scheduler": diffusers.EulerDiscreteScheduler(),
        "force_zeros_for_empty_prompt": not refiner,
    }
    if refiner:
        pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)
    else:
        pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return _saved(pipe, folder, "sdxl")


def _saved(pipe, folder, scheduler):
    pipe.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULERS[scheduler]))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"][1] = SCHEDULERS[scheduler]["_class_name"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def open_reference(kind, folder, solver=None, **more):
    """A pipeline of diffusers on a folder, with the scheduler of a solver's name; more parts, or None."""
    index = json.loads((folder / "model_index.json").read_text())
    options = {name: None for name in ("safety_checker", "feature_extractor") if name in index}
    pipe = kind.from_pretrained(folder, **options, **more)
    pipe.set_progress_bar_config(disable=True)
    if solver is not None:
        pipe.scheduler = REFERENCE[solver].from_config(pipe.scheduler.config)
    return pipe


def noise(count=1, seed=0, channels=4):
    """[N, h, w, c], as ours are laid out."""
    shape = (count, LATENT, LATENT, channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def theirs(array):
    """[N, h, w, c] -> a torch tensor [N, c, h, w]."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def ours(tensor):
    """A torch tensor [N, c, h, w] -> [N, h, w, c]."""
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def controlnet(width, seed, **more):
    """A ControlNet of the U-Net of `unet`, for pictures of `SIZE`."""
    torch.manual_seed(seed)
    return shaken(
        diffusers.ControlNetModel(
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=width,
            down_block_types=("CrossAttnDownBlock2D",),
            conditioning_embedding_out_channels=(2, 4),
            **more,
        ),
        seed,
        0.1,
    )
