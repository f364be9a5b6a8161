"""The SentencePiece tokenizer of the ChatGLM family, with its special ids behind the pieces.

Special ids exist only as numbers: they are added by the prompt builders, and no text, whatever it
says, is ever encoded to one of them.
"""

from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from glm2_jax.detokenizer import Detokenizer
from glm2_jax.errors import CheckpointError, InputError

SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside a piece
MAX_MODEL_BYTES = 64 * 2**20  # the published one has a million
_COMMON_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_SPECIAL = {
    "chatglm2": _COMMON_SPECIAL,
    "codegeex2": _COMMON_SPECIAL,
    "chatglm3": _COMMON_SPECIAL + _ROLES,
}


class Tokenizer:
    """Text to ids and back, equal to the published tokenizers.

    Attributes:
        family: "chatglm2", "chatglm3" or "codegeex2".
        model_bytes: the SentencePiece model as it was read.
        num_pieces: number of pieces in that model; special ids follow them.
        special: name -> id of every special token of the family.
        size: number of ids with a meaning, num_pieces + len(special).
        prefix_ids: [gMASK] and sop, which begin every sequence.
        eos_id, pad_id: 2 and 0 (the unknown piece doubles as padding).
        adds_dummy_prefix: whether the model puts a space in front of every text.
    """

    eos_id = 2
    pad_id = 0

    def __init__(self, model_bytes: bytes, family: str = "chatglm2", *, source: str = ""):
        if family not in _SPECIAL:
            raise ValueError(f"unknown family {family!r}, expected one of {', '.join(_SPECIAL)}")
        self.family = family
        self.model_bytes = model_bytes
        self._pieces = _load_model(model_bytes, source)
        self.num_pieces = self._pieces.get_piece_size()
        self.special = {n: self.num_pieces + i for i, n in enumerate(_SPECIAL[family])}
        self.size = self.num_pieces + len(self.special)
        self.prefix_ids = [self.special["[gMASK]"], self.special["sop"]]
        # The flag lives in the model's protobuf; what it does to a letter shows it without one.
        self.adds_dummy_prefix = self.piece(self.encode("A")[0]).startswith(SPACE_MARK)

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
        """Opens a serialised SentencePiece model; raises CheckpointError if it is none."""
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
        return self._pieces.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids; special, control, unknown, negative and out-of-range ids give nothing.

        One leading space is dropped where the model adds one; every byte that is no part of a
        whole UTF-8 character becomes U+FFFD.
        """
        detokenizer = Detokenizer(self)
        return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()

    def piece(self, token_id: int) -> str:
        """The piece as the model stores it (spaces as U+2581); "" for ids that are no piece."""
        if not 0 <= token_id < self.num_pieces:
            return ""
        return self._pieces.id_to_piece(int(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token stands for, its leading space included; b"" where it has none."""
        byte = self.byte_value(token_id)
        return self.token_text(token_id).encode("utf-8") if byte is None else bytes([byte])

    def token_text(self, token_id: int) -> str:
        """The text of an ordinary piece with plain spaces; "" for every other id."""
        if not self._is_ordinary(token_id) or self.byte_value(token_id) is not None:
            return ""
        return self.piece(token_id).replace(SPACE_MARK, " ")

    def byte_value(self, token_id: int) -> int | None:
        """The byte, 0 to 255, that a byte piece such as <0x0A> stands for; None for other ids."""
        if not 0 <= token_id < self.num_pieces or not self._pieces.is_byte(int(token_id)):
            return None
        return int(self.piece(token_id)[3:5], 16)

    def _is_ordinary(self, token_id: int) -> bool:
        if not 0 <= token_id < self.num_pieces:
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
