import numpy as np
import pytest

from jaxldm.errors import InvalidArgumentError
from jaxldm.models.inputs import labels_or_null

T = np.zeros(2, np.float32)


def test_missing_labels_are_the_null_class():
    np.testing.assert_array_equal(labels_or_null(None, T, 10), [10, 10])
    np.testing.assert_array_equal(labels_or_null(np.array([3, 10]), T, 10), [3, 10])
    assert labels_or_null(None, T, None) is None


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(InvalidArgumentError, match="without classes"):
        labels_or_null(np.array([3, 4]), T, None)
    with pytest.raises(InvalidArgumentError, match="one for each of 2 images"):
        labels_or_null(np.array([3, 4, 5]), T, 10)
