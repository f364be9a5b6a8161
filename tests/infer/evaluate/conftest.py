"""A toy engine in place of the model that the flags name, and the figures of a run."""

import json

import pytest

from infer.evaluate import choice, generation, perplexity
from infer.evaluate.__main__ import main
from infer.evaluate.cases import run as cases
from tests.support.engine_toy import toy_engine, warm_engine


@pytest.fixture(scope="session")
def engine():
    return toy_engine(share=warm_engine(), max_length=256)


@pytest.fixture
def toy(engine, monkeypatch):
    for module in (perplexity, generation, choice, cases):
        monkeypatch.setattr(module, "open_engine", lambda *args, **kwargs: engine)
    return engine


@pytest.fixture
def figures(capsys):
    """Runs the command with `--json`; returns what it prints."""

    def run(*args) -> dict:
        assert main([*map(str, args), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run
