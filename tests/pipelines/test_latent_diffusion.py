"""The pipeline against closed forms and against itself in other batches, on other devices; compilations."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import COMPILATIONS
from tiny_models import PREDICTION, latent_pipeline, pixel_pipeline

from jaxldm import diffusion as D
from jaxldm.data import to_uint8
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError, JaxldmError, UnknownNameError
from jaxldm.pipelines import Network, class_to_image

KEY = jax.random.key(5)
MEANS = (0.3, -0.25, 0.1)  # of the two classes, and of the null class
STD = 0.1


@dataclasses.dataclass(frozen=True)
class ExactConfig:
    num_classes: int = 2
    sample_size: int = 2
    in_channels: int = 1


class ExactEpsilon(nn.Module):
    """The perfect network for images that are N(MEANS[label], STD^2) in every pixel."""

    config: ExactConfig = ExactConfig()

    @nn.compact
    def __call__(self, x, t, labels):
        path = PREDICTION.path
        alpha, sigma = (value[:, None, None, None] for value in (path.alpha(t), path.sigma(t)))
        mean = jnp.asarray(MEANS)[labels][:, None, None, None]
        return sigma * (x - alpha * mean) / (alpha**2 * STD**2 + sigma**2)


@dataclasses.dataclass(frozen=True)
class GuidedConfig(ExactConfig):
    scalar_inputs: tuple[str, ...] = ("guidance_scale",)


class GuidedEpsilon(nn.Module):
    """The same, with guidance inside."""

    config: GuidedConfig = GuidedConfig()

    @nn.compact
    def __call__(self, x, t, labels, guidance_scale):
        cond, null = (ExactEpsilon()(x, t, of) for of in (labels, jnp.full_like(labels, len(MEANS) - 1)))
        return D.guide(null, cond, guidance_scale)


EXACT = class_to_image(Network(ExactEpsilon(), {}), PREDICTION)
IMAGES_PER_DEVICE = EXACT.images_per_device


def first_noise(number):
    """x_T of image `number`, before it is scaled by sigma."""
    grid = D.Grid(np.zeros(2), np.zeros(2), np.ones(2))
    return np.asarray(D.initial_noise(jax.random.fold_in(KEY, number)[None], (1, 2, 2, 1), grid))[0]


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_gaussian_data_is_drawn_as_the_exact_solution_says(solver):
    """Guidance mixes the three Gaussians' means and keeps their width, so that every image is known exactly.

    Along the probability flow (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2) does not change (Song et al. 2021).
    """
    w, labels = 1.8, [0, 1, 1, 0, 0]
    images = EXACT(KEY, labels, num_inference_steps=999, guidance_scale=w, solver=solver)
    path = PREDICTION.path
    alpha, sigma = path.alpha(999.0), path.sigma(999.0)
    for k, label in enumerate(labels):
        mean = (1 - w) * MEANS[2] + w * MEANS[label]
        x_T = sigma * first_noise(k)
        exact = mean + STD * (x_T - alpha * mean) / np.sqrt(alpha**2 * STD**2 + sigma**2)
        np.testing.assert_allclose(images[k], np.clip(exact, -1, 1), atol=3e-3)


def test_a_network_that_takes_the_guidance_scale_is_called_once_and_guided_no_more():
    student = class_to_image(Network(GuidedEpsilon(), {}), PREDICTION)
    assert student.is_guidance_distilled and not EXACT.is_guidance_distilled
    call = {"num_inference_steps": 4, "guidance_scale": 2.5}
    images = student(KEY, [0, 1, 1], **call)
    np.testing.assert_allclose(images, EXACT(KEY, [0, 1, 1], **call), atol=1e-5)
    with pytest.raises(InvalidArgumentError, match="true_cfg_scale"):
        student(KEY, [0], true_cfg_scale=2.0)


def test_a_negative_label_replaces_the_null_class():
    far = EXACT(KEY, [0] * 4, negative_labels=1, guidance_scale=1.2, num_inference_steps=100)
    expected = 1.2 * MEANS[0] - 0.2 * MEANS[1]
    default = EXACT(KEY, [0] * 4, guidance_scale=1.2, num_inference_steps=100)
    shift = np.mean(far - default)
    np.testing.assert_allclose(shift, expected - (1.2 * MEANS[0] - 0.2 * MEANS[2]), atol=5e-3)


def test_labels_repeat_and_default_to_every_class_once():
    pipe = latent_pipeline()
    np.testing.assert_array_equal(pipe.cycle_labels([2, 0], 5), [2, 0, 2, 0, 2])
    np.testing.assert_array_equal(pipe.cycle_labels([2, 0], None), [2, 0])
    np.testing.assert_array_equal(pipe.cycle_labels(None, None), [0, 1, 2])
    np.testing.assert_array_equal(pipe.cycle_labels([1, 2, 0], 2), [1, 2])


@pytest.fixture(scope="module")
def pipe():
    return latent_pipeline()


@pytest.fixture(scope="module")
def drawn(pipe):
    """40 images on all eight devices, by a solver that draws fresh noise in every step."""
    return pipe(KEY, [0, 1, 2], num_images=40, num_inference_steps=3, solver="ddpm")


def test_the_pipeline_is_the_composition_written_by_hand(pipe, drawn):
    path = pipe.prediction.path
    grid = D.make_grid(path, 3)

    def network(x, t, labels):
        return pipe.denoiser(x, t, labels)

    @jax.jit
    def draw_one(key, label):
        predict = D.classifier_free_guidance(network, label, jnp.array([3]), 3.0)
        noise = D.initial_noise(key, (1, 4, 4, 2), grid)
        latents = D.sample(key, D.denoiser(predict, D.epsilon(path)), D.solvers.ddpm(), grid, noise)
        z = latents / pipe.autoencoder.config.scaling_factor + pipe.autoencoder.config.shift_factor
        return pipe.autoencoder(z, method="decode")

    image = draw_one(jax.random.fold_in(KEY, 17)[None], jnp.array([17 % 3]))
    assert pipe.image_shape() == image.shape[1:] == (8, 8, 1)
    np.testing.assert_allclose(drawn[17], image[0], atol=2e-4)


@pytest.mark.parametrize(
    ("num_images", "batch_size", "devices"), [(1, 64, 8), (7, 1, 8), (17, 64, 8), (40, 16, 1), (20, 1000, 1)]
)
def test_an_image_is_the_same_in_any_company(pipe, drawn, num_images, batch_size, devices):
    images = pipe(
        KEY,
        [0, 1, 2],
        num_images=num_images,
        batch_size=batch_size,
        devices=jax.devices()[:devices],
        num_inference_steps=3,
        solver="ddpm",
    )
    assert images.shape == (num_images, 8, 8, 1)
    np.testing.assert_array_equal(to_uint8(images), to_uint8(drawn[:num_images]))


def test_images_differ_from_each_other_and_from_those_of_another_seed(pipe, drawn):
    assert len({image.tobytes() for image in drawn}) == 40
    other = pipe(jax.random.key(6), [0, 1, 2], num_images=3, num_inference_steps=3, solver="ddpm")
    assert (np.abs(other - drawn[:3]).max(axis=(1, 2, 3)) > 0.01).all()


def test_steering_away_from_the_requested_class_is_no_guidance(pipe):
    def draw(**options):
        return pipe(KEY, [1, 2], num_inference_steps=3, solver="ddpm", **options)

    np.testing.assert_allclose(
        draw(guidance_scale=4.0, negative_labels=[1, 2]), draw(guidance_scale=1.0), atol=1e-4
    )
    assert np.abs(draw(guidance_scale=4.0) - draw(guidance_scale=1.0)).max() > 0.01


def draw_with_other_arguments(pipe, solver):
    """(compilations of a first call, of calls that differ in all that may differ)."""
    start = COMPILATIONS.count
    pipe(jax.random.key(0), [0], num_images=4, num_inference_steps=2, guidance_scale=3.0, solver=solver)
    first = COMPILATIONS.count
    pipe(jax.random.key(1), [0, 1], num_images=5, num_inference_steps=4, guidance_scale=7.5, solver=solver)
    pipe(jax.random.key(2), None, num_inference_steps=3, guidance_scale=0.0, solver=solver, negative_labels=1)
    return first - start, COMPILATIONS.count - first


@pytest.mark.parametrize("solver", sorted(D.solvers.SOLVERS))
def test_another_seed_scale_class_or_number_of_steps_compiles_nothing(solver):
    fresh = EXACT.replace(denoiser=Network(ExactEpsilon(ExactConfig(sample_size=3)), {}))
    first, others = draw_with_other_arguments(fresh, solver)
    same_call = solver in ("dpmpp_1s", "euler")  # as ddim(eta=0), which may have been compiled before
    assert (first > 0 or same_call) and others == 0


def test_nor_does_it_with_a_whole_model(pipe):
    _, others = draw_with_other_arguments(pipe, "ddpm")
    assert others == 0


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_rescale_is_that_of_the_published_formula(rescale):
    images = EXACT(KEY, [0], num_inference_steps=4, guidance_scale=3.0, guidance_rescale=rescale)
    path = PREDICTION.path
    grid = D.make_grid(path, 4)

    def predict(x, t):
        null, conditional = (EXACT.denoiser(x, t, jnp.full(1, label)) for label in (2, 0))
        guided = null + 3.0 * (conditional - null)
        rescaled = guided * jnp.std(conditional) / jnp.std(guided)
        return rescale * rescaled + (1 - rescale) * guided

    noise = D.initial_noise(KEY, (1, 2, 2, 1), grid)
    expected = D.sample(KEY, D.denoiser(predict, D.epsilon(path)), D.solvers.ddim(), grid, noise)
    np.testing.assert_allclose(images, np.clip(expected, -1, 1), atol=2e-5)


def test_a_solver_of_ones_own():
    images = EXACT(KEY, [0, 1], num_inference_steps=3, solver=D.solvers.euler())
    np.testing.assert_array_equal(images, EXACT(KEY, [0, 1], num_inference_steps=3, solver="euler"))


@pytest.mark.parametrize(
    "prediction",
    [
        D.edm(D.EDM()),
        D.flow(D.Flow()),
        D.velocity(D.Interpolant("gvp")),
        D.v(D.VP.named("linear", zero_terminal_snr=True)),
    ],
    ids=lambda prediction: prediction.name,
)
def test_every_path_draws_pixels(prediction):
    pipe = pixel_pipeline(prediction=prediction)
    images = pipe(KEY, [0, 2], num_inference_steps=3, solver="dpmpp_2m")
    assert images.shape == (2, 8, 8, 1) and np.isfinite(images).all() and np.abs(images).max() <= 1


def test_a_learned_variance_is_left_aside():
    plain = pixel_pipeline(learn_sigma=False)
    learned = pixel_pipeline(learn_sigma=True)
    # The same network, with the variance channels (the second half of each pixel's outputs) put behind.
    params = jax.tree.map(lambda x: x, plain.denoiser.params)
    shapes = jax.tree.map(np.shape, learned.denoiser.params)
    linear = params["final_layer"]["linear"]
    pixels = linear["kernel"].reshape(16, 16, 1)
    linear = {
        "kernel": np.concatenate([pixels, np.full_like(pixels, 9.0)], -1).reshape(16, 32),
        "bias": np.concatenate([linear["bias"].reshape(16, 1), np.full((16, 1), 9.0)], -1).reshape(32),
    }
    params = {
        **params,
        "final_layer": {
            **params["final_layer"],
            "linear": jax.tree.map(lambda x: x.astype(np.float32), linear),
        },
    }
    assert jax.tree.map(np.shape, params) == shapes
    images = learned.replace(denoiser=learned.denoiser.replace(params=params))(
        KEY, [0, 1], num_inference_steps=2
    )
    np.testing.assert_allclose(images, plain(KEY, [0, 1], num_inference_steps=2), atol=1e-5)


def test_a_model_without_classes():
    pipe = pixel_pipeline(num_classes=None, learn_sigma=False)
    images = pipe(KEY, num_images=3, num_inference_steps=2)
    assert images.shape == (3, 8, 8, 1) and pipe(KEY, num_inference_steps=2).shape == (1, 8, 8, 1)
    for wrong in ({"class_labels": [0]}, {"negative_labels": 0}, {"guidance_scale": 3.0}):
        with pytest.raises(InvalidArgumentError, match="no classes"):
            pipe(KEY, **wrong)


def test_on_step_is_called_by_each_device():
    steps = []
    EXACT(
        KEY,
        [0],
        num_images=20,
        num_inference_steps=3,
        on_step=lambda step, x: steps.append((int(step), x.shape)),
        devices=jax.devices()[:2],
    )
    jax.effects_barrier()
    assert len(steps) == 6
    assert sorted(steps) == [(step, (IMAGES_PER_DEVICE, 2, 2, 1)) for step in (0, 0, 1, 1, 2, 2)]


def test_progress_is_called_as_often_as_the_bar_is_long():
    """And another callback compiles nothing."""
    done, call = [], dict(num_images=20, num_inference_steps=3, devices=jax.devices()[:1])
    EXACT(KEY, [0], **call)
    before = COMPILATIONS.count
    EXACT(KEY, [0], progress=lambda step, total: done.append((step, total)), **call)
    assert done == 2 * [(1, 3), (2, 3), (3, 3)] and len(done) == EXACT.num_callbacks(**call)
    EXACT(KEY, [0], progress=lambda step, total: None, **call)
    assert COMPILATIONS.count == before


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"solver": "dimm"}, UnknownNameError, "ddim"),
        ({"num_inference_steps": 0}, InvalidArgumentError, "at least 1"),
        ({"num_inference_steps": 1001}, InvalidArgumentError, "1000"),
        ({"num_inference_steps": -3}, InvalidArgumentError, "at least 1"),
        ({"guidance_scale": float("nan")}, InvalidArgumentError, "finite"),
        ({"guidance_scale": float("inf")}, InvalidArgumentError, "finite"),
        ({"guidance_scale": -1.0}, InvalidArgumentError, "0 or more"),
        ({"guidance_rescale": 1.5}, InvalidArgumentError, r"in \[0, 1\]"),
        ({"guidance_rescale": float("nan")}, InvalidArgumentError, r"in \[0, 1\]"),
        ({"class_labels": [0, 3]}, DataError, r"\[0, 2\]"),
        ({"class_labels": [-1]}, DataError, r"\[0, 2\]"),
        ({"class_labels": [0.5]}, DataError, "whole"),
        ({"class_labels": []}, InvalidArgumentError, "label"),
        ({"negative_labels": 3}, DataError, r"\[0, 2\]"),
        ({"num_images": 0}, InvalidArgumentError, "at least 1"),
        ({"batch_size": 0}, InvalidArgumentError, "at least 1"),
        ({"devices": []}, InvalidArgumentError, "devices"),
        ({"eta": 2.0}, InvalidArgumentError, r"in \[0, 1\]"),
        ({"eta": 0.5, "solver": "dpmpp_2m"}, InvalidArgumentError, "eta"),
        ({"spacing": "even"}, UnknownNameError, "trailing"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_compiled(pipe, wrong, error, words):
    before = COMPILATIONS.count
    with pytest.raises(error, match=words) as caught:
        pipe(KEY, **{"class_labels": [0], **wrong})
    assert isinstance(caught.value, JaxldmError) and COMPILATIONS.count == before


def test_zero_terminal_snr_with_epsilon_is_refused():
    pipe = pixel_pipeline()
    pipe = pipe.replace(scheduler=pipe.scheduler | {"rescale_betas_zero_snr": True})
    with pytest.raises(CheckpointError, match="v_prediction"):
        pipe(KEY, [0])
