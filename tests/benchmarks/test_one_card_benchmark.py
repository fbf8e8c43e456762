"""The benchmark of one card: what is started, what becomes of failures, and the rows at small size."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest

import jaxldm
from experiments.benchmarks import (
    card_checks,
    card_jaxldm,
    card_report,
    card_rows,
    card_torch,
    card_worker,
    one_card,
)
from experiments.benchmarks.card_rows import ROWS, VARIANTS, Unit
from jaxldm.errors import InvalidArgumentError, UnknownNameError

BY_NAME = {row.name: row for row in ROWS}


def line(what, milliseconds, flops=None):
    """A measured line, as a worker answers it."""
    return {
        "what": what,
        "flops": flops,
        "milliseconds": [0.9 * milliseconds, milliseconds, 1.1 * milliseconds],
        "compile_seconds": 1.0,
        "memory_bytes": None,
    }


# ---------------------------------------------------------------- what is started


def test_every_unit_has_its_expected_seconds_and_both_sides_know_its_kind():
    planned = card_rows.units(ROWS, VARIANTS)
    assert [unit.row.name for unit in planned[:3]] == ["correctness", "correctness", "peak"]
    for table in card_rows.SECONDS.values():
        assert {name: len(seconds) for name, seconds in table.items()} == {
            row.name: len(row.variants) for row in ROWS
        }
    for unit in planned:
        side = card_jaxldm if unit.variant == "jaxldm" else card_torch
        assert unit.row.kind in side.KINDS
        assert set(unit.row.small) - {"quick"} == set(unit.row.sizes) - {"quick"}
        known = card_rows.expected_seconds(unit, "NVIDIA H100 80GB HBM3")
        assert card_rows.expected_seconds(unit, "NVIDIA H200") == known > 0
        assert card_rows.expected_seconds(unit, "Some other card") == card_rows.OTHER_GPUS * known


def test_a_row_that_would_not_be_finished_is_not_started_and_a_shorter_one_behind_it_is():
    planned = card_rows.units((BY_NAME["sdxl-1024"], BY_NAME["decode-1024"]), ("jaxldm",))
    clock, asked, written = [50.0], [], []

    def measure(unit, seconds):
        asked.append((unit.row.name, seconds))
        clock[0] -= 20.0
        return {"lines": [line("decoding", 5.0)]}

    records = one_card.measure_all(
        planned, "H100", measure, lambda: clock[0], lambda found: written.append(len(found))
    )
    assert asked == [("decode-1024", 50.0)]
    assert records[0]["not_started"] == "not started: about 90 s, and 50 s are left"
    assert "seconds" not in records[0] and records[1]["lines"]
    assert written == [1, 2]  # after each


def test_a_failed_row_is_a_row_with_its_reason():
    """Lines that were measured before the failure stay."""

    def broken(variant, dtype, **sizes):
        yield card_worker.Line("one call", lambda: None, flops=1e9)
        raise MemoryError("no memory\nfor that")

    side = type("side", (), {"KINDS": {"model": broken}, "forget": staticmethod(lambda: None)})
    request = {"row": "flux-1024", "variant": "jaxldm", "seconds": 0.0}
    answer = card_worker.measure(side, request, True, "bfloat16")
    assert answer["error"] == "MemoryError: no memory for that"
    assert [found["what"] for found in answer["lines"]] == ["one call"]
    records = [{"row": "flux-1024", "variant": "jaxldm", "expected_seconds": 1.0} | answer]
    text = card_report.report({"small_sizes": True, "dtype": "bfloat16"}, records)
    assert "- FLUX.1-dev, 1024 pixels (flux-1024), jaxldm: MemoryError: no memory for that" in text


FAKE = """#!{python}
import json, os, sys, time
names = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_PLATFORMS")
environment = {{name: os.environ.get(name) for name in names}}
given = {{"options": json.loads(sys.argv[4]), "environment": environment}}
print(json.dumps({{"device": "a card", "backend": "{backend}", "pid": os.getpid()}} | given), flush=True)
for line in sys.stdin:
    row = json.loads(line)["row"]
    if row == "demo":
        sys.exit(3)
    time.sleep(60 if row == "flux-1024" else 0)
    print(json.dumps({{"lines": [], "pid": os.getpid()}}), flush=True)
"""


@pytest.fixture
def sides(tmp_path, monkeypatch, request):
    """Both processes, of which each is a script that ends in the row `demo` and hangs in `flux-1024`."""
    script = tmp_path / "python"
    script.write_text(FAKE.format(python=sys.executable, backend=getattr(request, "param", "gpu")))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    both = one_card.Sides(one_card.OneCard(output_dir=tmp_path, memory_fraction=0.4))
    yield both
    both.stop()


def test_a_process_that_ends_or_hangs_is_a_failed_row_and_the_next_row_has_another(sides):
    demo, flux, peak = (Unit(BY_NAME[name], "jaxldm") for name in ("demo", "flux-1024", "peak"))
    first = sides.measure(peak, 1.0, 60.0)["pid"]
    assert sides.measure(demo, 1.0, 60.0)["error"] == "its process ended with code 3: see the log"
    second = sides.measure(peak, 1.0, 60.0)["pid"]
    assert sides.measure(flux, 1.0, 0.5)["error"] == "stopped: not finished in 0 s"
    assert len({first, second, sides.measure(peak, 1.0, 60.0)["pid"]}) == 3


def test_each_framework_has_its_share_of_the_memory_and_jax_in_pytorch_s_process_none(sides):
    found = {name: sides.setting(name, 60.0) for name in ("jaxldm", "torch")}
    for setting in found.values():
        assert setting["options"]["memory_fraction"] == 0.4
        assert setting["environment"]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        assert setting["environment"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.4"
    platforms = {name: setting["environment"]["JAX_PLATFORMS"] for name, setting in found.items()}
    assert platforms == {"jaxldm": None, "torch": "cpu"}


@pytest.mark.parametrize("sides", ["cpu"], indirect=True)
def test_without_a_gpu_nothing_of_published_size_is_run(sides):
    assert sides.setting("jaxldm", 60.0)["error"].startswith("it sees no GPU")
    dry = one_card.Sides(dataclasses.replace(sides.options, dry_run=True))
    assert "error" not in dry.setting("jaxldm", 60.0)
    dry.stop()


def test_what_this_package_warns_of_is_in_the_table():
    """Such as a kernel that it does without; warnings of others are only printed."""

    def row(variant, dtype, **sizes):
        yield card_worker.Line("one call")
        warnings.warn_explicit("attention without cuDNN's kernel", UserWarning, jaxldm.__file__, 1)
        warnings.warn_explicit("something else", UserWarning, np.__file__, 1)

    side = type("side", (), {"KINDS": {"model": row}, "forget": staticmethod(lambda: None)})
    request = {"row": "flux-1024", "variant": "jaxldm", "seconds": 0.0}
    with pytest.warns(UserWarning) as printed:
        answer = card_worker.measure(side, request, True, "bfloat16")
    assert len(printed) == 2
    assert answer["warnings"] == ["attention without cuDNN's kernel"]
    records = [{"row": "flux-1024", "variant": "jaxldm", "expected_seconds": 1.0} | answer]
    text = card_report.report({"small_sizes": True, "dtype": "bfloat16"}, records)
    assert "- flux-1024, jaxldm: attention without cuDNN's kernel" in text


def test_without_pytorch_its_rows_are_left_out_and_without_jaxldm_its_rows_fail():
    planned = one_card.units(ROWS[:2], VARIANTS)
    assert {unit.variant for unit in one_card.with_present(planned, ["jaxldm"])} == {"jaxldm"}
    assert one_card.with_present(planned, ["torch"]) == planned


@pytest.mark.parametrize("fails", [False, True])
def test_the_arrays_of_a_row_are_free_before_the_other_process_has_its_turn(fails):
    arrays, alive = [], []

    def row(variant, dtype, **sizes):
        array = np.zeros(3)
        arrays.append(weakref.ref(array))
        yield card_worker.Line("one call", lambda: array.sum())
        if fails:
            raise MemoryError("for the second")

    def forget():
        alive.append(arrays[0]() is not None)

    side = type("side", (), {"KINDS": {"model": row}, "forget": staticmethod(forget)})
    request = {"row": "flux-1024", "variant": "jaxldm", "seconds": 0.0}
    assert ("error" in card_worker.measure(side, request, True, "bfloat16")) == fails
    assert alive == [False]


def test_mistyped_options_are_refused():
    assert one_card.check(one_card.OneCard(rows=("peak",))) == (BY_NAME["peak"],)
    for wrong, error in (
        ({"rows": ("sd3",)}, UnknownNameError),
        ({"variants": ("jax",)}, UnknownNameError),
        ({"dtype": "int8"}, UnknownNameError),
        ({"minutes": 0.0}, InvalidArgumentError),
        ({"memory_fraction": 1.5}, InvalidArgumentError),
    ):
        with pytest.raises(error):
            one_card.check(one_card.OneCard(**wrong))


def test_the_script_runs_by_its_path_from_another_folder(tmp_path):
    """As far as the check of its options; the folder of the repository is not on the path."""
    script = Path(one_card.__file__)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, script, "--rows", "sd4", "--output-dir", tmp_path / "out"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("one_card: unknown row 'sd4'")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_goes_through_without_pytorch_and_says_so(tmp_path, monkeypatch, capsys):
    """Rows of a whole run, in processes of their own, where PyTorch and diffusers cannot be imported."""
    (tmp_path / "block").mkdir()
    for name in ("torch", "diffusers", "transformers"):
        text = f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')"
        (tmp_path / "block" / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "block"), str(one_card.ROOT)]))
    out = tmp_path / "out"
    one_card.main(one_card.OneCard(dry_run=True, rows=("peak",), minutes=5, output_dir=out))
    printed = capsys.readouterr().out
    text = (out / "quick" / "one_card_cpu.md").read_text()
    assert text in printed and "PyTorch was not run: ModuleNotFoundError: No module named" in text
    assert "SMALL SIZES" in text and "TFLOP/s" in text and "100.0%, -, -" in text
    (record,) = json.loads((out / "quick" / "one_card_cpu.json").read_text())["records"]
    assert record["variant"] == "jaxldm" and record["lines"] and "error" not in record


def test_a_dry_run_of_all_rows_goes_through_on_both_sides(tmp_path, monkeypatch, capsys):
    """Every row and variant, as on a card but small; no result is wrong."""
    monkeypatch.delenv("XLA_FLAGS")  # one device, as a card is
    one_card.main(one_card.OneCard(dry_run=True, minutes=60, output_dir=tmp_path))
    records = json.loads((tmp_path / "quick" / "one_card_cpu.json").read_text())["records"]
    assert {(record["row"], record["variant"]) for record in records} == {
        (unit.row.name, unit.variant) for unit in card_rows.units(ROWS, VARIANTS)
    }
    assert all(record["lines"] and not card_report.reason(record) for record in records)
    assert "failed" not in capsys.readouterr().out


# ---------------------------------------------------------------- the table


def test_the_table_has_ratios_and_shares_of_the_peak_of_the_same_run():
    records = [
        {"row": "peak", "variant": "jaxldm", "lines": [line("products", 10.0, 1e12)]},  # 100 TFLOP/s
        {"row": "peak", "variant": "eager", "lines": [line("products", 5.0, 1e12)]},  # 200 TFLOP/s
        {"row": "sd15-512", "variant": "jaxldm", "lines": [line("one call for 2", 20.0, 1e12)]},
        {"row": "sd15-512", "variant": "eager", "lines": [line("one call for 2", 50.0, 1e12)]},
        {"row": "sd15-512", "variant": "torch.compile", "lines": [], "error": "OutOfMemoryError: x"},
        {"row": "demo", "variant": "jaxldm", "lines": [], "not_started": "not started: about 150 s"},
    ]
    for record in records:
        record["expected_seconds"] = 1.0
    text = card_report.report({"small_sizes": False, "dtype": "bfloat16"}, records)
    assert "200 TFLOP/s" in text
    found = next(row for row in text.splitlines() if "SD 1.5" in row and "one call" in row)
    assert [cell.strip() for cell in found.split("|")[1:-1]] == [
        "SD 1.5, 512 pixels: one call for 2",
        "20 (18 to 22)",
        "50 (45 to 55)",
        "failed",
        "2.50",
        "",
        "25.0%, 10.0%, -",
        "1.0, 1.0, -",
        "",
    ]
    assert "| the demo, end to end | not started |" in text
    assert "SMALL" not in text


def test_errors_above_their_bound_are_said():
    def of(error):
        return [{"what": "attention, bfloat16", "result": {"error": error, "bound": 1e-2}}]

    for error, verdict in ((2e-3, "ok"), (2e-2, "WRONG"), (np.inf, "WRONG")):
        ours = {"row": "correctness", "variant": "jaxldm", "lines": of(error)}
        theirs = {"row": "correctness", "variant": "eager", "lines": of(3e-3)}
        ((what, mine, other, bound, found),) = card_report.check_cells([ours, theirs])
        assert (what, mine, other, bound) == ("attention, bfloat16", f"{error:.1e}", "3.0e-03", "1e-02")
        assert found == verdict
        assert card_report.failed([ours, theirs]) == (verdict == "WRONG")
    assert card_report.failed([ours | {"lines": [], "error": "no memory"}])


# ---------------------------------------------------------------- the work itself


def test_the_answers_of_the_checks_are_those_of_both_frameworks_in_float32():
    """Of each kind one; in float32 an error above 1e-5 is a mistake, here or there; and those of 8 bits."""
    found = {}
    for check in card_checks.checks(tokens=24, pixels=4, channels=8):
        name = (check.name, check.dtype) if check.kind == "product of 8 bits" else check.name
        found.setdefault(name, check)
    assert len(found) > 12
    assert {"int8", "float8_e4m3fn"} <= {check.dtype for check in found.values()}
    for check in found.values():
        wide = check if check.kind == "product of 8 bits" else check._replace(dtype="float32")
        assert card_checks.error(card_jaxldm.compute(wide), wide) < 1e-5, check.name
        assert card_checks.error(card_torch.compute(wide), wide) < 1e-5, check.name


def test_an_error_that_is_not_a_number_is_above_every_bound():
    check = next(card_checks.checks(tokens=8, pixels=2, channels=8))
    assert card_checks.error([np.full_like(check.answers[0], np.nan)], check) == np.inf


def test_a_row_at_small_size_is_measured_on_both_sides():
    timed = {}
    for variant in VARIANTS[:2]:
        side = card_jaxldm if variant == "jaxldm" else card_torch
        request = {"row": "peak", "variant": variant, "seconds": 0.0}
        answer = card_worker.measure(side, request, True, "bfloat16")
        assert "error" not in answer
        (timed[variant],) = answer["lines"]
    assert len({(found["what"], found["flops"]) for found in timed.values()}) == 1
    for found in timed.values():
        first, median, last = found["milliseconds"]
        assert 0 < first <= median <= last
        assert found["first_call_seconds"] > 0 and found["calls"] == 3


def test_both_sides_of_a_line_have_the_same_title_and_operations():
    sizes = {"family": "sdxl", "pixels": 16, "quick": True}
    ours = next(card_jaxldm.decoding("jaxldm", "bfloat16", **sizes))
    theirs = next(card_torch.decoding("eager", "bfloat16", **sizes))
    assert (ours.what, ours.flops) == (theirs.what, theirs.flops)
    theirs.run()


def test_a_worker_answers_line_by_line():
    requests = io.StringIO(json.dumps({"row": "peak", "variant": "jaxldm", "seconds": 0.0}) + "\n")
    answers = io.StringIO()
    card_worker.main("jaxldm", {"dry_run": True, "dtype": "float32"}, requests, answers)
    first, second = map(json.loads, answers.getvalue().splitlines())
    assert first["versions"]["jax"] and first["backend"] == "cpu"
    assert second["lines"][0]["flops"] == 8 * 2 * 256**3 and second["seconds"] > 0
