"""A tiny vocabulary of byte-level tokens, as GLM-4 is published with: tokenizer.model is a rank
file, and tokenizer.json holds the same table."""

import base64
from typing import Any

from glm2_jax.text.ranks import BYTE_LETTERS
from glm2_jax.text.tokenizer import SPECIAL

_WORDS = (
    "th", "he", "the", " the", "in", "ing", "er", "re", " w", " wor", "or", "ld", " world",
    "ll", "ello", "el", "hello", "  ", "    ", "\n\n", "12", "123", "你", "好", "你好", "是",
)  # fmt: skip


def _tokens() -> list[bytes]:
    """All single bytes, then halves of characters, then pieces of words: 300 tokens or so."""
    halves = ["你".encode()[:2], "好".encode()[:2], "👋".encode()[:2]]
    return [*(bytes([byte]) for byte in range(256)), *halves, *(word.encode() for word in _WORDS)]


def rank_file() -> bytes:
    """The rank file of the tokens."""
    return b"".join(b"%s %d\n" % (base64.b64encode(x), i) for i, x in enumerate(_tokens()))


def fast_file() -> dict[str, Any]:
    """The tokenizer.json of the tokens, with the special ones after them."""
    tokens = _tokens()
    special = enumerate(SPECIAL["glm4"], len(tokens))
    return {
        "added_tokens": [{"id": i, "content": name, "special": True} for i, name in special],
        "model": {
            "type": "BPE",
            "vocab": {"".join(BYTE_LETTERS[b] for b in x): i for i, x in enumerate(tokens)},
            "merges": [],
        },
    }
