"""The ids that known tokenizers give for prompts: those of the published models and of the demo.

Only what was observed is here.
"""

from __future__ import annotations

from typing import NamedTuple

from glm2_jax.config import GLMConfig
from glm2_jax.text.tokenizer import Tokenizer

HELLO = "你好"


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
        ("raw", HELLO): [64790, 64792, 36474, 54591],
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
CHATGLM = Tokens(
    "published ChatGLM-6B",
    {(template, HELLO): [5, 74874, 130001, 130004] for template in ("chatglm", "raw")},
)
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

_KNOWN = {  # by family: the pieces of its tokenizer, the size of the vocabulary, and what it gives
    "chatglm2": (PUBLISHED_PIECES, 65024, PUBLISHED),
    "chatglm3": (PUBLISHED_PIECES, 65024, PUBLISHED),
    "codegeex2": (PUBLISHED_PIECES, 65024, CODEGEEX2),
    "glm4": (151329, 151552, GLM4),
    "glm4-0414": (151329, 151552, GLM4),
    "chatglm": (130344, 130528, CHATGLM),
    "glm": (50000, 50048, GLM),
}
_UNKNOWN = 0, 0, Tokens("unknown", {})


def is_demo(config: GLMConfig, tokenizer: Tokenizer) -> bool:
    """Return whether this is the bundled demo model, or as large."""
    return (config.num_params, tokenizer.num_pieces) == (_DEMO_PARAMETERS, _DEMO_PIECES)


def known_tokens(config: GLMConfig, tokenizer: Tokenizer) -> Tokens | None:
    """Return what the tokenizer should give: by its size, not its checksum, as a damaged file must
    fail."""
    pieces, _, tokens = _KNOWN.get(config.family, _UNKNOWN)
    if tokenizer.num_pieces == pieces:
        return tokens
    return DEMO if is_demo(config, tokenizer) else None


def greeting_ids(config: GLMConfig, template: str) -> list[int] | None:
    """Return the ids of HELLO in a template, by the tokenizer that a family was published with;
    None where they are not known, or the vocabulary has another size."""
    _, size, tokens = _KNOWN.get(config.family, _UNKNOWN)
    return tokens.prompts.get((template, HELLO)) if config.vocab_size == size else None
