"""What a tokenizer needs of the file with its tokens, whatever kind of file it is."""

from collections.abc import Set
from typing import Protocol

from glm2_jax.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs"


class Vocabulary(Protocol):
    """The tokens of one file: their ids, their bytes, and how a text is split into them."""

    model_bytes: bytes  # the file as it was read
    families: tuple[str, ...]  # those whose tokenizer it can be
    description: str  # for errors: "a SentencePiece model with 256 byte pieces"
    size: int  # the largest id of a token, plus 1
    byte_level: bool  # whether its tokens are ranked bytes; else SentencePiece has made it
    adds_dummy_prefix: bool  # whether a space is put before every text
    drops_all_spaces: bool  # whether decoding drops all leading spaces, not only that one
    decode_errors: str  # the codec error handler for bytes that are not a character

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, which are never those of control tokens."""
        ...

    def spell(self, token_id: int, avoid: Set[int]) -> list[int]:
        """Return ids outside `avoid` that are the same text as a token, in smaller tokens."""
        ...

    def piece(self, token_id: int) -> str:
        """Return a token as its file writes it, "" for an id of no token."""
        ...

    def piece_id(self, text: str) -> int | None:
        """Return the id of the token that its file writes so, or None."""
        ...

    def token_text(self, token_id: int) -> str:
        """Return a token's text; "" for control tokens and those that are not whole characters."""
        ...

    def raw_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of a token that may be part of a character; None for the others."""
        ...


def refuse_pointer(data: bytes, name: str) -> None:
    """Raise a CheckpointError if the data is a Git LFS pointer instead of a file."""
    if data.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{name} is a Git LFS pointer, not the file itself.",
            "The repository was cloned without its large files.",
            "Run `git lfs pull` in it, or download the file.",
        )
