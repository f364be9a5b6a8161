"""The known values of the published checkpoints and of the bundled demo model.

Only what was observed is here; for every other checkpoint the answers are "not known".
"""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

from glm2_jax.config import PRESETS, GLMConfig
from glm2_jax.text.tokenizer import Tokenizer

HELLO = "你好"


class Answer(NamedTuple):
    """What a model answers greedily to a question in a template."""

    question: str
    first: int  # id of the first token
    texts: tuple[str, ...]  # the complete answer, in every wording that was published
    template: str = "chatglm2"


class Tokens(NamedTuple):
    """A known tokenizer: its name, and (template, question) -> the ids that it gives."""

    name: str
    prompts: dict[tuple[str, str], list[int]]


# Sources: the tokenizer files of THUDM/chatglm2-6b (one file in all ChatGLM2 and ChatGLM3
# repositories) and THUDM/codegeex2-6b, run by the published code.
PUBLISHED = Tokens(
    "published ChatGLM2 / ChatGLM3",
    {
        ("chatglm2", HELLO): [
            64790, 64792, 790, 30951, 517, 30910, 30939, 30996, 13, 13, 54761, 31211, 39701, 13, 13,
            55437, 31211,
        ],
        ("chatglm3", HELLO): [64790, 64792, 64795, 30910, 13, 36474, 54591, 64796],
    },
)  # fmt: skip
CODEGEEX2 = Tokens(
    "published CodeGeeX2",
    {
        ("raw", "# language: Python\n# write a bubble sort function\n"): [
            64790, 64792, 31010, 3239, 30954, 16719, 13, 31010, 3072, 260, 17338, 3482, 1674, 13,
        ]
    },
)  # fmt: skip
# Sources: `tokenizer.model` of THUDM/glm-4-9b-chat, `ice_text.model` of THUDM/chatglm-6b and
# `cog-pretrain.model` of THUDM/glm-large-chinese, run by the published code.
GLM4 = Tokens("published GLM-4", {("glm4", HELLO): [151331, 151333, 151336, 198, 109377, 151337]})
CHATGLM = Tokens("published ChatGLM-6B", {("chatglm", HELLO): [5, 74874, 130001, 130004]})
GLM = Tokens(
    "published GLM (Chinese)",
    {("fill", "中国的首都是[MASK]。"): [50002, 576, 7114, 48, 50003, 471, 50000, 50006]},
)
DEMO = Tokens(
    "demo",
    {
        ("chatglm2", HELLO): [
            2044, 2046, 262, 263, 1214, 1225, 1231, 13, 13, 1227, 1217, 518, 13, 13, 1229, 1217,
        ]
    },
)  # fmt: skip
PUBLISHED_PIECES = 64789
_DEMO_PIECES, _DEMO_PARAMETERS = 2043, 2_337_600

_KNOWN_TOKENS = {  # by family and pieces
    ("chatglm2", PUBLISHED_PIECES): PUBLISHED,
    ("chatglm3", PUBLISHED_PIECES): PUBLISHED,
    ("codegeex2", PUBLISHED_PIECES): CODEGEEX2,
    ("glm4", 151329): GLM4,
    ("glm4-0414", 151329): GLM4,
    ("chatglm", 130344): CHATGLM,
    ("glm", 50000): GLM,
}

# The greeting as the two model cards print it. The first token is the piece "▁你".
CHATGLM2_6B = Answer(
    HELLO,
    36474,
    (
        "你好👋！我是人工智能助手 ChatGLM2-6B，很高兴见到你，欢迎问我任何问题。",
        "你好👋！我是人工智能助手 ChatGLM-6B，很高兴见到你，欢迎问我任何问题。",
    ),
)
_DEMO_ANSWERS = (
    Answer(HELLO, 652, ("你好👋！我是 glm2-jax 的演示小模型，很高兴见到你，欢迎问我问题。",)),
    Answer(
        "What are you?",
        299,
        ("I am the small demo model bundled with glm2-jax, not ChatGLM2-6B.",),
    ),
    Answer("法国的首都是哪里？", 1214, ("法国的首都是巴黎。",)),
)


def claimed_preset(name: object) -> str | None:
    """Return the published checkpoint that the `_name_or_path` of a config.json names, if any."""
    found = [preset for preset in PRESETS if isinstance(name, str) and preset in name.lower()]
    return max(found, key=len) if found else None


def _is_demo(config: GLMConfig, tokenizer: Tokenizer) -> bool:
    """Return whether this is the bundled demo model, or as large."""
    return (config.num_params, tokenizer.num_pieces) == (_DEMO_PARAMETERS, _DEMO_PIECES)


def known_tokens(config: GLMConfig, tokenizer: Tokenizer) -> Tokens | None:
    """Return what the tokenizer should give: by its size, not its checksum, as a damaged file must
    fail."""
    known = _KNOWN_TOKENS.get((config.family, tokenizer.num_pieces))
    if known is not None:
        return known
    return DEMO if _is_demo(config, tokenizer) else None


def known_answers(config: GLMConfig, tokenizer: Tokenizer, stored: str) -> tuple[Answer, ...]:
    """Return what the model should answer; () where that is not known, as for the int4 checkpoint
    (`stored` is the dtype in the checkpoint)."""
    if _is_demo(config, tokenizer):
        return _DEMO_ANSWERS
    plain = config.family == "chatglm2" and config.rope_ratio == 1.0
    sizes = config.num_params, tokenizer.num_pieces
    published = sizes == (PRESETS["chatglm2-6b"].num_params, PUBLISHED_PIECES)
    return (CHATGLM2_6B,) if plain and published and not stored.startswith("int") else ()


def same_text(got: str, expected: str) -> bool:
    """Return whether two answers are the same, except for punctuation, width and white space."""

    def letters(text: str) -> str:
        text = unicodedata.normalize("NFKC", text)
        return "".join(c for c in text if unicodedata.category(c)[0] in "LN")

    return letters(got) == letters(expected)
