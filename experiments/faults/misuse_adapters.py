"""The valid calls that `misuse` starts from, of files that change a model: LoRA, and words."""

from __future__ import annotations

import jax
import numpy as np

from experiments.faults.misuse_cases import Case
from experiments.faults.misuse_files import THERE, case, place
from experiments.faults.small_folders import class_pipeline
from jaxldm import checkpoints, models, pipelines


def adapters() -> list[Case]:
    """LoRA."""
    c, here = checkpoints, place()
    lora = c.load_lora(here / "lora")
    dense = {"mid_block": {"attentions_0": {"proj_in": {"kernel": np.zeros((4, 4), np.float32)}}}}
    parts = {"unet": (models.build("mini-unet"), dense)}
    return [
        case("checkpoints.load_lora", c.load_lora, path=here / "lora"),
        case(
            "checkpoints.merge_lora",
            c.merge_lora,
            components=parts,
            lora=lora,
            scale=0.5,
            words={"components": "component"},
        ),
        case(
            "checkpoints.save_lora",
            c.save_lora,
            path=here / "new-lora.safetensors",
            adapters={"unet": models.init_lora(jax.random.key(0), dense, 2, ["*/proj_in"])},
            scale=0.5,
            names="kohya",
            words={"adapters": "component|adapters|lora", "path": THERE + "|suffix|end in", "names": "names"},
        ),
        *words(),
        *changed_models(),
        case(
            "pipelines.with_lora",
            pipelines.with_lora,
            pipe=class_pipeline(),
            path=here / "dit-lora.safetensors",
            scale=1.0,
            words={"scale": "scale|component"},
        ),
        case(
            "checkpoints.load_ip_adapter",
            checkpoints.load_ip_adapter,
            path=here / "ip-adapter.safetensors",
            dtype=None,
        ),
        case(
            "pipelines.with_ip_adapter",
            pipelines.with_ip_adapter,
            pipe=pipelines.load(here / "texts"),
            path=here / "ip-adapter.safetensors",
            image_encoder=None,
            words={"image_encoder": f"image_encoder|{THERE}"},
        ),
        case(
            "pipelines.encode_image_prompts",
            pipelines.encode_image_prompts,
            pipe=class_pipeline(),
            images=np.zeros((8, 8, 3), np.uint8),
            words={"images": "IP-Adapter"},
        )._replace(refusal="IP-Adapter"),
    ]


def words() -> list[Case]:
    """Files of textual inversion."""
    c, here, vectors = checkpoints, place(), np.zeros((1, 8), np.float32)
    tokenizer = c.load_tokenizer(here / "tokenizer")
    hints = {
        "word": "word|family",
        "vectors": "vectors|family",
        "vectors_2": "vectors|family",
        "path": THERE + "|suffix|end in|family",
    }
    return [
        case("checkpoints.load_embedding", c.load_embedding, path=here / "a.safetensors", word=None),
        case(
            "checkpoints.save_embedding",
            c.save_embedding,
            path=here / "new-word.safetensors",
            word="<cat>",
            vectors=vectors,
            words=hints,
        ),
        case("checkpoints.with_word", c.with_word, tokenizer=tokenizer, word="<cat>", count=1),
        case(
            "pipelines.with_word",
            pipelines.with_word,
            pipe=class_pipeline(),
            word="<cat>",
            vectors=vectors,
            vectors_2=None,
            words=hints,
        )._replace(refusal="family"),
        case(
            "pipelines.with_embedding",
            pipelines.with_embedding,
            pipe=class_pipeline(),
            path=here / "a.safetensors",
            word=None,
            words=hints,
        )._replace(refusal="family"),
    ]


def changed_models() -> list[Case]:
    """Models that become others, and guidance by a weak network."""
    return [
        Case(
            "pipelines.with_control",
            pipelines.with_control,
            dict(pipe=class_pipeline(), control=[place() / "dit"], dtype=None),
            words={"control": "control", "dtype": "dtype|control"},
            refusal="takes no control",
        ),
        Case(
            "pipelines.with_free_u",
            pipelines.with_free_u,
            dict(pipe=class_pipeline(), s1=0.9, s2=0.2, b1=1.5, b2=1.6),
            words=dict.fromkeys(("s1", "s2", "b1", "b2"), "FreeU"),
            refusal="FreeU is for",
        ),
        Case(
            "pipelines.as_flux_control",
            pipelines.as_flux_control,
            dict(pipe=class_pipeline()),
            refusal="must be a FLUX.1 model",
        ),
        Case(
            "pipelines.read_weak_guidance",
            pipelines.read_weak_guidance,
            dict(notation="skip-layers:2.8"),
            words={"notation": "weak_guidance"},
        ),
        Case(
            "pipelines.SkipLayers",
            pipelines.SkipLayers,
            dict(layers=(7, 8), scale=2.8, start=0.01, stop=0.2),
        ),
        Case(
            "pipelines.PerturbedAttention",
            pipelines.PerturbedAttention,
            dict(layers=("mid_block",), scale=3.0, start=0.0, stop=1.0),
        ),
    ]
