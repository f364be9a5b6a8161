"""What the tests of the chat share."""

import pytest

from glm2_jax.runtime import buckets
from tests.support.engine_toy import warm_engine


@pytest.fixture(autouse=True)
def one_shape(monkeypatch):
    """Pads every prompt and cache to the same size, so that little has to be compiled."""
    monkeypatch.setattr(buckets, "SMALLEST_BUCKET", 256)


@pytest.fixture(scope="session")
def warm():
    """An engine whose compiled programs all tests share."""
    return warm_engine()
