"""`jaxldm --help`, mistakes in what is typed, interruption: what every command shares."""

import dataclasses
import errno
import importlib.metadata
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import jax
import pytest
from command_lines import complaint, run

from jaxldm import __version__, cli, models, pipelines, training
from jaxldm import diffusion as D
from jaxldm.commands import COMMANDS, hints, info, load_command, sample, train
from jaxldm.commands.terminal import check_seed, print_warnings_as_lines, progress_bar
from jaxldm.errors import InvalidArgumentError, Stopped, UnknownNameError


def test_help_lists_the_commands(capsys):
    for words in ([], ["--help"], ["-h"]):
        code, out, err = run(capsys, *words)
        assert code == 0 and not err and all(f"\n  {name} " in out for name in COMMANDS)


def test_the_version(capsys):
    assert run(capsys, "--version") == (0, f"jaxldm {__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_explains_each_option(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and f"For example:\n  jaxldm {command}" in out
    fields = dataclasses.fields(load_command(command))
    optional = [field.name for field in fields if "Positional" not in str(field.type)]
    options = ["--" + name.replace("_", "-") for name in optional]
    assert all(option in out for option in options)
    text = " ".join(line.strip("│| ") for line in out.split("\n"))
    # Each option and each argument: its name, a sentence that ends with a full stop, and its default.
    assert len(re.findall(r"[A-Za-z0-9'`).]\. \((?:default: [^)]*|required)\)", text)) == len(fields)


def test_help_answers_without_the_heavy_packages():
    code = (
        "import sys; from jaxldm import cli\n"
        "for words in ['--help'], ['--version'], *([name, '--help'] for name in cli.COMMANDS):\n"
        "    cli.main(words)\n"
        "heavy = {'jax', 'flax', 'torch', 'tensorflow', 'matplotlib', 'orbax', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "choices"),
    [
        (["smaple"], ["train", "sample", "eval", "export", "info", "did you mean 'sample'?"]),
        (
            ["sample", "RUN", "--guidence-scale", "3"],
            ["--guidance-scale", "--guidance-rescale", "did you mean"],
        ),
        (["train", "smoke", "--epoch=3"], ["--epochs", "--batch-size"]),
        (["sample", "RUN", "--num-images", "many"], ["--num-images", "many", "jaxldm sample --help"]),
        (["sample"], ["RUN"]),
        (["sample", "RUN", "OTHER"], ["OTHER"]),
        (["sample", "RUN", "--seed"], ["--seed"]),
        (["export", "RUN"], ["OUT"]),
        (["train"], ["RECIPE"]),
        (["sample", "RUN", "--seed", "1", "--seed=2"], ["--seed is given twice"]),
        (["sample", "RUN", "--seed", "1.5"], ["--seed must be a whole number, got '1.5'"]),
        (["sample", "RUN", "--eta", "big"], ["--eta must be a number, got 'big'"]),
        (["serve", "RUN", "--slots", "3", "cat"], ["one or more whole numbers, got 'cat'"]),
        (["sample", "RUN", "--strength", "nan"], ["--strength must be finite"]),
        (["sample", "RUN", "--output-dir", ""], ["--output-dir is empty"]),
        (["sample", "RUN", "--quiet=yes"], ["--quiet takes no value"]),
        (["sample", "RUN", "--import", "mine"], ["--import goes before the command"]),
        (["sample", "R\udcffN"], ["argument 2 is not UTF-8"]),
        (["sample", "R\0N"], ["zero byte"]),
        (["sample", "x" * 5000], ["File name too long", "..."]),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_choices(capsys, words, choices):
    line = complaint(capsys, *words)
    assert all(choice in line for choice in choices) and len(line) < 400, line


def test_the_command_is_a_module_too_and_a_full_disk_is_one_line():
    command = [sys.executable, "-m", "jaxldm", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"jaxldm {__version__}\n", "")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "disk is full" in done.stderr


def test_a_bar_counts_calls_or_what_they_say(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(2, "drawing") as progress:
        progress(7, 9)
    with progress_bar(None, "measuring", unit="image") as progress:
        progress(3, 8)
    drawing, measuring = capsys.readouterr().err.split("measuring", 1)
    assert "drawing" in drawing and "/2 [" in drawing and "step" in drawing
    assert "/8 [" in measuring and "image" in measuring and "/2 [" not in measuring
    with progress_bar(None, "measuring", True) as progress:
        progress(3, 8)
    assert capsys.readouterr().err == ""


def test_warnings_are_one_line_each(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    print_warnings_as_lines()
    for text in ("a\nb " * 200, "a\nb " * 200, "another"):
        warnings.showwarning(text, UserWarning, "file", 3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("jaxldm: warning: a") for line in lines)
    assert max(map(len, lines)) < 400


def test_suggested_commands_are_quoted():
    assert hints.command("sample", "my runs/a b") == "jaxldm sample 'my runs/a b'"
    assert shlex.split(hints.sample_texts("x"))[3:5] == ["--prompt", "a cat in the snow"]
    assert "--class-labels 0 1 " in hints.sample_classes("x", 1000) and "--class" not in hints.sample_classes(
        "x", None
    )


def test_options_may_be_written_with_underscores(capsys):
    assert "does not exist" in complaint(
        capsys, "sample", "/nowhere/run", "--num_images=3", "--guidance_scale", "2"
    )


def test_ctrl_c_ends_with_130_and_a_word_on_resume(capsys, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Train, "run", interrupted)
    code, _, err = run(capsys, "train", "smoke")
    assert code == 130 and "--resume" in err and "Traceback" not in err
    monkeypatch.setattr(sample.Sample, "run", interrupted)
    code, _, err = run(capsys, "sample", "RUN")
    assert code == 130 and "--resume" not in err and err.count("\n") == 2


def test_how_to_go_on_after_ctrl_c_is_said_once(capsys, monkeypatch):
    """By the log of the training, or where that is not printed, or did not get to it, by the last line."""
    for error, words, last in (
        (Stopped("stopped after step 3: --resume"), (), "jaxldm: interrupted"),
        (
            Stopped("stopped after step 3: --resume"),
            ("--quiet",),
            "jaxldm: interrupted: stopped after step 3",
        ),
        (
            KeyboardInterrupt("stopped at once: --resume"),
            (),
            "jaxldm: interrupted: stopped at once: --resume",
        ),
    ):

        def interrupted(self, error=error):
            raise error

        monkeypatch.setattr(train.Train, "run", interrupted)
        code, _, err = run(capsys, "train", "smoke", *words)
        assert code == 130 and err.strip().startswith(last)
        assert err.count("--resume") == (0 if last.endswith("interrupted") else 1)


@pytest.mark.parametrize("command", ["sample", "eval", "inspect", "serve", "distill"])
def test_the_name_of_a_recipe_is_no_folder_and_its_run_is_named(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    line = complaint(capsys, command, "smoke-dit")
    assert (
        "name of a recipe" in line and "`jaxldm train smoke-dit`, then give the run, runs/smoke-dit" in line
    )
    (tmp_path / "runs" / "smoke-dit").mkdir(parents=True)
    assert complaint(capsys, command, "smoke-dit").endswith("such folder: give the run, runs/smoke-dit\n")
    (tmp_path / "smoke-dit").mkdir()  # a folder of that name is taken
    if command in ("sample", "eval", "inspect"):
        assert "name of a recipe" not in complaint(capsys, command, "smoke-dit")


def test_ctrl_c_during_an_import_ends_the_process_at_once():
    code = """
import signal, sys
from jaxldm import cli
signal.signal(signal.SIGINT, cli.on_interrupt)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    import interrupted_module
"""
    module = "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    pass\n"
    finder = f"""
import importlib.util, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name == "interrupted_module" else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        exec({module!r}, module.__dict__)
sys.meta_path.insert(0, Finder())
"""
    done = subprocess.run([sys.executable, "-c", finder + code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "\njaxldm: interrupted\n")


def test_ctrl_c_inside_the_garbage_collector_is_not_lost():
    unraisable = SimpleNamespace(exc_value=KeyboardInterrupt())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            cli.repeat_interrupt(unraisable, later=0)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_a_callback_or_before_the_command_ends_with_130(capsys, monkeypatch):
    def interrupted(self):
        raise RuntimeError("INTERNAL: CpuCallback error: Traceback: KeyboardInterrupt")

    monkeypatch.setattr(sample.Sample, "run", interrupted)
    assert run(capsys, "sample", "RUN")[0] == 130

    def too_early(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "check_text", too_early)
    assert run(capsys, "sample", "RUN")[0] == 130


@pytest.mark.parametrize(
    ("code", "word"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "permission"), (errno.EIO, "error")]
)
def test_what_a_library_cannot_write_is_one_line(capsys, monkeypatch, code, word):
    def fails(self):
        raise OSError(code, os.strerror(code), "/some/file")

    monkeypatch.setattr(info.Info, "run", fails)
    line = complaint(capsys, "info")
    assert "/some/file" in line and word in line


def test_a_reader_that_has_gone_is_no_error():
    command = f"{sys.executable} -m jaxldm.cli sample --help | head -1 > /dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141) and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("seed", [-1, 2**32, -(2**70)])
def test_a_seed_out_of_range(seed):
    assert check_seed(0) == 0 and check_seed(2**32 - 1) == 2**32 - 1
    with pytest.raises(InvalidArgumentError, match="4294967295"):
        check_seed(seed)


def test_the_recipe_with_what_was_asked_for(tmp_path):
    asked = train.Train(
        "mini-ldm",
        epochs=3,
        autoencoder_epochs=2,
        classifier_epochs=4,
        batch_size=16,
        learning_rate=0.5,
        seed=9,
        dataset="mnist",
        preset="tiny-dit",
    ).make_recipe(tmp_path)
    assert (asked.seed, asked.data, asked.autoencoder.epochs) == (9, "mnist", 2)
    assert asked.classifier.epochs == 4
    diffusion = asked.diffusion
    assert (diffusion.epochs, diffusion.batch_size, diffusion.learning_rate) == (3, 16, 0.5)
    assert (diffusion.preset, diffusion.overrides) == ("tiny-dit", {})
    assert train.Train("smoke").make_recipe(tmp_path) == training.RECIPES["smoke"]
    with pytest.raises(InvalidArgumentError, match="no autoencoder"):
        train.Train("tiny-dit", autoencoder_epochs=2).make_recipe(tmp_path)
    with pytest.raises(InvalidArgumentError, match="no classifier: leave --classifier-epochs out"):
        train.Train("captioned-shapes", classifier_epochs=2).make_recipe(tmp_path)
    with pytest.raises(UnknownNameError, match="mini-unet"):
        train.Train("smoke", preset="digit-classifier").make_recipe(tmp_path)


def test_info_lists_what_can_be_named(capsys):
    code, out, _ = run(capsys, "info")
    names = [*training.RECIPES, *models.PRESETS, *D.solvers.SOLVERS, *D.SPACINGS, "mnist5k", "cpu"]
    assert code == 0 and all(name in out for name in names)
    assert "partial" not in out and "compiled functions" in out


def test_info_lists_what_installed_packages_add(capsys, monkeypatch):
    def found(group):
        return [importlib.metadata.EntryPoint(f"of_{group}", "no_such_package:function", group)]

    monkeypatch.setattr(importlib.metadata, "entry_points", found)
    code, out, _ = run(capsys, "info")
    assert code == 0 and re.search(r"^  of_jaxldm\.solvers +of an installed package$", out, re.MULTILINE)
    assert re.search(r"^  of_jaxldm\.spacings +of an installed package$", out, re.MULTILINE)


@pytest.mark.parametrize("words", [["--import", "own_module"], ["--import=own_module"]])
def test_a_module_of_ones_own_is_imported_before_the_command(capsys, monkeypatch, tmp_path, words):
    (tmp_path / "own_module.py").write_text("imported = True")
    monkeypatch.syspath_prepend(tmp_path)
    assert run(capsys, *words, "--version") == (0, f"jaxldm {__version__}\n", "")
    assert sys.modules.pop("own_module").imported


@pytest.mark.parametrize("words", [["--import"], ["--import="], ["--import", "no_such_module", "info"]])
def test_a_module_that_cannot_be_imported_is_named(capsys, words):
    line = complaint(capsys, *words)
    assert "--import needs the name of a module" in line and "PYTHONPATH=." in line


def test_info_of_a_preset_counts_its_parameters(capsys):
    code, out, _ = run(capsys, "info", "mini-autoencoder")
    params = models.init(models.build("mini-autoencoder"), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert code == 0 and f"{count:,} parameters: {4 * count / 1e6:.1f} MB in float32" in out
    assert "jaxldm train smoke" in run(capsys, "info", "smoke")[1]
    assert "tiny-dit" in complaint(capsys, "info", "tiny-ditt")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_too_little_memory_is_one_line(capsys, monkeypatch, error):
    def fails(self):
        raise error

    monkeypatch.setattr(info.Info, "run", fails)
    assert "out of memory" in complaint(capsys, "info")


def test_a_mistake_of_ours_is_not_hidden(monkeypatch):
    def fails(self):
        raise RuntimeError("a bug")

    monkeypatch.setattr(info.Info, "run", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["info"])


class StandIn:
    """What the defaults of a family depend on."""

    __class__ = pipelines.Pipeline  # to `isinstance`
    num_classes = 10
    has_null_class = True

    def __init__(self, family, variant):
        self.options = dict(family.folder.options)
        if "is_distilled" in self.options:
            self.options["is_distilled"] = variant == " (distilled)"
        self.is_guidance_distilled = variant == " (dev)"


def test_the_help_of_sample_states_the_defaults_of_each_family(capsys):
    _, out, _ = run(capsys, "sample", "--help")
    rows = re.findall(r"^  (\w+)( \(\w+\))? +(\d+) +([\d.]+)(?: +([\d.]+))?$", out, re.MULTILINE)
    stages = ("FluxRedux", "WuerstchenPrior", "WuerstchenDecoder", "DeepFloydIFSuperResolution")
    families = {family.name: family for family in pipelines.FAMILIES if family.name not in stages}
    names = {name: "PixArt" if name.startswith("PixArt") else name for name in families}
    assert {row[0] for row in rows} == set(names.values())
    for name, family in families.items():
        for shown, variant, steps, scale, strength in rows:
            if shown == names[name]:
                defaults = family.defaults(StandIn(family, variant))
                assert (int(steps), float(scale)) == (defaults.num_inference_steps, defaults.guidance_scale)
                assert not strength or float(strength) == defaults.strength


def test_an_unknown_name_among_many_prints_no_wall(capsys):
    line = complaint(capsys, "info", "tiny-ditt")
    assert "did you mean 'tiny-dit'" in line and len(line) < 300


def test_swapped_arguments_are_one_short_line(capsys):
    for words in (["info", "runs/x", "info"], ["info", "sample"], ["sample", "mini-unet"], ["eval", "train"]):
        assert len(complaint(capsys, *words)) < 300
