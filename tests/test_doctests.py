"""The examples in the docstrings of every module are run as they are printed."""

import doctest
import importlib
import pkgutil

import pytest

import jaxldm

MODULES = [module.name for module in pkgutil.walk_packages(jaxldm.__path__, "jaxldm.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples():
    """A change of the docstrings' form that hides the examples would let the test above pass."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [name for name in MODULES if any(t.examples for t in finder.find(importlib.import_module(name)))]
    assert len(found) >= 60
