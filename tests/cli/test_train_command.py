"""`jaxldm train`: what its options change, and recipes in files of their own."""

import dataclasses

import numpy as np
import pytest
from command_lines import complaint, run

from jaxldm import training
from jaxldm.commands.controlnet import Controlnet
from jaxldm.commands.eval import check_real_images
from jaxldm.commands.finetune import Finetune
from jaxldm.commands.recipe_file import read_recipe_file
from jaxldm.commands.train import Train
from jaxldm.data import ArrayRows, Dataset
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError
from jaxldm.training.comes_back import check_comes_back
from jaxldm.training.recipe_heads import HEADS
from jaxldm.training.runs import check_run_folder, open_run

FILE = '''
"""Question: does a recipe in a file train?

Minutes: less than one
"""

import dataclasses

from jaxldm import training

smoke = training.RECIPES["smoke-dit"]
diffusion = dataclasses.replace(smoke.diffusion, epochs=1, sample_every=0)
RECIPE = dataclasses.replace(smoke, name="mine", max_train_images=64, classifier=None, diffusion=diffusion)
'''


BAD_METHOD = """class {}:
    {}
    def {}(self):
        raise SystemExit(3)
"""


class Digits:
    """As much of a data set as a run's config.json says."""

    __class__ = Dataset  # to `isinstance`

    name, image_shape, class_names, license = "mnist5k", (28, 28, 1), tuple("0123456789"), ""


def test_optimizer_dtype_and_accumulate_are_those_of_the_stage_that_draws(tmp_path):
    options = {"optimizer": "muon", "dtype": "bfloat16", "accumulate": 4}
    for name, stage in (("smoke", "diffusion"), ("smoke-masked", "masked_tokens")):
        recipe, plain = Train(name, **options).make_recipe(tmp_path), training.RECIPES[name]
        assert recipe == dataclasses.replace(
            plain, **{stage: dataclasses.replace(getattr(plain, stage), **options)}
        )
    own = Train("tiny-dit", optimizer="schedule_free_adamw").make_recipe(tmp_path).diffusion
    assert training.RECIPES["tiny-dit"].diffusion.ema_decay is not None
    assert (own.optimizer, own.ema_decay) == ("schedule_free_adamw", None)  # its average is its own


@pytest.mark.parametrize("command", [Finetune, Controlnet])
def test_fine_tuning_takes_optimizer_and_remat(command, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(training, "finetune_recipe", lambda *places, **options: given.update(options))
    command(source="model", data="pictures", optimizer="lion", remat=True).make_recipe(tmp_path)
    assert given == {"optimizer": "lion", "remat": True}
    given.clear()
    command(source="model", data="pictures").make_recipe(tmp_path)
    assert given == {}
    with pytest.raises(InvalidArgumentError, match="muon is for matrices"):
        training.FinetuneRecipe(
            source="model", word=training.WordRecipe(word="<a>", initial="cat"), optimizer="muon"
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optimizer", "adan"], "unknown optimizer 'adan': choose one of adamw, lion, muon"),
        (["--dtype", "float8"], "unknown dtype 'float8': choose one of float32, bfloat16"),
        (["--accumulate", "0"], "accumulate must be >= 1, got 0"),
        (["--accumulate", "3", "--devices", "1"], "batch_size 64 cannot be split into 3 equal parts"),
        (["--accumulate", "two"], "--accumulate must be a whole number"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_written(capsys, tmp_path, words, said):
    assert said in complaint(capsys, "train", "smoke", "--run-dir", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_keeps_them(tmp_path):
    began = Train("smoke", optimizer="lion", accumulate=2).make_recipe(tmp_path / "run")
    open_run(tmp_path / "run", began, Digits(), resume=False)
    assert Train("smoke", resume=True).make_recipe(tmp_path / "run") == began
    other = Train("smoke", resume=True, optimizer="muon").make_recipe(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"diffusion\.optimizer is 'lion' in it and 'muon' now"):
        check_run_folder(tmp_path / "run", other, resume=True)


def test_a_recipe_in_a_file_is_trained_and_its_run_needs_the_file_no_more(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my_recipe.py"
    file.write_text(FILE)
    code, out, _ = run(capsys, "info", "my_recipe.py")
    assert code == 0 and "Question: does a recipe in a file train?\n\nMinutes: less than one\n" in out
    assert "is the recipe mine: diffusion tiny-dit (1 epochs)" in out
    assert "train it:  jaxldm train my_recipe.py" in out
    code, out, _ = run(capsys, "train", "my_recipe.py", "--learning-rate", "2e-3", "--quiet")
    assert code == 0 and training.read_recipe("runs/my_recipe").diffusion.learning_rate == 2e-3
    file.unlink()
    for name in ("my_recipe.py", "mine"):
        code, out, _ = run(capsys, "train", name, "--run-dir", "runs/my_recipe", "--resume")
        assert code == 0 and "finished: everything is in runs/my_recipe" in out
    assert "a run of the recipe mine" in run(capsys, "info", "runs/my_recipe")[1]
    words = ["--class-labels", "3", "--num-inference-steps", "1", "--output-dir", "drawn"]
    assert run(capsys, "sample", "runs/my_recipe", *words)[0] == 0 and (tmp_path / "drawn").is_dir()


def test_the_recipe_of_the_run_comes_before_that_of_the_file(capsys, tmp_path):
    """As with a name: options that a run began with need not be given again."""
    file, run_dir = tmp_path / "my_recipe.py", tmp_path / "run"
    file.write_text(FILE)
    began = Train(str(file), epochs=7).make_recipe(run_dir)
    assert (began.name, began.diffusion.epochs, began.max_train_images) == ("mine", 7, 64)
    open_run(run_dir, began, Digits(), resume=False)
    for name in (str(file), "mine"):
        capsys.readouterr()
        assert Train(name, resume=True).make_recipe(run_dir) == began
    assert capsys.readouterr().out == ""
    file.write_text(FILE.replace("epochs=1, sample_every=0", "epochs=7, sample_every=0, batch_size=32"))
    assert Train(str(file), resume=True).make_recipe(run_dir) == began
    line = f"the run keeps the recipe it began with: diffusion.batch_size is 64 in it and 32 in {file}\n"
    assert capsys.readouterr().out == line
    file.write_text(FILE.replace('name="mine"', 'name="another"'))
    other = Train(str(file), resume=True).make_recipe(run_dir)
    with pytest.raises(CheckpointError, match="a run of another recipe: mine, not another"):
        check_run_folder(run_dir, other, resume=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no file recipe.py: give a Python file with RECIPE = training.Recipe("),
        ("x = 1", "recipe.py has no RECIPE: it needs RECIPE = training.Recipe("),
        (FILE.replace("RECIPE = ", "mine = "), "recipe.py has no RECIPE: call it RECIPE in place of smoke"),
        ("RECIPE = {'name': 'mine'}", "RECIPE in recipe.py must be a training.Recipe, got {'name': 'mine'}"),
        ("\n\nx = 1 / 0", "recipe.py, line 3: ZeroDivisionError: division by zero"),
        ("x = = 1", "recipe.py, line 1: SyntaxError: invalid syntax"),
        ("x = '\0'", "recipe.py: SyntaxError: source code"),
        ("import no_such_module", "recipe.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(0)", "recipe.py, line 1: SystemExit: 0"),
        ("raise GeneratorExit", "recipe.py, line 1: GeneratorExit\n"),
        ("import asyncio; raise asyncio.CancelledError", "recipe.py, line 1: CancelledError\n"),
        (BAD_METHOD.format("E(Exception)", "", "__str__") + "raise E", "line 5: E: a value of type E"),
        (BAD_METHOD.format("E", "", "__repr__") + "RECIPE = E()", "a training.Recipe, got a value of type E"),
        (
            BAD_METHOD.format("E", "@property", "__class__") + "RECIPE = E()",
            "must be a training.Recipe, got ",
        ),
        (FILE.replace('"mine"', '"a\\nb"'), "line 13: name must be a line of text, got 'a\\nb'"),
        (FILE.replace('"mine"', '" "'), "line 13: name must be a line of text, got ' '"),
        (FILE.replace('"mine"', '"\\ud800"'), "line 13: name must be a line of text, got '\\ud800'"),
        ("open('absent.txt')", "recipe.py, line 1: FileNotFoundError: [Errno 2]"),
        (
            "from jaxldm import training\n\nRECIPE = training.Recipe(name='a', seed=-1)",
            "jaxldm: recipe.py, line 3: seed must be a whole number from 0",
        ),
    ],
)
def test_a_mistake_in_a_file_is_one_line(capsys, monkeypatch, tmp_path, text, said):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "recipe.py").write_text(text)
    for command in ("train", "info"):
        assert said in complaint(capsys, command, "recipe.py")
    assert not (tmp_path / "runs").exists()


def test_a_file_is_run_again_when_it_has_changed_and_is_a_module_of_its_own(monkeypatch, tmp_path):
    """Dataclasses in it know where their annotations are; data in a folder has its whole path."""
    monkeypatch.chdir(tmp_path)
    text = "from __future__ import annotations\nimport dataclasses\nfrom typing import ClassVar\n"
    text += "from jaxldm import training\n@dataclasses.dataclass\nclass Mine:\n    x: ClassVar[int] = 0\n"
    for number in range(2):
        (tmp_path / "recipe.py").write_text(
            f"{text}RECIPE = training.Recipe(name='a', seed={number}, data='./x')"
        )
        recipe = Train("recipe.py").make_recipe(tmp_path / "run")
        assert recipe.seed == number and recipe.data == str(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.py"]


def test_a_docstring_may_be_anything(tmp_path):
    (tmp_path / "recipe.py").write_text(FILE + "__doc__ = 3\n")
    assert read_recipe_file(str(tmp_path / "recipe.py")).about == ""


PATH = """
@dataclasses.dataclass(frozen=True)
class Quadratic(D.Path):
    t_min: float = 1e-3
    name = "quadratic"

    def coefficients(self, xp, t):
        return 1 - t**2, t

    def time_of(self, xp, ratio):
        ratio = xp.minimum(ratio, 1e12)
        return 2 * ratio / (1 + xp.sqrt(1 + 4 * ratio**2))

changes["prediction"] = D.v(Quadratic())
"""
OWN = """
import dataclasses
import numpy as np
from jaxldm import diffusion as D, training
smoke, changes, more = training.RECIPES["smoke-dit"], {{}}, {{}}
kinds = [training.DiffusionRecipe, training.Recipe]
overrides = dict(smoke.diffusion.overrides)
{}
diffusion = kinds[0](**dict(vars(smoke.diffusion), **changes))
RECIPE = kinds[1](**dict(vars(smoke), name="own", classifier=None, diffusion=diffusion, **more))
"""
FURTHER = """
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(kinds[{0}]):
    extra: int = 3
kinds[{0}] = Mine
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PATH, "diffusion.prediction has the path Quadratic of the recipe's file: put the class into"),
        (
            "class Mine(D.VP): pass\nchanges['prediction'] = D.v(Mine(D.VP.named('linear').betas))",
            "path Mine of",
        ),
        (FURTHER.format(0), "recipe: diffusion has an unknown key 'extra'"),
        (FURTHER.format(1), "recipe has an unknown key 'extra'"),
        (
            "class Mine(training.Recipe): pass\nkinds[1] = Mine",
            "it is of the class jaxldm_recipe_file.Mine, and",
        ),
        (
            "class Mine(kinds[0]): pass\nkinds[0] = Mine",
            "diffusion is of the class jaxldm_recipe_file.Mine, and",
        ),
        ("changes['overrides'] = {'a': {3: 1}}", "diffusion.overrides.a has the key 3, which is no string"),
        ("changes['overrides'] = {**overrides, 'depth': {1}}", "diffusion.overrides.depth is {1}: "),
        (
            "changes['overrides'] = {**overrides, 'mlp_ratio': float('nan')}",
            "diffusion.overrides.mlp_ratio is nan",
        ),
        ("changes['overrides'] = {**overrides, 'a': '\\ud800'}", "diffusion.overrides.a is '\\ud800': "),
        ("more['data'] = './\\udcff'", "data is '"),
        (
            "changes['prediction'] = D.v(D.VP.named('linear'))._replace(sigma_data=2.0)",
            "diffusion: prediction: prediction 'v_prediction' has no option 'sigma_data'",
        ),
        (
            "changes['prediction'] = D.flow(D.Flow(t_min=1e-9))",
            "diffusion.prediction: ",
        ),
    ],
)
def test_a_recipe_that_cannot_be_read_back_is_refused_before_anything_is_written(
    capsys, monkeypatch, tmp_path, text, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN.format(text))
    line = complaint(capsys, "train", "own.py", "--run-dir", "run")
    assert said in line and "the recipe 'own' cannot be read back from the config.json of its run: " in line
    assert not (tmp_path / "run").exists()
    code, out, err = run(capsys, "info", "own.py")
    assert (code, err) == (0, "") and "own.py is the recipe own: diffusion " in out
    assert out.splitlines()[-1] == f"train refuses it:  {line.removeprefix('jaxldm: ').strip()}"


def test_numbers_of_numpy_and_paths_of_a_module_come_back(monkeypatch, tmp_path):
    text = """
changes["overrides"] = {**overrides, "depth": np.int64(1), "mlp_ratio": np.float32(2), "layers": [np.int8(1)]}
changes["weight"] = {"name": "min_snr", "gamma": np.float32(5)}
more["seed"] = np.uint8(3)
from a_path_of_a_module import Quadratic
changes["prediction"] = D.v(Quadratic())
"""
    module = "import dataclasses\nfrom jaxldm import diffusion as D\nchanges = {}\n" + PATH
    (tmp_path / "a_path_of_a_module.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.py").write_text(OWN.format(text))
    recipe = read_recipe_file(str(tmp_path / "own.py")).recipe
    own = recipe.diffusion
    check_comes_back(recipe)
    assert own.overrides["layers"] == (1,) and type(own.overrides["depth"]) is int
    assert own.weight == {"name": "min_snr", "gamma": 5.0} and type(own.weight["gamma"]) is float


@pytest.mark.parametrize("name", training.RECIPES)
def test_every_recipe_comes_back(name):
    check_comes_back(training.RECIPES[name])


def test_prodigy_has_the_rate_one_unless_one_is_given(capsys, monkeypatch, tmp_path):
    recipe = Train("smoke", optimizer="prodigy").make_recipe(tmp_path)
    assert recipe.diffusion.learning_rate == 1.0
    assert "prodigy finds the rate itself: --learning-rate is 1" in capsys.readouterr().out
    given = Train("smoke", optimizer="prodigy", learning_rate=0.5).make_recipe(tmp_path)
    assert given.diffusion.learning_rate == 0.5 and capsys.readouterr().out == ""
    open_run(tmp_path / "run", given, Digits(), resume=False)
    assert Train("smoke", optimizer="prodigy", resume=True).make_recipe(tmp_path / "run") == given
    taken = {}
    monkeypatch.setattr(training, "finetune_recipe", lambda *places, **options: taken.update(options))
    Finetune(source="model", data="pictures", optimizer="prodigy").make_recipe(tmp_path)
    assert taken["learning_rate"] == 1.0


@pytest.mark.parametrize(("validation", "test"), [(1, 4), (4, 1)])
def test_an_evaluation_needs_two_real_images_of_validation_and_of_test(validation, test):
    def rows(number):
        return ArrayRows(
            {"image": np.zeros((number, 8, 8, 3), np.float32), "label": np.zeros(number, np.int32)}
        )

    splits = {"train": rows(9), "validation": rows(validation), "test": rows(test)}
    few = "validation" if validation < 2 else "test"
    with pytest.raises(DataError, match=f"the {few} split of few has .*: put more into {few}"):
        check_real_images(Dataset("few", (8, 8, 3), ("a",), splits))
    check_real_images(Dataset("enough", (8, 8, 3), ("a",), dict.fromkeys(splits, rows(2))))


def test_an_unknown_name_says_that_files_are_taken(capsys):
    assert "or a Python file such as my_recipe.py" in complaint(capsys, "train", "mini-lmd")
    _, out, _ = run(capsys, "train", "--help")
    assert (
        "jaxldm train my_recipe.py" in out
        and "Expected figures: " in out
        and "RECIPE = dataclasses.replace(training.RECIPES" in out
    )


@pytest.mark.parametrize("name", training.RECIPES)
def test_every_recipe_says_what_it_asks(capsys, name):
    assert HEADS[name].question.endswith("?") and HEADS[name].minutes and HEADS[name].figures
    if name in ("mini-shortcut", "tiny-dit"):  # of which one is a preset as well
        _, out, _ = run(capsys, "info", name)
        assert all(f"{word}  " in out for word in ("question", "minutes", "figures"))
        assert HEADS[name].question in out and HEADS[name].figures in out
