"""The valid calls that `misuse` starts from, of what computes on arrays: layers, models, metrics, data."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.faults.misuse_cases import IMAGES, KEY, Case, accept
from experiments.faults.small_folders import class_pipeline, zeros
from jaxldm import data, metrics, models, nn, schedulers
from jaxldm import diffusion as D
from jaxldm.data.example import Skipped
from jaxldm.pipelines import Network

FIT = "do not fit"  # what Flax says about shapes
FEATURES = np.random.default_rng(0).normal(size=(8, 3))
LABELS = np.arange(8) % 2
PICTURES = np.zeros((2, 8, 8, 3), np.uint8)


def of_arrays() -> list[Case]:
    """What computes on arrays, or holds settings."""
    return [
        *layers(),
        *models_of_arrays(),
        *costs(),
        *pictures(),
        *feature_networks(),
        *figures_of_networks(),
        *figures_of_texts(),
        *statistics(),
        *health(),
        *images_in_memory(),
        *batches_in_memory(),
        *of_diffusion(),
    ]


def array_case(name: str, function: Any, /, words: dict[str, str] | None = None, **arguments: Any) -> Case:
    """A case of arrays, whose shapes may not go with each other."""
    accepted = {key: f"{key}|shapes do not go together|{FIT}" for key in arguments}
    return Case(name, function, arguments, False, accepted | (words or {}))


def layers() -> list[Case]:
    """Functions of `jaxldm.nn`."""
    x, tokens = np.zeros((1, 4, 4, 8), np.float32), np.zeros((1, 4, 8), np.float32)
    row, heads = np.zeros((1, 8), np.float32), np.zeros((1, 4, 2, 4), np.float32)
    channels, half = np.ones(8, np.float32), np.zeros((4, 2), np.float32)
    of = lambda name, /, **arguments: array_case(f"nn.{name}", getattr(nn, name), **arguments)  # noqa: E731
    return [
        of("apply_rotary", x=heads, cos=half, sin=half, interleaved=True),
        of("compute_dtype", name="float32", words={"name": "dtype"}),
        of("conv_of_doubled", x=x, kernel=np.zeros((3, 3, 8, 2), np.float32)),
        of("conv_transpose_4x4_stride_2", x=x, weight=np.zeros((8, 2, 4, 4), np.float32)),
        of(
            "dot_product_attention",
            query=heads,
            key=heads,
            value=heads,
            scale=None,
            bias=None,
            mask=None,
            return_weights=False,
        ),
        of("gated", x=tokens, gate=row),
        of("group_norm", x=x, scale=channels, bias=channels, num_groups=2, eps=1e-5),
        of("guidance_embedding", w=np.ones(1, np.float32), dim=8),
        of("layer_norm", x=tokens, eps=1e-6),
        of("modulate", x=tokens, shift=row, scale=row),
        of("patchify", images=x, patch_size=2, words={"images": "images", "patch_size": "patch"}),
        of("rotary_embedding", positions=np.arange(4), dim=4, theta=1e4, words={"dim": "dim|width"}),
        of("rotary_embedding_of_axes", positions=np.zeros((4, 2)), dims=(4, 4), theta=1e4, words=AXES),
        of(
            "sincos_position_embedding_2d",
            dim=8,
            height=2,
            width=2,
            base_size=None,
            interpolation_scale=1.0,
            words=dict.fromkeys(("height", "width"), "height|width|memory") | {"dim": "dim|width"},
        ),
        of(
            "timestep_embedding",
            t=np.ones(1, np.float32),
            dim=8,
            flip_sin_to_cos=True,
            downscale_freq_shift=1.0,
            max_period=1e4,
        ),
        of("unpatchify", tokens=tokens, patch_size=2, height=4, width=4, words=PATCHES),
    ]


AXES = {"positions": "positions|axes", "dims": "dims|axes|width"}
PATCHES = dict.fromkeys(("tokens", "patch_size", "height", "width"), "tokens|patch|height|width")


def models_of_arrays() -> list[Case]:
    """Functions of `jaxldm.models` that are given arrays."""
    config = {"sample_size": 8, "block_out_channels": (4,), "norm_num_groups": 2}
    one = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    kl = zeros(models.from_config(models.AutoencoderKLConfig(**config, **one, latent_channels=2)))
    vq = zeros(
        models.from_config(models.VQModelConfig(**config, **one, latent_channels=2, num_vq_embeddings=4))
    )
    images, latents = np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 8, 8, 2), np.float32)
    of = lambda name, /, **arguments: array_case(f"models.{name}", getattr(models, name), **arguments)  # noqa: E731
    network = class_pipeline().denoiser
    options = {"tiling": None, "slicing": False}
    return [
        of("class_name", config=network.config),
        of("config_to_dict", config=network.config),
        of("from_config", config=network.config),
        of("convention", module=network.module),
        of("compute_dtype", name="float32", words={"name": "dtype"}),
        of("clip_pixel_values", images=PICTURES, image_size=8),
        of("clip_inputs", images=images, image_size=8),
        of("dinov2_pixel_values", images=PICTURES, image_size=8),
        of("encode_indices", module=vq.module, params=vq.params, images=images),
        of("decode_indices", module=vq.module, params=vq.params, indices=np.zeros((1, 8, 8), np.int32)),
        of("encode_latents", module=kl.module, params=kl.params, images=images, key=None, **options),
        of("decode_latents", module=kl.module, params=kl.params, latents=latents, **options),
        of("guidance_embedding", w=np.ones(1, np.float32), dim=8),
        of("lpips_heads", net="vgg", words={"net": "network"}),
        of("patchify", images=images, patch_size=2, words={"images": "images", "patch_size": "patch"}),
        of(
            "unpatchify",
            tokens=np.zeros((1, 4, 8), np.float32),
            patch_size=2,
            height=4,
            width=4,
            words=PATCHES,
        ),
        of("resize_linear", x=images, size=(16, 16)),
        of(
            "sentence_embedding",
            last_hidden_state=np.ones((1, 4, 8), np.float32),
            attention_mask=np.ones((1, 4), np.int32),
        ),
    ]


def costs() -> list[Case]:
    """What a network costs, from shapes."""
    module = class_pipeline().denoiser.module
    of = lambda name, /, **arguments: Case(f"models.{name}", getattr(models, name), arguments, False, PRESET)  # noqa: E731
    compiled = jax.jit(lambda params, x: params["w"] * x).lower({"w": jnp.ones(2)}, jnp.ones(2)).compile()
    macs = lambda name: lambda function, x: getattr(models, name)(function, x)  # noqa: E731
    return [
        of("count_macs", name_or_module=module),
        of("compile_forward", name_or_module=module, dtype="float32"),
        of("forward_memory", name_or_module=module, dtype="float32"),
        of("memory_of", compiled=compiled),
        *(
            Case(
                f"models.{name}",
                macs(name),
                {"function": lambda x: jnp.ones(2), "x": jnp.ones(2)},
                False,
                PRESET,
            )
            for name in ("macs_of", "largest_product")
        ),
    ]


PRESET = {"name_or_module": "preset|name_or_module", "x": "inputs"}


def pictures() -> list[Case]:
    """Sets of images."""
    images = metrics.array_set(PICTURES, "pictures")
    return [
        Case(
            "metrics.array_set",
            metrics.array_set,
            {"images": PICTURES, "name": "pictures"},
            words={"images": "images|must hold"},
        ),
        array_case(
            "metrics.inception_inputs",
            metrics.inception_inputs,
            images=PICTURES,
            variant="tf1",
            words={"variant": "variant"},
        ),
        Case(
            "metrics.pair_distances",
            metrics.pair_distances,
            {
                "images": images,
                "real": images,
                "distance": lambda params, x, y: jnp.abs(x - y).mean((1, 2, 3)),
                "params": {},
                "batch_size": 2,
                "progress": accept,
            },
            False,
        ),
    ]


def small_classifier() -> Network:
    """A classifier of images of 8x8 pixels."""
    return zeros(
        models.build("digit-classifier", sample_size=8, block_out_channels=(4, 4, 4), num_features=4)
    )


def feature_networks() -> list[Case]:
    """Networks of metrics."""
    network = small_classifier()
    return [
        Case(
            "metrics.classifier_function",
            metrics.classifier_function,
            {"module": network.module, "params": network.params, "batch_size": 4},
        ),
        Case(
            "metrics.inception_network",
            metrics.inception_network,
            {"module": models.InceptionV3(), "params": {}, "sha256": "0", "variant": "tf1"},
        ),
        Case(
            "metrics.image_encoder_network",
            metrics.image_encoder_network,
            {
                "name": "a",
                "encode": lambda params, x: x,
                "params": {},
                "sha256": "0",
                "prepare": lambda images: images,
            },
        ),
    ]


def figures_of_networks() -> list[Case]:
    """What networks of metrics compute."""
    network = small_classifier()
    encoder = metrics.image_encoder_network(
        "mean", lambda params, x: x.mean((1, 2)), {}, "0" * 64, lambda images: images
    )
    return [
        Case(
            "metrics.extract",
            metrics.extract,
            {
                "images": metrics.array_set(PICTURES, "pictures"),
                "network": encoder,
                "layers": ["embedding"],
                "folder": "/dev/null/features",  # where nothing can be written
                "batch_size": 2,
                "devices": None,
                "progress": accept,
            },
            words=dict.fromkeys(
                ("layers", "batch_size", "devices", "progress", "images"),
                "layer|devices|cannot write|batch_size|progress|images",
            )
            | {"folder": "folder|write"},
            refusal="cannot write",
        ),
        Case(
            "metrics.evaluate",
            metrics.evaluate,
            {
                "images": np.zeros((4, 8, 8, 1), np.float32),
                "labels": np.arange(4) % 2,
                "classify": metrics.classifier_function(network.module, network.params),
                "dataset": labelled_images(),
                "progress": accept,
            },
            words=dict.fromkeys(
                ("images", "labels", "classify", "dataset"), "split|dataset|images|labels|classify"
            ),
        ),
    ]


def figures_of_texts() -> list[Case]:
    """How well images fit texts."""
    clip = zeros(models.from_config(small_clip()))
    pixels, words = np.zeros((1, 8, 8, 3), np.float32), {"module": "CLIPModel"}
    tokens = lambda texts, max_length: Tokenized(np.zeros((len(texts), max_length), np.int32))  # noqa: E731
    given = {"module": clip.module, "params": clip.params, "tokenizer": tokens, "prompts": ["a cat"]}
    similar = metrics.clip_similarities
    return [
        array_case("metrics.clip_similarities", similar, images=pixels, words=words, **given),
        array_case("metrics.clip_verifier", metrics.clip_verifier, words=words, **given),
        array_case("metrics.shapes_verifier", metrics.shapes_verifier, captions=["a red ring"]),
    ]


def labelled_images() -> data.Dataset:
    """A dataset of four images in each split."""
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32)
    rows = data.ArrayRows({"image": images, "label": np.arange(4) % 2})
    parts = dict.fromkeys(("train", "validation", "test"), rows)
    return data.Dataset("small", (8, 8, 1), tuple("0123456789"), parts)


@dataclasses.dataclass
class Tokenized:
    """What a tokenizer gives."""

    input_ids: Any


def small_clip() -> models.CLIPConfig:
    """CLIP of one layer on each side."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return models.CLIPConfig(
        text_config=models.CLIPTextConfig(vocab_size=8, max_position_embeddings=8, projection_dim=4, **sizes),
        vision_config=models.CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=4, **sizes),
        projection_dim=4,
    )


def statistics() -> list[Case]:
    """Moments, and figures of classes."""
    moments = metrics.add_rows(metrics.no_moments(3), FEATURES)
    rows = {"vectors": FEATURES, "labels": LABELS, "real_vectors": FEATURES, "real_labels": LABELS}
    return [
        Case("metrics.no_moments", metrics.no_moments, {"width": 3}),
        Case(
            "metrics.add_rows",
            metrics.add_rows,
            {"moments": moments, "features": FEATURES, "name": "features"},
        ),
        Case("metrics.merge_moments", metrics.merge_moments, {"a": moments, "b": moments}),
        Case("metrics.gaussian_of", metrics.gaussian_of, {"moments": moments, "name": "features"}),
        Case(
            "metrics.fit_gaussian_by_blocks",
            metrics.fit_gaussian_by_blocks,
            {"features": FEATURES, "name": "features"},
        ),
        Case("metrics.stratified_subset", metrics.stratified_subset, {"labels": LABELS, "number": 4}),
        Case(
            "metrics.diversity_ratio",
            metrics.diversity_ratio,
            rows,
            words=dict.fromkeys(rows, "vectors|labels"),
        ),
        Case(
            "metrics.health.check_diversity",
            metrics.health.check_diversity,
            rows | {"min_ratio": 0.5},
            words=dict.fromkeys(rows, "vectors|labels|diversity check"),
        ),
    ]


def health() -> list[Case]:
    """The health checks."""
    h, images = metrics.health, np.random.default_rng(0).normal(size=(4, 4, 4, 1))
    found = h.check_blank(images)
    cases = {
        "check_reconstruction": {"images": images, "reconstructions": images, "max_unexplained": 0.1},
        "check_terminal_latents": {"z_T": images, "sigma": 1.0, "tolerance": 0.1},
        "check_prediction_shape": {"output": images, "x_t": images},
        "check_guided": {"guided": images, "guidance_scale": 3.0, "unguided": None},
        "check_loss": {"losses": [1.0, 2.0]},
        "check_skipped": {"skipped": [0.0, 1.0], "max_share": 0.1},
        "check_posterior_collapse": {"mean": images, "log_variance": images, "min_kl": 0.01},
        "check_channels": {"kl": np.ones(3), "min_kl": 0.01},
        "check_blank": {"images": images, "min_contrast": 0.05, "max_share": 0.02},
        "check_saturation": {"images": images, "real_images": images, "max_contrast": 1.0, "max_excess": 0.1},
        "check_sharpness": {"images": images, "real_images": images, "min_ratio": 0.7},
        "failed": {"findings": found},
        "report": {"findings": found},
    }
    either = dict.fromkeys(
        ("images", "reconstructions", "mean", "log_variance"), "images|reconstruction|shapes"
    )
    return [
        Case(f"metrics.health.{name}", getattr(h, name), given, words=either) for name, given in cases.items()
    ]


def images_in_memory() -> list[Case]:
    """Images and labels in memory."""
    floats = np.zeros((2, 4, 4, 1), np.float32)
    return [
        array_case(
            "data.augment", data.augment, key=KEY, images=floats, strength=data.Augmentation(), fill=-1.0
        ),
        Case("data.from_uint8", data.from_uint8, {"pixels": PICTURES}),
        Case("data.to_uint8", data.to_uint8, {"images": floats}),
        Case("data.to_grey_levels", data.to_grey_levels, {"images": floats, "num_levels": 16}),
        Case(
            "data.from_grey_levels",
            data.from_grey_levels,
            {"levels": np.zeros((2, 4, 4), np.int32), "num_levels": 16},
        ),
        Case("data.describe_skipped", data.describe_skipped, {"skipped": [Skipped("a.png", "damaged")]}),
        Case(
            "data.check_images",
            data.check_images,
            {"images": floats, "shape": (4, 4, 1), "name": "images"},
            words={"shape": "shape|images"},
        ),
        Case(
            "data.check_labels",
            data.check_labels,
            {"labels": [0, 1], "num_images": 2, "num_classes": 2, "name": "labels"},
            words={"num_images": "num_images|labels", "num_classes": "num_classes|labels"},
        ),
        Case("data.fingerprint", lambda part: data.fingerprint(part), {"part": {"w": floats}}),
    ]


def batches_in_memory() -> list[Case]:
    """Batches of rows in memory."""
    batches = data.Batches({"image": IMAGES, "label": np.arange(2)}, 1, KEY)
    return [
        Case(
            "data.map_batches",
            data.map_batches,
            {"function": lambda rows: rows, "rows": IMAGES, "batch_size": 1},
        ),
        Case(
            "data.Buckets", data.Buckets, {"image_size": 96, "multiple": 8, "max_aspect": 2.0, "slack": 0.0}
        ),
        Case("data.assign_buckets", data.assign_buckets, {"sizes": [(9, 8)], "buckets": data.Buckets(16, 8)}),
        Case(
            "data.BucketedBatches",
            data.BucketedBatches,
            {
                "rows": batches.rows,
                "bucket_of": np.zeros(len(batches.rows), int),
                "batch_size": 1,
                "key": KEY,
            },
            words={"batch_size": "batch_size|examples", "bucket_of": "bucket", "rows": "rows|bucket_of"},
        ),
        Case(
            "data.Reader",
            data.Reader,
            {
                "batches": batches,
                "num_workers": 0,
                "num_threads": 1,
                "ahead": 1,
                "process": 0,
                "num_processes": 1,
            },
            words={"process": "process|batch", "num_processes": "num_processes|batch"},
        ),
        Case("data.Reader[...]", data.Reader(batches, ahead=0).__getitem__, {"*step": 1}),
        Case(
            "data.Batches",
            data.Batches,
            {"rows": {"image": IMAGES}, "batch_size": 1, "key": KEY, "shuffle": True, "part": slice(0, 1)},
            words={"rows": "rows|columns|examples"},
        ),
        Case("data.Batches[...]", batches.__getitem__, {"*step": 1}),
    ]


def of_diffusion() -> list[Case]:
    """What is left of `jaxldm.diffusion` and schedulers."""
    config = {"_class_name": "DDIMScheduler"}
    return [
        array_case(
            "D.implied_noise",
            D.implied_noise,
            x_0=IMAGES,
            x_t=IMAGES,
            alpha=0.5,
            sigma=0.5,
            words=dict.fromkeys(("alpha", "sigma"), "alpha|sigma|one number"),
        ),
        Case(
            "D.steps_within",
            D.steps_within,
            {"solver": D.solvers.heun(), "path": D.Flow(), "budgets": [3]},
            False,
        ),
        Case(
            "schedulers.default_solver",
            schedulers.default_solver,
            {"config": config},
            words={"config": "config"},
        ),
    ]
