"""The augmentation moves images as it should."""

import jax
import numpy as np

from jaxldm.data.augmentation import Augmentation, augment

# One compilation for all: 64 images, the strength an argument.
change = jax.jit(lambda images, *strength: augment(jax.random.key(0), images, Augmentation(*strength)))


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
