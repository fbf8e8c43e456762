"""Which tests need a reference, and how the others run where it is not installed.

References are what only the extra `test` brings: PyTorch, diffusers, transformers and further programs to
compare with. A test needs one if it, or anything of its file or of the helpers that it uses, names something
that was imported from them. Such a test has the marker `torch`. With `-m "not torch"`, stand-ins take the
place of the packages that are missing while files are imported; a test that touches one afterwards fails.
"""

import ast
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).parents[1]
REFERENCES = frozenset({"torch", "diffusers", "transformers", "peft", "gguf", "openai", "schemathesis"})


@functools.cache
def helper_files() -> dict[str, pathlib.Path]:
    """Name of a module -> its file, for everything in tests/ and experiments/."""
    return {path.stem: path for room in ("tests", "experiments") for path in (ROOT / room).rglob("*.py")}


@functools.cache
def dependents(path: pathlib.Path) -> frozenset[str]:
    """Names at the top of a file that need a reference: imports, functions, fixtures, constants."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    found = {name for statement in body for name in _imported(statement, path)}
    before = -1
    while len(found) != before:
        before = len(found)
        for statement in body:
            if _mentioned(statement) & found or _imports_inside(statement, path):
                found |= _defined(statement)
    return frozenset(found)


def _imported(statement: ast.stmt, path: pathlib.Path) -> set[str]:
    """The names that an import binds and that need a reference."""
    if isinstance(statement, ast.Import):
        roots = {alias.asname or alias.name.split(".")[0]: alias.name for alias in statement.names}
        return {name for name, module in roots.items() if _needs(module, path)}
    if isinstance(statement, ast.ImportFrom) and statement.module:
        module, names = (
            statement.module,
            {alias.asname or alias.name: alias.name for alias in statement.names},
        )
        if module.split(".")[0] in REFERENCES:
            return set(names)
        if module.split(".")[0] == "jaxldm":
            return set()
        helper = helper_files().get(module.split(".")[-1])
        if helper in (None, path):  # a folder of helpers: the names are modules
            return {name for name, own in names.items() if _needs(own, path)}
        return {name for name, own in names.items() if own in dependents(helper)}
    return set()


def _needs(module: str, path: pathlib.Path) -> bool:
    if module.split(".")[0] in REFERENCES:
        return True
    helper = helper_files().get(module.split(".")[-1])
    own = module.split(".")[0] in ("tests", "experiments") or "." not in module
    return own and helper not in (None, path) and bool(dependents(helper))


def _imports_inside(statement: ast.stmt, path: pathlib.Path) -> bool:
    """Whether a function or class imports a reference when it is called."""
    inner = [] if isinstance(statement, ast.Import | ast.ImportFrom) else ast.walk(statement)
    return any(_imported(node, path) for node in inner if isinstance(node, ast.Import | ast.ImportFrom))


def _mentioned(statement: ast.stmt) -> set[str]:
    """Every name in a statement, and the fixtures that a function asks for."""
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return names | {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}


def _defined(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    return {
        node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)
    }


def needs_reference_everywhere(path: pathlib.Path) -> bool:
    """Whether no test of a file can run without a reference: then the file need not be imported."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    tests = {
        item.name for item in body if isinstance(item, ast.FunctionDef) and item.name.startswith("test_")
    }
    return bool(tests) and tests <= dependents(path)


class StandIn(types.ModuleType):
    """In place of a package that is missing, or of anything in it, while files of tests are imported."""

    collecting = True

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():  # SciPy asks whether an array is a torch.Tensor, once a `torch` is imported
            return type(name, (), {"__init__": _refuse_after_collecting})
        _refuse_after_collecting(self.__name__)
        return StandIn(f"{self.__name__}.{name}")

    def __call__(self, *args, **options):
        return self.call


def _refuse_after_collecting(what, *args, **options):
    if not StandIn.collecting:
        raise ImportError(f"{what} is not installed, and this test is not marked `torch`")


class Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a `StandIn` for each reference that is not installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in REFERENCES:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        module.__version__ = "0.0"  # safetensors.torch compares it before 0.8


def stand_in_for_missing() -> None:
    """From now on `import torch` works where it is not installed, and gives something no test may use."""
    if any(importlib.util.find_spec(name) is None for name in REFERENCES):
        sys.meta_path.append(Missing())


def remove_stand_ins() -> None:
    """After the files were imported: other packages (tyro, SciPy) look whether `torch` was."""
    StandIn.collecting = False
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Missing)]
    for name in [name for name, module in sys.modules.items() if isinstance(module, StandIn)]:
        del sys.modules[name]
