"""Data of one point for each class, of which every student of few steps is known exactly."""

import functools

import jax
import jax.numpy as jnp

from jaxldm import diffusion as D
from jaxldm.diffusion.paths import per_image
from jaxldm.training import FewStepsRecipe, optimizer
from jaxldm.training.conditions import label_condition
from jaxldm.training.few_steps.method import Setting
from jaxldm.training.few_steps.methods import METHODS

V, FLOW = D.v(D.VP.named("cosine")), D.flow(D.Flow())
POINTS = jnp.asarray([-1.0, 0.5, 2.0])  # of two classes, and of none
BATCH = 6
GUIDED = [name for name, method in METHODS.items() if method.guidance == "inside"]


def prediction_of(name):
    return FLOW if METHODS[name].inputs else V


def network(prediction, params, x, t, condition):
    """The exact denoiser of points as a network: `gain` is for the guidance scale, `late` an error of noise.

    It is the exact average velocity, too: of a point all trajectories are straight.
    """
    named = condition if isinstance(condition, dict) else {"labels": condition}
    point = params["points"][named["labels"]]
    scale = named.get("guidance_scale", 1.0)
    point = point + params["gain"] * (scale - 1) * (point - params["points"][2])
    path = prediction.path
    x_0 = jnp.broadcast_to(per_image(point + params["late"] * path.sigma(t), x), x.shape)
    return prediction.target(x_0, D.implied_noise(x_0, x, path.alpha(t), path.sigma(t)), t)


def teacher_of(scale=1.0, gain=0.0):
    guided = POINTS.at[:2].set((1 - scale) * POINTS[2] + scale * POINTS[:2])
    return {"points": guided, "gain": jnp.asarray(gain), "late": jnp.asarray(0.0)}


def setting(name, scales=(1.0, 1.0), **numbers):
    recipe = FewStepsRecipe(
        method=name,
        teacher="x" if METHODS[name].taught else None,
        guidance_scale=scales if name in GUIDED else None,
        numbers=numbers,
    )
    adam = optimizer(1e-2, 0, 10)
    takes = scales[0] < scales[1]
    return Setting(
        network=functools.partial(network, prediction_of(name)),
        prediction=prediction_of(name),
        on=label_condition(2),
        num_steps=recipe.num_steps,
        guidance_scale=scales,
        scale_input=lambda scale: {"guidance_scale": scale} if takes else {},
        numbers=recipe.numbers,
        updates=8,
        condition_dropout=0.0,
        optimizer_of=lambda every, share: adam,
        ema_decay=0.9,
    )


def batch_of(scale=1.0):
    labels = jnp.arange(BATCH, dtype=jnp.int32) % 2
    mean = jnp.broadcast_to(POINTS[labels][:, None, None, None], (BATCH, 2, 2, 1))
    noise = jax.random.normal(jax.random.key(9), mean.shape)
    sample = jnp.broadcast_to(teacher_of(scale)["points"][labels][:, None, None, None], mean.shape)
    return {"mean": mean, "label": labels, "noise": noise, "sample": sample}
