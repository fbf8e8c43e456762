"""Whole pipeline folders, against what diffusers writes and opens. No network is run here."""

import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from tokenizer_folders import clip_folder

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, StorageError, UnknownNameError

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A StableDiffusionPipeline without a safety checker, saved, and its folder."""
    torch.manual_seed(0)
    words = tmp_path_factory.mktemp("words")
    clip_folder(words)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(words)
    text_config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    pipe = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(
            sample_size=4,
            block_out_channels=(8,),
            norm_num_groups=4,
            layers_per_block=1,
            cross_attention_dim=8,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        ),
        vae=diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8),
        text_encoder=transformers.CLIPTextModel(text_config),
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    pipe.save_pretrained(folder)
    return pipe, folder


@pytest.fixture(scope="module")
def loaded(reference):
    return checkpoints.load_components(reference[1])


NETWORKS = ("unet", "vae", "text_encoder")


def assert_same_weights(components, pipe):
    for name in NETWORKS:
        theirs = getattr(pipe, name).state_dict()
        ours = checkpoints.to_state_dict(components[name][1])
        known = {
            key if key in theirs else key.removeprefix("text_model."): value for key, value in ours.items()
        }
        assert known.keys() == {key for key in theirs if not key.endswith("position_ids")}
        for key, value in known.items():
            np.testing.assert_array_equal(value, theirs[key].numpy(), key)


def test_the_index_names_what_is_there(reference):
    assert checkpoints.read_model_index(reference[1]) == {
        "scheduler": ("diffusers", "DDIMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", type(reference[0].tokenizer).__name__),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }


def test_components_of_diffusers(reference, loaded):
    assert loaded.keys() == {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    assert_same_weights(loaded, reference[0])
    assert loaded["scheduler"]["_class_name"] == "DDIMScheduler"
    assert loaded["scheduler"]["beta_schedule"] == "scaled_linear"
    texts = ["a photo of a cat", ""]
    theirs = reference[0].tokenizer(texts, padding="max_length", max_length=77)["input_ids"]
    np.testing.assert_array_equal(loaded["tokenizer"](texts).input_ids, theirs)


def test_some_of_the_components_in_another_dtype(reference):
    some = checkpoints.load_components(reference[1], dtype="bfloat16", only=["vae", "scheduler"])
    assert some.keys() == {"vae", "scheduler"}
    assert some["vae"][0].config.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(some["vae"][1])} == {"bfloat16"}
    with pytest.raises(UnknownNameError, match="unet"):
        checkpoints.load_components(reference[1], only=["unets"])


def test_components_for_diffusers(loaded, tmp_path, caplog):
    shaken = {
        name: (loaded[name][0], jax.tree.map(lambda leaf: leaf + 0.5, loaded[name][1])) for name in NETWORKS
    }
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    components = loaded | shaken | options
    for _ in range(2):  # the second time it replaces the first
        checkpoints.save_components(tmp_path / "out", "StableDiffusionPipeline", components)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    assert type(pipe) is diffusers.StableDiffusionPipeline and not caplog.records
    assert pipe.safety_checker is None and pipe.scheduler.config.beta_schedule == "scaled_linear"
    assert_same_weights(shaken, pipe)
    again = checkpoints.load_components(tmp_path / "out")
    for name in NETWORKS:
        assert again[name][0] == loaded[name][0]
        jax.tree.map(np.testing.assert_array_equal, again[name][1], shaken[name][1])
    np.testing.assert_array_equal(again["tokenizer"](["a cat"])[0], loaded["tokenizer"](["a cat"])[0])


def write_index(folder, **entries):
    folder.mkdir(exist_ok=True)
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0", **entries}
    (folder / "model_index.json").write_text(json.dumps(index))


def test_what_no_picture_needs_is_left_out(tmp_path):
    module = models.build("mini-autoencoder", block_out_channels=(8, 16), sample_size=8)
    checkpoints.save(tmp_path / "vae", module, models.init(module, jax.random.key(0)))
    write_index(
        tmp_path,
        vae=["jaxldm", "ConvAutoencoder"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        unet=[None, None],
        force_zeros_for_empty_prompt=True,
    )
    assert checkpoints.load_components(tmp_path).keys() == {"vae"}
    with pytest.raises(CheckpointError, match="image_encoder"):
        checkpoints.load_components(tmp_path, only=["image_encoder"])


def test_the_index_says_which_class_it_is(tmp_path):
    module = models.build("mini-autoencoder", block_out_channels=(8, 16), sample_size=8)
    checkpoints.save(tmp_path / "vae", module, models.init(module, jax.random.key(0)))
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "TheWholeModel"}))
    write_index(tmp_path, vae=["jaxldm", "ConvAutoencoder"])
    assert checkpoints.load_components(tmp_path)["vae"][0] == module
    write_index(tmp_path, vae=["diffusers", "AutoencoderOobleck"])
    with pytest.raises(
        CheckpointError, match=r"vae: config\.json has _class_name 'AutoencoderOobleck'; known"
    ):
        checkpoints.load_components(tmp_path)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"unet": ["diffusers"]}, r"\['diffusers'\] as unet"),
        ({"unet": ["diffusers", 3]}, "as unet"),
        ({"../unet": ["diffusers", "UNet2DConditionModel"]}, "outside its folder"),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, "there is no model folder .*unet"),
        ({"scheduler": ["diffusers", "DDIMScheduler"]}, "scheduler_config"),
        ({"tokenizer": ["transformers", "CLIPTokenizer"]}, "there is no tokenizer folder"),
    ],
)
def test_a_wrong_index(tmp_path, entry, words):
    write_index(tmp_path, **entry)
    with pytest.raises(CheckpointError, match=words):
        checkpoints.load_components(tmp_path)


def test_no_pipeline_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        checkpoints.load_components(tmp_path)
    with pytest.raises(CheckpointError, match="there is no pipeline folder"):
        checkpoints.read_model_index(tmp_path / "nowhere")
    (tmp_path / "model_index.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        checkpoints.read_model_index(tmp_path)


def test_other_files_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match=r"thesis\.tex"):
        checkpoints.save_components(tmp_path, "StableDiffusionPipeline", {"scheduler": SCHEDULER})
    write_index(tmp_path)
    with pytest.raises(StorageError, match=r"thesis\.tex"):
        checkpoints.save_components(tmp_path, "StableDiffusionPipeline", {"scheduler": SCHEDULER})
    with pytest.raises(StorageError, match="is a file"):
        checkpoints.save_components(tmp_path / "thesis.tex", "StableDiffusionPipeline", {})
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_failing_save_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="without _class_name"):
        checkpoints.save_components(tmp_path / "out", "DDIMPipeline", {"scheduler": {"beta_start": 0.1}})
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_refused(reference, tmp_path):
    """JAX would answer such a token with the last row of the embedding, and say nothing."""
    folder = tmp_path / "sd"
    shutil.copytree(reference[1], folder)
    only = ["tokenizer", "text_encoder"]
    tokenizer = checkpoints.load_components(folder, only=only)["tokenizer"]
    size = tokenizer.largest_token + 1
    path = folder / "tokenizer" / "tokenizer.json"
    entries = json.loads(path.read_text())
    entries["added_tokens"].append(entries["added_tokens"][-1] | {"id": size, "content": "<my-cat>"})
    path.write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match=f"tokens up to {size}, its text encoder embeddings of {size}"):
        checkpoints.load_components(folder, only=only)
    assert checkpoints.load_components(folder, only=["tokenizer"])["tokenizer"].largest_token == size
