"""Caches in pipelines: what they draw, what compiles, and what is refused before anything does."""

import dataclasses

import jax
import numpy as np
import pytest
from compilations import COMPILATIONS
from tiny_models import DIT, PREDICTION, latent_pipeline, pixel_pipeline, random_params, text_parts

from jaxldm import diffusion as D
from jaxldm import models, pipelines, serving
from jaxldm.errors import InvalidArgumentError, UnknownNameError
from jaxldm.pipelines.caching import check_cache

KEY = jax.random.key(3)
CALL = {"num_inference_steps": 6, "guidance_scale": 2.0}


@pytest.fixture(scope="module", params=["unet", "dit"])
def pipe(request):
    return latent_pipeline() if request.param == "unet" else pixel_pipeline(depth=3)


def test_a_cache_draws_nearly_the_same_and_compiles_once(pipe):
    labels = [0, 1, 2]
    plain = pipe(KEY, labels, **CALL)
    every = pipe(KEY, labels, cache="fora:1", **CALL)
    np.testing.assert_array_equal(every, plain)
    before = COMPILATIONS.count
    for steps, cache in ((6, "fora:2"), (6, D.caching.fora(3, warm_up=2)), (9, "fora:5"), (6, "fora:2,3")):
        images = pipe(KEY, labels, cache=cache, **CALL | {"num_inference_steps": steps})
        assert np.isfinite(images).all() and not (images == plain).all()
    assert COMPILATIONS.count == before
    schedules = [D.caching.at_steps([True, *row]) for row in ([True] * 5, [False] * 5, [True, False] * 2)]
    first = pipe(KEY, labels, cache=schedules[0], **CALL)
    np.testing.assert_array_equal(first, plain)
    before = COMPILATIONS.count
    none, some = (pipe(KEY, labels, cache=schedule, **CALL) for schedule in schedules[1:])
    assert COMPILATIONS.count == before
    errors = [np.abs(images - plain).mean() for images in (none, some)]
    assert errors[0] > errors[1] > 0


def test_steps_one_at_a_time_keep_the_memory(pipe):
    """With a callback the loop is on the host."""
    seen = []
    images = pipe(KEY, [0, 1, 2], cache="fora:2", on_step=lambda i, x: seen.append(i), **CALL)
    np.testing.assert_allclose(images, pipe(KEY, [0, 1, 2], cache="fora:2", **CALL), atol=1e-5)
    assert seen == list(range(6))


def test_batches_are_begun_without_tracing_the_network_again(pipe, monkeypatch):
    options = CALL | {"cache": "fora:2", "batch_size": 1, "devices": jax.devices()[:1]}
    pipe(KEY, [0], **options)
    kind, traced = type(pipe.denoiser.module), []
    original = kind.__call__

    def counted(self, *args, **more):
        traced.append(self)
        return original(self, *args, **more)

    monkeypatch.setattr(kind, "__call__", counted)
    pipe(KEY, [0, 1, 2, 0], **options)
    assert len(traced) <= 1  # by the check of the cache, before anything is drawn


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"cache": "forra:3"}, UnknownNameError, "did you mean 'fora'"),
        ({"cache": "fora:0"}, InvalidArgumentError, "interval must be"),
        ({"cache": "first-block:-1"}, InvalidArgumentError, "threshold must be a positive number"),
        ({"cache": 3}, InvalidArgumentError, "cache must be a cache such as D.caching.fora"),
        ({"cache": D.caching.at_steps([True] * 7)}, InvalidArgumentError, "schedule has 7 steps, the run 6"),
        ({"cache": "fora:2", "solver": "heun"}, InvalidArgumentError, "once a step: choose ddim"),
    ],
)
def test_what_is_refused_before_anything_compiles(pipe, options, error, words):
    before = COMPILATIONS.count
    with pytest.raises(error, match=words) as caught:
        pipe(KEY, [0], **CALL | options)
    assert COMPILATIONS.count == before and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"cache": "first-block:0.1"}, "looks at the first blocks of a transformer"),
        ({"cache": "deepcache:3,9"}, "skips=9 of the cache is beyond this U-Net's outermost level"),
        ({"cache": "fora:2", "solver": "heun"}, "once a step: choose ddim"),
        ({"cache": D.caching.at_steps([True] * 7)}, "schedule has 7 steps, the run 6"),
        ({"cache": "fora:2", "weak_guidance": pipelines.PerturbedAttention(("up_blocks",))}, "exclude"),
    ],
)
def test_it_is_refused_before_a_text_is_encoded(tmp_path_factory, monkeypatch, options, words):
    parts = text_parts(tmp_path_factory.mktemp("text") / "tokenizer")
    texts = pipelines.Pipeline(pipelines.PIPELINES["StableDiffusionPipeline"], parts)
    encoded = []
    family = texts.family._replace(encode=lambda *given, **more: encoded.append(given))
    before = COMPILATIONS.count
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        dataclasses.replace(texts, family=family)(KEY, ["a"], **CALL | options)
    assert COMPILATIONS.count == before and not encoded and "\n" not in str(caught.value)


PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
PNDM |= {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("options, fits", [({}, False), ({"solver": "unipc"}, True)])
def test_the_scheduler_of_stable_diffusion_1_5_needs_another_solver(tmp_path, options, fits):
    """PNDM calls the network twice in its first step."""
    parts = text_parts(tmp_path / "tokenizer") | {"scheduler": PNDM}
    texts = pipelines.Pipeline(pipelines.PIPELINES["StableDiffusionPipeline"], parts)
    call = pipelines.pipeline.read_call(texts, options)
    run = texts.family.grid(texts, call, (16, 16))
    if fits:
        check_cache(texts.denoiser, D.caching.fora(2), *run)
    else:
        with pytest.raises(InvalidArgumentError, match="once a step: choose ddim"):
            check_cache(texts.denoiser, D.caching.fora(2), *run)


def test_a_model_without_such_blocks_is_refused_before_anything_compiles():
    module = models.build("tiny-dydit", **DIT | {"depth": 2}, channel_groups=2)
    network = pipelines.Network(module, random_params(module))
    pipe, before = pipelines.class_to_image(network, PREDICTION), COMPILATIONS.count
    with pytest.raises(InvalidArgumentError, match="DyDiT has nothing that a cache can reuse: leave the"):
        pipe(KEY, [0], cache="fora:2", **CALL)
    assert COMPILATIONS.count == before


SETTINGS = {
    "taylor": lambda n: D.caching.taylor(1 + n % 6, n % 3, warm_up=1 + n % 4),
    "magcache": lambda n: D.caching.magcache(
        np.linspace(1, 0.5 + n / 40, 6), 0.05 * (1 + n), max_skips=1 + n % 3
    ),
    "deepcache": lambda n: D.caching.deepcache(1 + n % 7, warm_up=1 + n % 3),
    "first-block": lambda n: D.caching.first_block(0.002 * 1.5**n, warm_up=1 + n % 3, max_skips=1 + n % 4),
    "teacache": lambda n: D.caching.teacache([0.1 * n, 1.0, 0.0], 0.002 * 1.5**n, warm_up=1 + n % 3),
}


def test_twenty_settings_are_one_program(pipe):
    """Intervals, orders, schedules, thresholds, polynomials; other seeds, scales and numbers of steps."""
    others = ("first-block", "teacache") if pipe.denoiser_name == "unet" else ("deepcache",)
    for kind in SETTINGS.keys() - set(others):

        def draw(n, kind=kind, **more):
            return pipe(jax.random.key(n), [0, 1], cache=SETTINGS[kind](n), **CALL | more)

        first = draw(0)
        before = COMPILATIONS.count
        found = [draw(n, guidance_scale=1.5 + n / 10, num_inference_steps=6 + n % 3) for n in range(1, 20)]
        assert COMPILATIONS.count == before, kind
        assert np.isfinite([first, *found]).all()


def test_caches_of_other_families_are_refused(pipe):
    unet = pipe.denoiser_name == "unet"
    with pytest.raises(InvalidArgumentError, match="transformer" if unet else "for U-Nets"):
        pipe(KEY, [0], cache="first-block:0.1" if unet else "deepcache:3", **CALL)
    with pytest.raises(InvalidArgumentError, match="leave the cache out"):
        serving.prepare(pipe, KEY, [0], cache="fora:2", num_inference_steps=2)


def test_a_calibration_makes_caches_of_the_model(pipe):
    found = pipelines.calibrate_cache(pipe, KEY, [0, 1], **CALL)
    assert (
        found.ratios.shape == (6,) and (found.ratios[1:] > 0).all() and (found.residual_changes[1:] > 0).all()
    )
    assert found.input_changes[1:].all() == (pipe.denoiser_name != "unet")
    images = pipe(KEY, [0, 1], cache=D.caching.magcache(found.ratios, 100.0, max_skips=2), **CALL)
    skipping = D.caching.at_steps([True, True, False, False, True, False])
    np.testing.assert_array_equal(images, pipe(KEY, [0, 1], cache=skipping, **CALL))
    with pytest.raises(InvalidArgumentError, match="starts from noise"):
        pipelines.calibrate_cache(pipe, KEY, [0], latents=np.zeros((1, *pipe.latent_shape())), **CALL)
