"""All scripts' rows in one table: seconds by each script's own whole run, and the Pareto frontier."""

import dataclasses

import pytest

from experiments.less_compute import comparison, frontier, smaller
from experiments.results import Results
from jaxldm.errors import InvalidArgumentError


def keep(folder, name, settings, **figures):
    Results(folder).row(name, settings, lambda: (figures | {"accuracy": 0.9}, {}))


@pytest.fixture
def options(tmp_path):
    """Rows of three scripts, whose whole runs took 40, 60 and 80 ms a digit."""
    caches, small, tiny = tmp_path / "DiT", tmp_path / "DiT" / "smaller", tmp_path / "dynamic"
    common = {"judge": "j", "images": 500, "seed": 0, "repeats": 3}
    for name, steps, cache, seconds, distance in (
        ("25 steps", 25, None, 10.0, 2.5),
        ("50 steps", 50, None, 20.0, 2.0),
        ("fora:2", 50, {"interval": 2}, 12.5, 2.2),
    ):
        settings = common | {"steps": steps, "cache": name, "settings": cache}
        keep(caches, name, settings, seconds=seconds, distance=distance)
    of_smaller = common | {"steps": 50, "timed": 128}
    keep(small, "full", of_smaller, seconds=0.06, distance=2.001)
    keep(small, "50%, trained further", of_smaller, seconds=0.03, distance=2.4)
    keep(tiny, "DiT-Tiny", common | {"model": "a"}, milliseconds=80.0, distance=2.0)
    keep(tiny, "DyDiT, 0.5", common | {"model": "b"}, milliseconds=60.0, distance=2.3)
    keep(tiny, "DyDiT, 0.7", common | {"images": 100}, milliseconds=60.0, distance=2.0)
    return frontier.Frontier(model="DiT", output_dir=tmp_path, dynamic_dir=tiny)


def test_seconds_are_compared_within_a_script(options):
    rows, notes = frontier.collected(options)
    shares = {row["name"]: row["share"] for row in rows}
    assert next(iter(shares)) == "50 steps" and shares == pytest.approx(
        {"50 steps": 1, "25 steps": 0.5, "fora:2": 0.625, "50%, trained further": 0.5, "DyDiT, 0.5": 0.75}
    )
    assert [note.partition(":")[0] for note in notes] == ["dynamic", "bits"]
    assert "'DyDiT, 0.7' is of other settings" in notes[0] and "less_compute.bits" in notes[1]


def test_table_and_plot_mark_what_nothing_beats(options, capsys):
    frontier.main(options)
    text = (options.output_dir / "DiT" / "frontier.md").read_text()
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    marked = {row[0] for row in cells if row[-1] == "yes"}
    assert marked == {"50%, trained further", "fora:2", "50 steps"}
    (cache,) = (row for row in cells if row[0] == "fora:2")
    assert cache[4] == "1.60" and cache[8] == "2.375"  # a quarter of the way from 25 to 50 steps
    assert (options.output_dir / "DiT" / "frontier.png").stat().st_size > 1000
    assert "python -m experiments.less_compute.bits" in capsys.readouterr().out


def test_another_model_is_refused(options):
    keep(options.dynamic_dir, "DiT-Tiny", {"images": 500, "seed": 1}, milliseconds=80.0, distance=3.0)
    with pytest.raises(InvalidArgumentError, match="--leave-out dynamic"):
        frontier.collected(options)
    rows, _ = frontier.collected(dataclasses.replace(options, leave_out=("dynamic",)))
    assert {row["script"] for row in rows} == {"caching", "smaller"}
    with pytest.raises(InvalidArgumentError, match="no rows of U-Net yet"):
        frontier.main(dataclasses.replace(options, model="U-Net", dynamic_dir=None))


def test_a_row_timed_again_is_not_compared_with_one_of_the_first_time():
    assert not frontier.fits({"model": "a"}, {"model": "b"})
    first, again = {"images": 5, "timed": 128}, {"images": 5, "timed": 128, "again": "2026-01-01"}
    assert frontier.fits(again, again | {"again": "2026-01-02"}) and frontier.fits(first, first)
    assert not frontier.fits(first, again) and not frontier.fits(again, first)


def test_students_are_those_without_guidance():
    kinds = [
        frontier.SOURCES["students"].kind(name)
        for name in (
            "lcm, 4 steps, w 1",
            "lcm, 4 steps, w 3",
            "teacher, 8 steps, w 1",
            "straightness of lcm, w 1",
        )
    ]
    assert kinds == ["students of few steps", "", comparison.FEWER_STEPS, ""]


def test_rows_of_smaller_networks_have_a_kind():
    names = ("full", "25 steps", *smaller.MERGED, "stopped at an SNR of 3", "50% of heads and channels")
    names += ("50%, trained further", "half the blocks, trained further", "full, trained further")
    assert [smaller.kind_of(name) for name in names] == [
        "full",
        comparison.FEWER_STEPS,
        *["merged tokens"] * len(smaller.MERGED),
        *("stopped early", "pruned", "pruned and trained", "smaller network", "full"),
    ]
