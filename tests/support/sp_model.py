"""A tiny SentencePiece model with the settings of the published one, trained in memory."""

import functools
import io
import struct
from pathlib import Path

import pytest
import sentencepiece

from tests.support.paths import ROOT

_SENTENCES = (
    "你好，世界。今天天气很好，我们去公园散步吧。",
    "请问这个模型有多少层？它有二十八层。",
    "我是一个人工智能助手，很高兴见到你，欢迎问我任何问题。",
    "问：晚上睡不着应该怎么办\n\n答：可以听一听轻音乐。\n\n",
    "[Round 1]\n\n问：你好\n\n答：你好！\n\n",
    "Hello world, this is a tiny tokenizer for the tests.",
    "What is the capital of France? The capital of France is Paris.",
    "The model answers questions in English and in Chinese.",
    "def main():\n    print('hello world')\t# greeting",
    "sophisticated people like 1234567890 and 3.14159 <|user|> </s> <0x0A>",
)


@functools.cache
def sp_model(
    *,
    byte_fallback: bool = True,
    newlines: bool = False,
    first_ids: tuple[int, int, int] = (0, 1, 2),
) -> bytes:
    """Trains the model: BPE, byte fallback, nothing normalized, digits split. Deterministic.

    With `newlines` its pieces may hold newlines, which no published tokenizer's do.
    """
    model = io.BytesIO()
    lines = _SENTENCES if newlines else [line for s in _SENTENCES for line in s.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=first_ids[0],
        bos_id=first_ids[1],
        eos_id=first_ids[2],
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def without_dummy_prefix(model: bytes) -> bytes:
    """The same model with add_dummy_prefix (field 3 of the normalizer) set to False."""
    flag = b"identity\x12\x00\x18"
    assert model.count(flag + b"\x01") == 1
    return model.replace(flag + b"\x01", flag + b"\x00")


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field of a protocol buffer, shorter than 16 KiB."""
    low, high = len(payload) & 127, len(payload) >> 7
    return bytes([number << 3 | 2, *([low | 128, high] if high else [low])]) + payload


def piece(text: bytes, score: float = 0.0, kind: int = 1) -> bytes:
    """A piece of a model (field 1) of a kind: 1 = normal, 4 = user-defined."""
    return field(1, field(1, text) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind]))


def with_pieces(model: bytes, pieces: list[str], *, kind: int = 1) -> bytes:
    """The same model with further pieces."""
    return model + b"".join(piece(text.encode(), -1000.0, kind) for text in pieces)


REAL_TOKENIZER = ROOT.parent / "shared/data/tokenizer"


def real_model() -> Path:
    """Return the folder of the published tokenizer next to the checkout; skips without it."""
    if not (REAL_TOKENIZER / "tokenizer.model").is_file():
        pytest.skip("the published tokenizer is not next to the checkout")
    return REAL_TOKENIZER


@functools.cache
def chatglm_model() -> bytes:
    """The model with the further pieces that first-generation ChatGLM-6B needs."""
    control = ["<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>"]
    blanks = [f"<|blank_{count}|>" for count in range(2, 81)]
    model = with_pieces(sp_model(), [*control, "<ENC>", "<dBLOCK>"], kind=3)
    return with_pieces(model, ["<n>", "<|tab|>", *blanks], kind=4)
