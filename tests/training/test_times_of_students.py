"""Times that students are trained at: those at which they draw, and none at which a slope is undefined."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm import few_steps, models, pipelines
from jaxldm.diffusion.paths import per_image
from jaxldm.pipelines.call import Call
from jaxldm.training import DiffusionRecipe, FewStepsRecipe, create_train_state, make_train_step, optimizer
from jaxldm.training.conditions import label_condition
from jaxldm.training.few_steps.job import few_steps_of, scheduler_of
from jaxldm.training.few_steps.matching import times_of
from jaxldm.training.few_steps.method import TEACHER, Setting
from jaxldm.training.few_steps.methods import METHODS

COSINE, LINEAR = D.VP.named("cosine"), D.VP.named("linear")
SHORT = D.VP.named("cosine", num_train_timesteps=30)
SIZES = {"hidden_size": 8, "depth": 1, "num_heads": 1, "patch_size": 4, "sample_size": 8, "in_channels": 1}


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("prediction", [D.v(COSINE), D.v(SHORT), D.flow(D.Flow())], ids=lambda p: p.path.name)
def test_a_generator_is_trained_at_the_times_at_which_it_draws(prediction, num_steps):
    few = FewStepsRecipe(method="dmd", teacher="x", num_steps=num_steps)
    recipe = DiffusionRecipe(preset="tiny-dit", prediction=prediction, few_steps=few)
    module = models.build("tiny-dit", **SIZES, num_classes=3)
    shapes = models.shapes(module)
    params = jax.tree.map(lambda spec: np.zeros(spec.shape, np.float32), shapes)
    pipe = pipelines.class_to_image(pipelines.Network(module, params), prediction)
    pipe = dataclasses.replace(pipe.replace(scheduler=scheduler_of(recipe)), few_steps=few_steps_of(recipe))
    _, rows = pipe.family.grid(pipe, Call(), (8, 8))
    assert D.steps_in(rows) == num_steps
    np.testing.assert_allclose(rows.t[:num_steps], times_of(prediction.path, num_steps), rtol=1e-6)


def test_four_steps_of_a_generator_are_those_of_the_scheduler_of_latent_consistency():
    assert times_of(COSINE, 4).tolist() == [999, 759, 499, 259]


def network(params, x, t, condition):
    """Smooth in t, and of no particular meaning."""
    return params["slope"] * x + per_image(params["wave"] * jnp.sin(t / 300), x)


def continuous(prediction):
    """(loss, state, batch, optimizer) of continuous consistency by exact derivatives."""
    recipe = FewStepsRecipe(method="scm", teacher="x", numbers={"difference": 0.0, "warmup": 0.0})
    adam = optimizer(1e-2, 0, 10)
    setting = Setting(
        network=network,
        prediction=prediction,
        on=label_condition(2),
        num_steps=None,
        guidance_scale=(1.0, 1.0),
        scale_input=lambda scale: {},
        numbers=recipe.numbers,
        updates=8,
        condition_dropout=0.0,
        optimizer_of=lambda every, share: adam,
        ema_decay=None,
    )
    params = {"slope": jnp.asarray(0.4), "wave": jnp.asarray(0.2)}
    teacher = {"slope": jnp.asarray(0.3), "wave": jnp.asarray(0.5)}
    state = create_train_state(jax.random.key(0), params, adam, frozen={TEACHER: teacher})
    mean = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 2, 1)), jnp.float32)
    batch = {"mean": mean, "label": jnp.zeros(4, jnp.int32)}
    return METHODS["scm"].make_loss(setting), state, batch, adam


@pytest.mark.parametrize("end", [0.0, np.pi / 2])
@pytest.mark.parametrize("path", [COSINE, LINEAR, D.Flow()], ids=["cosine", "linear", "flow"])
def test_the_tangent_of_continuous_consistency_is_finite_at_both_ends(path, end, monkeypatch):
    """The formula divides by sin t, and the path's own time is not that of TrigFlow."""
    prediction = D.flow(path) if isinstance(path, D.Flow) else D.v(path)
    loss, state, batch, _ = continuous(prediction)
    monkeypatch.setattr(few_steps, "trig_times", lambda key, size, *_: jnp.full(size, end, jnp.float32))
    of = jax.value_and_grad(lambda params: loss(params, state, batch, state.key)[0])
    value, gradient = of(state.params)
    assert np.isfinite(value) and value > 0
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(gradient))


def test_an_update_with_a_tangent_that_is_nan_is_skipped_and_not_hidden():
    loss, state, batch, adam = continuous(D.v(COSINE))
    step = jax.jit(make_train_step(loss, adam))
    moved, metrics = step(state, batch)
    assert metrics["skipped"] == 0 and moved.params["slope"] != state.params["slope"]
    damaged = batch["mean"].at[1].set(jnp.nan)
    stayed, metrics = step(state, batch | {"mean": damaged})
    assert metrics["skipped"] == 1 and np.isnan(metrics["loss"])
    assert stayed.params["slope"] == state.params["slope"]
