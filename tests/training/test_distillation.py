"""Students of a small teacher, from its folder to the images that they draw."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from students import SIZES, SMALL, evaluations, pipeline, random_params, student

from jaxldm import checkpoints, data, models, pipelines, schedulers
from jaxldm import diffusion as D
from jaxldm.commands.info import describe
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError
from jaxldm.pipelines.few_steps import FewSteps
from jaxldm.training import RECIPES, Recipe, distill_recipe, kept_steps, read_kept, read_recipe, train
from jaxldm.training.runs import open_run, save_autoencoder, save_classifier, save_denoiser

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers") / "export"
    pipelines.save(pipeline(), folder)
    return folder


def bytes_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_progressive_students_halve_go_on_after_a_kill_and_draw_in_their_steps(teacher, tmp_path):
    before, said = bytes_of(teacher), []
    recipe = student(teacher, "progressive", num_steps=1, numbers={"start_steps": 4}, guidance_scale=1.0)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))).to_dict() == recipe.to_dict()
    straight = train(recipe, tmp_path / "straight", devices=1, log=said.append)

    def stop(line):
        if line.startswith("diffusion: epoch 3/4"):  # in the second of two rounds
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "killed", devices=1, log=stop)
    killed = train(recipe, tmp_path / "killed", devices=1, resume=True, log=said.append)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (straight.path / weights).read_bytes() == (killed.path / weights).read_bytes()
    assert bytes_of(teacher) == before
    assert (straight.path / weights).read_bytes() != before[teacher / weights]

    pipe = pipelines.load(straight.path)
    assert evaluations(pipe) == 1
    for options, words in (
        ({"num_inference_steps": 4}, "made for 1 step, not for 4"),
        ({"timesteps": [999, 499]}, "made for 1 step, not for 2"),
        ({"guidance_scale": 3.0}, "guidance of scale 1 is inside"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            pipe(jax.random.key(0), [3], **options)
    with pytest.raises(CheckpointError, match="itself a student, by progressive"):
        distill_recipe(straight.path, "lcm", dataset="mnist5k")
    with pytest.raises(CheckpointError, match="holds a run of another recipe"):
        train(student(teacher, "lcm"), straight.path, resume=True, devices=1)


def test_a_student_of_two_players_is_exported_with_its_steps(teacher, tmp_path):
    run = train(
        student(teacher, "dmd", num_steps=2, guidance_scale=1.0),
        tmp_path / "dmd",
        devices=1,
        log=lambda line: None,
    )
    kept = read_kept(run.path, kept_steps(run.path)[-1]).params
    new = kept["critic"].keys() - kept["student"].keys()
    assert new == {"step_size_embedder"} and kept["student"].keys() < kept["critic"].keys()
    pipe = pipelines.load(run.path)
    assert pipe.default_steps() == 2 and pipe.default_guidance_scale == 1.0
    pipelines.save(pipe, tmp_path / "export")
    again = pipelines.load(tmp_path / "export")
    assert again.few_steps == pipe.few_steps and again.few_steps.only_steps == (2,)
    assert again.scheduler["_class_name"] == "LCMScheduler"


def test_a_student_has_the_autoencoder_classifier_and_latents_of_its_teachers_run(tmp_path):
    """The teacher is a run whose networks nobody trained."""
    denoiser = dataclasses.replace(
        RECIPES["smoke-dit"].diffusion, overrides={**SMALL, "patch_size": 7}, sample_every=0
    )
    recipe = dataclasses.replace(RECIPES["smoke"], max_train_images=64, diffusion=denoiser)
    dataset, said = recipe.load_data(), []
    run = open_run(tmp_path / "teacher", recipe, dataset, resume=False, log=said.append)
    for save, name, fields in (
        (save_autoencoder, "mini-autoencoder", recipe.autoencoder.overrides),
        (save_classifier, "digit-classifier", recipe.classifier.overrides),
    ):
        module = models.build(name, **fields)
        save(run, module, models.init(module, jax.random.key(0)))
    from jaxldm.training.diffusion import build_denoiser

    module = build_denoiser(recipe, dataset.image_shape, dataset.num_classes)
    config = schedulers.to_config(recipe.diffusion.prediction)
    save_denoiser(run, module, models.init(module, jax.random.key(0)), config)
    before = bytes_of(run.path)

    assert distill_recipe(run.path, "reflow").diffusion.few_steps.guidance_scale == (3.0, 3.0)
    numbers = {"pairs": 64, "teacher_steps": 2}
    own = distill_recipe(run.path, "reflow", epochs=1, numbers=numbers, guidance_scale=1.0)
    assert own.name == "smoke-reflow"
    out = train(own, tmp_path / "student", devices=1, log=said.append)
    assert bytes_of(run.path) == before
    assert read_recipe(out.path) == own
    for part in ("vae", "classifier/model"):
        assert bytes_of(out.path / part).keys() and [*bytes_of(out.path / part).values()] == [
            *bytes_of(run.path / part).values()
        ]
    lines = [" ".join(line.split()) for line in describe(str(out.path)).splitlines()]
    for line in ("autoencoder mini-autoencoder the teacher's", "classifier digit-classifier the teacher's"):
        assert f"{line} complete" in lines
    assert "diffusion tiny-dit 1 steps done complete" in lines
    assert f"student by reflow, from the teacher {run.path}" in lines
    assert {"steps 1 to 1000, 4 by default, by the solver ddim", "guidance none"} <= {*lines}
    pipe = pipelines.load(out.path)
    assert pipe(jax.random.key(0), [1, 2], num_inference_steps=1).shape == (2, 28, 28, 1)
    assert pipe.few_steps.solver == "ddim" and pipe.few_steps.only_steps is None


def test_a_network_that_takes_the_length_of_a_step_is_told_it():
    """Of mean flows and shortcuts: x_s = x_t - (t - s) u(x_t, t, t - s)."""
    module = models.build("tiny-dit", **SIZES, num_classes=10, scalar_inputs=("step_size",))
    rng, params = np.random.default_rng(1), random_params(module)
    pipe = pipelines.class_to_image(pipelines.Network(module, params), D.flow(D.Flow()))
    x = noise = rng.normal(size=(1, 28, 28, 1)).astype(np.float32)
    for t, s in ((1.0, 0.5), (0.5, 0.0)):
        length = np.full(1, t - s, np.float32)
        condition = {"labels": np.array([3], np.int32), "step_size": length}
        x = x - (t - s) * models.network(module)(params, x, np.full(1, t, np.float32), condition)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output": "latents"}
    drawn = pipe(jax.random.key(0), [3], latents=noise, **options)
    np.testing.assert_allclose(drawn, x, atol=1e-4)
    deaf = pipe(jax.random.key(0), [3], latents=noise, **options | {"num_inference_steps": 1})
    assert np.abs(deaf - drawn).max() > 1e-2


def test_folders_that_are_no_teachers_are_refused(teacher, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        distill_recipe(tmp_path / "none", "lcm")
    with pytest.raises(InvalidArgumentError, match="does not say what it was trained on"):
        distill_recipe(teacher, "lcm")
    with pytest.raises(UnknownNameError, match="field of the recipe"):
        distill_recipe(teacher, "lcm", dataset="mnist5k", epoch=3)
    pipelines.save(pipeline(learn_sigma=True), tmp_path / "variance")
    with pytest.raises(CheckpointError, match="draws its variance, too"):
        distill_recipe(tmp_path / "variance", "lcm", dataset="mnist5k")
    own = FewSteps(method="lcm", solver="lcm", guidance="inside", guidance_scale=(3.0, 3.0))
    pipelines.save(dataclasses.replace(pipeline(), few_steps=own), tmp_path / "student")
    with pytest.raises(CheckpointError, match=r"itself a student, by lcm, .* that it was distilled from"):
        distill_recipe(tmp_path / "student", "cd", dataset="mnist5k")
    pipelines.save(pipeline(D.epsilon(D.VP.named("cosine"))), tmp_path / "weak")
    ends = D.VP.named("linear", zero_terminal_snr=True)
    pipelines.save(pipeline(D.epsilon(D.VP.named("linear"))), tmp_path / "zero")
    scheduler = tmp_path / "zero" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(schedulers.to_config(D.v(ends)) | {"prediction_type": "epsilon"}))
    for method in ("progressive", "cd"):
        with pytest.raises(InvalidArgumentError, match="leaves the image undefined at the noisy end"):
            distill_recipe(tmp_path / "weak", method, dataset="mnist5k")
        with pytest.raises(CheckpointError, match="zero terminal SNR"):
            distill_recipe(tmp_path / "zero", method, dataset="mnist5k")
    with pytest.raises(InvalidArgumentError, match="halves the steps"):
        distill_recipe(teacher, "progressive", dataset="mnist5k", num_steps=3)


def test_a_recipe_whose_network_is_not_the_teachers_is_refused(teacher, tmp_path):
    recipe = student(teacher, "lcm")
    wider = {**recipe.diffusion.overrides, "hidden_size": 32}
    other = dataclasses.replace(recipe, diffusion=dataclasses.replace(recipe.diffusion, overrides=wider))
    with pytest.raises(InvalidArgumentError, match="its hidden_size is 32, not 16"):
        train(other, tmp_path / "run", devices=1)
    assert not (tmp_path / "run").exists()
    assert checkpoints.read_config(teacher / "transformer")["hidden_size"] == 16
    assert data.load("mnist5k").num_classes == 10
