"""A look at a script (`--quick`), or a run that is stopped, leaves the results that are there as they are."""

import ast
import dataclasses
import importlib
import json
import pathlib
import sys
import types

import pytest

from experiments import figures
from experiments.faults import run as faults
from experiments.faults.result import Result
from jaxldm.errors import UnknownNameError

ROOT = pathlib.Path(__file__).parents[2]
# Dry runs and short forms are looks, too.
LOOKS = {"quick", "dry_run", "short"}


def options_with_a_look():
    """(module, name of the options' class) of every script that has a quick form and an output folder."""
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ClassDef):
                continue
            fields = {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            if "output_dir" in fields and (fields & LOOKS or "TrainAndMeasure" in bases):
                yield ".".join(path.relative_to(ROOT).with_suffix("").parts), node.name


FOUND = list(options_with_a_look())


def test_every_script_with_a_quick_form_is_found():
    names = {module.split(".")[-1] for module, _ in FOUND}
    assert {"compile_time", "cpu", "fold", "startup", "train_step_compile", "train_step_memory"} <= names
    assert {"sixteen_bits", "real_size", "one_card", "measure", "mixture", "minimisers", "run"} <= names


@pytest.mark.parametrize(("module", "name"), FOUND, ids=lambda word: word.split(".")[-1])
def test_a_script_writes_under_runs_and_a_look_by_the_one_helper(module, name):
    found = importlib.import_module(module)
    (folder,) = (f.default for f in dataclasses.fields(getattr(found, name)) if f.name == "output_dir")
    assert folder.parts[0] == "runs", "published results are replaced by --output-dir alone"
    used = pathlib.Path(found.__file__).read_text(encoding="utf-8")
    assert any(helper in used for helper in ("quick_options(", "output_folder(", ".fitted()"))


def test_a_look_is_smaller_and_has_a_folder_of_its_own():
    @dataclasses.dataclass(frozen=True)
    class Options:
        quick: bool = False
        rounds: int = 9
        output_dir: pathlib.Path = pathlib.Path("results")
        image_dir: pathlib.Path | None = pathlib.Path("docs")

    assert figures.quick_options(Options(), rounds=1) == Options()
    quick = figures.quick_options(Options(quick=True), rounds=1)
    assert quick == Options(True, 1, pathlib.Path("results/quick"), None)


def test_a_result_is_replaced_when_the_run_is_complete(tmp_path):
    figures.save_results(tmp_path, {"it.md": "old", "it.json": "[1, 2]"})
    figures.save_results(tmp_path, {"it.md": "half", "it.json": "[3]"}, complete=False)
    assert (tmp_path / "it.md").read_text() == "old" and (tmp_path / "it.json").read_text() == "[1, 2]"
    assert (tmp_path / "unfinished" / "it.json").read_text() == "[3]"
    (tmp_path / "unfinished" / "other.md").write_text("of another script")
    figures.save_results(tmp_path, {"it.md": "new", "it.json": "[3, 4]"})
    assert (tmp_path / "it.md").read_text() == "new"
    assert [path.name for path in (tmp_path / "unfinished").iterdir()] == ["other.md"]
    figures.save_results(tmp_path, {"other.md": "whole"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.json", "it.md", "other.md"]


def plan(*_, **__):
    return {"state": 2e9, "temporary": 1e9}


def compiled(name, scan, options):
    shared = {"network": name, "scan": scan, "parameters": 1, "input": [1], "temporary_bytes": None}
    return shared | {"trace_seconds": 1.0, "compile_seconds": 1.0, "weight_bytes": 2}


def cpu_row(*_):
    return [{"row": "x", "milliseconds": {"jaxldm": 1.0}, "ratio_quartiles": {}, "first_call_seconds": {}}]


def network_row(name, dtype, options):
    return {"part": name, "dtype": dtype, "parameters": 1, "macs": 1, "not_run": "x"}


def sides(*_):
    return dict.fromkeys(("command", "ready", "first_step", "end"), 1.0)


def side_row(side, *_):
    names = ("import", "load", "first_step", "first_image", "step", "peak_gb")
    return {"side": side, **dict.fromkeys(names, 1.0)}


def added(options, keep):
    keep("added", {"solver": "ddim", "added_microseconds": 1.0, "num_images": 2})


# Script -> what stands in for its measurements.
STUBS = {
    "benchmarks.compile_time": {"measure": compiled},
    "benchmarks.cpu": {"measure_pair": cpu_row, "installed": lambda *_: {}},
    "benchmarks.fold": {"measure_added": added, "measure_network": lambda *_: None},
    "benchmarks.startup": {"make_folder": lambda *_: None, "run_side": sides},
    "benchmarks.train_step_memory": {"planned": plan},
    "benchmarks.real_size": {"make_folder": lambda *_: None, "run_side": side_row},
    "choosing_a_model.measure": {"measured": network_row},
}


def published(folder):
    """Results that are there, of every name that a script writes."""
    stems = (*(name.split(".")[-1] for name in STUBS), "sixteen_bits", "results", "models")
    for name in (f"{stem}.{ending}" for stem in stems for ending in ("md", "json")):
        (folder / name).write_text('{"rows": [], "machine": {}, "errors": {}}')
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unchanged(folder, before):
    return before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def options_of(module, **given):
    (name,) = (name for where, name in FOUND if where == module.__name__)
    return getattr(module, name)(**given)


@pytest.mark.parametrize("name", STUBS)
def test_a_quick_run_changes_no_result(name, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(f"experiments.{name}")
    for function, stub in STUBS[name].items():
        monkeypatch.setattr(module, function, stub)
    before = published(tmp_path)
    module.main(options_of(module, quick=True, output_dir=tmp_path))
    assert unchanged(tmp_path, before)
    written = [path.suffix for path in (tmp_path / "quick").iterdir() if path.is_file()]
    assert sorted(written) == [".json", ".md"]


@pytest.fixture
def sixteen_bits(monkeypatch):
    """The script without diffusers and networks."""
    errors = importlib.import_module("experiments.benchmarks.sixteen_bits").Errors
    cases = types.SimpleNamespace(CASES=dict.fromkeys(("a", "b")))
    measured = types.SimpleNamespace(measure=lambda name, dtype, seeds: errors(len(seeds), 2.0))
    for name, module in (("cases", cases), ("errors", measured)):
        monkeypatch.setitem(sys.modules, f"experiments.benchmarks.sixteen_bits_{name}", module)
    for name in ("torch", "diffusers"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(__version__="1"))
    return importlib.import_module("experiments.benchmarks.sixteen_bits"), measured


def test_a_stopped_run_changes_no_result_and_the_next_goes_on(sixteen_bits, tmp_path, monkeypatch, capsys):
    module, measured = sixteen_bits
    before, measure = published(tmp_path), measured.measure
    module.main(module.SixteenBits(quick=True, output_dir=tmp_path))
    assert unchanged(tmp_path, before) and (tmp_path / "quick" / "sixteen_bits.md").exists()

    def stopped(name, *rest):
        if name == "b":
            raise KeyboardInterrupt
        return measure(name, *rest)

    monkeypatch.setattr(measured, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        module.main(module.SixteenBits(output_dir=tmp_path))
    assert unchanged(tmp_path, before)
    monkeypatch.setattr(measured, "measure", measure)
    module.main(module.SixteenBits(cases=("b",), output_dir=tmp_path))
    assert set(json.loads((tmp_path / "sixteen_bits.json").read_text())["errors"]) == {"a", "b"}
    assert not (tmp_path / "unfinished").exists()


def test_a_stopped_run_of_compile_times_changes_no_result(tmp_path, monkeypatch, capsys):
    module, calls = importlib.import_module("experiments.benchmarks.compile_time"), []

    def stopped(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compiled(*given)

    monkeypatch.setattr(module, "measure", stopped)
    before = published(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        module.main(options_of(module, output_dir=tmp_path))
    assert unchanged(tmp_path, before)
    assert len(json.loads((tmp_path / "unfinished" / "compile_time.json").read_text())["rows"]) == 1
    module.main(options_of(module, output_dir=tmp_path))
    assert len(json.loads((tmp_path / "compile_time.json").read_text())["rows"]) == 2 * len(module.NETWORKS)


def test_a_short_form_of_the_faults_changes_no_table(tmp_path, monkeypatch, capsys):
    kind = types.SimpleNamespace(run=lambda count, seed: Result("kills", count, [], 1.0))
    monkeypatch.setattr(faults, "KINDS", {"kills": (200, 8)})
    monkeypatch.setattr(faults.importlib, "import_module", lambda name: kind)
    before = published(tmp_path)
    faults.main(faults.Faults(short=True, output_dir=tmp_path, only=("kills",)))
    assert unchanged(tmp_path, before)
    assert "| kills | 8 | 0 | 1 |" in (tmp_path / "quick" / "results.md").read_text()
    with pytest.raises(UnknownNameError, match=r"kind 'kill'.*did you mean 'kills'"):
        faults.main(faults.Faults(only=("kill",), output_dir=tmp_path))
    faults.main(faults.Faults(output_dir=tmp_path, only=("kills",)))
    assert "| kills | 200 | 0 | 1 |" in (tmp_path / "results.md").read_text()
