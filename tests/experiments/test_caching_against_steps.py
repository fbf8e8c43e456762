"""The comparison of caches with fewer steps: its notations."""

from experiments.less_compute import caching


def test_every_notation_of_the_table_is_one():
    for notation in caching.OF_ALL + caching.OF_UNETS + caching.OF_TRANSFORMERS:
        assert caching.D.caching.read(notation).settings
