"""The SentencePiece tokenizer of the ChatGLM family, with its special ids after the pieces.

No text is ever encoded to a special id; only the prompt builders add them. Tokens that a fine-tuned
folder added are text, and encoded to one id each, as the `transformers` tokenizer does.
"""

import codecs
import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import sentencepiece

from glm2_jax.errors import CheckpointError, InputError
from glm2_jax.family import ROLE_TOKENS

SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside a piece
MAX_MODEL_BYTES = 64 * 2**20  # the published one has a million bytes
_COMMON_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
SPECIAL = {
    "chatglm2": _COMMON_SPECIAL,
    "codegeex2": _COMMON_SPECIAL,
    "chatglm3": _COMMON_SPECIAL + ROLE_TOKENS,
}
"""The special tokens of each family, in the order of their ids."""
# An error handler: SentencePiece replaces each byte, Python's "replace" only each run of them.
_EACH_BYTE = "glm2_jax.each_byte"
codecs.register_error(_EACH_BYTE, lambda error: ("\ufffd", cast(Any, error).start + 1))


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that the family does not have; the fields are those of `transformers`."""

    content: str
    id: int
    special: bool = False  # for the folder; encoding and decoding do not depend on it
    lstrip: bool = False  # whether blanks before it belong to it
    rstrip: bool = False
    single_word: bool = False  # whether it is only recognized between spaces


class Tokenizer:
    """Encodes text to ids and back, exactly as the published tokenizers do."""

    eos_id = 2
    pad_id = 0  # the unknown piece
    family: str  # "chatglm2", "chatglm3" or "codegeex2"
    model_bytes: bytes  # the SentencePiece model as it was read
    num_pieces: int  # in that model; special ids follow them
    special: dict[str, int]  # name -> id of every special token of the family
    added: dict[str, AddedToken]  # additional tokens by their text
    end_ids: tuple[int, ...]  # additional ids that end an answer
    size: int  # the largest id in use, plus 1
    prefix_ids: list[int]  # [gMASK] and sop, which begin every sequence
    suffix_ids: list[int]  # what ends every prompt
    adds_dummy_prefix: bool  # whether the model puts a space before every text

    def __init__(self, model_bytes: bytes, family: str = "chatglm2", *, source: str = ""):
        self.model_bytes = model_bytes
        self._pieces = _load_model(model_bytes, source)
        self.num_pieces = self._pieces.get_piece_size()
        self._byte_ids = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._byte_values = {token_id: byte for byte, token_id in enumerate(self._byte_ids)}
        self._set_tokens(family, None, (), ())
        # The flag is in the model's protobuf; its effect on a letter shows it without a parser.
        self.adds_dummy_prefix = self.piece(self.encode("A")[0]).startswith(SPACE_MARK)

    def with_tokens(
        self,
        family: str,
        special: Mapping[str, int] | None = None,
        added: Sequence[AddedToken] = (),
        end_ids: Sequence[int] = (),
    ) -> "Tokenizer":
        """Return a tokenizer of the same pieces with other tokens.

        `special` is name -> id of the family's special tokens, at least "[gMASK]" and "sop"; None =
        they follow the pieces, as published. Such an id may replace a piece. The ids and texts of
        `added` are unique and differ from `special`.
        """
        other = copy.copy(self)
        other._set_tokens(family, special, added, end_ids)
        return other

    def _set_tokens(
        self,
        family: str,
        special: Mapping[str, int] | None,
        added: Sequence[AddedToken],
        end_ids: Sequence[int],
    ) -> None:
        if family not in SPECIAL:
            raise ValueError(f"unknown family {family!r}, expected one of {', '.join(SPECIAL)}")
        self.family = family
        self.special = dict(self.default_special(family) if special is None else special)
        self.added = {token.content: token for token in added}
        self.end_ids = tuple(end_ids)
        self._texts = {token.id: token.content for token in added}
        taken = {*self.special.values(), *self._texts}
        self._replaced = frozenset(i for i in taken if i < self.num_pieces)
        self.size = max(self.num_pieces, *(i + 1 for i in taken))
        self.prefix_ids = [self.special["[gMASK]"], self.special["sop"]]
        self.suffix_ids = []
        longest_first = sorted(self.added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None

    def default_special(self, family: str) -> dict[str, int]:
        """Return name -> id of a family's special tokens where they follow the pieces."""
        return {name: self.num_pieces + i for i, name in enumerate(SPECIAL[family])}

    @classmethod
    def from_file(cls, path: str | Path, family: str = "chatglm2") -> "Tokenizer":
        """Read a `tokenizer.model` file; CheckpointError if it is not a suitable one."""
        path = Path(path)
        try:
            size = path.stat().st_size
            if not path.is_file():  # reading a pipe could wait forever
                raise OSError("it is not a plain file")
            if size > MAX_MODEL_BYTES:
                raise OSError(f"it is larger than {MAX_MODEL_BYTES} bytes")
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"The tokenizer {path} cannot be read.",
                error.strerror or str(error),
                "Put the model's tokenizer.model there.",
            ) from error
        return cls(data, family, source=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, family: str = "chatglm2") -> "Tokenizer":
        """Open a serialized SentencePiece model; raises CheckpointError if it is not one."""
        return cls(data, family)

    def encode(self, text: str) -> list[int]:
        """Encode text without the prefix ids, never to a special id; InputError if it cannot be."""
        if not isinstance(text, str):
            raise InputError(
                "The text to encode is not a string.", f"It is of type {type(text).__name__}."
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"Character {error.start + 1} of the text is a lone surrogate "
                f"(U+{ord(text[error.start]):04X}).",
                "It is half of a character and cannot be written as UTF-8.",
                "Remove it, or read the text again in its true encoding.",
            ) from error
        if self._split is None:
            return self._encode_pieces(text)
        parts = self._split.split(text)  # text and added tokens in turn
        for i in range(1, len(parts), 2):
            token, left, right = self.added[parts[i]], parts[i - 1], parts[i + 1]
            if token.rstrip:
                parts[i + 1] = right.lstrip()
            if token.lstrip:
                parts[i - 1] = left.rstrip()
            if token.single_word and left and left[-1] != " ":
                parts[i - 1], parts[i] = left + token.content, ""
            elif token.single_word and right and right[0] != " ":
                parts[i + 1], parts[i] = token.content + right, ""
        ids: list[int] = []
        for i, part in enumerate(parts):
            if part:
                ids += [self.added[part].id] if i % 2 else self._encode_pieces(part)
        return ids

    def _encode_pieces(self, text: str) -> list[int]:
        ids = self._pieces.encode(text)
        if self._replaced.isdisjoint(ids):
            return ids
        result: list[int] = []
        for token_id in ids:
            if token_id not in self._replaced:
                result.append(token_id)
                continue
            # A piece whose id means another token is encoded in single characters, or in bytes.
            for character in self._pieces.id_to_piece(token_id):
                found = self._pieces.piece_to_id(character)
                ordinary = self._is_ordinary(found)
                result += [found] if ordinary else [self._byte_ids[b] for b in character.encode()]
        return result

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids; special, control, unknown, negative and out-of-range ids have no text.

        One leading space is dropped if the model adds one; every byte that is not part of a
        complete UTF-8 character becomes U+FFFD.
        """
        detokenizer = Detokenizer(self)
        return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()

    def piece(self, token_id: int) -> str:
        """Return a piece as stored (spaces as U+2581) or an added token's text, else ""."""
        if not 0 <= token_id < self.num_pieces or token_id in self._replaced:
            return self._texts.get(token_id, "")
        return self._pieces.id_to_piece(int(token_id))

    def piece_id(self, text: str) -> int | None:
        """Return the id of the piece with exactly this text; None if there is none."""
        token_id = self._pieces.piece_to_id(text)
        return token_id if self._pieces.id_to_piece(token_id) == text else None

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's UTF-8 bytes with its leading space; b"" if it has no text."""
        byte = self.byte_value(token_id)
        return self.token_text(token_id).encode() if byte is None else bytes([byte])

    def token_text(self, token_id: int) -> str:
        """Return the text of an ordinary piece, with plain spaces, or an added token, else ""."""
        if token_id in self._texts:
            return self._texts[token_id]
        if not self._is_ordinary(token_id) or self.byte_value(token_id) is not None:
            return ""
        return self.piece(token_id).replace(SPACE_MARK, " ")

    def is_added(self, token_id: int) -> bool:
        """Return whether an id is that of an added token."""
        return token_id in self._texts

    def byte_value(self, token_id: int) -> int | None:
        """Return the byte, 0 to 255, of a byte piece such as <0x0A>; None for other ids."""
        byte = self._byte_values.get(token_id)
        return None if token_id in self._replaced else byte

    def _is_ordinary(self, token_id: int) -> bool:
        if not 0 <= token_id < self.num_pieces or token_id in self._replaced:
            return False
        token_id = int(token_id)
        return not self._pieces.is_control(token_id) and not self._pieces.is_unknown(token_id)


def _load_model(data: bytes, source: str) -> sentencepiece.SentencePieceProcessor:
    """Parse the model and check what the rest of the project relies on."""
    name = f"The tokenizer {source}".rstrip()
    foreign = f"{name} does not belong to the ChatGLM family."
    if data.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{name} is a Git LFS pointer, not the file itself.",
            "The repository was cloned without its large files.",
            "Run `git lfs pull` in it, or download the file.",
        )
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(data)
        pieces.id_to_piece(list(range(pieces.get_piece_size())))  # each is valid text
    except (RuntimeError, UnicodeError) as error:
        raise CheckpointError(
            f"{name} is not a SentencePiece model.",
            " ".join(str(error).split()),
            "Download the file from the repository that the weights come from.",
        ) from error
    ids = (pieces.unk_id(), pieces.bos_id(), pieces.eos_id())
    if ids != (0, 1, 2):
        raise CheckpointError(foreign, f"Its ids of <unk>, <s> and </s> are {ids}, not (0, 1, 2).")
    num_bytes = sum(pieces.is_byte(pieces.piece_to_id(f"<0x{i:02X}>")) for i in range(256))
    if num_bytes != 256:
        why = f"It has {num_bytes} byte pieces, not 256, so some text could not be written."
        raise CheckpointError(foreign, why)
    return pieces


class Detokenizer:
    """Turns a stream of ids into text; the parts joined equal the decode of all ids.

    Consecutive byte pieces are held back while they may still become a character. Any other id ends
    such a run. Each byte that is not part of a character becomes U+FFFD, as in SentencePiece.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")(_EACH_BYTE)
        self._at_start = tokenizer.adds_dummy_prefix  # a leading space is still to be dropped

    def push(self, token_id: int) -> str:
        """Take the next id and return the text that is now certain, perhaps ""."""
        byte = self._tokenizer.byte_value(token_id)
        if byte is not None:
            return self._started(self._bytes.decode(bytes([byte])))
        held, text = self.flush(), self._tokenizer.token_text(token_id)
        if self._tokenizer.is_added(token_id):  # the text after it was encoded separately
            self._at_start = self._tokenizer.adds_dummy_prefix
            return held + text
        first = self._at_start and text.startswith(" ")
        self._started(text)
        return held + text[first:]

    def flush(self) -> str:
        """End the stream, or a run of bytes, and return what was held back."""
        return self._started(self._bytes.decode(b"", final=True))

    def _started(self, text: str) -> str:
        self._at_start = self._at_start and not text
        return text
