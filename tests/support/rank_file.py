"""A tiny rank file of byte-level tokens, as GLM-4's tokenizer.model is one."""

import base64

_WORDS = (
    "th", "he", "the", " the", "in", "ing", "er", "re", " w", " wor", "or", "ld", " world",
    "ll", "ello", "el", "hello", "  ", "    ", "\n\n", "12", "123", "你", "好", "你好", "是",
)  # fmt: skip


def rank_file() -> bytes:
    """All single bytes, then halves of characters, then pieces of words: 300 tokens or so."""
    tokens = [bytes([byte]) for byte in range(256)]
    halves = ["你".encode()[:2], "好".encode()[:2], "👋".encode()[:2]]
    tokens += [*halves, *(word.encode() for word in _WORDS)]
    return b"".join(b"%s %d\n" % (base64.b64encode(x), i) for i, x in enumerate(tokens))
