"""The classifier's loss is a cross-entropy, and falls."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm import models
from jaxldm.training.classifier import classification_loss

SMALL = {"sample_size": 8, "block_out_channels": (4, 4, 4), "num_features": 8}


def test_logits_of_zero_cost_the_logarithm_of_the_number_of_classes():
    images, labels = np.zeros([6, 8, 8, 1], np.float32), np.array([0, 1, 2, 3, 0, 1])
    zero = jax.jit(lambda key: classification_loss(key, lambda x: jnp.zeros([6, 5]), images, labels, None))
    loss, aux = zero(jax.random.key(0))
    np.testing.assert_allclose(loss, np.log(5), rtol=1e-6)
    np.testing.assert_allclose(aux["accuracy"], 2 / 6, rtol=1e-6)


def test_it_learns_to_tell_a_bar_across_from_a_bar_down():
    module = models.build("digit-classifier", num_classes=2, **SMALL)
    params = models.init(module, jax.random.key(0))
    labels = np.arange(32) % 2
    images = np.full([32, 8, 8, 1], -1.0, np.float32)
    images[0::2, 3:5], images[1::2, :, 3:5] = 1, 1

    def loss_of(params, key):
        return classification_loss(key, lambda x: module.apply({"params": params}, x), images, labels)

    @jax.jit
    def step(params, key):
        (_, aux), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, key)
        return jax.tree.map(lambda value, slope: value - 5e-3 * jnp.sign(slope), params, gradient), aux[
            "accuracy"
        ]

    accuracies = []
    for i in range(100):
        params, accuracy = step(params, jax.random.key(i))
        accuracies.append(accuracy)
    assert np.mean(accuracies[:10]) < 0.9 < 0.95 < np.mean(accuracies[-10:])
