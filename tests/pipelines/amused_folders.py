"""A tiny random aMUSEd of diffusers, saved as a folder, and how it is fed the numbers that ours draws."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.schedulers import scheduling_amused
from reference_pipelines import shaken, text_encoder, write_tokenizer

FACTOR, CODEBOOK = 2, 24  # pixels of a token, tokens
MASK = CODEBOOK + 3  # the table of tokens is rounded up in the published model, too


def write_amused(folder):
    """A folder as the published ones are: codebook, U-ViT, CLIP with its projection."""
    tokenizer, size = write_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    vqvae = diffusers.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=CODEBOOK,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
        force_upcast=True,
    )
    torch.nn.init.normal_(vqvae.quantize.embedding.weight, std=0.5)  # as far apart as latents are
    transformer = diffusers.UVit2DModel(
        hidden_size=16,
        cond_embed_dim=10,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=16,
        vocab_size=MASK + 1,
        codebook_size=CODEBOOK,
        in_channels=12,
        block_out_channels=8,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        sample_size=4,
    )
    pipe = diffusers.AmusedPipeline(
        vqvae=shaken(vqvae, 1),
        tokenizer=tokenizer,
        text_encoder=text_encoder(size, 16, 5, projection=10),
        transformer=shaken(transformer, 2, 0.3),
        scheduler=diffusers.AmusedScheduler(mask_token_id=MASK),
    )
    pipe.save_pretrained(folder)
    return folder


class FedNumbers:
    """The random numbers of our run with these keys, in the order in which diffusers asks for them.

    Step i of image k draws from fold_in(key k, i): the tokens from number 0 of it, the noise on the
    confidence from number 1. What an image loses before the first step, from fold_in(key k, 2^32 - 1).
    """

    def __init__(self, monkeypatch, keys, height, width):
        self.keys, self.shape, self.step = keys, (height, width), 0
        monkeypatch.setattr(torch, "multinomial", self.tokens)
        monkeypatch.setattr(torch, "rand", self.lost)
        monkeypatch.setattr(scheduling_amused, "gumbel_noise", self.gumbel)

    def folded(self, *numbers):
        keys = self.keys
        for number in numbers:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, np.uint32(number))
        return keys

    def tokens(self, probabilities, count, generator=None):
        logits = jnp.log(jnp.asarray(probabilities.numpy()))
        logits = logits.reshape(len(self.keys), *self.shape, -1)
        drawn = jax.vmap(jax.random.categorical)(self.folded(self.step, 0), logits)
        return torch.from_numpy(np.array(drawn)).long().reshape(-1, 1)

    def gumbel(self, probabilities, generator=None):
        length = self.shape[0] * self.shape[1]
        drawn = jax.vmap(lambda key: jax.random.gumbel(key, (length,)))(self.folded(self.step, 1))
        self.step += 1
        return torch.from_numpy(np.array(drawn))

    def lost(self, shape, **options):
        drawn = jax.vmap(lambda key: jax.random.uniform(key, self.shape))(self.folded(2**32 - 1))
        return torch.from_numpy(np.array(drawn))
