"""Data: datasets by TFDS name, batches as pure functions of the step, checks, the cache of latents."""

from jaxldm.data.augmentation import Augmentation, augment
from jaxldm.data.batches import ArrayRows, Batches, Rows, map_batches
from jaxldm.data.buckets import BucketedBatches, Buckets, assign_buckets
from jaxldm.data.dataset import Dataset
from jaxldm.data.edges import edges
from jaxldm.data.folders import describe_skipped, load_folder
from jaxldm.data.images import (
    check_images,
    check_labels,
    from_grey_levels,
    from_uint8,
    to_grey_levels,
    to_uint8,
)
from jaxldm.data.latents import cached, fingerprint
from jaxldm.data.load import data_folder, load, source_name
from jaxldm.data.reader import Reader
from jaxldm.data.shards import sharded

__all__ = [
    "ArrayRows",
    "Augmentation",
    "Batches",
    "BucketedBatches",
    "Buckets",
    "Dataset",
    "Reader",
    "Rows",
    "assign_buckets",
    "augment",
    "cached",
    "check_images",
    "check_labels",
    "data_folder",
    "describe_skipped",
    "edges",
    "fingerprint",
    "from_grey_levels",
    "from_uint8",
    "load",
    "load_folder",
    "map_batches",
    "sharded",
    "source_name",
    "to_grey_levels",
    "to_uint8",
]
