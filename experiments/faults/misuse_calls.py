"""Whole calls that people get wrong in Python, each with the words that the line of its refusal must have.

`misuse` replaces one argument of a valid call by values of any kind. Here are mistakes with a sense: another
order, functions that return nothing, parts of a model exchanged, names from elsewhere, pixels of 0 to 255.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.faults.misuse_arrays import labelled_images, small_classifier
from experiments.faults.misuse_cases import FLOW, IMAGES, KEY, VP, conditional, halve
from experiments.faults.misuse_families import calls_of_families
from experiments.faults.misuse_files import place
from experiments.faults.small_folders import class_pipeline
from jaxldm import checkpoints, metrics, models, pipelines
from jaxldm import diffusion as D
from jaxldm import few_steps as few
from jaxldm import training as T

ONES, LATE, EARLY = np.ones(2, np.float32), np.full(2, 0.8, np.float32), np.full(2, 0.4, np.float32)
THREE, LABELS = np.ones(3, np.float32), np.zeros(2, np.int32)


class Mistake(NamedTuple):
    """A call as it is written by mistake, and a regular expression for the line that refuses it."""

    name: str
    call: Callable[[], Any]
    words: str


def nothing(*arguments):
    """A function without a return."""


def mistakes() -> list[Mistake]:
    """Of all rooms."""
    return [
        *of_sampling(),
        *of_guidance(),
        *of_losses(),
        *of_few_steps(),
        *of_training(),
        *of_metrics(),
        *of_models(),
        *of_pipelines(),
        *(Mistake(*call) for call in calls_of_families()),
    ]


def of_sampling() -> list[Mistake]:
    """Denoisers, guidance and the sampling loop."""
    prediction, grid, ddim = D.flow(FLOW), D.make_grid(FLOW, 1), D.solvers.ddim()
    exact, keys = D.gaussian_denoiser(FLOW), D.image_keys(KEY, 2)
    module = class_pipeline().denoiser.module

    def draw(denoise: Any, x: Any = IMAGES) -> Any:
        return D.sample(KEY, denoise, ddim, grid, x)

    def step(solver: Any = ddim, keys: Any = keys, i: Any = 0) -> Any:
        return D.sample_step(keys, exact, solver, grid, ddim.init(IMAGES), i)

    return [
        Mistake(
            "network: None", lambda: draw(D.denoiser(nothing, prediction)), "network must return.*missing"
        ),
        Mistake("network: pair", lambda: draw(D.denoiser(lambda x, t: (x, {}), prediction)), "tuple of 2"),
        Mistake("denoise: None", lambda: draw(nothing), "denoise must return"),
        Mistake("denoise: module", lambda: draw(module), r"models\.network\(module\)\(params"),
        Mistake("denoise: swapped", lambda: D.sample(exact, KEY, ddim, grid, IMAGES), "got a key"),
        Mistake(
            "sample: steps=", lambda: D.sample(KEY, exact, ddim, grid, IMAGES, steps=5), "no argument 'steps'"
        ),
        Mistake("denoise(x, t [3])", lambda: exact(IMAGES, THREE), "one for each of 2 images"),
        Mistake("denoise(x, text)", lambda: exact(IMAGES, "0.5"), "t must be"),
        Mistake("sample_step: row", lambda: step(i=7), r"i must lie in \[0, 0\]"),
        Mistake("sample_step: key", lambda: step(keys=KEY), r"D\.image_keys"),
        Mistake("sample_step: solver", lambda: step(D.solvers.dpmpp_2m()), r"solver\.init\(x_T\)"),
        Mistake(
            "make_grid: steps=", lambda: D.make_grid(FLOW, steps=5), "did you mean 'num_inference_steps'"
        ),
        Mistake("noise: shape", lambda: D.initial_noise(KEY, 4, grid), r"such as \(4, 8, 8, 1\)"),
        Mistake(
            "inpaint: pixels",
            lambda: D.inpaint(ddim, 255 * np.ones((4, 4, 1)), np.ones((4, 4, 1))),
            "up to 255",
        ),
        Mistake("solver: DDIM", lambda: D.solvers.make("DDIM"), "did you mean 'ddim'"),
        Mistake("SOLVERS[...]", lambda: D.solvers.SOLVERS["euler_a"], "did you mean 'euler_ancestral'"),
        Mistake("path: typo", lambda: D.Flow(shfit=3.0), "did you mean 'shift'"),
        Mistake("time: option", lambda: D.training_times("mode", skale=1.0), "it has: scale"),
    ]


def of_guidance() -> list[Mistake]:
    """Guidance by conditions, by networks, by classifiers."""
    exact = D.gaussian_denoiser(FLOW)
    return [
        Mistake(
            "guidance: rows",
            lambda: D.classifier_free_guidance(conditional, THREE, 0.0, 2.0)(IMAGES, ONES),
            "condition has 3 rows, x has 2",
        ),
        Mistake(
            "guidance: null",
            lambda: D.condition_branches(conditional, LABELS, None),
            "the null class, got None",
        ),
        Mistake(
            "guidance: None",
            lambda: D.autoguidance(halve, nothing, 2.0)(IMAGES, ONES),
            "each network must return an array",
        ),
        Mistake(
            "classifier: logits",
            lambda: D.classifier_guidance(exact, lambda x, t: jnp.ones((2, 9)), 1.0)(IMAGES, 0.5),
            r"log_p\[jnp\.arange\(2\), labels\]",
        ),
    ]


def of_losses() -> list[Mistake]:
    """The loss of diffusion and of masked tokens."""
    prediction, tokens = D.flow(FLOW), np.zeros((2, 4), np.int32)

    def loss(network: Any = conditional, x_0: Any = IMAGES, **options: Any) -> Any:
        return D.diffusion_loss(KEY, network, prediction, x_0, **options)

    module = class_pipeline().denoiser.module
    return [
        Mistake("loss: None", lambda: loss(nothing), "the network must return an array, got None"),
        Mistake("loss: module", lambda: loss(module), r"models\.network\(module\)\(params"),
        Mistake("loss: rows", lambda: loss(condition=THREE), "condition has 3 rows, x_0 has 2"),
        Mistake("loss: pixels", lambda: loss(x_0=255 * np.ones_like(IMAGES)), r"write x / 127\.5 - 1"),
        Mistake("loss: weight maker", lambda: loss(weight=D.min_snr), r"write D\.min_snr\(5\.0\)"),
        Mistake(
            "loss: weight shape", lambda: loss(weight=lambda snr: jnp.ones((2, 3))), "weight must return"
        ),
        Mistake(
            "loss: time maker", lambda: loss(time=D.logit_normal), r"write D\.logit_normal\(0\.0, 1\.0\)"
        ),
        Mistake("loss: arguments", lambda: loss(lambda x, t: x), r"got one of \(x, t\)"),
        Mistake(
            "tokens: rows",
            lambda: D.masked_token_loss(KEY, lambda t, c: jnp.zeros((2, 4, 4)), tokens, THREE, mask_token=4),
            "condition has 3 rows, tokens has 2",
        ),
        Mistake(
            "tokens: None",
            lambda: D.sample_tokens(KEY, nothing, tokens + 4, D.make_unmasking(1), mask_token=4),
            "the network must return",
        ),
    ]


def of_few_steps() -> list[Mistake]:
    """Losses of few steps."""
    exact, flow = D.gaussian_denoiser(FLOW), D.flow(FLOW)
    two = IMAGES, IMAGES

    def flows(u: Any, condition: Any = None) -> Any:
        return few.mean_flow_loss(u, *two, EARLY, LATE, condition)

    def consistency(f: Any = halve, **options: Any) -> Any:
        return few.consistency_loss(f, halve, IMAGES, LATE, IMAGES, EARLY, **options)

    def progressive(jump: Any) -> Any:
        return few.progressive_loss(conditional, jump, flow, *two, LATE, LATE, EARLY)

    one_pixel = lambda z, r, t, c: z[:, :1, :1]  # noqa: E731
    return [
        Mistake("mean flow: None", lambda: flows(nothing), "u must return"),
        Mistake("mean flow: shape", lambda: flows(one_pixel), r"array \[2, 4, 4, 1\], got one of"),
        Mistake("mean flow: rows", lambda: flows(one_pixel, THREE), "condition has 3 rows, x_0 has 2"),
        Mistake("consistency: f", lambda: consistency(nothing), "f must return"),
        Mistake("consistency: distance", lambda: consistency(distance=lambda e: e), "distance must return"),
        Mistake("consistency: maker", lambda: consistency(distance=few.pseudo_huber), r"pseudo_huber\(c\)"),
        Mistake("progressive: maker", lambda: progressive(few.ddim_jump), r"ddim_jump\(denoise\)"),
        Mistake("progressive: None", lambda: progressive(nothing), "jump must return"),
        Mistake("shortcut: None", lambda: few.shortcut_target(nothing, IMAGES, LATE, EARLY), "must return"),
        Mistake(
            "matching: None",
            lambda: few.distribution_matching_gradient(exact, nothing, IMAGES, FLOW, IMAGES, LATE),
            "fake must return",
        ),
        Mistake(
            "simulation: row",
            lambda: few.backward_simulation(KEY, halve, FLOW, IMAGES, [0.9, 0.5], 5),
            r"row must lie in \[0, 1\]",
        ),
        Mistake(
            "drift: widths", lambda: few.drift(np.ones((4, 3)), np.ones((4, 2))), "shapes do not go together"
        ),
        Mistake(
            "guidance: null",
            lambda: few.guidance_distillation_loss(
                lambda x, t, c, w: x, conditional, flow, *two, LATE, ONES, ONES, None
            ),
            "null class, got None",
        ),
        Mistake(
            "continuous: None", lambda: few.trig_consistency(nothing, IMAGES, LATE), "velocity must return"
        ),
    ]


def of_training() -> list[Mistake]:
    """Steps, states and the loop."""
    adam = T.optimizer(1e-3, warmup_steps=1, total_steps=10)
    params, batch = {"w": np.zeros(2, np.float32)}, {"x": np.zeros(2, np.float32)}

    def right(params, state, batch, key):
        return jnp.sum(params["w"]), {}

    def update(loss: Any = right, state: Any = None, **options: Any) -> Any:
        state = T.create_train_state(KEY, params, adam, ema=False) if state is None else state
        return T.make_train_step(loss, adam, **options)(state, batch)

    def fit(batches: Any, plan: Any) -> Any:
        state = T.create_train_state(KEY, params, adam)
        return T.fit(state, T.make_train_step(right, adam), batches, plan, "/dev/null/run", bar=False)

    smoke = T.RECIPES["smoke"]
    return [
        Mistake(
            "loss_fn: bare",
            lambda: update(lambda p, s, b, k: jnp.sum(p["w"])),
            r"must return \(loss, metrics\)",
        ),
        Mistake("loss_fn: None", lambda: update(nothing), "got None"),
        Mistake(
            "loss_fn: text", lambda: update(lambda p, s, b, k: (jnp.sum(p["w"]), {"a": "b"})), "the metric a"
        ),
        Mistake("step: state", lambda: update(state=params), r"training\.create_train_state"),
        Mistake("step: ema", lambda: update(ema_decay=0.9), "ema=True"),
        Mistake("step: swapped", lambda: T.make_train_step(adam, right), "a loss, or players"),
        Mistake(
            "state: ints", lambda: T.create_train_state(KEY, {"w": np.zeros(2, int)}, adam), r"params\['w'\]"
        ),
        Mistake("fit: few batches", lambda: fit([batch], T.Plan(3)), "batches are 1, and the plan has 3"),
        Mistake("fit: plan", lambda: fit([batch], 10), r"training\.Plan\(num_steps\)"),
        Mistake(
            "recipe: epochs", lambda: dataclasses.replace(smoke, epochs=3), r"dataclasses\.replace\(old\."
        ),
        Mistake("recipe: typo", lambda: dataclasses.replace(smoke, sed=3), "did you mean 'seed'"),
        Mistake("RECIPES[...]", lambda: T.RECIPES["mini_ldm"], "did you mean 'mini-ldm'"),
        Mistake("train: name", lambda: T.train("smoke", "/dev/null/run"), r"training\.RECIPES\['smoke'\]"),
        Mistake("read_log: other", lambda: T.read_log(place() / "run" / "config.json"), "no training log"),
        Mistake(
            "autoencoder: encode",
            lambda: T.autoencoder_loss(KEY, lambda x: x, lambda z: z, IMAGES),
            r"models\.DiagonalGaussian",
        ),
    ]


def of_metrics() -> list[Mistake]:
    """Figures of images."""
    network, data, images = small_classifier(), labelled_images(), np.zeros((4, 8, 8, 1), np.float32)
    classify, labels = metrics.classifier_function(network.module, network.params), np.arange(4) % 2
    logits = np.zeros((4, 3))
    return [
        Mistake(
            "classify: size", lambda: classify(np.zeros((4, 6, 6, 1), np.float32)), "do not fit.*an input is"
        ),
        Mistake("classify: pixels", lambda: classify(np.zeros((4, 8, 8, 1), np.uint8)), "floating-point"),
        Mistake(
            "classify: None", lambda: metrics.evaluate(images, labels, nothing, data), "classify must return"
        ),
        Mistake("accuracy: labels", lambda: metrics.accuracy(logits, labels + 9), r"in \[0, 2\]"),
        Mistake(
            "grid: channels", lambda: metrics.image_grid(np.zeros((4, 3, 8, 8), np.float32)), "channels last"
        ),
        Mistake("grid: pixels", lambda: metrics.image_grid(images + 255), "up to 255"),
    ]


def of_models() -> list[Mistake]:
    """Networks and their folders."""
    pipe, t = class_pipeline(), np.zeros(2, np.float32)
    network, x = pipe.denoiser, np.zeros((2, 8, 8, 1), np.float32)
    call = models.network(network.module)
    return [
        Mistake("network: variables", lambda: call({"params": network.params}, x, t, LABELS), "inside of"),
        Mistake("network: bytes", lambda: call(network.params, x.astype(np.uint8), t, LABELS), "127.5"),
        Mistake("Network: t", lambda: network(x), "missing a required argument: 't'"),
        Mistake(
            "Network: channels", lambda: network(np.zeros((2, 8, 8, 3), np.float32), t, LABELS), "an input is"
        ),
        Mistake(
            "Network: swapped",
            lambda: pipelines.Network(network.params, network.module)(x),
            "must be a module",
        ),
        Mistake("config: typo", lambda: models.DiTConfig(depht=3), "did you mean 'depth'"),
        Mistake(
            "dtype: fp16", lambda: checkpoints.load(place() / "clip", dtype="fp16"), "did you mean 'float16'"
        ),
        Mistake("load: run", lambda: checkpoints.load(place() / "run"), r"pipelines\.load"),
        Mistake("load: export", lambda: checkpoints.load(place() / "export"), r"pipelines\.load"),
        Mistake(
            "save: variables",
            lambda: checkpoints.save(place() / "new", network.module, {"params": network.params}),
            r"variables\['params'\]",
        ),
    ]


def of_pipelines() -> list[Mistake]:
    """Calls of pipelines, and their parts."""
    pipe, texts = class_pipeline(), pipelines.load(place() / "texts")
    network, v = pipe.denoiser, D.v(VP)

    def swapped() -> Any:
        return texts.replace(unet=texts.vae, vae=texts.unet)(KEY, "a")

    return [
        Mistake("pipe: prompt=", lambda: pipe(KEY, prompt="a cat"), r"write class_labels=\[3\]"),
        Mistake("pipe: class_labels=", lambda: texts(KEY, class_labels=[1]), "write prompt='a cat'"),
        Mistake("pipe: no key", lambda: pipe(class_labels=[1]), r"write jax\.random\.key\(0\)"),
        Mistake("pipe: no prompt", lambda: texts(KEY), "write prompt='a cat'"),
        Mistake("pipe: twice", lambda: pipe(KEY, [1], class_labels=[1]), "multiple values"),
        Mistake("pipe: steps", lambda: pipe(KEY, [1], steps=5), "did you mean 'num_inference_steps'"),
        Mistake(
            "pipe: num_images", lambda: texts(KEY, "a", num_images=2), "did you mean 'num_images_per_prompt'"
        ),
        Mistake("pipe: image path", lambda: texts(KEY, "a", image="cat.png"), r"PIL\.Image\.open"),
        Mistake("warm_up: compile_only", lambda: pipe.warm_up([1], compile_only=True), "leave it out"),
        Mistake("grid: size", lambda: pipe.grid(512), "size must be two whole numbers"),
        Mistake("encode_prompts: text", lambda: texts.encode_prompts("a cat"), "a list of texts"),
        Mistake("decode: option", lambda: pipe.decode(IMAGES, batchsize=2), "did you mean 'batch_size'"),
        Mistake(
            "generate: classes",
            lambda: pipelines.generate(pipe, KEY, "a"),
            r"pipe\(key, class_labels=\[3\]\)",
        ),
        Mistake(
            "replace: pair",
            lambda: pipe.replace(transformer=(network.module, network.params)),
            r"Network\(\*",
        ),
        Mistake("replace: params", lambda: pipe.replace(transformer=network.params), "a network such as"),
        Mistake("replace: swapped", swapped, "its vae is a .*, and no autoencoder"),
        Mistake(
            "class_to_image: names", lambda: pipelines.class_to_image(network, v, class_names="abc"), "a list"
        ),
        Mistake(
            "class_to_image: number of names",
            lambda: pipelines.class_to_image(network, v, class_names=["a"])(KEY, [0]),
            "does not name each",
        ),
        Mistake(
            "class_to_image: scale",
            lambda: pipelines.class_to_image(network, v, default_guidance_scale="3"),
            "default_guidance_scale must be",
        ),
    ]
