"""JSON schemas that are enforced: which tokens may follow, so that an answer fits its schema.

The tokens are matched as the bytes that the client is shown. llguidance (the extra `serve`) does
the matching; it is imported when it is first needed. V vocabulary entries.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import lcm
from typing import TYPE_CHECKING, Any

import numpy as np

from glm2_jax.errors import InputError
from glm2_jax.extras import pip_install
from glm2_jax.text.prompt import stop_ids
from glm2_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of any JSON object."""

MAX_SCHEMA = 2**16  # characters
# llguidance builds one state for each remainder, and has no limit of its own.
MAX_MULTIPLE = 10_000
# It compiles nested schemas by recursion and a stack that overflows would end the process: a level
# takes up to 13 kB of stack, and at least 11 characters.
_STACK = 2**27  # bytes; only what is used is taken from the memory
_KEPT = 32  # compiled schemas
# White space between the tokens of JSON: as models write it, but not without end.
_WHITE_SPACE = r" |\n[ \t]{0,40}"
# A leading space is not shown, if the tokenizer puts one before every text. Without forcing, a
# token is as good as any other with the same bytes, and llguidance never has to encode text.
_START = '%llguidance {"no_forcing": true}\nstart: / ?/ @json'


class Grammars:
    """Compiles JSON schemas for one tokenizer; for any thread.

    Raises:
        InputError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        try:
            import llguidance
        except ImportError as error:
            raise InputError(
                "JSON schemas cannot be enforced",
                "llguidance is not installed.",
                f"Install it: {pip_install('serve')}",
            ) from error
        vocabulary = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
        self._tokenizer = llguidance.LLTokenizer(vocabulary, eos_token=_end_ids(tokenizer))
        self._words = -(-vocab_size // 32)
        self._compiled = functools.lru_cache(_KEPT)(self._compile)
        self._thread = _deep_thread()

    def matcher(self, schema: Mapping[str, Any]) -> Matcher:
        """Return what matches one answer; it may take a second where the schema is new.

        InputError: the schema is not valid, or cannot be enforced.
        """
        text = _checked(schema)
        compiled = self._compiled(text)
        try:
            return Matcher(compiled.deep_copy(), self._words)
        except InputError:
            # The copies share the states of the lexer. Earlier answers may have used them up.
            return Matcher(self._compile(text), self._words)

    def _compile(self, text: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        grammars = [{"lark_grammar": _START}, {"name": "json", "json_schema": json.loads(text)}]
        limits = LLParserLimits(
            step_lexer_fuel=50_000,  # about 4 ms
            step_max_items=10_000,
            max_lexer_states=50_000,  # about 30 MB
            max_grammar_size=100_000,
            verbose_errors=False,
        )
        grammar = json.dumps({"grammars": grammars})
        make = functools.partial(LLMatcher, self._tokenizer, grammar, log_level=0, limits=limits)
        matcher = self._thread.submit(make).result()
        _check(matcher)
        return matcher


class Matcher:
    """The tokens that may follow in one answer; for one thread at a time.

    Attributes:
        allowed: uint32 [V / 32, rounded up], bit i of word w for token 32 w + i. There is at least
            one; end tokens are among them only where the text is complete.
    """

    allowed: np.ndarray

    def __init__(self, matcher: LLMatcher, words: int):
        self._matcher, self._words = matcher, words
        self._compute()

    def take(self, token: int) -> None:
        """Note the next token, one of those that are `allowed`, and find what may follow.

        InputError: that would take too long, or nothing can follow.
        """
        self._matcher.consume_token(token)
        self._compute()

    def _compute(self) -> None:
        mask = self._matcher.compute_bitmask()
        _check(self._matcher)  # the mask of an error is an end token
        self.allowed = np.frombuffer(mask, np.uint32)[: self._words]


class _Vocabulary:
    """The bytes of each token as llguidance takes them; b"" for one that is never text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.eos_token_id = tokenizer.eos_id
        # The text after an added token is shown without its leading space. It is not needed: its
        # text can be written in other tokens.
        self.tokens = [
            b"" if tokenizer.is_added(token) else tokenizer.token_bytes(token)
            for token in range(vocab_size)
        ]

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError("nothing is forced, so nothing is encoded")


def _end_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that may end a constrained answer: not the one that calls a tool."""
    calls = tokenizer.special.get("<|observation|>")
    return [token for token in stop_ids(tokenizer) if token != calls]


def _deep_thread() -> ThreadPoolExecutor:
    """Return a thread with a large stack."""
    usual = threading.stack_size(_STACK)
    try:
        pool = ThreadPoolExecutor(1, "grammar")
        pool.submit(int).result()  # starts it
    finally:
        threading.stack_size(usual)
    return pool


def _checked(schema: Mapping[str, Any]) -> str:
    """Return a schema as JSON with our options; InputError if it is beyond our limits."""
    # The key of llguidance's options: the client could turn the enforcement off with it.
    options = {"x-guidance": {"whitespace_pattern": _WHITE_SPACE}}
    try:
        text = json.dumps({**schema, **options}, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _refused(f"It is not JSON: {error}.") from error
    if len(text) > MAX_SCHEMA:
        raise _refused(f"It has {len(text):,} characters; at most {MAX_SCHEMA:,} are supported.")
    if re.search(r'"multipleOf":(-|0(\.0*)?[,}])', text):
        raise _refused("`multipleOf` must be above 0.")
    # Without the powers of ten, which cost nothing. The rest may end up in one number (`allOf`).
    multiples = re.findall(r'"multipleOf":([\d.]{1,20})', text)
    if lcm(*(int(one.replace(".", "").strip("0") or 1) for one in multiples)) > MAX_MULTIPLE:
        raise _refused(
            f"The least common multiple of its `multipleOf` is above {MAX_MULTIPLE:,}"
            " times a power of ten."
        )
    return text


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        why = matcher.get_error().partition("\n<")[0]
        raise _refused("No text can complete the answer." if why == "NoExtensionBias" else why)


def _refused(why: str) -> InputError:
    return InputError(
        "the JSON schema cannot be enforced",
        why,
        "Correct or simplify it, or leave it out and ask for the format in the prompt.",
    )
