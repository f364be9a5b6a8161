"""The tokenizer of the GLM family: a vocabulary file, and the special ids of a model family.

No text is ever encoded to a special id; only the prompt builders add them. Tokens that a fine-tuned
folder added are text, and encoded to one id each, as the `transformers` tokenizer does.
"""

import codecs
import copy
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from glm2_jax.errors import CheckpointError, InputError
from glm2_jax.family import ROLE_TOKENS
from glm2_jax.text.pieces import SPACE_MARK, Pieces
from glm2_jax.text.ranks import Ranks, is_rank_file
from glm2_jax.text.vocabulary import Vocabulary, refuse_pointer

MAX_MODEL_BYTES = 64 * 2**20  # the published ones have one to three million bytes


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The special tokens of a family, by their names, and what they are for."""

    special: tuple[str, ...]  # in the order of their ids
    named_in_file: bool = False  # they are tokens of the file; else their ids follow its tokens
    prefix: tuple[str, ...] = ("[gMASK]", "sop")  # before every text
    suffix: tuple[str, ...] = ()  # after the text that is answered
    blanks: tuple[str, ...] = ()  # of them the first that there is ends a text without a blank
    eos: str | int = 2  # ends an answer: a special token, a token of the file, or an id
    pad: str | int = 0
    hf_class: str = "ChatGLMTokenizer"  # the published class
    file: str = "tokenizer.model"  # the published name of the vocabulary


_MASKS = ("[MASK]", "[gMASK]", "[sMASK]")
_GLM2 = Scheme((*_MASKS, "sop", "eop"))
_MEDIA = tuple(f"<|{side}_of_{kind}|>" for kind in ("image", "video") for side in ("begin", "end"))
_GLM4 = Scheme(
    ("<|endoftext|>", *_MASKS, "<sop>", "<eop>", *ROLE_TOKENS, *_MEDIA),
    prefix=("[gMASK]", "<sop>"), eos="<|endoftext|>", pad="<|endoftext|>",
    hf_class="ChatGLM4Tokenizer",
)  # fmt: skip
SCHEMES = {
    "chatglm2": _GLM2,
    "codegeex2": _GLM2,
    "chatglm3": dataclasses.replace(_GLM2, special=_GLM2.special + ROLE_TOKENS),
    "glm4": _GLM4,
    "glm4-0414": dataclasses.replace(_GLM4, hf_class="PreTrainedTokenizerFast"),
    "chatglm": Scheme(
        (*_MASKS, "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"), named_in_file=True,
        prefix=(), suffix=("[gMASK]", "<sop>"), eos="<eop>", pad="<pad>", file="ice_text.model",
    ),
    "glm": Scheme(
        ("<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNK]", "<unused_0>",
         "<|startofpiece|>", "<|endofpiece|>", "[sMASK]", "[gMASK]"),
        prefix=("[CLS]",), suffix=("<|endoftext|>", "<|startofpiece|>"),
        blanks=("[gMASK]", "[MASK]"), eos="<|endofpiece|>", pad="<|endoftext|>",
        hf_class="GLMChineseTokenizer", file="cog-pretrain.model",
    ),
}  # fmt: skip
SPECIAL = {family: scheme.special for family, scheme in SCHEMES.items()}
"""The special tokens of each family, in the order of their ids."""


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
    """Encodes text to ids and back, exactly as the published tokenizers do.

    `Tokenizer("chatglm2-6b/tokenizer.model")` reads a file; CheckpointError as of `from_file`.
    """

    eos_id: int = 2
    pad_id: int = 0  # the unknown piece in ChatGLM2 and ChatGLM3
    family: str  # one of SCHEMES
    special: dict[str, int]  # name -> id of every special token of the family
    added: dict[str, AddedToken]  # additional tokens by their text
    end_ids: tuple[int, ...]  # additional ids that end an answer
    size: int  # the largest id in use, plus 1
    prefix_ids: list[int]  # they begin every sequence
    suffix_ids: list[int]  # they follow the text that is answered or filled
    blank: str  # the mask at the end of a text that has none; "" in families without blanks

    families: tuple[str, ...]  # those to which the vocabulary file can belong
    model_bytes: bytes  # the vocabulary file as it was read
    num_pieces: int  # the largest id of a token of that file, plus 1
    byte_level: bool  # whether its tokens are ranked bytes; else SentencePiece has made it
    adds_dummy_prefix: bool  # whether a space is put before every text

    def __init__(
        self,
        vocabulary: str | os.PathLike[str] | Vocabulary,
        family: str | None = None,
        *,
        source: str = "",
    ):
        if isinstance(vocabulary, str | os.PathLike):
            source = os.fspath(vocabulary)
            vocabulary = _open(_read_file(Path(vocabulary), family), source)
        self._vocabulary, self._source = vocabulary, source
        self.families = vocabulary.families
        self.model_bytes = vocabulary.model_bytes
        self.num_pieces = vocabulary.size
        self.byte_level = vocabulary.byte_level
        self.adds_dummy_prefix = vocabulary.adds_dummy_prefix
        self._set_tokens(self.families[0] if family is None else family, None, (), ())

    @property
    def start_ids(self) -> list[int]:
        """The ids of a prompt without text, after which the model may write anything."""
        blank = [self.special[self.blank]] if self.blank else []
        return [*self.prefix_ids, *blank, *self.suffix_ids]

    def with_tokens(
        self,
        family: str,
        special: Mapping[str, int] | None = None,
        added: Sequence[AddedToken] = (),
        end_ids: Sequence[int] = (),
    ) -> "Tokenizer":
        """Return a tokenizer of the same vocabulary file with other tokens.

        `special` is name -> id of the family's special tokens, at least those that its `Scheme`
        uses; None = as published. Such an id may replace a piece. The ids and texts of `added` are
        unique and differ from `special`. CheckpointError if the file is that of another family.
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
        if family not in SCHEMES:
            raise ValueError(f"unknown family {family!r}, expected one of {', '.join(SCHEMES)}")
        if family not in self.families:
            raise CheckpointError(
                f"{_called(self._source)} does not belong to the {family} family.",
                f"It is {self._vocabulary.description}. That suits {' or '.join(self.families)}.",
                "Take the tokenizer of the repository that the weights come from.",
            )
        self.family, scheme = family, SCHEMES[family]
        self.special = dict(self.default_special(family) if special is None else special)
        self.added = {token.content: token for token in added}
        self.end_ids = tuple(end_ids)
        self._texts = {token.id: token.content for token in added}
        taken = {*self.special.values(), *self._texts}
        self._replaced = frozenset(i for i in taken if i < self.num_pieces)
        self.size = max(self.num_pieces, *(i + 1 for i in taken))
        self.prefix_ids = [self.special[name] for name in scheme.prefix]
        self.suffix_ids = [self.special[name] for name in scheme.suffix]
        self.blank = next((name for name in scheme.blanks if name in self.special), "")
        self.eos_id, self.pad_id = self._id_of(scheme.eos), self._id_of(scheme.pad)
        longest_first = sorted(self.added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None

    def _id_of(self, token: str | int) -> int:
        if isinstance(token, int):
            return token
        found = self.special.get(token, self._vocabulary.piece_id(token))
        if found is None:
            raise self._no_token(token, self.family)
        return found

    def default_special(self, family: str) -> dict[str, int]:
        """Return name -> id of a family's special tokens as it was published."""
        scheme = SCHEMES[family]
        if not scheme.named_in_file:
            return {name: self.num_pieces + i for i, name in enumerate(scheme.special)}
        ids = {name: self._vocabulary.piece_id(name) for name in scheme.special}
        for name, token_id in ids.items():
            if token_id is None:
                raise self._no_token(name, family)
        return cast(dict[str, int], ids)

    def _no_token(self, name: str, family: str) -> CheckpointError:
        return CheckpointError(
            f"{_called(self._source)} does not belong to the {family} family.",
            f"It has no token {name}.",
            "Take the tokenizer of the repository that the weights come from.",
        )

    @classmethod
    def from_file(cls, path: str | Path, family: str | None = "chatglm2") -> "Tokenizer":
        """Read a vocabulary file, whose kind its content shows; None = the family that it suits.

        CheckpointError if it cannot be read, is damaged, or is that of another family.
        """
        return cls(path, family)

    @classmethod
    def from_bytes(
        cls, data: bytes, family: str | None = "chatglm2", *, source: str = ""
    ) -> "Tokenizer":
        """Open the content of a vocabulary file; see `from_file`."""
        return cls(_open(data, source), family, source=source)

    def encode(self, text: str) -> list[int]:
        """Encode text without the prefix ids, never to a special id; InputError if it cannot be."""
        _check_text(text)
        if self._split is None:
            return self._encode_text(text)
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
                ids += [self.added[part].id] if i % 2 else self._encode_text(part)
        return ids

    def _encode_text(self, text: str) -> list[int]:
        ids = self._vocabulary.encode(text)
        if self._replaced.isdisjoint(ids):
            return ids
        result: list[int] = []  # a piece whose id means another token is written in smaller ones
        for i in ids:
            result += self._vocabulary.spell(i, self._replaced) if i in self._replaced else [i]
        return result

    def encode_with_masks(self, text: str) -> list[int]:
        """Encode a text whose [MASK], [sMASK] and [gMASK] are blanks to fill: their special ids.

        Spaces before a mask are dropped, as in the published tokenizers.
        """
        _check_text(text)
        masks = "|".join(re.escape(name) for name in _MASKS if name in self.special)
        *before, last = re.split(f"({masks})", text)  # text and mask in turn, then text
        ids: list[int] = []
        for left, mask in zip(before[::2], before[1::2], strict=True):
            ids += [*self.encode(left.rstrip()), self.special[mask]]
        return ids + self.encode(last)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids; special, control, unknown, negative and out-of-range ids have no text.

        One leading space is dropped if the model adds one; bytes that are not part of a complete
        UTF-8 character become U+FFFD.
        """
        detokenizer = Detokenizer(self)
        return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()

    def piece(self, token_id: int) -> str:
        """Return a token as its file writes it, or an added token's text, else "".

        SentencePiece writes a space as U+2581, byte-level files write GPT-2's letter of each byte.
        """
        if token_id in self._texts or token_id in self._replaced:
            return self._texts.get(token_id, "")
        return self._vocabulary.piece(token_id)

    def piece_id(self, text: str) -> int | None:
        """Return the id of the token that its file writes exactly so; None if there is none."""
        return self._vocabulary.piece_id(text)

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's UTF-8 bytes with its leading space; b"" if it has no text."""
        raw = self.raw_bytes(token_id)
        return self.token_text(token_id).encode() if raw is None else raw

    def token_text(self, token_id: int) -> str:
        """Return the text of an ordinary token, with plain spaces, or an added token, else "".

        A token that is part of a character has none; nor has a byte piece of SentencePiece.
        """
        if token_id in self._texts or token_id in self._replaced:
            return self._texts.get(token_id, "")
        return self._vocabulary.token_text(token_id)

    def is_added(self, token_id: int) -> bool:
        """Return whether an id is that of an added token."""
        return token_id in self._texts

    def raw_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of a token that may begin or continue a character; None for others."""
        return None if token_id in self._replaced else self._vocabulary.raw_bytes(token_id)

    def byte_value(self, token_id: int) -> int | None:
        """Return the byte, 0 to 255, of a token of one byte such as <0x0A>; None for other ids."""
        raw = self.raw_bytes(token_id)
        return raw[0] if raw is not None and len(raw) == 1 else None


def _check_text(text: str) -> None:
    """Raise an InputError unless it is a string that UTF-8 can write."""
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


def _read_file(path: Path, family: str | None) -> bytes:
    """Return the content of a vocabulary file; CheckpointError if it cannot be read."""
    name = SCHEMES.get(family or "", SCHEMES["chatglm2"]).file
    if path.is_dir():
        raise CheckpointError(
            f"The tokenizer {path} cannot be read.",
            "It is a folder, not a plain file.",
            f"Name the {name} in it; for the tokens that the folder adds to that file, use "
            "convert.open_folder(folder).tokenizer.",
        )
    try:
        size = path.stat().st_size
        if not path.is_file():  # reading a pipe could wait forever
            raise OSError("it is not a plain file")
        if size > MAX_MODEL_BYTES:
            raise OSError(f"it is larger than {MAX_MODEL_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        why, fix = error.strerror or str(error), f"Put the model's {name} there."
        raise CheckpointError(f"The tokenizer {path} cannot be read.", why, fix) from error


def _open(data: bytes, source: str) -> Vocabulary:
    """Open the content of a vocabulary file, of the kind that it shows."""
    refuse_pointer(data, _called(source))
    kind = Ranks if is_rank_file(data) else Pieces
    return kind(data, _called(source))


def _called(source: str) -> str:
    return f"The tokenizer {source}".rstrip()


class Detokenizer:
    """Turns a stream of ids into text; the parts joined equal the decode of all ids.

    Bytes are held back while they may still become a character; an id of a token that is not raw
    bytes ends it. Other bytes become U+FFFD: each of them, as in SentencePiece, or each run that
    begins like a character, as in byte-level tokenizers.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, vocabulary = tokenizer, tokenizer._vocabulary
        self._bytes = codecs.getincrementaldecoder("utf-8")(vocabulary.decode_errors)
        self._at_start = vocabulary.adds_dummy_prefix  # a leading space is still to be dropped
        self._drops_all = vocabulary.drops_all_spaces

    def push(self, token_id: int) -> str:
        """Take the next id and return the text that is now certain, perhaps ""."""
        raw = self._tokenizer.raw_bytes(token_id)
        if raw is not None:
            return self._started(self._bytes.decode(raw))
        held, text = self.flush(), self._tokenizer.token_text(token_id)
        if self._tokenizer.is_added(token_id):  # the text after it was encoded separately
            self._at_start = self._tokenizer.adds_dummy_prefix
            return held + text
        if self._at_start and self._tokenizer.piece(token_id).startswith(SPACE_MARK):
            text = text[1:]
            self._at_start = self._drops_all  # and ends with the first text in any case
        return held + self._started(text)

    def flush(self) -> str:
        """End the stream, or a run of bytes, and return what was held back."""
        return self._started(self._bytes.decode(b"", final=True))

    def _started(self, text: str) -> str:
        self._at_start = self._at_start and not text
        return text
