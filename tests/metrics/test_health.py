"""Each health check passes what is healthy and names what is sick, with cause and fix."""

import re

import jax
import numpy as np
import pytest

from jaxldm.errors import DataError
from jaxldm.metrics import health

RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(4), 25)


def blobs(number=100, width=2.0, spread=3.0, contrast=1.0, seed=0):
    """Bright spots on black at random places: [N, 16, 16, 1] in [-1, 1]."""
    centre = np.random.default_rng(seed).uniform(8 - spread, 8 + spread, size=[2, number, 1, 1])
    axis = np.arange(16.0)
    square = (axis.reshape(1, 16, 1) - centre[0]) ** 2 + (axis.reshape(1, 1, 16) - centre[1]) ** 2
    return np.clip(2 * contrast * np.exp(-square / width**2) - 1, -1, 1)[..., None]


def noisy(images, amount):
    return images + amount * np.random.default_rng(1).normal(size=images.shape)


REAL = blobs(seed=7)
Z = RNG.normal(size=[200, 7, 7, 4])
SMALL = np.zeros([50, 7, 7, 4])

HEALTHY = {
    "reconstruction": lambda: health.check_reconstruction(REAL, noisy(REAL, 0.05)),
    "z_T statistics": lambda: health.check_terminal_latents(0.01 * 3 * Z + RNG.normal(size=Z.shape)),
    "z_T of a path that ends in noise of another size": lambda: health.check_terminal_latents(
        Z + 80 * RNG.normal(size=Z.shape), sigma=80
    ),
    "prediction shape": lambda: health.check_prediction_shape(Z, jax.ShapeDtypeStruct(Z.shape, "float32")),
    "NaN after guidance": lambda: health.check_guided(Z, 7.5, unguided=Z),
    "loss": lambda: health.check_loss([3.0, 1.0, 0.5]),
    "one update of ten skipped": lambda: health.check_skipped([np.nan, 1.0, *[0.0] * 8]),
    "no loss yet": lambda: health.check_loss([]),
    "posterior collapse": lambda: health.check_posterior_collapse(Z, np.full(Z.shape, -4.0)),
    "blank images": lambda: health.check_blank(REAL),
    "diversity": lambda: health.check_diversity(blobs(), LABELS, REAL, LABELS),
    "saturation": lambda: health.check_saturation(blobs(), REAL),
    "sharpness": lambda: health.check_sharpness(blobs(), REAL),
}


@pytest.mark.parametrize("check", HEALTHY)
def test_what_is_healthy_passes(check):
    findings = HEALTHY[check]()
    assert findings and not health.failed(findings), health.report(findings)


def with_nan(values, row):
    values = np.array(values)
    values[row].flat[3] = np.nan
    return values


def collapsed(channel):
    mean, log_variance = Z.copy(), np.full(Z.shape, -4.0)
    mean[..., channel], log_variance[..., channel] = 0, 0
    return mean, log_variance


def one_class_alike():
    images = blobs()
    images[LABELS == 2] = images[LABELS == 2][:1]
    return images


SICK = {
    "reconstruction of the mean image": (
        lambda: health.check_reconstruction(REAL, np.broadcast_to(REAL.mean(axis=0), REAL.shape)),
        r"100.0% of the variance",
        "beta",
    ),
    "latents that are not scaled": (
        lambda: health.check_terminal_latents(0.07 * 20 * Z + RNG.normal(size=Z.shape)),
        r"standard deviation 1.7",
        "scaling_factor",
    ),
    "a schedule that stops early": (
        lambda: health.check_terminal_latents(0.6 * (Z + 2) + 0.8 * RNG.normal(size=Z.shape)),
        r"mean \+1\.[12]",
        "zero terminal SNR",
    ),
    "NaN in the latents": (
        lambda: health.check_terminal_latents(with_nan(Z, 3)),
        "NaN",
        "float64",
    ),
    "learned variance in the output": (
        lambda: health.check_prediction_shape(np.zeros([2, 7, 7, 8]), np.zeros([2, 7, 7, 4])),
        r"input \(2, 7, 7, 4\), output \(2, 7, 7, 8\)",
        "out_channels|channels",
    ),
    "NaN of guidance": (
        lambda: health.check_guided(with_nan(Z, 3), 1e30, unguided=Z),
        r"1 of 200 .* scale 1e\+30",
        "lower guidance_scale",
    ),
    "NaN of the network": (
        lambda: health.check_guided(with_nan(Z, 3), 3, unguided=with_nan(Z, 3)),
        "1 of 200",
        "checkpoint",
    ),
    "NaN loss": (lambda: health.check_loss([1.0, 0.5, np.nan, np.nan]), "2 of 4 .* entry 2", "learning rate"),
    "skipped updates": (lambda: health.check_skipped([0.0, 1.0, 1.0]), "2 of 3 updates", "learning rate"),
    "infinite loss": (lambda: health.check_loss([1.0, np.inf]), "entry 1", "clip"),
    "posterior collapse": (
        lambda: health.check_posterior_collapse(*collapsed(2)),
        "channel 2 has no information",
        "annealing",
    ),
    "posterior with NaN": (
        lambda: health.check_posterior_collapse(with_nan(SMALL, 0), SMALL - 4),
        "channel 3 has no information",
        "beta",
    ),
    "black images": (
        lambda: health.check_blank(-np.ones([5, 8, 8, 1])),
        "5 of 5 .*5 black",
        "scaling_factor",
    ),
    "white images": (lambda: health.check_blank(np.ones([5, 8, 8, 1])), "5 white", "scaling_factor"),
    "grey images": (lambda: health.check_blank(np.zeros([5, 8, 8, 1])), "5 grey", "scaling_factor"),
    "NaN images": (lambda: health.check_blank(with_nan(REAL[:5], 1)), "1 of 5 .*1 NaN", "NaN"),
    "one class alike": (
        lambda: health.check_diversity(one_class_alike(), LABELS, REAL, LABELS),
        "0.00 in class 2",
        "guidance_scale",
    ),
    "too much contrast": (
        lambda: health.check_saturation(blobs(contrast=2.5), REAL),
        "contrast 1.[2-9]",
        "guidance_rescale",
    ),
    "clipped pixels": (
        lambda: health.check_saturation(
            np.sign(RNG.normal(size=REAL.shape)), 0.5 * RNG.normal(size=REAL.shape)
        ),
        "100% of the pixels",
        "guidance_rescale",
    ),
    "blur": (lambda: health.check_sharpness(blobs(width=3.0), REAL), "0.[3-6]", "reconstructions"),
}


@pytest.mark.parametrize("case", SICK)
def test_what_is_sick_is_named_with_cause_and_fix(case):
    check, seen, fix = SICK[case]
    (finding,) = health.failed(check())
    assert finding.likely_cause
    assert re.search(seen, finding.seen), finding.seen
    assert re.search(fix, finding.fix), finding.fix
    assert finding.fix in health.report([finding]) and "BAD" in health.report([finding])


def test_limits_are_arguments():
    blurred = noisy(REAL, 0.05)
    assert health.failed(health.check_reconstruction(REAL, blurred, max_unexplained=1e-6))


def test_checks_that_cannot_judge_say_so():
    with pytest.raises(DataError, match="differ from each other"):
        health.check_reconstruction(np.zeros([3, 2, 2, 1]), np.zeros([3, 2, 2, 1]))
    with pytest.raises(DataError, match="two generated and two real"):
        health.check_diversity(REAL[:2], np.array([0, 1]), REAL, LABELS)
