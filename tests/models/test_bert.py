import jax.numpy as jnp
import numpy as np
import torch

from jaxldm.models import sentence_embedding


def test_sentence_embeddings_are_the_masked_mean_at_length_one():
    rng = np.random.default_rng(0)
    states, mask = rng.standard_normal((3, 5, 8)).astype(np.float32), np.ones((3, 5), np.int32)
    mask[1, 2:], mask[2, 1:] = 0, 0
    rows = [torch.from_numpy(states[i, : mask[i].sum()]).mean(0) for i in range(3)]
    expected = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
    ours = sentence_embedding(jnp.asarray(states), jnp.asarray(mask))
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(ours, axis=-1), 1.0, atol=1e-6)
    half = sentence_embedding(jnp.asarray(states, jnp.float16), jnp.asarray(mask))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, expected.numpy(), atol=2e-3)


def test_a_sentence_without_tokens_is_zero_and_not_nan():
    assert not sentence_embedding(jnp.ones((1, 3, 2)), jnp.zeros((1, 3), jnp.int32)).any()
