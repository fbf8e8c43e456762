"""Every figure of README and docs has a row in the ledger, and the rows that are quick are still true."""

import pytest

from experiments import ledger
from experiments.ledger_checks import CHECKS
from jaxldm import cli
from jaxldm.errors import DataError

ROWS, STATED = ledger.read_ledger()
FIGURES = ledger.all_figures()
HELP = "add it to experiments/ledger.toml, whose first lines say how"


def test_every_figure_has_a_row():
    unknown = [f"{f.page}#{f.anchor}: {f.text}" for f in ledger.missing(FIGURES, ROWS, STATED)]
    assert not unknown, f"figures without a row ({HELP}): {unknown}"


def test_no_row_is_of_a_figure_that_is_gone():
    assert not ledger.stale(FIGURES, ROWS, STATED)


def test_rows_say_where_when_and_how():
    for row in ROWS:
        assert row.what and row.command and row.machine and row.minutes > 0 and 0 <= row.tolerance < 1
        assert len(str(row.date)) == 10 and (row.figures or row.results) and row.check in {"", *CHECKS}
    assert all(entry.why and entry.figures for entry in STATED)
    assert {row.check for row in ROWS} == {"", *CHECKS}


def test_quick_rows_hold():
    (row,) = (row for row in ROWS if row.check == "demo_parameters")
    assert ledger.check_row(row) == []
    wrong = row._replace(figures=["1.9", *row.figures[1:]])
    (line,) = ledger.check_row(wrong)
    assert "printed 1.9, now 1.6" in line


def test_what_counts_as_a_figure():
    text = (
        "# T\n## How fast, really?\nIn 4.4 s, `5.5 s`, 93.2% and 1,066.3 at w = 7.5 with JAX 0.8 to 0.12 "
        "([1.5](a/2.5.md)) and SD 1.5: 3 times, 12 digits.\n```\n9.9 s\n```\n"
        "<!-- t: written by x -->\n| 1.25 |\n<!-- end -->\n0.5\n"
    )
    found = ledger.figures_of("p.md", text)
    assert {figure.anchor for figure in found} == {"how-fast-really"}
    assert [f.text for f in found] == ["4.4 s", "93.2%", "1,066.3", "1.5", "3 times", "0.5"]


def test_a_number_of_a_file_of_results_covers_its_rounding_alone(tmp_path, monkeypatch):
    (tmp_path / "r.json").write_text('{"rows": [{"seconds": 0.16843, "share": 0.9316, "count": 1275408}]}')
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    row = ROWS[0]._replace(where="p.md", figures=[], results=["r.json"])
    printed = ["0.168", "168.4 ms", "93.2%", "1.3", "1.275", "0.169", "168.5 ms", "93.1%", "1.4"]
    figures = [ledger.Figure("p.md", "", text) for text in printed]
    assert [f.text for f in ledger.missing(figures, [row], [])] == ["0.169", "168.5 ms", "93.1%", "1.4"]
    assert len(ledger.missing(figures, [row._replace(where="q.md")], [])) == len(figures)


def test_an_entry_with_another_field_is_refused(tmp_path):
    path = tmp_path / "ledger.toml"
    path.write_text('[[stated]]\nwhere = "README.md"\nreason = "x"\n')
    with pytest.raises(DataError, match="reason"):
        ledger.read_ledger(path)
    path.write_text('[[stated]]\nwhere = "README.md"\nwhy = "all of it"\n')
    with pytest.raises(DataError, match="figures"):
        ledger.read_ledger(path)


def test_what_is_no_measurement_is_named_so_that_a_new_figure_is_seen():
    (entry, *_) = (entry for entry in STATED if entry.where.startswith("docs/checkpoints.md"))
    page = entry.where.partition("#")[0]
    new = ledger.Figure(page, entry.where.partition("#")[2], "77.7 s")
    known = new._replace(text=entry.figures[0])
    assert ledger.missing([known, new], ROWS, STATED) == [new]


def test_the_table_of_16_bits_is_that_of_the_results():
    def rows(path, columns):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return {row[0]: [row[column] for column in columns] for row in cells}

    results = rows(ledger.ROOT / "experiments/benchmarks/results/sixteen_bits.md", (3, 6))
    readme = rows(ledger.ROOT / "experiments/benchmarks/README.md", (0,))
    page = rows(ledger.ROOT / "docs/checkpoints.md", (-2, -1))
    results.pop("network")
    assert len(results) == 31 and results.keys() <= readme.keys()
    assert {name: page[name] for name in results} == results


def test_the_minutes_of_a_command_are_one_number():
    minutes = {}
    for row in ROWS:
        minutes.setdefault((row.command, row.check), set()).add(row.minutes)
    assert all(len(found) == 1 for found in minutes.values()), minutes
    (demo,) = minutes["make demo", ""]
    (cpu,) = minutes["python -m experiments.benchmarks.cpu", ""]
    texts = {name: (ledger.ROOT / name).read_text(encoding="utf-8") for name in (
        "README.md", "docs/index.md", "experiments/lecture39/README.md", "experiments/benchmarks/README.md"
    )}  # fmt: skip
    assert f": {demo:g} minutes after installation" in texts["README.md"]
    assert f"**Minutes.** {demo:g} on" in texts["experiments/lecture39/README.md"]
    assert f"**Minutes.** {cpu:g} for a full run" in texts["experiments/benchmarks/README.md"]
    word = {3: "three", 4: "four", 5: "five"}[round(demo)]
    assert f"`make demo`: {word} minutes" in texts["docs/index.md"] and f"({word} minutes" in cli.HELP


def test_the_list_and_the_missing(capsys):
    ledger.main(ledger.Ledger(list=True))
    out = capsys.readouterr().out
    assert all(row.where in out for row in ROWS) and "make demo" in out
    assert max(map(len, out.splitlines())) <= 100
    ledger.main(ledger.Ledger(missing=True))
    assert capsys.readouterr().out == ""
