"""The package's rooms: imports run downward only, and importing the package stays light."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import jaxldm

PACKAGE = pathlib.Path(jaxldm.__file__).parent
# Each room may import from itself and from the rooms named here, at the top of a file or inside a function.
GROUND_FLOOR = {"errors", "files", "host"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "host": {"errors", "files"},
    "diffusion": GROUND_FLOOR,
    "nn": GROUND_FLOOR,
    "models": GROUND_FLOOR | {"nn"},
    "data": GROUND_FLOOR,
    "checkpoints": GROUND_FLOOR | {"models"},
    "metrics": GROUND_FLOOR | {"data"},
    "pipelines": GROUND_FLOOR | {"diffusion", "models", "data", "checkpoints", "metrics"},
    "training": GROUND_FLOOR | {"diffusion", "models", "data", "checkpoints", "metrics"},
}
NEVER_IMPORTED = {"torch", "tensorflow", "diffusers", "transformers", "ray"}


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
    assert not {name.split(".")[0] for name in names} & NEVER_IMPORTED
    if room not in MAY_IMPORT:  # the command line, on top, may import everything
        assert room in ("__init__", "cli", "commands")
        return
    ours = {name.split(".")[1] for name in names if name.startswith("jaxldm.")} - {"__version__"}
    assert ours <= MAY_IMPORT[room] | {room}, f"{room} must not import {ours - MAY_IMPORT[room] - {room}}"


@pytest.mark.parametrize(
    "statement", ["import jaxldm", "from jaxldm import diffusion, models, training, pipelines"]
)
def test_import_pulls_no_other_framework(statement):
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    assert not NEVER_IMPORTED & set(loaded)
    if statement == "import jaxldm":
        assert "jax" not in loaded, "the package itself imports its rooms only when they are touched"
