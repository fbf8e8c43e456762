"""Results of experiments: table, numbers and picture of one measurement, together or not at all."""

import json

from matplotlib.figure import Figure

from experiments.faults.kill_points import killed, moments
from experiments.figures import figure_png, read_result, save_results


def write(folder, version):
    figures, text = json.dumps({"version": version}), f"version {version}\n"
    save_results(folder, {"it.json": figures, "it.md": text, "it.png": f"picture {version}".encode()})


def read(folder):
    """The version that all files are of."""
    version = json.loads(read_result(folder / "it.json"))["version"]
    assert read_result(folder / "it.md") == f"version {version}\n"
    assert (folder / "it.png").read_bytes() == f"picture {version}".encode()
    return version


def test_results_killed_at_any_moment_are_of_one_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    place = tmp_path / "counted"
    for folder in (place, *(tmp_path / str(at) for at in range(99))):
        write(folder, 1)
        (folder / "notes.txt").write_text("mine")  # so that the folder stays, and files are moved into it
    points, seen = moments(place, lambda: write(place, 2)), set()
    assert len(points) > 5 and points[-1] < 99
    for at in points:
        folder = tmp_path / str(at)
        killed(folder, at, lambda folder=folder: write(folder, 2))
        seen.add(read(folder))
        assert (folder / "notes.txt").read_text() == "mine"
    assert seen == {1, 2}


def test_what_is_not_there_reads_as_none(tmp_path):
    assert read_result(tmp_path / "nowhere" / "it.md") is None
    assert figure_png(Figure()).startswith(b"\x89PNG")
