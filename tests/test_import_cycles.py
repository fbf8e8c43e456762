"""No module of the package imports itself through others, at the top of a file or inside a function."""

import ast
import pathlib

import jaxldm

PACKAGE = pathlib.Path(jaxldm.__file__).parent


def module_name(path: pathlib.Path, package: pathlib.Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(package: pathlib.Path) -> dict[str, set[str]]:
    """module -> the modules of the package that it imports anywhere in its file, also for type checkers."""
    files = {module_name(path, package): path for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                full = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in files else str(node.module) for name in full.values()}
        graph[module] = names & files.keys() - {module}
    return graph


def import_cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that import each other, directly or through others; empty without cycles."""
    cycles: list[set[str]] = []
    reach = {module: reachable(graph, module) for module in graph}
    for module in graph:
        cycle = {other for other in reach[module] if module in reach[other]}
        if cycle and cycle not in cycles:
            cycles.append(cycle)
    return cycles


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def test_no_module_imports_itself_through_others():
    assert not import_cycles(import_graph(PACKAGE))


def test_a_cycle_through_a_function_is_found(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("from package import b\n")
    (package / "b.py").write_text("def f():\n    from package.a import g\n")
    assert import_cycles(import_graph(package)) == [{"package.a", "package.b"}]
    (package / "b.py").write_text("import os\n")
    assert not import_cycles(import_graph(package))
