"""`jaxldm sample`, `export` and `info` on random models: what they write, and the mistakes one can make."""

import errno
import importlib
import os
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from command_lines import complaint, run
from PIL import Image
from tiny_folders import write_run
from tiny_models import latent_pipeline, pixel_pipeline

from jaxldm import diffusion as D
from jaxldm import pipelines
from jaxldm.checkpoints.folder import WEIGHTS_FILE
from jaxldm.data import to_uint8

FEW_STEPS = ["--num-inference-steps", "2", "--solver", "ddim"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "exported"
    pipelines.save(pixel_pipeline(learn_sigma=False), folder)
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("models") / "run", latent_pipeline())


def sample(capsys, folder, out, *words):
    code, _, err = run(capsys, "sample", folder, *FEW_STEPS, "--output-dir", out, *words)
    assert code == 0, err
    return np.load(out / "samples.npz")


def test_what_is_written(capsys, exported, tmp_path):
    saved = sample(
        capsys, exported, tmp_path / "a" / "b", "--class-labels", 2, 0, "--num-images", 5, "--seed", 4
    )
    assert saved["images"].shape == (5, 8, 8, 1) and saved["images"].dtype == np.uint8
    np.testing.assert_array_equal(saved["labels"], [2, 0, 2, 0, 2])
    names = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert names == {
        "grid.png",
        "samples.npz",
        *(f"image-{k:05d}-class-{2 * (k % 2 == 0)}.png" for k in range(5)),
    }
    picture = np.asarray(Image.open(tmp_path / "a" / "b" / "image-00003-class-0.png"))
    np.testing.assert_array_equal(picture, saved["images"][3, ..., 0])
    pipe = pipelines.load(exported)
    images = pipe(jax.random.key(4), [2, 0], num_images=5, num_inference_steps=2)
    np.testing.assert_array_equal(saved["images"], to_uint8(images))


def test_by_default_every_class_once_and_a_seed_draws_the_same_again(capsys, exported, tmp_path):
    first = sample(capsys, exported, tmp_path / "first")
    again = sample(capsys, exported, tmp_path / "again", "--num-images", 2, "--batch-size", 1)
    other = sample(capsys, exported, tmp_path / "other", "--seed", 4294967295)
    np.testing.assert_array_equal(first["labels"], [0, 1, 2])
    np.testing.assert_array_equal(again["images"], first["images"][:2])
    assert (other["images"] != first["images"]).any()


def test_a_run_folder_serves_as_well_as_its_export(capsys, run_folder, tmp_path):
    from_run = sample(capsys, run_folder, tmp_path / "a")
    assert run(capsys, "export", run_folder, tmp_path / "out")[0] == 0
    np.testing.assert_array_equal(
        sample(capsys, tmp_path / "out", tmp_path / "b")["images"], from_run["images"]
    )
    code, out, _ = run(capsys, "info", tmp_path / "out", "--compare", run_folder)
    rows = pipelines.compare(pipelines.load(run_folder), pipelines.load(run_folder))
    assert "unet/conv_in.weight" in [row.name for row in rows]
    same = f"all {len(rows)} tensors of {tmp_path / 'out'} and {run_folder} are the same, bit for bit\n"
    assert (code, out) == (0, same)


def test_the_command_after_export_works_as_it_is_printed(capsys, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "export", run_folder, "my model")
    name, *words = shlex.split(out.partition("try it:")[2])
    assert code == 0 and name == "jaxldm" and words[1] == "my model"
    assert run(capsys, *words, *FEW_STEPS)[0] == 0 and (tmp_path / "samples" / "grid.png").exists()


def test_a_path_of_ones_own_needs_its_module_and_is_sampled_with_it(capsys, tmp_path, monkeypatch):
    (tmp_path / "own_paths.py").write_text(
        "import dataclasses\nfrom jaxldm import diffusion as D\n"
        "@dataclasses.dataclass(frozen=True)\nclass Mine(D.Flow):\n    name = 'mine'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("own_paths").Mine()
    write_run(tmp_path / "run", pixel_pipeline(prediction=D.flow(mine)))
    sys.modules.pop("own_paths")
    command = ["sample", tmp_path / "run", *FEW_STEPS, "--output-dir", tmp_path / "out"]
    line = complaint(capsys, *command)
    assert "jaxldm --import own_paths" in line and "mixes two models" not in line
    assert run(capsys, "--import", "own_paths", *command)[0] == 0
    code, out, _ = run(capsys, "--import", "own_paths", "info", tmp_path / "run")
    assert code == 0 and f"sample:  jaxldm --import own_paths sample {tmp_path / 'run'}" in out
    sys.modules.pop("own_paths")


def test_compare_fails_and_names_the_tensors_that_differ(capsys, exported, run_folder, tmp_path):
    pipe = pipelines.load(exported)
    params = jax.tree.map(np.array, pipe.denoiser.params)
    params["x_embedder"]["proj"]["bias"][3] += 1.0
    pipelines.save(pipe.replace(denoiser=pipe.denoiser.replace(params=params)), tmp_path / "other")
    code, out, line = run(capsys, "info", tmp_path / "other", "--compare", exported)
    assert code == 2 and "transformer/x_embedder.proj.bias" in line and "1 of 21" in line
    (only,) = out.splitlines()
    assert only.startswith("transformer/x_embedder.proj.bias") and only.endswith("numbers differ")
    assert "two folders" in complaint(capsys, "info", "--compare", exported)


def test_info_says_what_a_folder_is_and_how_to_sample_from_it(capsys, exported, run_folder):
    code, out, _ = run(capsys, "info", exported)
    assert code == 0 and "8x8x1 images" in out and "classes  0 to 2" in out
    assert f"jaxldm sample {exported} --class-labels" in out
    code, out, _ = run(capsys, "info", run_folder)
    assert code == 0 and "recipe smoke" in out and "4x4x2 latents -> 8x8x1 images" in out


def test_a_warning_of_the_health_checks_reaches_the_screen(capsys, tmp_path):
    pipe = latent_pipeline()
    blank = jax.tree.map(lambda x: np.zeros_like(np.asarray(x)), pipe.autoencoder.params)
    pipelines.save(pipe.replace(autoencoder=pipe.autoencoder.replace(params=blank)), tmp_path / "blank")
    code, _, err = run(capsys, "sample", tmp_path / "blank", *FEW_STEPS, "--output-dir", tmp_path / "out")
    assert code == 0 and "3 of 3 images are blank" in err and "fix: " in err
    assert (tmp_path / "out" / "grid.png").exists()


def test_nan_is_an_error_and_is_not_saved(capsys, tmp_path):
    pipe = latent_pipeline()
    nan = jax.tree.map(lambda x: np.full_like(np.asarray(x), np.nan), pipe.denoiser.params)
    pipelines.save(pipe.replace(denoiser=pipe.denoiser.replace(params=nan)), tmp_path / "nan")
    line = complaint(capsys, "sample", tmp_path / "nan", *FEW_STEPS, "--output-dir", tmp_path / "out")
    assert "unet holds NaN or infinity, in " in line and not (tmp_path / "out").exists()
    # Of weights that are whole it is the guidance that overflows.
    pipelines.save(pipe, tmp_path / "whole")
    words = [*FEW_STEPS, "--guidance-scale", "3e38", "--output-dir", tmp_path / "out"]
    line = complaint(capsys, "sample", tmp_path / "whole", *words)
    assert "3 of 3" in line and "lower guidance_scale" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--solver", "dimm"], ["ddim", "dpmpp_2m", "did you mean"]),
        (["--spacing", "even"], ["trailing"]),
        (["--num-inference-steps", "0"], ["num_inference_steps", "at least 1"]),
        (["--num-inference-steps", "1001"], ["1001", "1000"]),
        (["--guidance-scale", "nan"], ["--guidance-scale", "finite"]),
        (["--guidance-scale", "-1"], ["guidance_scale", "0 or more"]),
        (["--guidance-scale", "inf"], ["finite"]),
        (["--guidance-scale=-inf"], ["finite"]),
        (["--guidance-rescale", "2"], ["in [0, 1]"]),
        (["--class-labels", "3"], ["class labels", "[0, 2]", "3"]),
        (["--class-labels", "-1"], ["[0, 2]"]),
        (["--class-labels", "0", "cat"], ["nobody named the classes of this model: give 'cat' as a number"]),
        (["--class-labels", "9" * 5000], ["nobody named the classes"]),
        (["--class-labels"], ["--class-labels needs one or more values"]),
        (["--negative-class-labels", "0", "9"], ["negative labels", "[0, 2]"]),
        (["--num-images", "0"], ["num_images", "1 or more"]),
        (["--num-images", "-5"], ["1 or more"]),
        (["--batch-size", "0"], ["batch_size"]),
        (["--seed", "-1"], ["seed", "4294967295"]),
        (["--seed", "4294967296"], ["seed"]),
        (["--eta", "0.5", "--solver", "dpmpp_2m"], ["eta"]),
        (["--sigmas", "karras"], ["--sigmas must be numbers", "--spacing"]),
        (["--sigmas", "3", "1", "--spacing", "karras"], ["sigmas", "spacing"]),
        (["--devices", "99"], ["devices must be between 1 and 8"]),
        (["--refiner-start", "0.5", "--refiner", "x"], ["--refiner is not for this model"]),
        (["--guidance-scale", "1", "--guidance-rescale", "0.7"], ["no effect", "--guidance-scale 1"]),
        (["--guidance-scale", "1", "--negative-class-labels", "0"], ["no effect"]),
        (["--guidance-scale", "1e39"], ["--guidance-scale", "3.4e+38"]),
        (["--num-images", "1000000000"], ["1000000000 images of 8x8 pixels", "GB"]),
        (["--sigmas", "3", "-1"], ["--sigmas must be", "0 or more"]),
        (["--cache", "forra:3"], ["cache", "did you mean 'fora'"]),
        (["--cache", "fora:0"], ["interval", "at least 1"]),
        (["--cache", "fora:x"], ["interval must be a whole number"]),
        (["--cache", "deepcache:3"], ["this cache is for U-Nets", "fora:3"]),
        (["--cache", "first-block:-1"], ["threshold must be a positive number"]),
        (["--cache", "first-block:0.1,9"], ["first_blocks=9", "none of the"]),
        (["--cache", "fora:2", "--solver", "heun"], ["once a step", "ddim"]),
    ],
)
def test_a_wrong_option_of_sample(capsys, exported, tmp_path, words, expected):
    line = complaint(capsys, "sample", exported, "--output-dir", tmp_path / "out", *words)
    assert all(part in line for part in expected), line
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file(capsys, exported, tmp_path):
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        assert "is a file" in complaint(capsys, "sample", exported, "--output-dir", out)
        assert "is a file" in complaint(capsys, "export", exported, out)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_disk_that_fills_up_loses_nothing(capsys, exported, tmp_path, monkeypatch):
    sample(capsys, exported, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jaxldm.files.os.fsync", full)
    line = complaint(capsys, "sample", exported, *FEW_STEPS, "--output-dir", tmp_path / "out", "--seed", 1)
    assert "disk is full" in line and str(tmp_path / "out") in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "model_index.json").unlink(), ["no finished model yet", "--resume"]),
        (lambda run: (run / "config.json").write_text("{"), ["config.json"]),
        (lambda run: (run / "unet/config.json").write_text("{"), ["config.json"]),
        (lambda run: os.truncate(run / "unet" / WEIGHTS_FILE, 500), [WEIGHTS_FILE]),
        (lambda run: (run / "unet" / WEIGHTS_FILE).write_bytes(b"no weights"), [WEIGHTS_FILE]),
        (lambda run: shutil.rmtree(run), ["does not exist", "jaxldm train"]),
        (lambda run: (shutil.rmtree(run), run.write_text("a file")), ["is a file"]),
        (lambda run: (shutil.rmtree(run), run.mkdir()), ["neither a run folder"]),
    ],
)
def test_a_folder_that_holds_no_whole_model(capsys, tmp_path, damage, words):
    run = write_run(tmp_path / "run", latent_pipeline())
    damage(run)
    for command in (
        ["sample", run, "--output-dir", tmp_path / "out"],
        ["export", run, tmp_path / "exported"],
        ["eval", run, "--output-dir", tmp_path / "out"],
    ):
        line = complaint(capsys, *command)
        assert all(word in line for word in words) or command[0] == "eval", line
    assert not (tmp_path / "out").exists() and not (tmp_path / "exported").exists()


def test_export_refuses_to_write_over_other_files(capsys, exported, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "thesis.tex" in complaint(capsys, "export", exported, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_eval_needs_a_run_with_a_judge(capsys, exported, run_folder):
    assert "run folder" in complaint(capsys, "eval", exported)
    assert "classifier" in complaint(capsys, "eval", run_folder)


def test_true_processes_with_one_device_and_with_eight_draw_the_same(exported, tmp_path):
    for devices in (1, 8):
        # of a flag that is given twice the last counts
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        environment = {**os.environ, "XLA_FLAGS": flags}
        words = [
            "sample",
            exported,
            *FEW_STEPS,
            "--num-images",
            "20",
            "--output-dir",
            tmp_path / str(devices),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "jaxldm.cli", *map(str, words)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    one, eight = (np.load(tmp_path / name / "samples.npz")["images"] for name in ("1", "8"))
    assert len(one) == 20
    np.testing.assert_array_equal(one, eight)


def test_a_mistake_in_a_true_process_is_one_line_and_exit_code_2(exported):
    done = subprocess.run(
        [sys.executable, "-m", "jaxldm.cli", "sample", str(exported), "--solver", "dimm"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "ddim" in done.stderr


def test_quiet_prints_nothing(capsys, exported, tmp_path):
    code, out, err = run(capsys, "sample", exported, *FEW_STEPS, "--output-dir", tmp_path / "out", "--quiet")
    assert (code, out, err) == (0, "", "") and (tmp_path / "out" / "grid.png").exists()


def test_grids_can_be_typed(capsys, exported, tmp_path):
    """A spacing by its name, and noise levels as numbers, separated by spaces or commas."""
    pipe = pipelines.load(exported)
    for words, options in (
        (["--spacing", "karras", "--num-inference-steps", 3], {"spacing": "karras"}),
        (["--sigmas", "5", "1.5", "0.3"], {"sigmas": [5, 1.5, 0.3]}),
        (["--sigmas", "5,1.5,0.3"], {"sigmas": [5, 1.5, 0.3]}),
    ):
        out = tmp_path / "-".join(map(str, words))
        assert run(capsys, "sample", exported, "--solver", "ddim", "--output-dir", out, *words)[0] == 0
        images = pipe(jax.random.key(0), num_inference_steps=3, solver="ddim", **options)
        np.testing.assert_array_equal(np.load(out / "samples.npz")["images"], to_uint8(images))


def test_a_cache_can_be_typed(capsys, exported, tmp_path):
    plain, every = (
        sample(capsys, exported, tmp_path / name, *words)
        for name, words in (("plain", []), ("cached", ["--cache", "fora:1"]))
    )
    np.testing.assert_array_equal(plain["images"], every["images"])


def test_the_number_of_devices_changes_no_image(capsys, exported, tmp_path):
    one = sample(capsys, exported, tmp_path / "one", "--devices", 1)
    many = sample(capsys, exported, tmp_path / "many", "--devices", 4)
    np.testing.assert_array_equal(one["images"], many["images"])


def test_a_solver_from_another_package(capsys, exported, tmp_path, monkeypatch):
    (tmp_path / "my_solvers.py").write_text("from jaxldm import diffusion as D\nmine = D.solvers.heun\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--num-inference-steps", 2, "--solver"]
    for name, out in (("my_solvers:mine", "mine"), ("heun", "heun")):
        assert run(capsys, "sample", exported, "--output-dir", tmp_path / out, *words, name)[0] == 0
    images = [np.load(tmp_path / out / "samples.npz")["images"] for out in ("mine", "heun")]
    np.testing.assert_array_equal(*images)
    for name in ("my_solvers:nothing", "no_such_module:mine"):
        assert name.split(":")[0] in complaint(capsys, "sample", exported, *words, name)


COUNT_COMPILATIONS = """
import collections, sys
import jax
from jaxldm import cli, host
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.split("/")[-1]]))
host._MIN_COMPILE_SECONDS = 0.0
code = cli.main()
print(code, events["cache_hits"], events["cache_misses"], file=sys.stderr)
"""


def test_a_second_process_compiles_nothing(exported, tmp_path):
    """Also with another seed and another number of steps: the compiled functions are read from disk."""

    def compilations(*words):
        argv = ["sample", exported, "--output-dir", tmp_path / "out", *words]
        done = subprocess.run(
            [sys.executable, "-c", COUNT_COMPILATIONS, *map(str, argv)],
            env=os.environ | {"JAXLDM_COMPILATION_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
        code, hits, misses = map(int, done.stderr.splitlines()[-1].split())
        assert code == 0, done.stderr
        return hits, misses

    _, first = compilations(*FEW_STEPS)
    assert first > 0
    hits, misses = compilations("--num-inference-steps", 3, "--solver", "ddim", "--seed", 5)
    assert misses == 0 and hits > 0
