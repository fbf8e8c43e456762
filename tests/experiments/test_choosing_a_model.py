"""The script that measures what models cost, on the networks of digits."""

import json

import pytest

from experiments.choosing_a_model import families, measure
from jaxldm import models
from jaxldm.errors import UnknownNameError


def test_small_networks(tmp_path, capsys):
    names = ("tiny-dit", "mini-autoencoder, 28 pixels")
    measure.main(measure.Measure(names, ("float32",), separate=False, output_dir=tmp_path))
    rows = {row["part"]: row for row in json.loads((tmp_path / "models.json").read_text())["rows"]}
    assert set(rows) == set(names)
    for name, row in rows.items():
        assert row["weights_bytes"] == 4 * row["parameters"] == 4 * models.count_params(name.split(",")[0])
        assert row["seconds"] > 0 and row["temporary_bytes"] > 0
    assert rows["tiny-dit"]["macs"] == models.count_macs("tiny-dit")
    # a second call adds to the first; too large a network is compiled, and not run
    more = measure.Measure(("tiny-dit",), ("bfloat16",), 0.001, separate=False, output_dir=tmp_path)
    measure.main(more)
    kept = {
        (row["part"], row["dtype"]): row for row in json.loads((tmp_path / "models.json").read_text())["rows"]
    }
    assert len(kept) == len(names) + 1
    skipped = kept["tiny-dit", "bfloat16"]
    assert "seconds" not in skipped and "GB of weights" in skipped["not_run"]
    assert skipped["weights_bytes"] == 2 * skipped["parameters"]
    line = next(line for line in capsys.readouterr().out.split("\n") if line.startswith("| Tiny DiT |"))
    seconds = measure.number(50 * kept["tiny-dit", "float32"]["seconds"])
    assert [cell.strip() for cell in line.split("|")][-2] == seconds


def test_everything_that_is_measured_exists():
    """Inputs of the shapes that are written down, and parts of pictures by their names."""
    for name, part in families.PARTS.items():
        module = part.module("float32")
        for place, shape in part.shapes.items():
            assert part.inputs(module)[place].shape == shape
        assert part.method is None or hasattr(module, part.method), name
    for title, picture in families.PICTURES.items():
        assert set(picture.calls) <= set(families.PARTS), title


def test_unknown_parts_are_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="tiny-dot"):
        measure.main(measure.Measure(("tiny-dot",), output_dir=tmp_path))
