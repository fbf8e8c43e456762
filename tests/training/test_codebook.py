"""Moving averages of a codebook in closed form, restarts, and where gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxldm import training
from jaxldm.errors import InvalidArgumentError

KEY = jax.random.key(0)


def clusters(means, each=6, spread=0.05):
    """[1, N, 1, c] vectors around the means, and the cluster of each."""
    numbers = np.random.default_rng(0)
    which = np.repeat(np.arange(len(means)), each)
    z = np.asarray(means, np.float32)[which] + spread * numbers.standard_normal((len(which), 2)).astype("f")
    return z.reshape(1, -1, 1, 2), which


def iterate(codebook, z, steps, **options):
    step = lambda codebook, key: (training.update_codebook(key, codebook, z, **options), None)  # noqa: E731
    return jax.jit(lambda codebook: jax.lax.scan(step, codebook, jax.random.split(KEY, steps))[0])(codebook)


def test_entries_become_the_means_of_what_is_nearest_to_them():
    """k-means: the assignments stay, so the fixed point of the averages is the mean of each cluster."""
    z, which = clusters([[0, 0], [3, 0], [0, 3]])
    start = training.new_codebook(np.float32([[0.5, 0.5], [2.5, 0.5], [0.5, 2.5]]))
    codebook = iterate(start, z, 600, decay=0.95, restart_below=0.0)
    means = np.stack([z.reshape(-1, 2)[which == k].mean(0) for k in range(3)])
    np.testing.assert_allclose(training.codebook_entries(codebook), means, atol=1e-4)
    np.testing.assert_allclose(codebook.counts, 6, rtol=1e-4)


def test_one_step_is_the_published_one():
    z, which = clusters([[0, 0], [3, 0]], each=4)
    table = np.float32([[0.5, 0.0], [2.5, 0.0], [9.0, 9.0]])
    codebook = training.update_codebook(KEY, training.new_codebook(table), z, 0.9, 0.0)
    np.testing.assert_allclose(codebook.counts, [0.9 + 0.4, 0.9 + 0.4, 0.9], rtol=1e-6)
    for k in range(2):
        expected = 0.9 * table[k] + 0.1 * z.reshape(-1, 2)[which == k].sum(0)
        np.testing.assert_allclose(codebook.sums[k], expected, rtol=1e-5)
    # Nobody comes to the third: its average shrinks, the entry stays.
    np.testing.assert_allclose(training.codebook_entries(codebook)[2], table[2], rtol=1e-3)


def test_a_dead_entry_is_alive_after_its_restart():
    z, _ = clusters([[0, 0], [3, 0], [0, 3]])
    table = np.float32([[0, 0], [3, 0], [50, 50]])  # the third cluster's vectors have the wrong entry
    stays = iterate(training.new_codebook(table), z, 60, decay=0.9, restart_below=0.0)
    restarted = iterate(training.new_codebook(table), z, 60, decay=0.9, restart_below=0.1)
    used = [training.quantization_losses(z, training.codebook_entries(c)) for c in (stays, restarted)]
    assert used[0].perplexity < 2.01 and len(np.unique(used[0].indices)) == 2
    assert used[1].perplexity > 2.3 and len(np.unique(used[1].indices)) == 3
    assert restarted.counts.min() > 0.1 * 18 / 3
    assert used[1].commitment < used[0].commitment
    assert np.isfinite(training.codebook_entries(restarted)).all()


def test_the_losses_are_those_of_vq_gan_and_so_are_their_gradients():
    numbers = np.random.default_rng(1)
    z, table = numbers.normal(size=(2, 3, 3, 4)).astype("f"), numbers.normal(size=(5, 4)).astype("f")

    def loss(z, table):
        found = training.quantization_losses(z, table)
        return 0.25 * found.commitment + found.codebook, found

    (value, found), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(z, table)
    theirs_z, theirs_table = (torch.tensor(part, requires_grad=True) for part in (z, table))
    distances = torch.cdist(theirs_z.reshape(1, -1, 4), theirs_table[None])[0]
    chosen = theirs_table[distances.argmin(1)].reshape(z.shape)
    expected = (
        0.25 * (chosen.detach() - theirs_z).square().mean() + (chosen - theirs_z.detach()).square().mean()
    )
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_array_equal(found.indices.ravel(), distances.argmin(1))
    for ours, theirs in zip(gradients, (theirs_z, theirs_table), strict=True):
        np.testing.assert_allclose(ours, theirs.grad, rtol=1e-4, atol=1e-7)
    of_commitment = jax.grad(lambda t: training.quantization_losses(z, t).commitment)(table)
    of_codebook = jax.grad(lambda z: training.quantization_losses(z, table).codebook)(z)
    assert (of_commitment == 0).all() and (of_codebook == 0).all()


def test_perplexity_counts_the_entries_in_use():
    table = np.float32([[0.0], [1.0], [2.0], [3.0]])
    even = training.quantization_losses(table.reshape(1, 4, 1, 1), table)
    np.testing.assert_allclose(even.perplexity, 4, rtol=1e-6)
    one = training.quantization_losses(jnp.zeros((1, 4, 1, 1)), table)
    np.testing.assert_allclose([one.perplexity, one.commitment], [1, 0], atol=1e-6)
    half = training.quantization_losses(np.float32([0, 0, 1, 1]).reshape(1, 4, 1, 1), table)
    np.testing.assert_allclose(half.perplexity, 2, rtol=1e-6)


def test_a_codebook_of_another_kind_is_refused():
    with pytest.raises(InvalidArgumentError, match="new_codebook"):
        training.update_codebook(KEY, np.zeros((3, 2), "f"), np.zeros((1, 2, 2, 2), "f"))
