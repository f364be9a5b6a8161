"""The known values of the published checkpoints and of the bundled demo model.

Only what was observed is here; for every other checkpoint the answers are "not known".
"""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

from glm2_jax.config import PRESETS, GLMConfig
from glm2_jax.text.tokenizer import Tokenizer
from infer.known_ids import HELLO, PUBLISHED_PIECES, is_demo


class Answer(NamedTuple):
    """What a model answers greedily to a question in a template."""

    question: str
    first: int  # id of the first token
    texts: tuple[str, ...]  # the complete answer, in every wording that was published
    template: str = "chatglm2"


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


def known_answers(config: GLMConfig, tokenizer: Tokenizer, stored: str) -> tuple[Answer, ...]:
    """Return what the model should answer; () where that is not known, as for the int4 checkpoint
    (`stored` is the dtype in the checkpoint)."""
    if is_demo(config, tokenizer):
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
