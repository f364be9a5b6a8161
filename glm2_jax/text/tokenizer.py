"""The SentencePiece tokenizer of the ChatGLM family, with its special ids behind the pieces.

Special ids exist only as numbers: they are added by the prompt builders, and no text, whatever it
says, is ever encoded to one of them. Tokens that a fine-tuned folder added are text: where it
contains one, it is encoded to the one id, as the `transformers` tokenizer does.
"""

import codecs
import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import sentencepiece

from glm2_jax.errors import CheckpointError, InputError
from glm2_jax.family import ROLE_TOKENS

SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside a piece
MAX_MODEL_BYTES = 64 * 2**20  # the published one has a million
_COMMON_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
SPECIAL = {
    "chatglm2": _COMMON_SPECIAL,
    "codegeex2": _COMMON_SPECIAL,
    "chatglm3": _COMMON_SPECIAL + ROLE_TOKENS,
}
"""The special tokens of each family, in the order of their ids."""


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token beyond those of the family; the fields are those of `transformers`.

    Attributes:
        content: its text.
        id: its id.
        special: whether the folder calls it special; encoding and decoding do not depend on it.
        lstrip, rstrip: whether the blanks before and after it belong to it.
        single_word: whether it counts only between spaces.
    """

    content: str
    id: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class Tokenizer:
    """Text to ids and back, equal to the published tokenizers.

    Attributes:
        family: "chatglm2", "chatglm3" or "codegeex2".
        model_bytes: the SentencePiece model as it was read.
        num_pieces: number of pieces in that model; special ids follow them.
        special: name -> id of every special token of the family.
        added: further tokens, by their text.
        end_ids: ids beyond those of the family that end an answer.
        size: the largest id with a meaning, plus 1.
        prefix_ids: [gMASK] and sop, which begin every sequence.
        eos_id, pad_id: 2 and 0 (the unknown piece doubles as padding).
        adds_dummy_prefix: whether the model puts a space in front of every text.
    """

    eos_id = 2
    pad_id = 0

    def __init__(self, model_bytes: bytes, family: str = "chatglm2", *, source: str = ""):
        self.model_bytes = model_bytes
        self._pieces = _load_model(model_bytes, source)
        self.num_pieces = self._pieces.get_piece_size()
        self._set_tokens(family, None, (), ())
        # The flag lives in the model's protobuf; what it does to a letter shows it without one.
        self.adds_dummy_prefix = self.piece(self.encode("A")[0]).startswith(SPACE_MARK)

    def with_tokens(
        self,
        family: str,
        special: Mapping[str, int] | None = None,
        added: Sequence[AddedToken] = (),
        end_ids: Sequence[int] = (),
    ) -> "Tokenizer":
        """The same pieces with other tokens.

        Args:
            family: "chatglm2", "chatglm3" or "codegeex2".
            special: name -> id of its special tokens, "[gMASK]" and "sop" at least; None = they
                follow the pieces, as published. One may stand in the place of a piece.
            added: further tokens; their ids and texts differ from each other and from `special`.
            end_ids: ids beyond those of the family that end an answer.
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
        longest_first = sorted(self.added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None

    def default_special(self, family: str) -> dict[str, int]:
        """name -> id of a family's special tokens where they follow the pieces, as published."""
        return {name: self.num_pieces + i for i, name in enumerate(SPECIAL[family])}

    @classmethod
    def from_file(cls, path: str | Path, family: str = "chatglm2") -> "Tokenizer":
        """Reads a `tokenizer.model` file.

        Raises:
            CheckpointError: the file is missing, unreadable or no fitting SentencePiece model.
        """
        path = Path(path)
        try:
            if path.exists() and not path.is_file():  # reading a pipe would wait for ever
                raise OSError("it is not a plain file")
            if path.stat().st_size > MAX_MODEL_BYTES:
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
        """Opens a serialized SentencePiece model; raises CheckpointError if it is none."""
        return cls(data, family)

    def encode(self, text: str) -> list[int]:
        """Encodes text without the prefix ids; never gives a special id.

        Raises:
            InputError: `text` is no string, or holds a lone surrogate, which has no UTF-8 form.
        """
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
        ids: list[int] = []
        for number, part in enumerate(self._split_added(text)):
            if number % 2 and part:
                ids.append(self.added[part].id)
            elif part:
                ids += self._encode_pieces(part)
        return ids

    def _split_added(self, text: str) -> list[str]:
        """The text between added tokens, and at odd places these; "" where one does not count."""
        parts = self._split.split(text) if self._split is not None else [text]
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
        return parts

    def _encode_pieces(self, text: str) -> list[int]:
        ids = self._pieces.encode(text)
        if self._replaced.isdisjoint(ids):
            return ids
        # The text of a piece whose id means another token: in single characters.
        parts = ([i] if i not in self._replaced else self._encode_characters(i) for i in ids)
        return [i for part in parts for i in part]

    def _encode_characters(self, token_id: int) -> Iterable[int]:
        for character in self._pieces.id_to_piece(token_id):
            found = self._pieces.piece_to_id(character)
            if found in self._replaced or not self._is_ordinary(found):
                yield from (self._pieces.piece_to_id(f"<0x{b:02X}>") for b in character.encode())
            else:
                yield found

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids; special, control, unknown, negative and out-of-range ids give nothing.

        One leading space is dropped where the model adds one; every byte that is no part of a
        whole UTF-8 character becomes U+FFFD.
        """
        detokenizer = Detokenizer(self)
        return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()

    def piece(self, token_id: int) -> str:
        """The piece as the model stores it (spaces as U+2581), or the text of an added token; ""
        for other ids."""
        if not 0 <= token_id < self.num_pieces or token_id in self._replaced:
            return self._texts.get(token_id, "")
        return self._pieces.id_to_piece(int(token_id))

    def piece_id(self, text: str) -> int | None:
        """The id of the piece with exactly this text; None where the model has none."""
        token_id = self._pieces.piece_to_id(text)
        return token_id if self._pieces.id_to_piece(token_id) == text else None

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token stands for, its leading space included; b"" where it has none."""
        byte = self.byte_value(token_id)
        return self.token_text(token_id).encode("utf-8") if byte is None else bytes([byte])

    def token_text(self, token_id: int) -> str:
        """The text of an ordinary piece with plain spaces, or that of an added token; "" for
        every other id."""
        if token_id in self._texts:
            return self._texts[token_id]
        if not self._is_ordinary(token_id) or self.byte_value(token_id) is not None:
            return ""
        return self.piece(token_id).replace(SPACE_MARK, " ")

    def is_added(self, token_id: int) -> bool:
        """Whether an id is that of an added token."""
        return token_id in self._texts

    def byte_value(self, token_id: int) -> int | None:
        """The byte, 0 to 255, that a byte piece such as <0x0A> stands for; None for other ids."""
        if not self._is_ordinary(token_id) or not self._pieces.is_byte(int(token_id)):
            return None
        return int(self.piece(token_id)[3:5], 16)

    def _is_ordinary(self, token_id: int) -> bool:
        if not 0 <= token_id < self.num_pieces or token_id in self._replaced:
            return False
        token_id = int(token_id)
        return not self._pieces.is_control(token_id) and not self._pieces.is_unknown(token_id)


def _load_model(data: bytes, source: str) -> sentencepiece.SentencePieceProcessor:
    """Parses the model and checks what the rest of the project relies on."""
    name = f"The tokenizer {source}" if source else "The tokenizer"
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
            f"{name} is no SentencePiece model.",
            " ".join(str(error).split()),
            "Download the file from the repository that the weights come from.",
        ) from error
    ids = (pieces.unk_id(), pieces.bos_id(), pieces.eos_id())
    if ids != (0, 1, 2):
        raise CheckpointError(
            f"{name} does not belong to the ChatGLM family.",
            f"Its ids of <unk>, <s> and </s> are {ids}, not (0, 1, 2).",
        )
    num_bytes = sum(pieces.is_byte(i) for i in range(pieces.get_piece_size()))
    if num_bytes != 256:
        raise CheckpointError(
            f"{name} does not belong to the ChatGLM family.",
            f"It has {num_bytes} byte pieces, not 256, so some text could not be written.",
        )
    return pieces


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
