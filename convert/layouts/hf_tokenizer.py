"""Writes a tokenizer as the files that `transformers.AutoTokenizer` opens without remote code.

`tokenizer.json` holds the pieces of the SentencePiece model, or the ranked bytes of GLM-4, as a
byte-pair encoding of the `tokenizers` package. Both join two neighbors when the joined token has
the best score, or the lowest rank; so every way to cut a token in two becomes a merge, in that
order.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sentencepiece

from glm2_jax.errors import CheckpointError, UsageError
from glm2_jax.extras import pip_install
from glm2_jax.text.roles import GLM4_TOOL, GLM4_TOOLS, ROLES
from glm2_jax.text.tokenizer import SPACE_MARK, Tokenizer

# The published names `sop` and `eop` are parts of words: as special tokens they would be found in
# "sophisticated". The later GLM models write them so.
SAFE_NAMES = {"sop": "<sop>", "eop": "<eop>"}
PREFIX = "[gMASK]<sop>"  # begins every sequence
# How GLM-4 cuts a text before it merges bytes: the pattern of OpenAI's cl100k.
_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Texts whose ids must be equal to ours before anything is written.
_PROBES = (
    "",
    " ",
    "\n",
    "你好",
    "sophisticated people",
    "[Round 1]\n\n问：你好\n\n答：",
    "def main():\n    print('hello world')\t# greeting",
    "It's 12345 HE'LL   go \n\n x",
    "1234567890 a  b   c \u3000 \r\n 👋 𠮷 ① e\u0301 <0x0A> sop eop ▁",
)


# Families of whose vocabularies there is such a form.
_FORMED = frozenset({"chatglm2", "glm4"})


def tokenizer_files(tokenizer: Tokenizer, template: str, *, max_length: int) -> dict[str, bytes]:
    """Return the files of a tokenizer: name -> content.

    The chat template renders the prompt `template`, "raw" has none. CheckpointError where the files
    would give other ids than ours, UsageError without the package `tokenizers` and for a tokenizer
    that has no such form.
    """
    if not _FORMED.intersection(tokenizer.families):
        raise UsageError(
            f"The tokenizer of a {tokenizer.family} model has no HF-native form.",
            "Its SentencePiece model normalizes the text (NFKC), so that tokenizer.json would give "
            "other ids.",
            "Use --layout chatglm, whose folders hold the SentencePiece model.",
        )
    fast = _byte_pair_encoding(tokenizer)
    _compare(fast, tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "padding_side": "left",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "eos_token": _name(tokenizer, tokenizer.eos_id),
        "pad_token": _name(tokenizer, tokenizer.pad_id),
    }
    if tokenizer.piece(tokenizer.pad_id):  # of SentencePiece; bytes know every text
        config["unk_token"] = config["pad_token"]
    if template in CHAT_TEMPLATES:
        config["chat_template"] = CHAT_TEMPLATES[template]
    return {
        "tokenizer.json": fast.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
        "tokenizer.model": tokenizer.model_bytes,
    }


def token_names(tokenizer: Tokenizer) -> dict[int, str]:
    """Return id -> name of the special and added tokens, as other programs know them."""
    special = {i: SAFE_NAMES.get(name, name) for name, i in tokenizer.special.items()}
    return special | {token.id: token.content for token in tokenizer.added.values()}


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.piece(token_id) or token_names(tokenizer)[token_id]


def _byte_pair_encoding(tokenizer: Tokenizer) -> Any:
    """Return the `tokenizers.Tokenizer` with our pieces, special tokens, prefix and decoder."""
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(
            "The tokenizer files need the package tokenizers, which is not installed.",
            str(error),
            f"Install it: {pip_install('export')}",
        ) from error
    fast = (_ranks if tokenizer.byte_level else _pieces)(tokenizers, tokenizer)
    # <s> is not among them: no prompt has it, and people do write that HTML tag.
    end = _name(tokenizer, tokenizer.eos_id)
    names = [name for i in (tokenizer.pad_id, tokenizer.eos_id) if (name := tokenizer.piece(i))]
    names += [SAFE_NAMES.get(name, name) for name in tokenizer.special]
    fast.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]
    )
    for token in tokenizer.added.values():
        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word")}
        added = tokenizers.AddedToken(token.content, normalized=False, **flags)
        (fast.add_special_tokens if token.special else fast.add_tokens)([added])
    begin = [_name(tokenizer, token_id) for token_id in tokenizer.prefix_ids]
    ids = zip((*begin, end), (*tokenizer.prefix_ids, tokenizer.eos_id), strict=True)
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{' '.join(begin)} $A",
        pair=f"{' '.join(begin)} $A $B {end}",
        special_tokens=list(ids),
    )
    return fast


def _pieces(tokenizers: Any, tokenizer: Tokenizer) -> Any:
    """Return the encoding of a SentencePiece model; its vocabulary has the special tokens, too."""
    decoders, normalizers = tokenizers.decoders, tokenizers.normalizers
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    named = token_names(tokenizer)
    ids = {model.id_to_piece(i): i for i in range(model.get_piece_size()) if i not in named}
    ordinary = {piece: i for piece, i in ids.items() if tokenizer.token_text(i)}
    merges = _merges(ordinary, lambda i: -model.get_score(i))
    ids |= {name: i for i, name in named.items()}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, byte_fallback=True))
    space = normalizers.Replace(" ", SPACE_MARK)
    dummy = [normalizers.Prepend(SPACE_MARK)] if tokenizer.adds_dummy_prefix else []
    fast.normalizer = normalizers.Sequence([*dummy, space])
    strip = [decoders.Strip(" ", 1, 0)] if tokenizer.adds_dummy_prefix else []
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return fast


def _ranks(tokenizers: Any, tokenizer: Tokenizer) -> Any:
    """Return the encoding of ranked bytes, in the letters of GPT-2; special tokens follow them."""
    ids = {tokenizer.piece(i): i for i in range(tokenizer.num_pieces)}
    merges = _merges(ids, float)
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, ignore_merges=True))
    before = tokenizers.pre_tokenizers
    cuts = before.Split(tokenizers.Regex(_CUTS), behavior="isolated")
    letters = before.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = before.Sequence([cuts, letters])
    fast.decoder = tokenizers.decoders.ByteLevel()
    return fast


def _merges(ids: Mapping[str, int], order: Callable[[int], float]) -> list[tuple[str, str]]:
    """Return every way to cut a token in two tokens; those of the token of the least `order` go
    first."""

    def ways(token: str) -> Iterator[tuple[float, int, int, str, str]]:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                yield order(ids[token]), ids[left], ids[right], left, right

    found = sorted(way for token in ids for way in ways(token))
    return [(left, right) for *_, left, right in found]


def _compare(fast: Any, tokenizer: Tokenizer) -> None:
    """Refuse a vocabulary that does not work as a byte-pair encoding of this kind."""
    encode = functools.partial(fast.encode, add_special_tokens=False)
    pairs: list[tuple[str, Any, Any]] = [
        *((repr(text), encode(text).ids, tokenizer.encode(text)) for text in _PROBES),
        *((x, fast.token_to_id(SAFE_NAMES.get(x, x)), i) for x, i in tokenizer.special.items()),
    ]
    for text, found, expected in pairs:
        if found != expected:
            raise CheckpointError(
                "The tokenizer cannot be written in the HF-native form.",
                f"For {text} it would give {found}, not {expected}.",
                "Check that tokenizer.model is the published file.",
            )


_ROUNDS = """\
{%- set memory = namespace(round=0, system='') -%}
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
{%- if message.role == 'system' and loop.first -%}
{%- set memory.system = message.content + '\\n' -%}
{%- elif message.role == 'user' -%}
{%- set memory.round = memory.round + 1 -%}
{{- '[Round ' ~ memory.round ~ ']\\n\\n问：' ~ memory.system ~ message.content -}}
{%- set memory.system = '' -%}
{%- if not loop.last or add_generation_prompt -%}
{{- '\\n\\n答：' -}}
{%- endif -%}
{%- elif message.role == 'assistant' -%}
{{- message.content -}}
{%- if not loop.last -%}
{{- '\\n\\n' -}}
{%- endif -%}
{%- else -%}
{{- raise_exception('ChatGLM2 knows user, assistant and one system message at the start.') -}}
{%- endif -%}
{%- endfor -%}"""

# In ChatGLM3 the text after a role's token gets a space mark of its own, as the published code
# gives it; the space before the content stands for that of its second piece of text.
_CHATGLM3 = """\
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
{%- if message.role not in ROLES -%}
{{- raise_exception('ChatGLM3 knows the roles NAMES.') -}}
{%- endif -%}
{{- '<|' ~ message.role ~ '|>' ~ (message.metadata or '') ~ '\\n ' ~ message.content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}"""

# Tools come as an argument, or in a system message; calls and their results as OpenAI's API writes
# them, or as messages with metadata and of the role observation.
_GLM4 = """\
{{- '[gMASK]<sop>' -}}
{%- set described = [{'role': 'system', 'content': '', 'tools': tools}] if tools else [] -%}
{%- for message in described + messages -%}
{%- set role = 'observation' if message.role == 'tool' else message.role -%}
{%- if role not in ROLES -%}
{{- raise_exception('GLM-4 knows the roles NAMES, tool.') -}}
{%- endif -%}
{%- if message.content or not message.tool_calls -%}
{{- '<|' ~ role ~ '|>' ~ (message.metadata or '') ~ '\\n' -}}
{%- if message.tools -%}
{{- TOOLS -}}
{%- for tool in message.tools -%}
{%- set function = tool.function or tool -%}
{{- TOOL -}}
{%- endfor -%}
{%- endif -%}
{{- message.content or '' -}}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function or call -%}
{%- set values = function.arguments -%}
{{- '<|assistant|>' ~ function.name ~ '\\n' ~ (values if values is string else values | tojson) -}}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}"""

_TOOL = GLM4_TOOL.format(name="' ~ function.name ~ '", json="' ~ function | tojson(indent=4) ~ '")
_WORDS = {
    "ROLES": str(list(ROLES)),
    "NAMES": ", ".join(ROLES),
    **{
        name: "'" + text.replace("\n", "\\n") + "'"
        for name, text in (("TOOLS", GLM4_TOOLS), ("TOOL", _TOOL))
    },
}


def _filled(template: str) -> str:
    """Return a template with the words of `_WORDS` in the place of their names."""
    return re.sub(rf"\b(?:{'|'.join(_WORDS)})\b", lambda found: _WORDS[found[0]], template)


CHAT_TEMPLATES = {"chatglm2": _ROUNDS, "chatglm3": _filled(_CHATGLM3), "glm4": _filled(_GLM4)}
