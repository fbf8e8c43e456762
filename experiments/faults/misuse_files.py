"""The valid calls that `misuse` starts from, of what reads and writes files, which are small."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.faults.misuse_cases import Case, accept
from experiments.faults.readers import CLIP, DIT, VAE, lora_files, model_files, t5_files, write_files
from experiments.faults.small_folders import class_pipeline, write_export, write_run, write_texts, zeros
from jaxldm import checkpoints, data, metrics, models, pipelines
from jaxldm import diffusion as D
from jaxldm import training as T
from jaxldm.checkpoints.safetensors_file import safetensors_bytes
from jaxldm.pipelines.call import IMAGE_PROMPTS
from jaxldm.training.store import TrainingStore

# Checked behind the paths, so that the message may be about what lies there.
THERE = "there is no|does not exist|no run folder|holds|folder|file|config.json"
IMAGES = np.zeros((1, 8, 8, 3), np.float32)
NOWHERE = "there is no weight file"
PATHS = dict.fromkeys(("folder", "path", "pipeline_folder", "run_dir", "paths", "data_dir", "variant"), THERE)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="misuse-")  # removed with the process


@functools.cache
def place() -> Path:
    """A folder with one of each kind: models, pipelines, runs, pictures."""
    folder = Path(_scratch().name)
    write_files(folder / "clip", model_files(CLIP))
    write_files(folder / "vae", model_files(VAE))
    write_files(folder / "lora", lora_files("diffusers"))
    write_files(folder / "tokenizer", t5_files())
    write_export(folder / "export")
    write_run(folder / "run")
    with TrainingStore(folder / "run" / "diffusion" / "checkpoints") as store:
        store.save(1, {"params": {"w": np.zeros(2, np.float32)}})
    checkpoints.save_single_file(folder / "vae.safetensors", {"vae": of(VAE)})
    checkpoints.save_dit_file(folder / "dit.safetensors", *of(DIT))
    (folder / "a.safetensors").write_bytes(safetensors_bytes({"a": np.zeros(2, np.float32)}))
    for number in range(10):
        metrics.save_png(folder / "pictures" / f"{number}.png", np.zeros((8, 8, 3), np.uint8))
    (folder / "log.csv").write_text("epoch,step,loss,grad_norm,learning_rate,seconds\n1,1,0.5,1.0,0.1,0.5\n")
    down, up = np.ones((2, 16), np.float32), np.ones((48, 2), np.float32)
    tensors = {
        "transformer.blocks.0.attn.qkv.lora_A.weight": down,
        "transformer.blocks.0.attn.qkv.lora_B.weight": up,
    }
    (folder / "dit-lora.safetensors").write_bytes(safetensors_bytes(tensors))
    write_texts(folder / "texts")
    (folder / "ip-adapter.safetensors").write_bytes(safetensors_bytes(ip_adapter_of_texts()))
    return folder


def ip_adapter_of_texts() -> dict[str, np.ndarray]:
    """A plain IP-Adapter for the U-Net of `write_texts`, which has three attention layers."""
    shapes: dict[str, tuple[int, ...]] = {"proj.weight": (64, 6), "proj.bias": (64,)}
    shapes |= {"norm.weight": (16,), "norm.bias": (16,)}
    shapes = {f"image_proj.{name}": shape for name, shape in shapes.items()}
    shapes |= {f"ip_adapter.{n}.to_{kind}_ip.weight": (8, 16) for n in (1, 3, 5) for kind in "kv"}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@functools.cache
def of(config: Any) -> tuple[Any, dict]:
    """A network of zeros."""
    network = zeros(models.from_config(config))
    return network.module, network.params


def case(name: str, function: Any, /, words: dict[str, str] | None = None, **arguments: Any) -> Case:
    """A case whose valid call takes long enough not to be cheap."""
    return Case(name, function, arguments, False, PATHS | (words or {}))


def of_files() -> list[Case]:
    """What opens files and folders, or writes them."""
    return [
        *networks_on_disk(),
        *pipeline_folders(),
        *pipelines_in_memory(),
        *generation(),
        *runs(),
        *datasets(),
    ]


def networks_on_disk() -> list[Case]:
    """Folders of one network, and what they are made of."""
    c, here = checkpoints, place()
    module, params = of(CLIP)
    state = c.to_state_dict(params)
    options = {"dtype": None, "sharding": None}
    return [
        case("checkpoints.load", c.load, folder=here / "clip", variant=None, **options),
        case(
            "checkpoints.save",
            c.save,
            folder=here / "saved",
            module=module,
            params=params,
            max_shard_size=10**9,
            words={"params": "params|parameters|tensor"},
        ),
        case("checkpoints.module_in", c.module_in, folder=here / "clip"),
        case("checkpoints.read_config", c.read_config, folder=here / "clip"),
        case("checkpoints.published", c.published, params=params),
        case("checkpoints.to_state_dict", c.to_state_dict, params=params),
        case(
            "checkpoints.from_state_dict",
            c.from_state_dict,
            state=state,
            template_params=params,
            words={"state": "state|weights", "template_params": "template_params|weights"},
            **options,
        ),
        case("checkpoints.hash_of_files", c.hash_of_files, paths=[here / "clip" / "config.json"]),
        case("checkpoints.read_weights", c.read_weights, path=here / "a.safetensors"),
        case("checkpoints.load_tokenizer", c.load_tokenizer, folder=here / "tokenizer"),
        case(
            "tokenizer(...)",
            c.load_tokenizer(here / "tokenizer"),
            texts=["at"],
            max_length=8,
            special_tokens=True,
        ),
        case("tokenizer.save", c.load_tokenizer(here / "tokenizer").save, folder=here / "saved-tokenizer"),
        case("checkpoints.load_inception", c.load_inception, path=here / "nowhere")._replace(refusal=NOWHERE),
        case("checkpoints.load_lpips", c.load_lpips, path=here / "nowhere")._replace(refusal=NOWHERE),
    ]


def pipeline_folders() -> list[Case]:
    """Folders of pipelines, and of samples."""
    c, p, here, pipe = checkpoints, pipelines, place(), class_pipeline()
    network = pipe.denoiser
    return [
        case("checkpoints.read_model_index", c.read_model_index, folder=here / "export"),
        case(
            "checkpoints.load_components",
            c.load_components,
            pipeline_folder=here / "export",
            dtype=None,
            only=["transformer"],
            sharding=None,
            variant=None,
            words={"only": "only|component"},
        ),
        case(
            "checkpoints.save_components",
            c.save_components,
            folder=here / "components",
            class_name="LatentDiffusionPipeline",
            components={"transformer": (network.module, network.params), "n": 3},
            options={"id2label": {}},
            words={"components": "component"},
        ),
        case(
            "pipelines.load",
            p.load,
            folder=here / "export",
            reference_quirks=False,
            **dict.fromkeys(("dtype", "variant", "family", "vae", "mesh", "rules", "controlnet")),
            words={"vae": f"vae|{THERE}", "controlnet": f"controlnet|{THERE}"},
        ),
        case(
            "pipelines.load_original",
            p.load_original,
            path=here / "dit.safetensors",
            architecture="DiT",
            vae=of(VAE),
            prediction=None,
            class_names=["a", "b", "c"],
            num_heads=2,
            dtype=None,
            words={"num_heads": "heads", "vae": f"vae|{THERE}", "class_names": "class_names|id2label"},
        ),
        case("pipelines.save", p.save, pipe=pipe, folder=here / "saved-pipeline"),
        case("pipelines.kind_of", p.kind_of, folder=here / "export", family=None),
        case("pipelines.modules_in", p.modules_in, folder=here / "export", family=None),
        case("pipelines.check_export_folder", p.check_export_folder, folder=here / "new", family=pipe.family),
        case("pipelines.check_output_folder", p.check_output_folder, folder=here / "new"),
        case(
            "pipelines.save_samples",
            p.save_samples,
            folder=here / "samples",
            images=IMAGES,
            labels=[0],
            columns=1,
        ),
    ]


def pipelines_in_memory() -> list[Case]:
    """What is made of networks, or asked of a pipeline."""
    p, pipe = pipelines, class_pipeline()
    network = pipe.denoiser
    return [
        case("pipelines.components", lambda pipe: list(p.components(pipe)), pipe=pipe),
        case("pipelines.compare", p.compare, first=pipe, second=pipe),
        case(
            "pipelines.invert",
            lambda pipe, image, iterations: p.invert(
                pipe, image, "a", iterations=iterations, num_inference_steps=1
            ),
            pipe=p.load(place() / "texts"),
            image=np.zeros((16, 16, 3), np.uint8),
            iterations=1,
        ),
        case("pipelines.is_denoiser", p.is_denoiser, config=network.config),
        case(
            "pipelines.join_wuerstchen", p.join_wuerstchen, prior=pipe, decoder=pipe, words=TWO_STAGES
        )._replace(refusal="must be a WuerstchenPriorPipeline"),
        case(
            "pipelines.class_to_image",
            p.class_to_image,
            denoiser=network,
            prediction=D.v(D.VP.named("linear")),
            autoencoder=None,
            guided_channels=None,
        ),
        case(
            "pipelines.default_latent_spec",
            p.default_latent_spec,
            pipe=pipe,
            patch=1,
            in_channels=3,
            default_size=None,
            words={"in_channels": "channels"},
        ),
        Case(
            "pipelines.as_images", p.as_images, {"images": IMAGES, "name": "image"}, words={"images": "image"}
        ),
        Case("pipelines.as_masks", p.as_masks, {"masks": IMAGES[..., :1] > 0, "size": (8, 8)}, words=MASKS),
        Case(
            "pipelines.check_drawn",
            p.check_drawn,
            {"images": IMAGES, "guidance_scale": 1.0},
            words={"images": "images|outputs"},
        ),
        Case("pipelines.columns_for", p.columns_for, {"num_images": 9, "num_labels": 3}),
    ]


def generation() -> list[Case]:
    """What computes with the networks of a pipeline."""
    c, p, here = checkpoints, pipelines, place()
    vae = pipelines.Network(*of(VAE))
    return [
        case(
            "pipelines.generate",
            p.generate,
            pipe=pipelines.load(here / "texts"),
            key=jax.random.key(0),
            prompt="a cat",
            negative_prompt=None,
            num_inference_steps=1,
            output="latents",
            prompt_embeds=None,
            negative_prompt_embeds=None,
            pooled_prompt_embeds=None,
            prompt_attention_mask=None,
            resize=None,
            output_type=None,
            on_x0=None,
            **dict.fromkeys(IMAGE_PROMPTS),
            words={"num_inference_steps": "steps", "prompt": "prompt"},
        ),
        case("pipelines.encode_images", p.encode_images, vae=vae, images=IMAGES, words=PICTURES),
        case(
            "pipelines.decode_images",
            p.decode_images,
            vae=vae,
            latents=np.zeros((1, 8, 8, 2), np.float32),
            tiling=None,
            image=None,
            mask=None,
            batch_size=1,
            devices=None,
            in_flight=None,
            words={"latents": "latents|inputs"},
        ),
        case("pipelines.previewer", p.previewer, vae=vae, show=accept, every=1),
        case(
            "pipelines.encode_texts",
            p.encode_texts,
            encoder=pipelines.Network(*of(CLIP)),
            tokenizer=c.load_tokenizer(here / "tokenizer"),
            texts=["at"],
            skip=0,
            final_norm=True,
            warn=True,
            max_length=8,
            mask=False,
            template="{}",
            layers=None,
            special_tokens=True,
            words={"skip": "skip"},
        ),
    ]


PICTURES = {"images": "images|inputs"}
TWO_STAGES = {"prior": "prior|lacks|part", "decoder": "decoder|lacks|part"}
MASKS = {"masks": "mask", "size": "size|mask_image"}


def runs() -> list[Case]:
    """Runs of trainings."""
    here, recipe = place(), T.RECIPES["smoke-dit"]
    images = {"image": np.zeros((64, 28, 28, 1), np.float32), "label": np.zeros(64, np.int32)}
    dataset = data.Dataset("small", (28, 28, 1), tuple("0123456789"), {"train": data.ArrayRows(images)})
    return [
        case("T.read_recipe", T.read_recipe, run_dir=here / "run"),
        case("T.read_config", T.read_config, run_dir=here / "run"),
        case("T.read_data", T.read_data, run_dir=here / "run")._replace(refusal="was trained with [8, 8, 1]"),
        case("T.recipe_to_resume", T.recipe_to_resume, run_dir=here / "run"),
        case("T.kept_steps", T.kept_steps, run_dir=here / "run", stage="diffusion"),
        case(
            "T.read_kept",
            T.read_kept,
            run_dir=here / "run",
            step=1,
            stage="diffusion",
            words=dict.fromkeys(("run_dir", "step", "stage"), "run_dir|step|stage|checkpoint|there is no"),
        ),
        case(
            "T.post_hoc_ema",
            T.post_hoc_ema,
            run_dir=here / "run",
            relative_length=0.1,
            step=None,
            stage="diffusion",
            words=dict.fromkeys(("run_dir", "step", "stage"), "run_dir|step|stage|checkpoint"),
        )._replace(refusal="averages"),
        case("T.read_log", T.read_log, path=here / "log.csv", words={"path": "path|log"}),
        case("T.stages_of", T.stages_of, recipe=recipe),
        case(
            "T.check_recipe",
            T.check_recipe,
            recipe=recipe,
            dataset=dataset,
            mesh=T.make_mesh(1),
            words={"dataset": "dataset|split"},
        ),
        case(
            "T.train",
            functools.partial(T.train, run_dir="/dev/null/run"),  # where nothing can be written
            recipe=recipe,
            resume=False,
            devices=1,
            log=print,
            bar=False,
            words=dict.fromkeys(
                ("recipe", "resume", "log", "bar", "devices"), "recipe|part of that path|devices"
            ),
        )._replace(refusal="cannot write"),
        Case("T.RunFolder", T.RunFolder, {"path": "run"}),
        case("T.write_report", T.write_report, run_dir=here / "run"),
        Case(
            "T.finetune_recipe",
            T.finetune_recipe,
            {"source": "sd", "data": "pictures", "method": "lora", "image_size": 8, "seed": 0},
            words={"data": "data|pictures", "image_size": "image_size|does not exist"},
        ),
    ]


def datasets() -> list[Case]:
    """Images of files, and their cache."""
    here = place()
    return [
        Case(
            "data.load",
            data.load,
            {"name": "no/such", "data_dir": here, "image_size": None, "pad_to": None, "hold_out": True},
            False,
            PATHS
            | dict.fromkeys(
                ("name", "image_size", "pad_to", "data_dir", "hold_out"),
                "name|dataset|data set|size|pad_to|hold_out",
            ),
            refusal="unknown dataset",
        ),
        Case(
            "data.load_folder",
            data.load_folder,
            {"image_size": 4, "pad_to": 8, "max_skipped": 0.1, "hold_out": False}
            | {"folder": here / "pictures"},
            words=PATHS
            | {
                "folder": "folder|file|pictures",
                "image_size": "image_size|pictures",
                "max_skipped": "max_skipped|pictures",
                "pad_to": "pad_to|pictures",
            },
        ),
        Case("data.edges", data.edges, {"images": np.zeros((1, 4, 4, 3), np.float32)}),
        Case("data.source_name", data.source_name, {"dataset": here}),
        Case("data.data_folder", data.data_folder, {"data_dir": here}),
        Case(
            "data.cached",
            data.cached,
            {"path": here / "cache.npz", "key": "k", "compute": lambda: {"a": np.zeros(2)}},
            words=PATHS | {"compute": "compute"},
        ),
        Case(
            "data.sharded",
            data.sharded,
            {
                "folder": here / "shards",
                "key": "k",
                "num_rows": 3,
                "compute": lambda start, stop: {"a": np.zeros(stop - start)},
                "rows_per_shard": 2,
            },
            words=PATHS | {"compute": "compute"},
        ),
        *pictures(),
    ]


def pictures() -> list[Case]:
    """Pictures that are read and written."""
    here = place()
    return [
        Case(
            "metrics.open_image_set",
            metrics.open_image_set,
            {"path": here / "pictures"},
            words=PATHS | {"path": "images|path|pictures|file"},
        ),
        Case(
            "metrics.save_png",
            metrics.save_png,
            {"path": here / "p.png", "picture": np.zeros((4, 4, 1), np.uint8)},
            words=PATHS,
        ),
    ]
