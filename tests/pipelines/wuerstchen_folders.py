"""Tiny random pipelines of Wuerstchen as diffusers has them, and the folders that they write."""

import types

import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated import wuerstchen
from reference_pipelines import shaken, text_encoder, write_tokenizer

SIZE = {"height": 128, "width": 256}  # of pictures
EMBEDDINGS, LATENTS = (3, 6, 4), (32, 64, 4)  # [h, w, c] of these pictures
DECODER = {
    "c_r": 6,
    "c_cond": 12,
    "c_hidden": [8, 12],
    "nhead": [-1, 2],
    "blocks": [1, 1],
    "level_config": ["CT", "CTA"],
    "inject_effnet": [False, True],
    "effnet_embd": 4,
    "clip_embd": 12,
}


def parts(folder):
    """Components of the three pipelines."""
    torch.manual_seed(1)
    tokenizer, size = write_tokenizer(folder)
    prior = shaken(wuerstchen.WuerstchenPrior(c_in=4, c=16, c_cond=16, c_r=6, depth=1, nhead=2), 2)
    prior.out[1].bias.data[4:] -= 2  # away from the b that the prior divides by
    decoder = shaken(wuerstchen.WuerstchenDiffNeXt(**DECODER), 3)
    vqgan = wuerstchen.PaellaVQModel(embed_dim=8, bottleneck_blocks=1, num_vq_embeddings=16)
    vqgan = shaken(vqgan, 4)
    vqgan.out_block[0].weight.data *= 6  # a picture with lights and shadows
    of_prior = {"prior": prior, "text_encoder": text_encoder(size, 16, 5), "tokenizer": tokenizer}
    of_decoder = {"decoder": decoder, "vqgan": vqgan, "text_encoder": text_encoder(size, 12, 6)}
    return of_prior, of_decoder | {"tokenizer": tokenizer}


def write_wuerstchen(root):
    """The pipelines `prior`, `decoder` and `whole`; their folders have these names under `root`."""
    of_prior, of_decoder = parts(root / "tokenizer")
    pipes = {
        "prior": wuerstchen.WuerstchenPriorPipeline(**of_prior, scheduler=DDPMWuerstchenScheduler()),
        "decoder": wuerstchen.WuerstchenDecoderPipeline(**of_decoder, scheduler=DDPMWuerstchenScheduler()),
        "whole": wuerstchen.WuerstchenCombinedPipeline(
            **{f"prior_{name}": part for name, part in of_prior.items()},
            **of_decoder,
            prior_scheduler=DDPMWuerstchenScheduler(),
            scheduler=DDPMWuerstchenScheduler(),
        ),
    }
    for name, pipe in pipes.items():
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(root / name)
    return types.SimpleNamespace(root=root, **pipes)
