"""The SentencePiece vocabularies: ChatGLM2/3, first-generation ChatGLM-6B, and Chinese GLM."""

import codecs
import re
import struct
from collections.abc import Set
from typing import Any, cast

import sentencepiece

from glm2_jax.errors import CheckpointError

SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside a piece
# An error handler: SentencePiece replaces each byte, Python's "replace" only each run of them.
_EACH_BYTE = "glm2_jax.each_byte"
codecs.register_error(_EACH_BYTE, lambda error: ("\ufffd", cast(Any, error).start + 1))

# First-generation ChatGLM-6B has pieces for white space, which NFKC would lose.
_MAX_BLANKS = 80
_BLANKS = {f"<|blank_{count}|>": " " * count for count in range(2, _MAX_BLANKS + 1)}
_WHITE_SPACE = {"<n>": "\n", "<|tab|>": "\t", **_BLANKS}
_RUN_OF_BLANKS = re.compile(f" {{2,{_MAX_BLANKS}}}")
# Its launch file lacks the last pieces of the later one, and its ids begin after those of images.
_LAUNCH_IMAGE_IDS = 20_000
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # kinds of pieces in the file
_LAUNCH_PIECES = (
    *((name, _CONTROL) for name in ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>")),
    *((name, _CONTROL) for name in ("<sop>", "<eop>", "<ENC>", "<dBLOCK>")),
    *((name, _USER_DEFINED) for name in ("<|tab|>", *_BLANKS)),
    *((f"<0x{byte:02X}>", _BYTE) for byte in range(256)),
)


class Pieces:
    """The `Vocabulary` of a SentencePiece model."""

    byte_level = False
    decode_errors = _EACH_BYTE

    def __init__(self, data: bytes, name: str):
        """Parse a serialized model, called `name` in errors; CheckpointError if it is not one."""
        self.model_bytes = data
        self._model = _load_model(data, name)
        if not _has_settings(data):
            raise CheckpointError(
                f"{name} is cut off: the vocabulary is incomplete.",
                f"It ends after {self._model.get_piece_size():,} pieces, without the settings that "
                "follow them in a complete file.",
                "Download the file again from the repository that the weights come from.",
            )
        num_bytes = _num_bytes(self._model)
        first = self._model.id_to_piece(3) if self._model.get_piece_size() > 3 else ""
        launch = num_bytes == 0 and first == "<pad>"
        if launch:
            self._model = _load_model(_complete_launch(data), name)
        self._offset = _LAUNCH_IMAGE_IDS if launch else 0
        self.size = self._offset + self._model.get_piece_size()
        self.description = f"a SentencePiece model with {num_bytes} byte pieces"
        self.families: tuple[str, ...]
        self._texts: dict[int, str] = {}  # of pieces that are white space
        if self.piece_id("<|blank_2|>") is not None:
            self.description += " and pieces for blanks"
            self.families = ("chatglm",)
            found = ((self.piece_id(piece), text) for piece, text in _WHITE_SPACE.items())
            self._texts = {i: text for i, text in found if i is not None}
        else:  # SentencePiece refuses files that have some bytes only
            self.families = ("chatglm2", "chatglm3", "codegeex2") if num_bytes else ("glm",)
        byte_ids = [self.piece_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._byte_ids = [] if None in byte_ids else cast(list[int], byte_ids)
        self._byte_values = {i: bytes([byte]) for byte, i in enumerate(self._byte_ids)}
        # The flags are in the model's protobuf; their effects show them without a parser.
        self.adds_dummy_prefix = self._model.encode("A", out_type=str)[0].startswith(SPACE_MARK)
        space = self._model.piece_to_id(SPACE_MARK)
        self.drops_all_spaces = self._model.decode([space, space]) == ""

    def encode(self, text: str) -> list[int]:
        if self._texts:
            text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
            text = _RUN_OF_BLANKS.sub(lambda run: f"<|blank_{len(run[0])}|>", text)
        ids = self._model.encode(text)
        return [i + self._offset for i in ids] if self._offset else ids

    def spell(self, token_id: int, avoid: Set[int]) -> list[int]:
        """Return single characters, or bytes where a character has no piece to use."""
        ids: list[int] = []
        for character in self.piece(token_id):
            found = self._model.piece_to_id(character) + self._offset
            usable = self._is_ordinary(found) and found not in avoid
            bytes_of_it = [self._byte_ids[b] for b in character.encode()] if self._byte_ids else []
            ids += [found] if usable else bytes_of_it
        return ids

    def piece(self, token_id: int) -> str:
        """Return a piece as stored: spaces are U+2581."""
        if not self._offset <= token_id < self.size:
            return ""
        return self._model.id_to_piece(int(token_id) - self._offset)

    def piece_id(self, text: str) -> int | None:
        found = self._model.piece_to_id(text)
        return found + self._offset if self._model.id_to_piece(found) == text else None

    def token_text(self, token_id: int) -> str:
        if token_id in self._texts:
            return self._texts[token_id]
        if not self._is_ordinary(token_id) or token_id in self._byte_values:
            return ""
        return self.piece(token_id).replace(SPACE_MARK, " ")

    def raw_bytes(self, token_id: int) -> bytes | None:
        return self._byte_values.get(token_id)

    def _is_ordinary(self, token_id: int) -> bool:
        if not self._offset <= token_id < self.size:
            return False
        i = int(token_id) - self._offset
        return not self._model.is_control(i) and not self._model.is_unknown(i)


def _load_model(data: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    """Parse the model and check what the rest of the project relies on."""
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
        model.id_to_piece(list(range(model.get_piece_size())))  # each is valid text
    except (RuntimeError, UnicodeError) as error:
        raise CheckpointError(
            f"{name} is not a SentencePiece model, and not a list of ranked tokens as in GLM-4.",
            "It is damaged, cut off, or another file." if data else "It is empty.",
            "Download the file from the repository that the weights come from.",
        ) from error
    ids = (model.unk_id(), model.bos_id(), model.eos_id())
    if ids != (0, 1, 2):
        raise CheckpointError(
            f"{name} does not belong to the GLM family.",
            f"Its ids of <unk>, <s> and </s> are {ids}, not (0, 1, 2).",
        )
    return model


def _has_settings(data: bytes) -> bool:
    """Return whether a serialized model has a normalizer_spec (field 3), which follows the pieces.

    SentencePiece itself takes a file that ends between two pieces.
    """
    at = 0
    while at + 1 < len(data):
        if data[at] == 3 << 3 | 2:
            return True
        size, at = data[at + 1], at + 2
        shift = 7
        while size >> shift and at < len(data):  # a length of several bytes
            size += (data[at] - 1) << shift
            at, shift = at + 1, shift + 7
        at += size
    return False


def _num_bytes(model: sentencepiece.SentencePieceProcessor) -> int:
    return sum(model.is_byte(model.piece_to_id(f"<0x{byte:02X}>")) for byte in range(256))


def _complete_launch(data: bytes) -> bytes:
    """Return the launch file of ChatGLM-6B with the pieces that the later file has after it.

    Protocol buffers that are joined are merged: pieces (field 1) follow the earlier ones, and
    byte_fallback (field 35 of field 2) is added to the settings.
    """
    added = b""
    for piece, kind in _LAUNCH_PIECES:
        text = piece.encode()
        body = bytes([0x0A, len(text)]) + text + b"\x15" + struct.pack("<f", 0.0)
        body += bytes([0x18, kind])
        added += bytes([0x0A, len(body)]) + body
    return data + added + b"\x12\x03\x98\x02\x01"
