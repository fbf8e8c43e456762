"""What the tests of the command line share."""

import pytest

from jaxldm import data


@pytest.fixture(scope="session", autouse=True)
def digits():
    """The digits, prepared before a command needs them: what that prints is not the command's own."""
    return data.load("mnist5k")
