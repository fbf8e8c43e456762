"""The comparison of caches with fewer steps: against the whole run, and against the same seconds."""

import pytest

from experiments.less_compute import caching


def row(name, kind, seconds, distance):
    figures = {"name": name, "kind": kind, "seconds": seconds, "distance": distance}
    return figures | {"steps": 50, "accuracy": 0.9, "change": 0.1}


ROWS = [
    row("50 steps", "fewer steps", 10.0, 1.0),
    row("20 steps", "fewer steps", 4.0, 1.2),
    row("10 steps", "fewer steps", 2.0, 1.6),
    row("fora:3", "fora", 3.0, 1.1),
]


def test_a_cache_is_compared_with_the_run_and_with_fewer_steps_of_its_seconds(tmp_path):
    compared = caching.with_comparison(ROWS)
    cache = compared[-1]
    assert cache["speedup"] == pytest.approx(10 / 3) and cache["worse"] == pytest.approx(0.1)
    assert cache["baseline"] == pytest.approx(1.4)  # half way between 10 and 20 steps
    assert compared[0]["worse"] == 0 and compared[1]["baseline"] == pytest.approx(1.2)
    pytest.importorskip("matplotlib")
    caching.plot(tmp_path / "caching.png", "digits", compared)
    assert (tmp_path / "caching.png").stat().st_size > 1000


def test_every_notation_of_the_table_is_one():
    for notation in caching.OF_ALL + caching.OF_UNETS + caching.OF_TRANSFORMERS:
        assert caching.D.caching.read(notation).settings
