"""Training on captions: states of a frozen encoder, and a run that is a folder of Stable Diffusion."""

import dataclasses
import html
import json
import re
import shutil
import types

import diffusers
import jax
import numpy as np
import pytest
from PIL import Image

from jaxldm import checkpoints, models, pipelines, schedulers, training
from jaxldm import diffusion as D
from jaxldm.commands import eval_images, hints, inspect_checkpoints, inspect_sections
from jaxldm.commands.eval import Eval, load_classifier
from jaxldm.commands.info import describe
from jaxldm.commands.inspect import Inspect
from jaxldm.commands.inspect_subject import Subject
from jaxldm.data import ArrayRows, shards
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError
from jaxldm.training import text as text_room
from jaxldm.training.diffusion import Condition, build_denoiser, make_loss
from jaxldm.training.few_steps.networks import student_network
from jaxldm.training.finetuning import denoising, tuned_of
from jaxldm.training.finetuning import make_loss as make_adapter_loss
from jaxldm.training.runs import RunFolder, save_denoiser
from jaxldm.training.text import CaptionedRows, encode_captions, load_text_parts, text_pipeline

STATES = "encoder_hidden_states"

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dark", "light", "picture"]
BERT = models.BertConfig(
    vocab_size=len(WORDS),
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=12,
)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A tiny BERT of random weights, with a tokenizer of nine words."""
    folder = tmp_path_factory.mktemp("encoder")
    module = models.from_config(BERT)
    checkpoints.save(folder / "text_encoder", module, models.init(module, jax.random.key(0)))
    (folder / "tokenizer").mkdir()
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 512, "pad_token": "[PAD]"}
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def recipe(encoder_folder, tmp_path_factory):
    """The smallest recipe with captions, on 40 plain pictures."""
    tmp_path = tmp_path_factory.mktemp("data")
    for n in range(40):
        path = tmp_path / "pictures" / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 250 * (n % 2), np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"a {('dark', 'light')[n % 2]} picture")
    stage = {"epochs": 1, "batch_size": 8, "save_every": 0}
    return training.Recipe(
        name="tiny-text",
        data=str(tmp_path / "pictures"),
        autoencoder=training.AutoencoderRecipe(
            preset="sd-vae",
            overrides={
                "block_out_channels": (8,),
                "down_block_types": ("DownEncoderBlock2D",),
                "up_block_types": ("UpDecoderBlock2D",),
                "layers_per_block": 1,
                "norm_num_groups": 4,
            },
            **stage,
        ),
        diffusion=training.DiffusionRecipe(
            preset="sd15-unet",
            overrides={
                "block_out_channels": (8,),
                "down_block_types": ("CrossAttnDownBlock2D",),
                "up_block_types": ("UpBlock2D",),
                "mid_block_type": None,
                "layers_per_block": 1,
                "attention_head_dim": 2,
                "norm_num_groups": 4,
            },
            prediction=D.v(D.VP.named("cosine")),
            sample_every=1,
            sample_steps=2,
            samples_per_class=1,
            **stage,
        ),
        text=training.TextRecipe(encoder=str(encoder_folder), max_length=6),
    )


def pipeline_of(recipe, preset="sd15-unet", **overrides):
    """The pipeline that encodes captions for a network."""
    own = dataclasses.replace(
        recipe.diffusion, preset=preset, overrides=overrides or recipe.diffusion.overrides
    )
    module = build_denoiser(dataclasses.replace(recipe, diffusion=own), (8, 8, 3), 2)
    return text_pipeline(module, load_text_parts(recipe.text))


def test_states_are_those_of_the_pipelines_and_are_kept(recipe, tmp_path, monkeypatch):
    pipe = pipeline_of(recipe)
    assert pipe.unet.config.cross_attention_dim == 8
    captions = ["a dark picture", "a light picture", "a dark picture"]
    monkeypatch.setattr(text_room, "_TEXTS_AT_ONCE", 2)  # the empty text is one, too
    monkeypatch.setattr(shards, "SHARD_BYTES", 3 * 2 * 6 * 8 - 1)  # of float16: two texts in each
    found = encode_captions(pipe, captions, (8, 8), tmp_path / "captions")
    kept = found.texts.take(np.arange(3))[STATES]
    assert kept.shape == (3, 6, 8) and kept.dtype == np.float16 and len(found.texts) == 3
    assert len(found.texts.paths) == 2 and found.which[0] == found.which[2] != found.which[1]
    expected = pipelines.prompts.encode_texts(pipe.text_encoder, pipe.tokenizer, ["", *captions]).hidden
    np.testing.assert_allclose(found.null[STATES], expected[0], atol=2e-3)
    rows = CaptionedRows(ArrayRows({"mean": np.arange(3.0)}), found)
    taken = rows.take(np.array([2, 1]))
    assert taken["mean"].tolist() == [2, 1] and taken[STATES].dtype == np.float32
    np.testing.assert_allclose(taken[STATES], expected[[3, 2]], atol=2e-3)
    monkeypatch.setattr(type(pipe.text_encoder.module), "__call__", None)  # they come from the cache
    again = encode_captions(pipe, captions, (8, 8), tmp_path / "captions")
    np.testing.assert_array_equal(again.texts.take(np.arange(3))[STATES], kept)
    assert again.null.keys() == found.null.keys()


def test_a_dropped_caption_is_the_empty_one(monkeypatch):
    seen = []

    def network(module):
        def call(params, x, t, condition, dropout_key):
            jax.debug.callback(seen.append, condition[STATES])
            return x

        return call

    monkeypatch.setattr(models, "network", network)
    recipe = training.DiffusionRecipe(condition_dropout=0.5)
    null = np.full((3, 2), -7, np.float32)
    loss_fn = make_loss(recipe, models.build("tiny-dit"), Condition({STATES: null}))
    states = np.arange(64 * 6, dtype=np.float32).reshape(64, 3, 2)
    batch = {"mean": np.zeros((64, 2, 2, 1), np.float32), STATES: states}
    jax.block_until_ready(jax.jit(lambda batch: loss_fn({}, None, batch, jax.random.key(0)))(batch))
    jax.effects_barrier()
    dropped = (np.asarray(seen[0]) == null).all(axis=(1, 2))
    assert 20 < dropped.sum() < 44
    np.testing.assert_array_equal(np.asarray(seen[0])[~dropped], states[~dropped])


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    return training.train(recipe, tmp_path_factory.mktemp("runs") / "run", log=lambda line: None, bar=False)


def test_a_run_is_a_pipeline_folder_that_draws_from_prompts(run, tmp_path):
    pipe = pipelines.load(run.path)
    assert pipelines.kind_of(run.path) == "text-to-image" and pipe.family.name == "StableDiffusion"
    assert pipe.tokenizer.max_length == 6
    assert list((run.path / "diffusion" / "samples").glob("*.png"))
    text = describe(str(run.path))
    assert "run of the recipe tiny-text" in text and "text_encoder" in text and "--prompt" in text
    caption = training.read_data(run.path).captions("test", 1)[0]
    assert f"--prompt '{caption}'" in hints.sample_run(run.path)  # and not of a cat in the snow
    with pytest.raises(CheckpointError, match="draws from texts"):
        load_classifier(str(run.path))
    pipelines.save(pipe, tmp_path / "exported")
    assert not any(row.difference for row in pipelines.compare(pipe, pipelines.load(tmp_path / "exported")))


def test_a_run_is_inspected_with_its_own_images_and_captions(run, tmp_path, monkeypatch):
    monkeypatch.setattr(inspect_sections, "MOST_PATCHES", 40)
    Inspect(str(run.path), str(tmp_path), num_images=2, num_inference_steps=2, quiet=True).run()
    page = html.unescape((tmp_path / "index.html").read_text())
    assert "test images of" in page and "The captions, row by row: a " in page
    assert re.search(r"Words of 'a (dark|light) picture' over its image", page)
    assert re.search(r'"a (dark|light) picture", seen from one patch', page)
    assert "no finished classifier" in page and "guidance scale 3." in page
    with_prompt = Inspect(str(run.path), prompt="a dark picture")
    nothing = np.zeros((1, 1, 1, 3), np.float32)
    subject = Subject(None, nothing, nothing, np.zeros(1, np.int32), ("image",), {}, {}, "images")
    note = inspect_checkpoints.checkpoint_section(subject, with_prompt, None, print).note
    assert "Leave out --prompt" in note


def test_the_images_of_a_run_are_those_of_its_captions(run, tmp_path, monkeypatch):
    options = Eval(str(run.path), real=str(run.path), num_images=5, num_inference_steps=2, quiet=True)
    captions = eval_images.captions_to_draw(options)
    assert len(captions) == 5 and set(captions) <= {"a dark picture", "a light picture"}
    images, real = eval_images.generated_images(options, captions), eval_images.real_images(str(run.path))
    assert images.count == 5 and images.size == real.size == (8, 8)
    (tmp_path / "lines.txt").write_text("a light picture\na dark picture\n")
    own = dataclasses.replace(options, prompts=str(tmp_path / "lines.txt"))
    assert eval_images.captions_to_draw(own) == ["a light picture", "a dark picture"]
    with pytest.raises(CheckpointError, match=f"--real {run.path} --metrics"):
        load_classifier(str(run.path))


def test_diffusers_draws_the_same_pictures_from_it(run):
    import torch

    prompts = ["a dark picture", "a light picture"]
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(run.path)
    theirs.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0}
    start = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    expected = theirs(prompts, latents=start, output_type="np", height=8, width=8, **options).images
    images = pipelines.load(run.path)(jax.random.key(0), prompts, latents=latents, **options)
    assert images.shape == (2, 8, 8, 3)
    np.testing.assert_allclose(np.clip(images, -1, 1) / 2 + 0.5, expected, atol=2e-3)


def test_diffusers_draws_the_same_from_a_latent_consistency_student(run, tmp_path):
    """The guidance scale is an input of the U-Net as there, and the scheduler is theirs."""
    import torch

    recipe = training.distill_recipe(run.path, "lcm", guidance_scale=(1.0, 4.0), epochs=1, sample_every=0)
    student = training.train(recipe, tmp_path / "student", devices=1, log=lambda line: None, bar=False)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(student.path)
    theirs.set_progress_bar_config(disable=True)
    assert isinstance(theirs.scheduler, diffusers.LCMScheduler)
    assert theirs.unet.config.time_cond_proj_dim == 256
    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    start = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    options = {"num_inference_steps": 1, "guidance_scale": 3.0}
    expected = theirs(["a dark picture"], latents=start, output_type="np", height=8, width=8, **options)
    pipe = pipelines.load(student.path)
    images = pipe(jax.random.key(0), ["a dark picture"], latents=latents, **options)
    np.testing.assert_allclose(np.clip(images, -1, 1) / 2 + 0.5, expected.images, atol=2e-3)
    assert pipe.few_steps.guidance == "input" and pipe.default_steps() == 4
    text, path = " ".join(describe(str(student.path)).split()), run.path
    assert f"student by lcm, from the teacher {path} steps 1 to 50, 4 by default, by the solver lcm" in text
    assert "guidance of scales from 1 to 4, inside: the network takes the scale, 3 by default" in text
    with pytest.raises(InvalidArgumentError, match="scales from 1 to 4, got 5"):
        pipe(jax.random.key(0), ["a dark picture"], guidance_scale=5.0)
    with pytest.raises(InvalidArgumentError, match=r"inside this lcm student, and true_cfg_scale=2 would"):
        pipe(jax.random.key(0), ["a dark picture"], true_cfg_scale=2.0)


def test_diffusers_draws_the_same_from_a_latent_consistency_adapter(run, tmp_path):
    """Only the adapter is trained; its file belongs to the teacher, the scheduler is theirs."""
    import torch

    def weights(folder):
        return checkpoints.to_state_dict(checkpoints.load(folder / "unet")[1])

    lora = training.LoraRecipe(rank=2, alpha=1.0)
    options = {"guidance_scale": 2.0, "epochs": 2, "sample_every": 1, "save_every": 1, "learning_rate": 0.02}
    recipe = training.distill_recipe(run.path, "lcm", lora=lora, **options)
    assert training.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    student = training.train(recipe, tmp_path / "student", devices=1, log=lambda line: None, bar=False)
    before, after = weights(run.path), weights(student.path)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and all(".attn" in name and ".to_" in name for name in changed)

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(run.path)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.LCMScheduler.from_config(theirs.scheduler.config)
    theirs.load_lora_weights(student.path)
    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    start = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    call = {"num_inference_steps": 1, "guidance_scale": 1.0}
    words = ["a dark picture"]
    expected = theirs(words, latents=start, output_type="np", height=8, width=8, **call).images
    pipe, teacher = pipelines.load(student.path), pipelines.load(run.path)
    with_file = pipelines.with_lora(teacher, student.path)
    for own, more in ((pipe, {}), (with_file, {"solver": "lcm"})):
        images = own(jax.random.key(0), words, latents=latents, **call, **more)
        np.testing.assert_allclose(np.clip(images, -1, 1) / 2 + 0.5, expected, atol=2e-3)
    plain = teacher(jax.random.key(0), words, latents=latents, **call, solver="lcm")
    assert np.abs(np.clip(plain, -1, 1) / 2 + 0.5 - expected).max() > 1e-2
    kept = training.read_kept(student.path, training.kept_steps(student.path)[-1])
    again = student_network(recipe.diffusion.few_steps, kept.params)
    for name, tensor in checkpoints.to_state_dict(again).items():
        np.testing.assert_allclose(tensor, after[name], atol=1e-6, err_msg=name)


def test_what_does_not_fit_is_refused_before_anything_is_written(recipe, tmp_path):
    def refused(error, words, **changes):
        with pytest.raises(error, match=words):
            training.train(dataclasses.replace(recipe, **changes), tmp_path / "run", log=print)
        assert not (tmp_path / "run").exists()

    longer = dataclasses.replace(recipe.text, max_length=13)
    absent = dataclasses.replace(recipe.text, encoder=str(tmp_path / "absent"))
    of_classes = training.DiffusionRecipe(preset="tiny-dit")
    refused(InvalidArgumentError, "more than the 12 tokens", text=longer)
    shorter, words = dataclasses.replace(recipe.text, max_length=4), "captions are longer than the 4 tokens"
    refused(InvalidArgumentError, rf"2 of 2 {words}.*'a \w+ picture': .* raise max_length", text=shorter)
    refused(CheckpointError, "absent", text=absent)
    refused(InvalidArgumentError, "UNet2DConditionModel", diffusion=of_classes)
    refused(InvalidArgumentError, "without text", text=None)
    wide = dataclasses.replace(
        recipe.diffusion, overrides={**recipe.diffusion.overrides, "cross_attention_dim": 16}
    )
    refused(InvalidArgumentError, "cross_attention_dim 16, and its text encoders make 8", diffusion=wide)
    silent = shutil.copytree(recipe.data, tmp_path / "pictures", ignore=shutil.ignore_patterns("*.txt"))
    refused(DataError, "trained on captions", data=str(silent))
    with pytest.raises(InvalidArgumentError, match="needs an autoencoder"):
        dataclasses.replace(recipe, autoencoder=None)


HEADS = {"attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 1}
MMDIT = {**HEADS, "caption_projection_dim": 16, "pos_embed_max_size": 4}
# Network -> its overrides, and the encoders of its pipeline besides the first.
OTHERS = {
    "pixart-sigma": ({**HEADS, "cross_attention_dim": 16}, {}),
    "sd3-medium": (MMDIT, {"encoder_3": "t5"}),
    "flux-schnell": ({**HEADS, "num_single_layers": 1, "axes_dims_rope": (2, 2, 4)}, {"encoder_2": "t5"}),
    "sdxl-unet": (
        {
            "block_out_channels": (8,),
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("UpBlock2D",),
            "mid_block_type": None,
            "layers_per_block": 1,
            "transformer_layers_per_block": 1,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            "addition_time_embed_dim": 4,
        },
        {"encoder_2": "clip"},
    ),
}


@pytest.fixture(scope="module")
def encoders(encoder_folder, tmp_path_factory):
    """A CLIP with projection, one without, and a T5 of random weights, with the same tokenizer."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    clip = {**sizes, "vocab_size": len(WORDS), "projection_dim": 6, "eos_token_id": 3}
    t5 = {"d_model": 10, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": len(WORDS)}
    modules = {"clip": models.build("openclip-bigg", **clip), "t5": models.build("t5-base", **t5)}
    modules["clip-l"] = models.build("clip-l", **clip)
    folder = tmp_path_factory.mktemp("encoders")
    for name, module in modules.items():
        params = models.init(module, jax.random.key(0))
        checkpoints.save(folder / name / "text_encoder", module, params)
        shutil.copytree(encoder_folder / "tokenizer", folder / name / "tokenizer")
    return folder


def other_recipe(recipe, encoders, preset):
    overrides, more = OTHERS[preset]
    first = {"pixart-sigma": "t5", "flux-schnell": "clip-l"}.get(preset, "clip")
    given = {name: str(encoders / kind) for name, kind in more.items()}
    text = training.TextRecipe(encoder=str(encoders / first), max_length=6, **given)
    path = D.flow(D.Flow()) if preset in ("sd3-medium", "flux-schnell") else D.v(D.VP.named("cosine"))
    own = dataclasses.replace(recipe.diffusion, preset=preset, overrides=overrides, prediction=path)
    return dataclasses.replace(recipe, diffusion=own, text=text)


@pytest.mark.parametrize("preset", OTHERS)
def test_other_networks_train_on_what_their_pipeline_draws_from(recipe, encoders, preset, tmp_path):
    """The gradient reaches every parameter's shape, and the saved folder makes the same conditions."""
    recipe = other_recipe(recipe, encoders, preset)
    module = build_denoiser(recipe, (8, 8, 3), 2)
    pipe = text_pipeline(module, load_text_parts(recipe.text))
    captions = ["a dark picture", "a light picture"]
    found = encode_captions(pipe, captions, (8, 8), tmp_path / "captions")
    rows = CaptionedRows(ArrayRows({"mean": np.zeros((2, 8, 8, 4), np.float32)}), found)
    loss = make_loss(recipe.diffusion, module, Condition(found.null))
    shapes = models.shapes(module)
    _, gradients = jax.eval_shape(
        lambda params, batch: jax.value_and_grad(loss, has_aux=True)(params, None, batch, jax.random.key(0)),
        shapes,
        rows.take(np.arange(2)),
    )
    assert jax.tree.structure(gradients) == jax.tree.structure(shapes)

    run = RunFolder(tmp_path / "run")
    vae = models.build("sd-vae", sample_size=8, **recipe.autoencoder.overrides)
    checkpoints.save(run.stage("autoencoder").model, vae, models.init(vae, jax.random.key(0)))
    params = models.init(module, jax.random.key(1))
    save_denoiser(run, module, params, schedulers.to_config(recipe.diffusion.prediction), pipe)
    loaded = pipelines.load(run.path)
    assert loaded.family is pipe.family
    cond, uncond = loaded.encode_prompts(captions, None, (8, 8))
    columns = rows.take(np.arange(2))
    assert set(cond) == set(found.null)
    for name in cond:
        np.testing.assert_allclose(cond[name], columns[name], atol=2e-3, err_msg=name)
        np.testing.assert_allclose(uncond[name][0], found.null[name], atol=2e-3, err_msg=name)
    check_finetuning(loaded, run.path, recipe.data)


def test_a_qwen_conditions_a_network_of_any_such_width(recipe, encoder_folder, tmp_path):
    """Its states are those of the tokens, and the saved folder makes the same of the captions."""
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "intermediate_size": 16, "head_dim": 6}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    qwen = models.build("qwen3-4b", vocab_size=len(WORDS), **sizes, **heads)
    checkpoints.save(tmp_path / "qwen" / "text_encoder", qwen, models.init(qwen, jax.random.key(3)))
    shutil.copytree(encoder_folder / "tokenizer", tmp_path / "qwen" / "tokenizer")
    text = dataclasses.replace(recipe.text, encoder=str(tmp_path / "qwen"))
    recipe = dataclasses.replace(recipe, text=text)
    module = build_denoiser(recipe, (8, 8, 3), 2)
    assert module.config.cross_attention_dim == 12
    pipe = text_pipeline(module, load_text_parts(text))
    captions = ["a dark picture", "a light picture"]
    found = encode_captions(pipe, captions, (8, 8), tmp_path / "captions").of(np.arange(2))[STATES]
    run = RunFolder(tmp_path / "run")
    vae = models.build("sd-vae", sample_size=8, **recipe.autoencoder.overrides)
    checkpoints.save(run.stage("autoencoder").model, vae, models.init(vae, jax.random.key(0)))
    params = models.init(module, jax.random.key(1))
    save_denoiser(run, module, params, schedulers.to_config(recipe.diffusion.prediction), pipe)
    loaded = pipelines.load(run.path)
    cond, _ = loaded.encode_prompts(captions, None, (8, 8))
    assert np.ptp(found[0] - found[1]) > 0.01
    np.testing.assert_allclose(cond[STATES], found, atol=2e-3)


def check_finetuning(pipe, folder, pictures):
    """The folder can be fine-tuned: an adapter of it has gradients under the conditions of its captions."""
    recipe = training.finetune_recipe(folder, pictures, "lora", image_size=8, rank=2, remat=True)
    training.check_recipe(recipe, recipe.load_data(), training.make_mesh(1))
    if pipe.denoiser_name == "transformer":
        kohya = training.finetune_recipe(folder, pictures, "lora", image_size=8, lora_names="kohya")
        with pytest.raises(InvalidArgumentError, match="kohya's names are for unet"):
            training.check_recipe(kohya, kohya.load_data(), training.make_mesh(1))
    tuned = tuned_of(recipe.finetune, pipe)
    cond, uncond = pipe.encode_prompts(["a dark picture"], None, (8, 8))
    null = {name: part[0] for name, part in uncond.items()}
    loss = make_adapter_loss(
        recipe.finetune, pipe.prediction, denoising(pipe, recipe.finetune), tuned, Condition(null)
    )
    state = types.SimpleNamespace(frozen=tuned.frozen)
    params, batch = tuned.init(jax.random.key(0)), {"mean": np.zeros((1, 8, 8, 4), np.float32), **cond}
    gradients, _ = jax.eval_shape(
        lambda params: jax.grad(loss, has_aux=True)(params, state, batch, jax.random.key(0)), params
    )
    assert jax.tree.structure(gradients) == jax.tree.structure(params)


def test_a_run_of_mmdit_draws_from_prompts(recipe, encoders, tmp_path):
    recipe = other_recipe(recipe, encoders, "sd3-medium")
    run = training.train(recipe, tmp_path / "run", log=lambda line: None, bar=False)
    pipe = pipelines.load(run.path)
    images = pipe(jax.random.key(0), "a dark picture", num_inference_steps=1)
    assert pipe.family.name == "StableDiffusion3" and images.shape == (1, 8, 8, 3)
    assert np.isfinite(images).all() and list((run.path / "diffusion" / "samples").glob("*.png"))


def test_encoders_that_a_network_cannot_take_are_refused(recipe, encoders):
    def refused(words, preset, **text):
        changed = other_recipe(recipe, encoders, preset)
        changed = dataclasses.replace(changed, text=dataclasses.replace(changed.text, **text))
        with pytest.raises(CheckpointError, match=words):
            build_denoiser(changed, (8, 8, 3), 2)

    refused("FluxPipeline lacks encoder_2", "flux-schnell", encoder_2=None)
    refused("PixArtSigmaPipeline has no use for encoder_2", "pixart-sigma", encoder_2=str(encoders / "t5"))
    refused(
        "pooled state of a CLIPTextModel, without projection", "flux-schnell", encoder=str(encoders / "t5")
    )
    refused("pooled state of a CLIPTextModelWithProjection", "sd3-medium", encoder=str(encoders / "t5"))
