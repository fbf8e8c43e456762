"""The valid calls that `misuse` starts from, of models, pipelines, schedulers and training."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.faults.misuse_adapters import adapters
from experiments.faults.misuse_arrays import of_arrays
from experiments.faults.misuse_caching import cases_of_caching
from experiments.faults.misuse_cases import IMAGES, KEY, VP, Case, accept, cases_of_diffusion
from experiments.faults.misuse_few_steps import of_few_steps
from experiments.faults.misuse_files import of_files
from experiments.faults.misuse_quantization import cases_of_quantization
from experiments.faults.misuse_search import of_search
from experiments.faults.misuse_settings import settings
from experiments.faults.misuse_single_files import single_files
from experiments.faults.misuse_smaller import cases_of_smaller
from experiments.faults.misuse_training import of_training
from experiments.faults.small_folders import class_pipeline, zeros
from jaxldm import diffusion as D
from jaxldm import metrics, models, pipelines, schedulers, serving
from jaxldm import training as T
from jaxldm.models.sharding import RULES


@functools.cache
def all_cases() -> list[Case]:
    """Of all rooms; made once."""
    return [
        *networks(),
        *calls_of_networks(),
        *pipelines_of_classes(),
        *servers(),
        *optimizers(),
        *trainings(),
        *meshes(),
        *schedules(),
        *figures(),
        *cases_of_diffusion(),
        *cases_of_caching(),
        *cases_of_quantization(),
        *cases_of_smaller(),
        *of_search(),
        *of_few_steps(),
        *of_arrays(),
        *settings(),
        *of_files(),
        *single_files(),
        *adapters(),
        *of_training(),
    ]


SIZES: dict[str, Any] = dict(sample_size=4, in_channels=1, patch_size=2, hidden_size=8, depth=1, num_heads=2)


def networks() -> list[Case]:
    """Models: building, sizes and adapters."""
    module = models.build("tiny-dit", **SIZES, num_classes=3)
    params = zeros(module).params
    return [
        Case(
            "models.build",
            models.build,
            {"name": "tiny-dit", **SIZES, "num_classes": 3, "dtype": "float32"},
            True,
            {
                "name": "preset",
                "sample_size": "side|sample_size",
                "hidden_size": "heads|hidden_size",
                "num_heads": "heads",
            },
        ),
        Case(
            "models.init_lora",
            models.init_lora,
            {"key": KEY, "params": params, "rank": 2, "targets": ["*/attn/qkv"]},
            True,
            {"params": "params|layer", "targets": "targets|layer"},
        ),
        Case(
            "models.apply_lora",
            models.apply_lora,
            {"params": params, "lora": models.init_lora(KEY, params, 2), "scale": 0.5},
            True,
            {"params": "params|parameters", "lora": "lora|adapter"},
        ),
        Case("models.init", models.init, {"module": module, "key": KEY}, False),
        Case(
            "models.init_from",
            models.init_from,
            {"module": scaled_module(), "key": KEY, "params": params},
            False,
            {"params": "params|parameters"},
        ),
        Case("models.shapes", models.shapes, {"module": module}),
        Case(
            "models.count_params",
            models.count_params,
            {"name_or_module": module},
            True,
            {"name_or_module": "preset"},
        ),
        Case(
            "models.config_from_dict",
            models.config_from_dict,
            {"entries": models.config_to_dict(module.config)},
            True,
            {"entries": "config.json"},
        ),
    ]


def scaled_module() -> Any:
    """A network that takes the guidance scale."""
    return models.build("tiny-dit", **SIZES, num_classes=3, scalar_inputs=("guidance_scale",))


def small_unet() -> Any:
    """A U-Net of texts with one level."""
    levels = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 2}
    return models.UNet2DConditionModel(models.UNet2DConditionConfig(**levels, **sizes, cross_attention_dim=4))


def calls_of_networks() -> list[Case]:
    """The one way to call models."""
    scaled = scaled_module()
    scaled_params = zeros(scaled).params
    module = models.build("tiny-dit", **SIZES, num_classes=3)
    params, x, t = zeros(module).params, np.zeros((1, 4, 4, 1), np.float32), np.zeros(1, np.float32)
    call = models.network(module)
    unet = zeros(small_unet())
    return [
        Case("models.network", models.network, {"module": module}),
        Case("models.caching_network", models.caching_network, {"module": module, "params": params}),
        Case(
            "models.controlled_network",
            models.controlled_network,
            {"module": unet.module, "params": unet.params, "control": models.build("sd15-controlnet")},
        ),
        Case(
            "models.controlnet_from_unet",
            models.controlnet_from_unet,
            {"unet": unet.module, "params": unet.params, "key": KEY},
            False,
            {"unet": "unet|U-Net", "params": "params|parameters"},
        ),
        Case("network(...)", lambda x, t: call(params, x, t, np.zeros(1, np.int32)), {"x": x, "t": t}, False),
        Case(
            "network(condition)",
            lambda condition: call(params, x, t, condition),
            {"condition": np.zeros(1, np.int32)},
            False,
            {"condition": "condition|labels"},
        ),
        Case(
            "network(guidance_scale)",
            lambda guidance_scale: models.network(scaled)(
                scaled_params, x, t, {"labels": np.zeros(1, np.int32), "guidance_scale": guidance_scale}
            ),
            {"guidance_scale": np.full(1, 3.0, np.float32)},
            False,
        ),
        Case(
            "models.look_inside",
            lambda module, x, t, attention: models.look_inside(
                module, params, x, t, np.zeros(1, np.int32), attention=attention
            ),
            {"module": module, "x": x, "t": t, "attention": True},
            False,
        ),
    ]


def pipelines_of_classes() -> list[Case]:
    """A pipeline in memory, called."""
    module = models.build("tiny-dit", **SIZES, num_classes=3)
    pipe = pipelines.class_to_image(zeros(module), D.v(VP))
    arguments = {
        "key": KEY,
        "class_labels": [0],
        "num_images": 1,
        "negative_labels": None,
        "batch_size": 1,
        "devices": None,
        "guidance_scale": 2.0,
        "guidance_rescale": 0.0,
        "num_inference_steps": 1,
        "solver": "ddim",
        "eta": None,
        "cache": None,
        "token_merging": None,
        "spacing": None,
        "sigmas": None,
        "timesteps": None,
        "latents": None,
        "output": "latents",
        "previews": 0,
        "in_flight": None,
        "on_step": None,
        "progress": None,
    }
    words = {
        "class_labels": "class labels|class",
        "negative_labels": "negative labels|negative|class",
        "timesteps": "times|steps",
        "solver": "solver|eta",
        "in_flight": "in_flight",
        "num_inference_steps": "steps",
        "spacing": "spacing|scheduler",
        "sigmas": "sigmas|spacing",
    }
    calibrated = {"pipe": pipe, "key": KEY, "num_inference_steps": 2}
    return [
        Case("pipe", pipe, arguments, False, words),
        Case("pipelines.calibrate_cache", pipelines.calibrate_cache, calibrated, False, words),
    ]


def servers() -> list[Case]:
    """What a server is made of; nothing is compiled."""
    pipe = class_pipeline()
    limits = {
        "max_queue": 2,
        "max_queue_seconds": 1.0,
        "requests_per_second": 1.0,
        "burst": 1,
        "quantum": 1,
    }
    job = {"pipe": pipe, "key": KEY, "encode": None, "num_inference_steps": 2}
    sizes = {"pipe": pipe, "sizes": (1, 4), "devices": None, "encode": None}
    return [
        Case("serving.Limits", serving.Limits, limits),
        Case("serving.Embeddings", serving.Embeddings, {"max_bytes": 8}),
        Case("serving.Engine", serving.Engine, sizes),
        Case("serving.as_served", serving.as_served, {"pipe": pipe, "slots": 4}),
        Case("serving.prepare", serving.prepare, job, words={"num_inference_steps": "steps"}),
        Case("serving.sharing", serving.sharing, {"pipe": pipe, "cache": serving.Embeddings(8)}),
    ]


TWO_PARTS = {name: {"bias": np.zeros(2, np.float32)} for name in ("encoder", "decoder")}


def optimizers() -> list[Case]:
    """Optimizers and schedules."""
    return [
        Case(
            "T.optimizer",
            T.optimizer,
            {
                "learning_rate": 1e-3,
                "warmup_steps": 1,
                "total_steps": 10,
                "weight_decay": 0.0,
                "max_grad_norm": 1.0,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "final_scale": 0.0,
                "name": "adamw",
                "rounds": 1,
            },
            True,
            {"total_steps": "steps", "name": "optimizer"},
        ),
        Case(
            "T.warmup_cosine",
            T.warmup_cosine,
            {
                "learning_rate": 1e-3,
                "warmup_steps": 1,
                "total_steps": 10,
                "final_scale": 0.0,
                "rounds": 1,
            },
            True,
            {"total_steps": "steps"},
        ),
        Case("T.annealed_beta", T.annealed_beta, {"beta": 1e-3, "warmup_steps": 10, "step": 1}),
    ]


def trainings() -> list[Case]:
    """Training any network on any loss."""
    adam = T.optimizer(1e-3, warmup_steps=1, total_steps=10)
    state = T.create_train_state(KEY, {"w": np.zeros(2, np.float32)}, adam)

    def loss(params, state, batch, key):
        return jnp.sum(params["w"]), {}

    step = T.make_train_step(loss, adam)
    return [
        Case(
            "T.make_train_step",
            T.make_train_step,
            {"loss_fn": loss, "optimizer": adam, "ema_decay": None, "accumulate": 2, "power_ema": [0.1]},
        ),
        Case(
            "T.Player",
            T.Player,
            {"name": "critic", "loss": loss, "optimizer": adam, "ema_decay": 0.9, "every": 1, "start": 0},
        ),
        Case("T.freeze", T.freeze, {"params": TWO_PARTS, "patterns": ["encoder/*"]}),
        Case("T.merge", T.merge, {"params": TWO_PARTS, "frozen": {"head": np.zeros(2, np.float32)}}),
        Case("T.compile_train_step", T.compile_train_step, {"train_step": step, "mesh": T.make_mesh(1)}),
        Case(
            "T.create_train_state",
            T.create_train_state,
            {
                "key": KEY,
                "params": {"w": np.zeros(2, np.float32)},
                "optimizer": adam,
                "ema": True,
                "frozen": None,
                "power_ema": [0.05, 0.1],
            },
            False,
        ),
        Case(
            "T.Plan",
            T.Plan,
            {"num_steps": 1, "save_every": 0, "sample_every": 0, "keep": 2, "save_frozen": True},
        ),
        Case(
            "T.latent_scale",
            T.latent_scale,
            {"mean": IMAGES + np.arange(2).reshape(2, 1, 1, 1), "log_variance": None},
        ),
        fit_of(state, step),
    ]


def meshes() -> list[Case]:
    """Devices, and where parameters lie on them."""
    return [
        Case("T.local_examples", T.local_examples, {"mesh": T.make_mesh(1), "batch_size": 8}),
        Case("T.make_mesh", T.make_mesh, {"devices": 1, "fsdp": 1, "tensor": 1}),
        Case("models.make_mesh", models.make_mesh, {"devices": 1, "fsdp": 1, "tensor": 1}),
        Case("models.sharding_of", models.sharding_of, {"mesh": T.make_mesh(1), "rules": RULES}),
        Case(
            "models.shardings",
            models.shardings,
            {
                "mesh": T.make_mesh(1),
                "params": {"fc1": {"kernel": np.zeros((4, 4), np.float32)}},
                "rules": RULES,
            },
        ),
    ]


def fit_of(state: Any, step: Any) -> Case:
    """The loop of training, in a folder that cannot be written."""
    return Case(
        "T.fit",
        functools.partial(T.fit, run_dir="/dev/null/run"),  # where nothing can be written
        {
            "state": state,
            "train_step": step,
            "batches": [{"x": np.zeros(2)}],
            "plan": T.Plan(1),
            "resume": False,
            "mesh": None,
            "name": "training",
            "on_sample": None,
            "explain_divergence": None,
            "log": accept,
            "bar": False,
        },
        words=dict.fromkeys(
            ("batches", "resume", "mesh", "name", "on_sample", "explain_divergence", "bar"),
            "cannot write",
        ),
        refusal="cannot write",
    )


def schedules() -> list[Case]:
    """Schedulers of diffusers."""
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "steps_offset": 1}
    return [
        Case(
            "schedulers.masked_tokens_config",
            schedulers.masked_tokens_config,
            {"mask_token": 16, "schedule": "cosine"},
            words={"schedule": "schedule"},
        ),
        Case(
            "schedulers.from_config",
            schedulers.from_config,
            {"config": config, "solver": "ddim", "eta": 0.0, "stops_early": False, "reference_quirks": True},
            True,
            {"config": "scheduler_config.json|config"},
        ),
        Case(
            "schedulers.to_config",
            schedulers.to_config,
            {"prediction": D.v(VP), "grid": None, "dynamic_shift": None, "solver": None},
        ),
        Case(
            "Scheduler.make_grid",
            schedulers.from_config(config).make_grid,
            {"num_inference_steps": 10, "num_image_tokens": None},
            True,
            {"num_image_tokens": "tokens"},
        ),
        Case(
            "Scheduler.with_grid",
            schedulers.from_config(config).with_grid,
            {
                "spacing": "trailing",
                "levels": None,
                "final": "clean",
                "steps_offset": 1,
                "rho": 7.0,
                "original_steps": 50,
                "lambda_min": None,
            },
            True,
            {"levels": "sigmas", "original_steps": "steps"},
        ),
    ]


def figures() -> list[Case]:
    """Metrics and pictures."""
    rows, labels = np.random.default_rng(0).normal(size=(8, 3)), np.arange(8) % 2
    images = np.zeros((4, 4, 4, 1), np.float32)
    two = {"features": rows, "real": rows + 1}
    width = dict.fromkeys(
        ("features", "real", "x", "y", "features_a", "features_b", "embeddings"), "features|rows|embeddings"
    )
    width |= {"columns": "column", "reference": "reference|images"}
    figures = {
        "accuracy": {"logits": rows, "labels": labels},
        "inception_score": {"probabilities": np.full((4, 2), 0.5)},
        "inception_score_of_splits": {"logits": rows, "splits": 2, "seed": 0},
        "within_class_diversity": {"vectors": rows, "labels": labels},
        "class_diversities": {"vectors": rows, "labels": labels},
        "nearest_neighbour_distances": {"images": rows, "reference": rows},
        "reconstruction_error": {"images": images, "reconstructions": images},
        "image_grid": {"images": images, "columns": 2, "padding": 2, "scale": 1},
        "labelled_grid": {
            "images": images,
            "columns": 2,
            "title": "",
            "column_labels": ["a", "b"],
            "row_labels": [],
            "scale": 1,
            "font_size": 13,
        },
        "nearest_neighbour_panel": {"images": images, "reference": images, "pairs": 2, "scale": 1},
        "fit_gaussian": {"features": rows},
        "frechet_distance": {"features_a": rows, "features_b": rows},
        "gaussian_frechet_distance": {"a": metrics.fit_gaussian(rows), "b": metrics.fit_gaussian(rows)},
        "clip_score": {"similarities": rows, "prompt_of": labels},
        "polynomial_mmd": {"x": rows, "y": rows},
        "kernel_distance": {**two, "subsets": 2, "subset_size": 4, "seed": 0},
        "clip_mmd": {"embeddings": rows, "real": rows, "sigma": 10.0},
        "manifold_overlap": {**two, "k": 3},
        "sliced_wasserstein": {**two, "directions": 10, "seed": 0},
    }
    return [
        Case(f"metrics.{name}", getattr(metrics, name), given, words=width) for name, given in figures.items()
    ]
