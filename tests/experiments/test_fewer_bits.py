"""The scripts about fewer bits: what rows are compared with, and from which width a product pays."""

import numpy as np
import pytest

from experiments.less_compute import bits, products
from jaxldm import models


def test_rows_are_compared_with_the_network_as_trained():
    images = np.zeros((2, 4, 4, 1), np.float32)
    rows = [
        {"name": "float32", "disk": 100, "memory": 90, "distance": 2.0, "accuracy": 1.0, "images": images},
        {"name": "int8", "disk": 27, "memory": 25, "distance": 2.1, "accuracy": 0.9, "images": images + 0.5},
    ]
    whole, small = bits.with_comparison(rows)
    assert small["share"] == pytest.approx(0.27) and small["worse"] == pytest.approx(0.05)
    assert small["change"] == pytest.approx(0.5) and whole["worse"] == whole["change"] == 0


def test_every_way_is_one_that_there_is():
    for kind, changes in bits.WAYS.values():
        if kind is not None:
            assert models.quantization(kind, **changes).weights == kind
    assert set(bits.QUICK) <= bits.WAYS.keys()


def test_a_product_pays_from_where_it_stays_faster():
    rows = [
        {"width": width, "kind": "int8", "speedup": speedup}
        for width, speedup in ((512, 1.1), (1024, 0.8), (2048, 1.2), (4096, 1.9))
    ]
    assert products.pays_from(rows, "int8") == 2048
    assert products.pays_from(rows, "fp8") is None


def test_products_are_timed_and_named(tmp_path):
    rows = products.measured(products.Products(output_dir=tmp_path, quick=True).fitted(), 64)
    assert [row["kind"] for row in rows] == ["bfloat16", "int8", "fp8"]
    assert all(row["seconds"] > 0 and row["how"] for row in rows)
