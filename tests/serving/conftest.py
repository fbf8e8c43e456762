"""What the tests of the application and of its page serve: a small model, and its engine, once for a file."""

import pytest
import tiny_models
from served import MAX_STEPS, warm_engine

from jaxldm.serving.requests import offer_of


@pytest.fixture(scope="module")
def pipe():
    return tiny_models.latent_pipeline()


@pytest.fixture(scope="module")
def offer(pipe):
    return offer_of(pipe, "digits", max_steps=MAX_STEPS)


@pytest.fixture(scope="module")
def engine(pipe, offer):
    """Of the server that most tests ask."""
    return warm_engine(pipe, offer)
