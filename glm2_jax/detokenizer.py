"""Ids to text one at a time, in whole characters."""

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glm2_jax.tokenizer import Tokenizer


class Detokenizer:
    """Turns a stream of ids into text; the parts joined equal the decode of all ids.

    Consecutive byte pieces are held back while they may still grow into a character. Any other
    id ends such a run, and each byte left in it that is no part of a character becomes U+FFFD,
    one for each byte, as in SentencePiece.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        self._held = b""  # the start of a character, never a whole one
        self._at_start = tokenizer.adds_dummy_prefix  # a leading space is still to be dropped

    def push(self, token_id: int) -> str:
        """Takes the next id and returns the text that is now certain, perhaps ""."""
        byte = self._tokenizer.byte_value(token_id)
        if byte is not None:
            text, self._held = _split_characters(self._held + bytes([byte]))
            self._at_start = self._at_start and not text
            return text
        return self.flush() + self._piece_text(token_id)

    def flush(self) -> str:
        """Ends the stream (or a run of bytes): returns what was held back."""
        text, self._held = "\ufffd" * len(self._held), b""
        self._at_start = self._at_start and not text
        return text

    def _piece_text(self, token_id: int) -> str:
        text = self._tokenizer.token_text(token_id)
        if not text:
            return ""
        if self._tokenizer.is_added(token_id):  # the text after it was encoded on its own
            self._at_start = self._tokenizer.adds_dummy_prefix
            return text
        drop, self._at_start = self._at_start and text[0] == " ", False
        return text[1:] if drop else text


def _split_characters(data: bytes) -> tuple[str, bytes]:
    """Decodes what is certain in `data`; returns it and the bytes that may still become more."""
    text = ""
    while data:
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            text += decoder.decode(data)
        except UnicodeDecodeError as error:
            # Everything before the bad byte is sound; the bad byte alone is given up.
            text += data[: error.start].decode("utf-8") + "\ufffd"
            data = data[error.start + 1 :]
            continue
        return text, decoder.getstate()[0]
    return text, b""
