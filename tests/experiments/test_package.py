"""The experiments are a package that runs from the repository, and stays out of the wheel."""

import ast
import importlib
import pathlib
import re
import sys
import tomllib
import types

import numpy as np
import pytest
import setuptools

from experiments import ledger, results
from jaxldm.commands.terminal import run_script
from jaxldm.errors import CheckpointError

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(
    path
    for path in (ROOT / "experiments").rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
)


def test_the_wheel_contains_jaxldm_alone():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    include = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.split(".")[0] for name in setuptools.find_packages(str(ROOT))} == {"jaxldm", "experiments"}
    assert {name.split(".")[0] for name in setuptools.find_packages(str(ROOT), include=include)} == {"jaxldm"}


@pytest.mark.parametrize("folder", ["experiments", "tests"])
def test_nothing_touches_the_module_search_path(folder):
    for path in (ROOT / folder).rglob("*.py"):
        touched = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
        ]
        assert not touched, path


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_a_module_and_names_its_command(path):
    """`python -m` finds each script, whose docstring says how it is called, and why."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name)
    assert f"python -m {name}" in module.__doc__
    assert all(word in module.__doc__ for word in ("Question:", "Command:", "Needs:"))
    readme = (path.parent / "README.md").read_text(encoding="utf-8")
    assert f"python -m {name}" in readme


SECTIONS = [
    (readme.parent.name, section)
    for readme in sorted((ROOT / "experiments").glob("*/README.md"))
    for section in re.split(r"^#+ ", readme.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if "**Command.**" in section
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: f"{section[0]}-{section[1][:20]}")
def test_an_entry_has_question_command_minutes_result_and_lesson(section):
    for part in ("**Question.**", "**Command.**", "**What came out.**", "**What it shows.**"):
        assert part in section[1]
    assert "**Minutes.**" in section[1] or re.search(r"(minutes?|seconds?)\b", section[1])


def test_the_help_of_a_script_names_its_command(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", types.SimpleNamespace(name="experiments.ledger"))
    monkeypatch.setattr("sys.argv", ["/some/where/experiments/ledger.py", "--help"])
    with pytest.raises(SystemExit) as end:
        run_script(ledger.main, ledger.Ledger)
    assert end.value.code == 0 and "usage: python -m experiments.ledger " in capsys.readouterr().out


def test_results_are_made_once(tmp_path):
    made, kept = [], results.Results(tmp_path)

    def make():
        made.append(1)
        return {"figure": len(made)}, {"images": np.arange(3)}

    for _ in range(2):
        figures, arrays = kept.row("a row", {"seed": (0,)}, make)
        assert figures == {"figure": 1} and arrays["images"].tolist() == [0, 1, 2]
    assert kept.row("a row", {"seed": (1,)}, make)[0] == {"figure": 2}
    assert kept.row("another", {}, make)[0] == {"figure": 3} and set(kept.rows()) == {"a row", "another"}
    kept.path.write_text("{")
    with pytest.raises(CheckpointError, match=r"results\.json"):
        kept.row("another", {}, make)
