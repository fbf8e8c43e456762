"""The script about smaller networks: that its settings are possible."""

from experiments.less_compute import smaller
from jaxldm import diffusion as D


def test_sampling_stops_later_at_a_higher_snr():
    """Each threshold leaves another part of the 50 steps to be skipped; a quick look can do the first."""
    path = D.VP.named("cosine")
    rows = [len(D.split_at_snr(D.make_grid(path, 50), snr)[0].t) for snr in smaller.SNRS]
    assert rows == sorted(set(rows)) and rows[0] > 1 and rows[-1] < 50
    assert len(D.split_at_snr(D.make_grid(path, 6), smaller.SNRS[0])[0].t) < 6
