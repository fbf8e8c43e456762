"""What the tests of text-to-image pipelines share: latents, pictures and noise of the reference."""

import jax
import numpy as np
import torch
from reference_pipelines import LATENT, SIZE, ours, theirs

from jaxldm import diffusion as D

KEY = jax.random.key(7)


def assert_latents_agree(drawn, tensor, tolerance=1e-3):
    reference = ours(tensor)
    assert drawn.shape == reference.shape and np.isfinite(reference).all()
    error = np.abs(drawn - reference).max() / np.abs(reference).max()
    assert error <= tolerance, f"latents differ by {error:.2e} of the largest value"


def assert_images_agree(images, reference, latents):
    """2 grey levels of 255, of what the reference decodes from its own latents."""
    with torch.no_grad():
        config = reference.vae.config
        shift = config.shift_factor or 0.0
        decoded = reference.vae.decode(latents / config.scaling_factor + shift).sample
    grey = [np.rint((np.clip(side, -1, 1) + 1) * 127.5) for side in (images, ours(decoded))]
    assert np.ptp(grey[1]) > 20  # not a flat picture
    assert np.abs(grey[0] - grey[1]).max() <= 2


def states_of(pipe, prompts, negatives, **options):
    """What `pipe.encode_prompts` returns, as the options of a call that take it."""
    names = {
        "encoder_hidden_states": "prompt_embeds",
        "text_embeds": "pooled_prompt_embeds",
        "pooled_projections": "pooled_prompt_embeds",
        "pooled_text_emb": "pooled_prompt_embeds",
        "encoder_attention_mask": "prompt_attention_mask",
    }
    branches = zip(("", "negative_"), pipe.encode_prompts(prompts, negatives, **options), strict=True)
    return {sign + names[name]: cond[name] for sign, cond in branches for name in names if name in cond}


def start_noise(count=1, channels=4):
    """The noise that a call with KEY starts from, before it is scaled."""
    unit = D.Grid(np.zeros(2), np.zeros(2), np.ones(2))
    return np.asarray(D.initial_noise(KEY, (count, LATENT, LATENT, channels), unit))


def known_noise(count, first, channels=4):
    """What `D.inpaint` draws for the known part behind each step, of image 0 of KEY."""
    key = jax.random.fold_in(KEY, 0)
    keys = [jax.random.fold_in(jax.random.fold_in(key, first + i), 2**32 - 2) for i in range(count)]
    draw = [jax.random.normal(key, (1, LATENT, LATENT, channels)) for key in keys]
    return [theirs(np.asarray(noise)) for noise in draw]


def mask():
    white = np.zeros((SIZE, SIZE), np.uint8)
    white[4:12, 6:] = 255
    return white


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def as_tensor(pixels):
    return theirs((pixels / np.float32(127.5) - np.float32(1))[None].astype(np.float32))


def without_posterior_noise(monkeypatch, module, noises):
    """The reference encodes to the mean, and draws these noises to start from."""
    queue = list(noises)
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **options: encoded.latent_dist.mode())
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: queue.pop(0))
