"""What the tests of `infer.generate` share."""

import pytest

from infer.engine import load
from tests.support.engine_toy import open_toy, warm_engine


@pytest.fixture(scope="session")
def warm():
    """An engine whose compiled programs all tests share."""
    return warm_engine()


@pytest.fixture
def loaded(monkeypatch):
    """Toy engines in place of the model that the flags name; collects choices and options."""
    opened = []
    notes = ("the weights are stored in float16; converted to float32",)
    monkeypatch.setattr(load, "open_choice", open_toy(opened, notes))
    return opened
