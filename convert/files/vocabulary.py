"""Finds the vocabulary of a folder's tokenizer, and which families have one of its kind."""

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from convert.files.shards import read_json
from convert.files.tensor import bad_file, reading
from glm2_jax.choices import FAMILIES
from glm2_jax.text.tokenizer import Tokenizer

# Under the names in which they are published; the first that exists is read.
VOCABULARY_FILES = ("tokenizer.model", "ice_text.model", "cog-pretrain.model")
FAST = "tokenizer.json"
_RANKS = frozenset({"glm4", "glm4-0414"})
_PIECES = frozenset(FAMILIES) - _RANKS
_START = 128  # bytes in which a SentencePiece model has its first pieces


class Kind(NamedTuple):
    """What the beginning of a vocabulary shows."""

    what: str  # for people
    start: re.Pattern[bytes]
    families: frozenset[str]


# The first that fits. The first pieces are <unk> <s> </s>, and then <pad> <n> in ice_text.model,
# <n> in cog-pretrain.model, the bytes in that of ChatGLM2.
_KINDS = (
    Kind("GLM-4", re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s"), _RANKS),
    Kind("ChatGLM-6B", re.compile(rb".*<pad>.*<n>", re.DOTALL), frozenset({"chatglm"})),
    Kind("the GLM base models", re.compile(rb".*<n>", re.DOTALL), frozenset({"glm"})),
    Kind(
        "ChatGLM2 and ChatGLM3",
        re.compile(rb".*<0x00>", re.DOTALL),
        frozenset({"chatglm2", "chatglm3", "codegeex2"}),
    ),
    Kind("another model", re.compile(rb""), _PIECES),
)
UNKNOWN = Kind("no model", re.compile(rb""), frozenset(FAMILIES))  # of a folder without one


def read_vocabulary(folder: Path) -> tuple[Tokenizer | None, Kind]:
    """Return the tokenizer of a folder, without the tokens of its other files, and its kind."""
    for name in VOCABULARY_FILES:
        path = folder / name
        if not path.exists():
            continue
        start = b""
        if path.is_file():  # reading a pipe could wait forever
            with reading(path), path.open("rb") as file:
                start = file.read(_START)
        kind = vocabulary_kind(start)
        return Tokenizer.from_file(path, _first(kind)), kind
    path = folder / FAST
    if path.exists() and (ranks := read_ranks(path)) is not None:
        kind = vocabulary_kind(ranks[:_START])
        return Tokenizer.from_bytes(ranks, _first(kind)), kind
    return None, UNKNOWN


def vocabulary_kind(start: bytes) -> Kind:
    """Return the kind of a vocabulary that begins so."""
    return next(kind for kind in _KINDS if kind.start.match(start))


def _first(kind: Kind) -> str:
    return next(family for family in FAMILIES if family in kind.families)


def read_ranks(path: Path) -> bytes | None:
    """Return the byte-level vocabulary of a tokenizer.json as the lines of a rank file.

    Its ids are the ranks, so that its merges say nothing more. None where it holds the pieces of a
    SentencePiece model. A damaged file is a `CheckpointError`.
    """
    raw = read_json(path)
    model, steps = raw.get("model"), str(raw.get("pre_tokenizer"))
    if not isinstance(model, Mapping) or "ByteLevel" not in steps:
        return None
    ids, added = model.get("vocab"), raw.get("added_tokens") or []
    if not isinstance(ids, Mapping) or not isinstance(added, list):
        raise bad_file(path, "has no vocabulary", "model.vocab is not an object.")
    special = {token.get("content") for token in added if isinstance(token, Mapping)}
    lines: list[tuple[int, bytes]] = []
    for text, rank in ids.items():
        if text in special:
            continue
        try:
            token = bytes(map(_BYTES.__getitem__, text))
        except KeyError as error:
            raise bad_file(
                path, "is not a byte-level vocabulary", f"No byte is written {error}."
            ) from None
        if type(rank) is not int:
            raise bad_file(path, "has an id that is no number", f"It is that of {text[:50]!r}.")
        lines.append((rank, base64.b64encode(token)))
    return b"".join(b"%s %d\n" % (token, rank) for rank, token in sorted(lines))


def byte_letters() -> list[str]:
    """Return the letter with which byte-level vocabularies write each byte: itself where it can be
    seen, else the next of those from U+0100 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(hidden)) for byte in range(256)]


_BYTES: Mapping[str, int] = {letter: byte for byte, letter in enumerate(byte_letters())}
