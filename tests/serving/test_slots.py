"""Images that share the steps of one network are the pipeline's, and to the last bit the same alone."""

import base64
import functools
import io
import json

import compilations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from programs import equations, products

from jaxldm import models, pipelines, serving
from jaxldm.errors import InvalidArgumentError, UnknownNameError
from jaxldm.pipelines.families.stable_diffusion import STABLE_DIFFUSION
from jaxldm.serving import slots
from jaxldm.serving.engine import choose
from jaxldm.serving.pictures import with_picture
from jaxldm.serving.requests import call_of, offer_of, read_generation

K = 4
SCALE = 2.0


def drawn_alone(pipe, *call, **options):
    """Latents of one call, by itself, as a server of K slots has them."""
    return serving.as_served(pipe, K)(*call, output="latents", **options)


def run(engine, arrivals):
    """Latents by (ticket, image). An arrival is (the step at which it comes, ticket, job)."""
    waiting = sorted(arrivals, key=lambda arrival: arrival[0])
    images, step, results = [], 0, {}
    while waiting or images or engine.busy:
        while waiting and waiting[0][0] <= step:
            _, ticket, job = waiting.pop(0)
            images += [(ticket, job, image) for image in range(job.num_images)]
        while images and engine.has_room(images[0][1]):
            ticket, job, image = images.pop(0)
            engine.begin(job, image, ticket, 1 + len(images))
        _, drawn, failed = engine.step()
        assert not failed
        results |= {(one.ticket, one.image): one.latents for one in drawn}
        step += 1
    return results


@functools.cache
def engine_of(make, **options):
    engine = serving.Engine(make(), sizes=(K,))
    for scale in (SCALE, 1.0):
        engine.allow([0], guidance_scale=scale, **options)
    engine.warm_up()
    return engine


CALLS = st.tuples(
    st.integers(0, 12),  # the step at which it comes
    st.integers(0, 2**32 - 1),  # seed
    st.lists(st.integers(0, 2), min_size=1, max_size=3),  # labels
    st.sampled_from([1, 2, 5, 7]),  # steps
    st.sampled_from([1.0, 1.5, SCALE]),  # guidance scale
)


@settings(max_examples=4)
@given(calls=st.lists(CALLS, min_size=1, max_size=9))
def test_an_image_is_the_same_in_any_company(calls):
    """Other seeds, classes, numbers of steps and scales come and go between its steps."""
    engine, arrivals, options = engine_of(tiny_models.latent_pipeline), [], {}
    for ticket, (step, seed, labels, steps, scale) in enumerate(calls):
        options[ticket] = {"num_inference_steps": steps, "guidance_scale": scale}
        job = engine.prepare(jax.random.key(seed), labels, **options[ticket])
        arrivals.append((step, ticket, job))
    results = run(engine, arrivals)
    for ticket, (_, seed, labels, _, _) in enumerate(calls):
        alone = drawn_alone(engine.pipe, jax.random.key(seed), labels, **options[ticket])
        for image in range(len(labels)):
            np.testing.assert_array_equal(results[ticket, image], alone[image])


# Noise, memory of past steps, several evaluations in some steps.
SOLVERS = ("ddpm", "dpmpp_3m_sde", "pndm")


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_kind_of_solver_is_mapped_over_slots(solver):
    """Images of 2 to 5 steps side by side, each at another step."""
    engine = serving.Engine(tiny_models.pixel_pipeline(), sizes=(K,))
    engine.allow([0], guidance_scale=SCALE, solver=solver)
    engine.warm_up()
    jobs = {
        steps: engine.prepare(
            jax.random.key(steps), [1], solver=solver, num_inference_steps=steps, guidance_scale=1.5
        )
        for steps in (2, 3, 5)
    }
    results = run(engine, [(steps - 2, steps, job) for steps, job in jobs.items()])
    for steps in jobs:
        options = {"solver": solver, "num_inference_steps": steps, "guidance_scale": 1.5}
        alone = drawn_alone(engine.pipe, jax.random.key(steps), [1], **options)[0]
        np.testing.assert_array_equal(results[steps, 0], alone)
        by_pipe = engine.pipe(jax.random.key(steps), [1], output="latents", **options)[0]
        np.testing.assert_allclose(alone, by_pipe, rtol=0, atol=1e-5 * np.abs(by_pipe).max())


def test_clipping_is_the_pipelines_with_the_quirks_of_diffusers_too(tmp_path):
    """There DDIM goes on with the epsilon from before x_0 was clipped."""
    pipelines.save(tiny_models.pixel_pipeline(), tmp_path / "model")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    clipping = {"clip_sample": True, "clip_sample_range": 0.3}
    file.write_text(json.dumps(json.loads(file.read_text()) | clipping))
    drawn = {}
    for quirks in (False, True):
        pipe = pipelines.load(tmp_path / "model", reference_quirks=quirks)
        call = jax.random.key(3), [1]
        options = {"num_inference_steps": 4, "guidance_scale": 1.0, "solver": "ddim", "output": "latents"}
        drawn[quirks] = pipe(*call, **options)
        served = serving.as_served(pipe, K)(*call, **options)
        atol = 1e-5 * np.abs(drawn[quirks]).max()
        np.testing.assert_allclose(served, drawn[quirks], rtol=0, atol=atol)
    assert np.abs(drawn[True] - drawn[False]).max() > 1e-3


def test_texts_share_slots_as_classes_do(tmp_path):
    parts = tiny_models.text_parts(tmp_path / "tokenizer")
    pipe = pipelines.Pipeline(STABLE_DIFFUSION, parts)
    cache = serving.Embeddings(2**20)
    engine = serving.Engine(pipe, sizes=(K,), encode=serving.sharing(pipe, cache))
    engine.allow("a")
    engine.warm_up()
    calls = {"cat": 3, "dog": 2, "a bird": 4}
    options = {text: {"num_inference_steps": n, "guidance_scale": 1.0 + n} for text, n in calls.items()}
    jobs = [engine.prepare(jax.random.key(7), text, "b", **options[text]) for text in calls]
    results = run(engine, [(0, text, job) for text, job in zip(calls, jobs, strict=True)])
    for text in calls:
        alone = drawn_alone(pipe, jax.random.key(7), text, "b", **options[text])
        np.testing.assert_array_equal(results[text, 0], alone[0])
    misses = cache.misses
    engine.prepare(jax.random.key(8), "cat", "b", num_inference_steps=5)
    assert cache.misses == misses  # another seed and number of steps encode nothing


def test_images_to_start_from_share_the_steps_of_noise(tmp_path):
    """One compiled step for both; pictures of any size, as a request has them."""
    pipe = pipelines.Pipeline(STABLE_DIFFUSION, tiny_models.text_parts(tmp_path / "tokenizer"))
    offer = offer_of(pipe, "cats")
    engine = serving.Engine(pipe, sizes=(K,))
    offer.allow(engine)
    assert offer.takes_images and len(engine.kinds) == 2  # with and without guidance
    engine.warm_up()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    sent = base64.b64encode(stream.getvalue()).decode()
    before, jobs, calls = compilations.COMPILATIONS.count, {}, {}
    for name, more in {"image": {"image": sent, "strength": 0.6}, "noise": {}}.items():
        body = {"prompt": "a cat", "num_inference_steps": 5, "num_images": 2, "seed": 4}
        prompts, options = call_of(offer, read_generation(offer, body | more))
        calls[name] = (jax.random.key(4), *prompts), with_picture(options)
        jobs[name] = engine.prepare(*calls[name][0], **calls[name][1])
    assert jobs["image"].num_steps == 3 and jobs["image"].kind == jobs["noise"].kind
    results = run(engine, [(0, "noise", jobs["noise"]), (1, "image", jobs["image"])])
    assert compilations.COMPILATIONS.count == before
    for name, (prompts, options) in calls.items():
        alone = drawn_alone(pipe, *prompts, **options)
        by_pipe = pipe(*prompts, **options, output="latents")
        for image in range(2):
            np.testing.assert_array_equal(results[name, image], alone[image])
        np.testing.assert_allclose(alone, by_pipe, rtol=0, atol=1e-5 * np.abs(by_pipe).max())
    assert np.abs(results["image", 0] - results["noise", 0]).max() > 0.1


@pytest.mark.parametrize("solver, calls", [("dpmpp_2m", 1), ("pndm", 2)])
def test_the_network_is_called_once_for_all_slots(solver, calls):
    """In one batch of 2K; the second call of PNDM's first step is made where a slot is at its first."""
    module = models.build("dit-s-8", depth=1, hidden_size=16, num_heads=2, num_classes=4, sample_size=8)
    network = pipelines.Network(module, tiny_models.random_params(module))
    pipe = pipelines.class_to_image(network, tiny_models.PREDICTION)
    job = serving.prepare(pipe, jax.random.key(0), [0, 1, 2], solver=solver)
    compiled = job.kind.compiled
    table = slots.empty(K, job.rows, compiled)
    step = jax.make_jaxpr(functools.partial(slots.step_of_slots, compiled=compiled))(pipe.denoiser, table)
    rows = 2 * K
    x, t = jax.ShapeDtypeStruct((rows, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.float32)
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    call = jax.make_jaxpr(lambda params, *inputs: module.apply({"params": params}, *inputs))
    once = products(call(models.shapes(module), x, t, labels).jaxpr)
    assert products(step.jaxpr) == sorted(once * calls)
    choices = [equation for equation in equations(step.jaxpr) if equation.primitive.name == "cond"]
    assert len(choices) == calls - 1
    names = {equation.primitive.name for equation in equations(step.jaxpr)}
    assert not any("callback" in name for name in names)
    donated = slots.advance.lower(pipe.denoiser, table, compiled=compiled).args_info[0]
    assert [{leaf.donated for leaf in jax.tree.leaves(part)} for part in donated] == [{False}, {True}]


def test_nothing_compiles_after_the_warm_up():
    engine = engine_of(tiny_models.latent_pipeline)
    run(engine, [(0, 0, engine.prepare(jax.random.key(0), [0], num_inference_steps=2))])  # keys, host work
    before = compilations.COMPILATIONS.count
    jobs = [
        engine.prepare(jax.random.key(n), [n % 3], num_inference_steps=n + 1, guidance_scale=1.0 + n % 2)
        for n in range(9)
    ]
    run(engine, [(n, n, job) for n, job in enumerate(jobs)])
    assert compilations.COMPILATIONS.count == before


def test_each_device_has_slots_of_its_own():
    """One slot on each of two devices: both images begin at once, and neither device rounds otherwise."""
    engine = serving.Engine(tiny_models.pixel_pipeline(), sizes=(1,), devices=jax.local_devices()[:2])
    engine.allow([0], guidance_scale=SCALE)
    engine.warm_up()
    options = {"num_inference_steps": 3, "guidance_scale": SCALE}
    jobs = [engine.prepare(jax.random.key(n), [n], **options) for n in range(2)]
    for n, job in enumerate(jobs):
        engine.begin(job, 0, n)
    assert not engine.has_room(jobs[0]) and [table.busy for table in engine.tables] == [1, 1]
    results = run(engine, [])
    for n in range(2):
        alone = serving.as_served(engine.pipe, 1)(jax.random.key(n), [n], output="latents", **options)
        np.testing.assert_array_equal(results[n, 0], alone[0])


def test_a_cancelled_image_frees_its_slot_at_once_and_harms_nobody():
    engine = engine_of(tiny_models.latent_pipeline)
    options = {"num_inference_steps": 5, "guidance_scale": SCALE}
    jobs = [engine.prepare(jax.random.key(n), [0], **options) for n in range(K + 1)]
    for n in range(K):
        engine.begin(jobs[n], 0, n)
    engine.step()
    assert not engine.has_room(jobs[K]) and engine.cancel(1) == 1 and engine.cancel(1) == 0
    engine.begin(jobs[K], 0, K)
    results = run(engine, [])
    assert {ticket for ticket, _ in results} == {0, 2, 3, 4}
    for n in (0, 2, 3, 4):
        alone = drawn_alone(engine.pipe, jax.random.key(n), [0], **options)[0]
        np.testing.assert_array_equal(results[n, 0], alone)


def test_a_step_that_fails_takes_its_table_and_no_other(monkeypatch):
    engine = engine_of(tiny_models.latent_pipeline)
    guided = engine.prepare(jax.random.key(0), [0], num_inference_steps=2, guidance_scale=SCALE)
    plain = engine.prepare(jax.random.key(1), [0], num_inference_steps=2, guidance_scale=1.0)
    engine.begin(guided, 0, "guided")
    engine.begin(plain, 0, "plain")
    advance = slots.advance

    def fail(network, of_slots, *, compiled):
        if of_slots.rows.image.uncond is not None:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return advance(network, of_slots, compiled=compiled)

    with monkeypatch.context() as patch:
        patch.setattr(slots, "advance", fail)
        _, _, failed = engine.step()
    assert set(failed) == {"guided"}
    engine.begin(guided, 0, "again")
    results = run(engine, [])
    assert set(results) == {("plain", 0), ("again", 0)}


def test_what_was_not_compiled_is_refused_in_words(monkeypatch):
    engine = engine_of(tiny_models.latent_pipeline)
    with pytest.raises(InvalidArgumentError, match="solver heun"):
        engine.prepare(jax.random.key(0), [0], solver="heun")
    with monkeypatch.context() as patch:
        patch.setattr(serving.jobs, "MAX_STEPS", 4)
        with pytest.raises(InvalidArgumentError, match="num_inference_steps must be at most 4, got 5"):
            engine.prepare(jax.random.key(0), [0], num_inference_steps=5)
    with pytest.raises(InvalidArgumentError, match="slots start from noise"):
        engine.prepare(jax.random.key(0), [0], latents=np.zeros((1, 4, 4, 2), np.float32))
    with pytest.raises(UnknownNameError, match="solver"):
        engine.prepare(jax.random.key(0), [0], solver="no")


def test_what_samples_in_another_way_is_refused():
    pipe = tiny_models.pixel_pipeline()
    other = pipe.family._replace(call=lambda pipe, key, *prompts, **options: np.zeros((1, 8, 8, 1)))
    with pytest.raises(InvalidArgumentError, match="is not one sampling loop"):
        serving.prepare(pipelines.Pipeline(other, pipe.parts), jax.random.key(0), [0])


@given(
    st.lists(st.tuples(st.sampled_from([1, 4, 16]), st.integers(0, 16)), min_size=1, max_size=6),
    st.integers(1, 40),
)
def test_a_table_with_room_is_chosen_where_there_is_one(tables, waiting):
    tables = [(size, min(busy, size)) for size, busy in tables]
    chosen = choose(tables, waiting)
    if chosen is None:
        assert all(busy == size for size, busy in tables)
    else:
        size, busy = tables[chosen]
        assert busy < size
        in_use = [table for table in tables if 0 < table[1] < table[0]]
        assert not in_use or (busy > 0 and size == max(in_use)[0])
