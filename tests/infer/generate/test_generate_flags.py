"""Flags of `python -m infer.generate` that say nothing, too much, or something twice."""

import pytest

from glm2_jax.cli.parser import from_flags
from glm2_jax.errors import UsageError
from infer import options
from infer.generate.__main__ import main, parser

PATHS = ("model", "output", "history", "compile-cache", "prompt-file", "batch-file")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-p", "a", "-p", "b"], "given twice"),
        (["--system", "a", "--system", "a"], "given twice"),
        *((["--" + flag, ""], "path is empty") for flag in PATHS),
    ],
)
def test_flags_that_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


HUGE = str(10**30)


def sampling(*flags: str):
    return from_flags(options.SamplingFlags, parser().parse_args(list(flags))).params()


@pytest.mark.parametrize(
    "flag", ["--seed", "--logprobs", "--temperature=1e39", "--repetition-penalty=1e40"]
)
def test_numbers_that_are_too_large(flag):
    with pytest.raises(UsageError, match=r"(0 to|at most)"):
        sampling(*([flag] if "=" in flag else [flag, HUGE]))


def test_lengths_may_be_as_large_as_one_likes():
    asked = sampling("--max-length", HUGE, "--max-new-tokens", HUGE, "--top-k", HUGE)
    assert asked.max_length == asked.max_new_tokens == asked.top_k == 10**30
    assert parser().parse_args(["--batch-size", HUGE]).batch_size == 2**31 - 1
