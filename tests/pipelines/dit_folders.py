"""A tiny random DiTPipeline folder of diffusers: what ours is compared with."""

import json

import diffusers
import torch
from reference_pipelines import LATENT, autoencoder, shaken

NULL = 1000
SCHEDULER = {  # as published
    "_class_name": "DDIMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "trained_betas": None,
}


def write_dit(folder):
    """A DiTPipeline folder; its blocks share their embedders, as published ones do."""
    torch.manual_seed(0)
    transformer = shaken(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            out_channels=8,
            sample_size=LATENT,
            norm_eps=1e-6,
        ),
        seed=1,
        scale=0.1,
    )
    state = transformer.state_dict()
    for name in [name for name in state if ".1.norm1.emb." in name]:
        state[name].copy_(state[name.replace(".1.", ".0.", 1)])
    pipe = diffusers.DiTPipeline(transformer, autoencoder(), diffusers.DDIMScheduler())
    pipe.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(label): f"animal {label}, beast {label}" for label in range(NULL)}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
