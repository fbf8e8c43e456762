"""The package's rooms: imports run downward only, and importing the package stays light."""

import ast
import json
import pathlib
import subprocess
import sys
import tomllib

import pytest
import thorough

import jaxldm

PACKAGE = pathlib.Path(jaxldm.__file__).parent
# Each room may import from itself and from the rooms named here, at the top of a file or inside a function.
GROUND_FLOOR = {"errors", "arguments", "exact", "reading", "entries", "files", "host", "memory", "indices"}
GROUND_FLOOR |= {"pixels", "functions"}
MAY_IMPORT = {
    "errors": set(),
    "arguments": {"errors", "exact", "functions"},
    "exact": set(),
    "reading": {"errors"},
    "entries": {"errors", "exact", "reading"},
    "files": {"errors", "reading"},
    "functions": {"errors"},
    "host": {"errors", "files"},
    "indices": {"arguments", "errors"},
    "memory": {"errors", "host"},
    "pixels": {"arguments", "errors"},
    "diffusion": GROUND_FLOOR,
    "few_steps": GROUND_FLOOR | {"diffusion"},
    "nn": GROUND_FLOOR,
    "models": GROUND_FLOOR | {"nn"},
    "data": GROUND_FLOOR,
    "checkpoints": GROUND_FLOOR | {"models"},
    "metrics": GROUND_FLOOR | {"data", "models"},
    "schedulers": GROUND_FLOOR | {"diffusion"},
    "pipelines": GROUND_FLOOR | {"diffusion", "schedulers", "models", "data", "checkpoints", "metrics"},
    # Captions become conditions in training as they do where the finished model draws.
    "training": GROUND_FLOOR
    | {"diffusion", "few_steps", "schedulers", "models", "data", "checkpoints", "metrics", "pipelines"},
    "serving": GROUND_FLOOR | {"diffusion", "models", "data", "pipelines"},
}
NEVER_IMPORTED = {"torch", "tensorflow", "diffusers", "transformers", "ray"}
DATA = {"tensorflow_datasets", "grain", "array_record", "mlxtend", "PIL"}
PLOTS = {"matplotlib", "sklearn"}
TEXT = {"tokenizers"}
TRAINING = {"optax", "orbax", "tqdm"}
HTTP = {"starlette", "uvicorn", "prometheus_client"}
# What a user types -> packages that it must not load: each is imported by the function that needs it.
LIGHT = {
    "import jaxldm": DATA | PLOTS | TEXT | TRAINING | {"jax", "flax", "numpy", "scipy"},
    "import jaxldm.cli": DATA | PLOTS | TEXT | TRAINING | {"jax", "flax", "numpy", "scipy", "tyro"},
    "import jaxldm.commands.serve": DATA | PLOTS | TEXT | TRAINING | HTTP | {"jax", "flax", "scipy"},
    "from jaxldm import diffusion": DATA | PLOTS | TEXT | TRAINING | {"flax", "scipy"},
    "from jaxldm import few_steps": DATA | PLOTS | TEXT | TRAINING | {"flax"},
    "from jaxldm import nn": DATA | PLOTS | TEXT | TRAINING | {"scipy"},
    "from jaxldm import data, metrics": DATA | PLOTS | TEXT | TRAINING | {"flax", "scipy"},
    "from jaxldm import pipelines": DATA | PLOTS | TEXT | TRAINING | {"scipy"},
    "from jaxldm import serving": DATA | PLOTS | TEXT | TRAINING | HTTP,
    "from jaxldm.serving import settings": DATA | PLOTS | TEXT | TRAINING | HTTP | {"scipy"},
    "from jaxldm import training": DATA | PLOTS | TEXT | {"orbax"},
    "from jaxldm import diffusion, models, training, pipelines": DATA | PLOTS | TEXT | {"orbax"},
}


def imported_modules(path: pathlib.Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_run_downward(path):
    room = room_of(path)
    names = imported_modules(path)
    others = NEVER_IMPORTED - ({"ray"} if path.name == "ray_serve.py" else set())  # where it is asked for
    assert not {name.split(".")[0] for name in names} & others
    if room not in MAY_IMPORT:  # the command line, on top, may import everything
        assert room in ("__init__", "__main__", "cli", "commands")
        return
    ours = {name.split(".")[1] for name in names if name.startswith("jaxldm.")} - {"__version__"}
    assert ours <= MAY_IMPORT[room] | {room}, f"{room} must not import {ours - MAY_IMPORT[room] - {room}}"


def modules_after(statement: str) -> set[str]:
    """The top-level packages that a new process has loaded after a statement."""
    code = (
        f"{statement}\nimport sys, json\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    return set(json.loads(out))


@pytest.mark.parametrize("statement", LIGHT)
def test_importing_a_room_loads_only_what_it_needs(statement):
    loaded = modules_after(statement)
    assert not loaded & (NEVER_IMPORTED | LIGHT[statement])


def test_no_two_files_of_tests_have_one_name():
    """pytest imports each by its name alone, and refuses the second."""
    names = [path.name for path in pathlib.Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names)), {name for name in names if names.count(name) > 1}


def test_the_list_of_thorough_tests_names_tests():
    assert thorough.names() and not thorough.unknown()


def test_the_version_has_one_source():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "jaxldm.__version__"}
    citation = (PACKAGE.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {jaxldm.__version__}\n" in citation
    changelog = (PACKAGE.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {jaxldm.__version__}" in changelog


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function below its `def`, without its docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    return function.end_lineno - function.lineno - documented * (first.end_lineno - first.lineno + 1)


def test_files_stay_under_500_lines_and_functions_under_60():
    too_long = []
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "experiments").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") >= 500:
            too_long.append(f"{path}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) >= 60:
                too_long.append(f"{path}: {node.name} has {lines_of(node)} lines")
    assert too_long == []
