"""The digit classifier's augmentation moves images as it should; its loss is a cross-entropy and falls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import models
from jaxldm.models.digit_classifier import Augmentation, augment, classification_loss

# One compilation for all: 64 images, the strength an argument.
change = jax.jit(lambda images, *strength: augment(jax.random.key(0), images, Augmentation(*strength)))
SMALL = {"sample_size": 8, "block_out_channels": (4, 4, 4), "num_features": 8}


def spot(row, column, size=28):
    """A round bright spot on black: it looks the same however it is turned."""
    axis = np.arange(size)
    square = (axis[:, None] - row) ** 2 + (axis[None] - column) ** 2
    return (2 * np.exp(-square / 18.0) - 1).astype(np.float32)[None, :, :, None]


def centre_of_mass(images):
    mass = np.asarray(images)[..., 0] + 1
    axis = np.arange(mass.shape[1])
    total = mass.sum(axis=(1, 2))
    return np.stack([(mass.sum(axis=2) * axis).sum(axis=1), (mass.sum(axis=1) * axis).sum(axis=1)]) / total


def test_no_strength_changes_nothing():
    images = np.random.default_rng(0).uniform(-1, 1, size=[64, 28, 28, 1]).astype(np.float32)
    np.testing.assert_array_equal(change(images, 0.0, 0.0, 0.0), images)


def test_a_shift_moves_the_mass_and_keeps_it():
    images = np.repeat(spot(14, 12), 64, axis=0)
    moved = change(images, 0.0, 0.0, 3.0)
    offset = centre_of_mass(moved) - [[14], [12]]
    assert np.abs(offset).max() <= 3 + 1e-2 and (offset.std(axis=1) > 1).all()
    np.testing.assert_allclose((moved + 1).sum(axis=(1, 2, 3)), (images + 1).sum(axis=(1, 2, 3)), rtol=1e-3)


def test_a_turn_about_the_centre_leaves_a_round_spot_and_takes_another_along_its_circle():
    round_spot = np.repeat(spot(13.5, 13.5), 64, axis=0)
    np.testing.assert_allclose(change(round_spot, 180.0, 0.0, 0.0), round_spot, atol=0.05)
    turned = change(np.repeat(spot(13.5, 18.5), 64, axis=0), 180.0, 0.0, 0.0)
    arm = centre_of_mass(turned) - 13.5
    np.testing.assert_allclose(np.linalg.norm(arm, axis=0), 5, atol=0.1)
    assert (arm.min(axis=1) < -4).all() and (arm.max(axis=1) > 4).all()


def test_scaling_changes_the_size_in_both_directions():
    images = np.repeat(spot(13.5, 13.5), 64, axis=0)
    mass = np.asarray(change(images, 0.0, 0.2, 0.0) + 1).sum(axis=(1, 2, 3))
    ratio = mass / (images[0] + 1).sum()
    assert 1 / 1.2**2 - 0.02 <= ratio.min() < 0.8 and 1.3 < ratio.max() <= 1 / 0.8**2 + 0.02


def test_what_comes_in_from_outside_is_background_and_the_range_stays():
    moved = change(np.ones([64, 28, 28, 1], np.float32), 45.0, 0.2, 20.0)
    assert moved.min() == -1 and moved.max() <= 1 + 1e-6


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


def test_images_of_another_size_do_not_pass():
    module = models.build("digit-classifier", **SMALL)
    params = models.init(module, jax.random.key(0))
    with pytest.raises(AssertionError):
        module.apply({"params": params}, jnp.zeros([2, 9, 8, 1]))
