"""Train, validation and test: which records of a dataset are whose."""

import numpy as np
from jaxtyping import Int

from jaxldm.data.dataset import SPLITS
from jaxldm.errors import DataError


def split_records(sizes: dict[str, int]) -> dict[str, tuple[str, Int[np.ndarray, "N"]]]:
    """Returns for train, validation and test the stored split each comes from and its record numbers.

    A split that is made from the training one has every tenth record: TFDS stores records in a shuffled
    order, so this is a random sample, and it is the same on every machine.
    """
    if "train" not in sizes:
        raise DataError(
            f"the dataset has no split 'train', only {', '.join(sizes) or 'none'}: prepare it with one"
        )
    records = np.arange(sizes["train"])
    origin_of_validation, origin_of_test = "validation", "test"
    if "test" not in sizes:
        origin_of_test = "validation" if "validation" in sizes else "train"
    if "validation" not in sizes or origin_of_test == "validation":
        origin_of_validation = "train"
    left = np.ones(len(records), dtype=bool)
    parts = {}
    for split, origin, remainder in (("validation", origin_of_validation, 9), ("test", origin_of_test, 8)):
        if origin == "train":
            parts[split] = origin, records[remainder::10]
            left[remainder::10] = False
        else:
            parts[split] = origin, np.arange(sizes[origin])
    parts["train"] = "train", records[left]
    return {split: parts[split] for split in SPLITS}
