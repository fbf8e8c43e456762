"""Verifiers of texts: CLIP's cosine and rules about shapes, as their metrics have them, in searches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.faults.misuse_arrays import small_clip
from jaxldm import diffusion as D
from jaxldm import metrics, models
from jaxldm.data import shapes
from jaxldm.errors import InvalidArgumentError
from jaxldm.metrics.shapes import UNCLEAR, asked_of, read_shapes

KEY, NUMBERS = jax.random.key(2), np.arange(240)
PROMPTS = ["a cat", "two people", "snow"]


@dataclasses.dataclass
class Tokenized:
    """What a tokenizer gives."""

    input_ids: Any


def tokenizer(texts, max_length):
    return Tokenized(np.array([[len(text) % 8, *[7] * (max_length - 1)] for text in texts], np.int32))


@pytest.fixture(scope="module")
def clip():
    module = models.from_config(small_clip())
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32)  # noqa: E731
    return module, jax.tree.map(draw, models.shapes(module))


@pytest.mark.parametrize("size, error", [((8, 8), 2e-5), ((21, 13), 3e-3), ((5, 6), 3e-3)])
def test_clip_s_cosine_is_that_of_the_metric(clip, size, error):
    """Of 8-bit images of CLIP's own size to rounding; otherwise but for what Pillow rounds to 8 bits."""
    pixels = np.random.default_rng(1).integers(0, 256, (3, *size, 3)).astype(np.float32)
    images = pixels / 127.5 - 1
    found = jax.jit(metrics.clip_verifier(*clip, tokenizer, PROMPTS))(images)
    wanted = metrics.clip_similarities(*clip, tokenizer, images, PROMPTS)
    np.testing.assert_allclose(found, np.diag(wanted), atol=error)
    assert np.ptp(wanted) > 0.05  # or else this test sees nothing
    one = metrics.clip_verifier(*clip, tokenizer, PROMPTS[1:2])(images)
    np.testing.assert_allclose(one, wanted[:, 1], atol=error)


def test_clip_s_cosine_has_a_gradient(clip):
    verifier = metrics.clip_verifier(*clip, tokenizer, PROMPTS)
    x = jnp.asarray(np.random.default_rng(2).uniform(-0.9, 0.9, (3, 10, 8, 3)), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: verifier(x).sum()))(x)
    step = 0.02 * gradient / jnp.abs(gradient).max()
    change = np.asarray(verifier(x + step) - verifier(x - step))
    np.testing.assert_allclose(change, 2 * jnp.sum(gradient * step, (1, 2, 3)), rtol=0.1, atol=1e-5)
    assert (change > 0).all()


@pytest.fixture(scope="module")
def pictures():
    """Rendered ones, some with noise and some that show nothing, in [-1, 1]; and 8-bit."""
    attributes = shapes.draw_attributes(3, NUMBERS)
    images, rng = shapes.render(3, NUMBERS, attributes, 32), np.random.default_rng(4)
    noisy = np.clip(images[:60] + rng.normal(0, 25, (60, 32, 32, 3)), 0, 255).astype(np.uint8)
    images = np.concatenate([images, noisy, rng.integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)])
    return attributes, images


def test_rules_are_those_of_the_reader(pictures):
    attributes, images = pictures
    rows = np.random.default_rng(5).integers(0, len(NUMBERS), len(images))
    rows[::2] = np.arange(len(images))[::2] % len(NUMBERS)  # every other caption is that of the picture
    captions = [shapes.caption([int(values[row]) for values in attributes]) for row in rows]
    captions[:9] = [caption.split()[2] for caption in captions[:9]]  # a colour alone
    score = jax.jit(metrics.shapes_verifier(captions))(images.astype(np.float32) / 127.5 - 1)
    found = read_shapes(images)
    assert (found.shape == UNCLEAR).any() and (found.shape != UNCLEAR).any()
    wanted = [
        np.mean([getattr(found, kind)[n] == number for kind, number in asked_of(caption).items()])
        for n, caption in enumerate(captions)
    ]
    np.testing.assert_allclose(score, wanted, rtol=1e-6)
    assert len(set(np.round(wanted, 3))) == 6


def test_a_search_by_rules_finds_the_picture_that_was_asked_for(pictures):
    """A denoiser that draws one of two pictures, by the noise."""
    asked, other = (pictures[1][n].astype(np.float32) / 127.5 - 1 for n in (0, 1))
    caption = shapes.caption([int(values[0]) for values in pictures[0]])

    def function(x, t):
        return jnp.where(x.mean((1, 2, 3), keepdims=True) > 0, asked[None], other[None])

    path, solver = D.Flow(), D.solvers.ddim()
    grid, verifier = D.make_grid(path, 2), metrics.shapes_verifier([caption])
    denoise = D.Denoiser(function, path)
    x_T = D.search.candidate_noise(KEY, (6, 32, 32, 3), grid, 4)
    found = D.search.best_of_n(KEY, denoise, solver, grid, x_T, verifier)
    right = np.asarray(x_T.mean((2, 3, 4)) > 0)
    assert right.any(0).any() and not right.all()
    np.testing.assert_array_equal(found.scores == 1, right)
    np.testing.assert_array_equal(found.score == 1, right.any(0))
    with pytest.raises(
        InvalidArgumentError, match="rules, which have no gradient: choose a search"
    ) as caught:
        D.search.optimize_noise(KEY, denoise, solver, grid, x_T[0], verifier, num_updates=1)
    assert "\n" not in str(caught.value)


def test_an_image_that_is_not_finite_never_wins():
    images = jnp.zeros((2, 16, 16, 3)).at[0, 3, 3, 1].set(jnp.nan)
    score = jax.jit(metrics.shapes_verifier(["dark background"]))(images)
    assert np.isnan(score[0]) and not np.isnan(score[1])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda clip: metrics.shapes_verifier([]), "captions is empty"),
        (lambda clip: metrics.shapes_verifier("a red ring"), "captions must be a list of texts"),
        (lambda clip: metrics.shapes_verifier(["a cat"]), r"captions\[0\] must name a shape, colour"),
        (
            lambda clip: metrics.shapes_verifier(["a red ring"] * 3)(np.zeros((2, 16, 16, 3))),
            "3 texts for 2 images: give one for each, or one for all",
        ),
        (lambda clip: metrics.shapes_verifier(["a red ring"])(np.zeros((2, 8, 8, 3))), "16 pixels or more"),
        (
            lambda clip: metrics.clip_verifier(*clip, tokenizer, PROMPTS)(np.zeros((3, 4, 4, 4))),
            r"must be \[B, H, W, 3\], got \[3, 4, 4, 4\]: decode latents",
        ),
        (lambda clip: metrics.clip_verifier(*clip, tokenizer, []), "prompts is empty"),
        (lambda clip: metrics.clip_verifier(models.build("tiny-dit"), {}, tokenizer, PROMPTS), "a CLIPModel"),
    ],
)
def test_what_is_refused(clip, call, words):
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        call(clip)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
