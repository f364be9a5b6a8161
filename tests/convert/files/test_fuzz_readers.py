"""Whatever a file holds, its reader accepts it or refuses it with one of our errors."""

import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from glm2_jax.errors import CheckpointError, InputError
from infer.requests.request import parse_line
from tests.support import fuzz
from tests.support.fuzzing import CAP, TARGETS, Target, survives

CORPUS = Path(__file__).with_name("fuzz_corpus")
FOUND = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_read_or_refused(name, tmp_path):
    target, outcomes = TARGETS[name], set()
    target.prepare(tmp_path)

    @settings(
        max_examples=300, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(target.inputs)
    def check(data):
        outcomes.add(survives(target, data, tmp_path))

    check()
    assert outcomes == {True, False}, "the inputs are all good, or all bad"


@pytest.mark.parametrize("path", FOUND, ids=[f"{p.parent.name}-{p.name}" for p in FOUND])
def test_cases_that_were_found_are_refused(path, tmp_path):
    target = TARGETS[path.parent.name]
    target.prepare(tmp_path)
    assert not survives(target, path.read_bytes(), tmp_path)


def test_the_corpus_is_there_and_small():
    assert FOUND and sum(path.stat().st_size for path in FOUND) < 100_000


def test_messages_may_nest_only_so_deep():
    def line(depth):
        return b'{"messages": [{"tools": %s%s}]}' % (b"[" * depth, b"]" * depth)

    assert parse_line(line(90)).messages
    for depth in (100, 990, 30_000):
        with pytest.raises(InputError, match="too deeply"):
            parse_line(line(depth))


def test_a_longer_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "ROUND", 30)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["fuzz", "history", "--minutes", "0"])
    fuzz.main()
    out = capsys.readouterr().out
    assert f"the last input is {tmp_path}" in out and "refused" in out
    assert len(list(tmp_path.glob("*/history.json"))) == 1


def test_what_a_target_may_do(tmp_path):
    def refuse(path, message="no"):
        raise CheckpointError(message)

    def outcome(read):
        return survives(Target("x", read, TARGETS["history"].inputs), b"", tmp_path)

    assert outcome(Path.read_bytes) and not outcome(refuse)
    with pytest.raises(KeyError):
        outcome(lambda path: {}[0])
    with pytest.raises(MemoryError):
        outcome(lambda path: bytes(2 * CAP))
    with pytest.raises(AssertionError, match="too long to read"):
        outcome(lambda path: refuse(path, "x" * 20_000))
    assert len(bytes(2 * CAP)) == 2 * CAP  # the cap ends with its block
