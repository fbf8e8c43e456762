"""A codebook that follows the encoder: exponential moving averages, and new entries for dead ones.

van den Oord et al. 2017, appendix A.1; Dhariwal et al. 2020 (Jukebox), section 3.1, for the restarts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxldm.arguments import array, check_dims, checked, instance, number, one_key
from jaxldm.models.vq_model import nearest_entries

Scalar = Float[Array, ""]
_SMALLEST_COUNT = 1e-5  # of Laplace smoothing


class Codebook(NamedTuple):
    """What the moving averages are of; entry k is sums[k] / counts[k], see `codebook_entries`.

    Attributes:
        counts: how many vectors of a batch an entry is the nearest of `[K]`.
        sums: of these vectors `[K, c]`.
    """

    counts: Float[Array, " K"]
    sums: Float[Array, "K c"]


A_CODEBOOK = instance(Codebook, "a codebook from training.new_codebook(table)")
_TABLE = array("floating", "[K, c]", axes=2, filled=True)
_LATENTS = array("floating", "[B, h, w, c]", axes=4, filled=True)


@checked(table=_TABLE)
def new_codebook(table: Float[Array, "K c"]) -> Codebook:
    """The moving averages that have these entries: a count of 1 each."""
    return Codebook(jnp.ones(table.shape[0], jnp.float32), jnp.asarray(table, jnp.float32))


@checked(codebook=A_CODEBOOK)
def codebook_entries(codebook: Codebook) -> Float[Array, "K c"]:
    """The table [K, c]: each sum by its count, counts smoothed so that none is 0."""
    counts, total = codebook.counts, jnp.sum(codebook.counts)
    smooth = (counts + _SMALLEST_COUNT) / (total + counts.size * _SMALLEST_COUNT) * total
    return codebook.sums / smooth[:, None]


@checked(key=one_key, codebook=A_CODEBOOK, z=_LATENTS, decay=number(0, 1), restart_below=number(0, below=1))
def update_codebook(
    key: PRNGKeyArray,
    codebook: Codebook,
    z: Float[Array, "B h w c"],
    decay: float = 0.99,
    restart_below: float = 0.1,
) -> Codebook:
    """One step of the moving averages, then vectors of the batch in place of dead entries.

        n_k <- decay n_k + (1 - decay) |{z_i: k nearest}|,   m_k <- decay m_k + (1 - decay) sum of these z_i

    Args:
        key: draws the vectors that dead entries become.
        codebook: before the step.
        z: what the encoder makes of a batch.
        decay: of the averages.
        restart_below: an entry is dead when its count is below this part of the mean count, the vectors of
            the batch by the entries. 0: never.
    """
    check_dims(z=(z, "B h w c"), codebook=(codebook.sums, "K c"))
    vectors = jnp.asarray(z, jnp.float32).reshape(-1, z.shape[-1])
    assigned = jax.nn.one_hot(nearest_entries(vectors, codebook_entries(codebook)), len(codebook.counts))
    counts = decay * codebook.counts + (1.0 - decay) * assigned.sum(0)
    found = jnp.einsum("nk,nc->kc", assigned, vectors, precision="highest")
    sums = decay * codebook.sums + (1.0 - decay) * found
    mean_count = len(vectors) / len(counts)
    dead = counts < restart_below * mean_count
    drawn = vectors[jax.random.randint(key, counts.shape, 0, len(vectors))]
    counts = jnp.where(dead, mean_count, counts)
    return Codebook(counts, jnp.where(dead[:, None], mean_count * drawn, sums))


class Quantized(NamedTuple):
    """What the losses of a codebook are made of.

    Attributes:
        indices: of the nearest entries `[B, h, w]`.
        commitment: mean (z - entry)^2, whose gradient moves z alone.
        codebook: the same number, whose gradient moves the entries alone.
        perplexity: exp(-sum_k p_k ln p_k) of how often each entry is used: K for an even use, 1 for one.
    """

    indices: Int[Array, "B h w"]
    commitment: Scalar
    codebook: Scalar
    perplexity: Scalar


@checked(z=_LATENTS, table=_TABLE)
def quantization_losses(z: Float[Array, "B h w c"], table: Float[Array, "K c"]) -> Quantized:
    """Commitment, codebook loss and perplexity of latents and a table of entries.

    van den Oord et al. 2017, equation 3, whose second and third terms these are.
    """
    check_dims(z=(z, "B h w c"), table=(table, "K c"))
    z, table = jnp.asarray(z, jnp.float32), jnp.asarray(table, jnp.float32)
    indices = nearest_entries(z, table)
    nearest = table[indices]
    held: Any = jax.lax.stop_gradient
    return Quantized(
        indices,
        jnp.mean(jnp.square(z - held(nearest))),
        jnp.mean(jnp.square(held(z) - nearest)),
        perplexity(indices, len(table)),
    )


def perplexity(indices: Int[Array, "..."], num_entries: int) -> Scalar:
    """exp of the entropy of how often each of the entries is used."""
    shares = jnp.bincount(indices.ravel(), length=num_entries) / indices.size
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(shares, shares)))
