"""The script about smaller networks: what rows are compared with, and that its settings are possible."""

import pytest

from experiments.less_compute import smaller
from jaxldm import diffusion as D


def row(name, kind, seconds, distance):
    return {
        "name": name,
        "kind": kind,
        "parameters": 2_000_000,
        "macs": 3_000_000,
        "evaluations": 50,
        "seconds": seconds,
        "distance": distance,
        "accuracy": 0.9,
    }


ROWS = [
    row("full", "full", 0.04, 2.0),
    row("25 steps", "fewer steps", 0.02, 2.4),
    row("50 %", "pruned", 0.03, 2.1),
    row("full, trained further", "full", 0.04, 1.8),
]


def test_rows_are_compared_with_the_full_network_and_with_fewer_steps(tmp_path):
    whole, _, pruned, further = smaller.with_comparison(ROWS)
    assert whole["worse"] == 0 and pruned["worse"] == pytest.approx(0.05)
    assert pruned["speedup"] == pytest.approx(4 / 3) and pruned["milliseconds"] == pytest.approx(30)
    assert pruned["baseline"] == pytest.approx(2.2) and further["baseline"] == pytest.approx(2.0)
    smaller.plot(tmp_path / "it.png", "digits", smaller.with_comparison(ROWS))
    assert (tmp_path / "it.png").stat().st_size > 1000


def test_sampling_stops_later_at_a_higher_snr():
    """Each threshold leaves another part of the 50 steps to be skipped; a quick look can do the first."""
    path = D.VP.named("cosine")
    rows = [len(D.split_at_snr(D.make_grid(path, 50), snr)[0].t) for snr in smaller.SNRS]
    assert rows == sorted(set(rows)) and rows[0] > 1 and rows[-1] < 50
    assert len(D.split_at_snr(D.make_grid(path, 6), smaller.SNRS[0])[0].t) < 6
