"""The kinds of `config.json` in which models of the GLM family are published: one row a kind.

Two kinds may have one model_type: "chatglm" is that of ChatGLM-6B and of ChatGLM2 to GLM-4-9B,
"glm" that of the GLM base models and of the classes of transformers. Their keys show which it is.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from glm2_jax.errors import CheckpointError, shorten

THETA = 10000.0  # the rotary base of every published model, before rope_ratio
_SUPPORTED = "Use a ChatGLM-6B, ChatGLM2, ChatGLM3, CodeGeeX2, GLM or GLM-4 checkpoint."


class Form(NamedTuple):
    """One kind of `config.json`."""

    name: str  # for people
    families: tuple[str, ...]  # of `choices.FAMILIES`, which have it
    model_type: str
    architecture: str
    # Our field -> its key, and the value that the published class takes if the key is absent; a
    # type where the key must be there. A value has the type of its default.
    fields: Mapping[str, tuple[str, Any]]
    # Keys with the only value that this implementation computes, and that for an absent key.
    required: Mapping[str, tuple[Any, Any]]
    # Return the fields of ours that such a file does not hold, from those that it does.
    derive: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda values: {}
    native: bool = False  # a class of transformers computes it
    # Keys of which one shows that a file is of this kind, of those of its model_type.
    marks: frozenset[str] = frozenset()


def _heads(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of plain multi-head attention: N heads that share the hidden size."""
    width, heads = values["hidden_size"], values["num_heads"]
    if heads < 1 or width % heads:
        raise bad_value("hidden_size", width, f"a multiple of num_attention_heads = {heads}")
    return {"num_kv_heads": heads, "head_dim": width // heads}


_CHATGLM2 = Form(
    "ChatGLM2 to GLM-4-9B",
    ("chatglm2", "chatglm3", "codegeex2", "glm4"),
    "chatglm",
    "ChatGLMModel",
    {
        "num_layers": ("num_layers", 28),
        "vocab_size": ("padded_vocab_size", 65024),
        "hidden_size": ("hidden_size", 4096),
        "ffn_hidden_size": ("ffn_hidden_size", 13696),
        "num_heads": ("num_attention_heads", 32),
        "num_kv_heads": ("multi_query_group_num", 1),
        "head_dim": ("kv_channels", 128),
        "seq_length": ("seq_length", 2048),
        "norm_eps": ("layernorm_epsilon", 1e-5),
        "rope_ratio": ("rope_ratio", 1.0),
        "rope_table_dtype": ("rope_table_dtype", "float32"),
        "logn_scaling": ("logn_scaling", False),
        "hidden_dropout": ("hidden_dropout", 0.0),
        "attention_dropout": ("attention_dropout", 0.0),
        "eos_token_id": ("eos_token_id", 2),
        "pad_token_id": ("pad_token_id", 0),
    },
    {
        "rmsnorm": (True, True),
        "post_layer_norm": (True, True),
        "apply_residual_connection_post_layernorm": (False, False),
        "add_bias_linear": (False, False),
        "add_qkv_bias": (True, False),
        "multi_query_attention": (True, False),
        "original_rope": (True, True),
        "tie_word_embeddings": (False, False),
        "interleaved_qkv": (False, False),
        "rotary_percent": (0.5, 0.5),
        "fp32_residual_connection": (False, False),
    },
)

# GlmConfig of transformers.
_GLM = Form(
    "GlmForCausalLM",
    ("chatglm2", "chatglm3", "codegeex2", "glm4"),
    "glm",
    "GlmForCausalLM",
    {
        "vocab_size": ("vocab_size", int),
        "hidden_size": ("hidden_size", int),
        "ffn_hidden_size": ("intermediate_size", int),
        "num_layers": ("num_hidden_layers", int),
        "num_heads": ("num_attention_heads", int),
        "num_kv_heads": ("num_key_value_heads", int),
        "head_dim": ("head_dim", int),
        "seq_length": ("max_position_embeddings", int),
        "norm_eps": ("rms_norm_eps", float),
        "attention_dropout": ("attention_dropout", 0.0),
        "eos_token_id": ("eos_token_id", 2),
        "pad_token_id": ("pad_token_id", 0),
    },
    {
        "hidden_act": ("silu", "silu"),
        "attention_bias": (True, True),
        "tie_word_embeddings": (False, False),
    },
    native=True,
    marks=frozenset({"num_hidden_layers"}),
)

# Glm4Config of transformers: GLM-4-0414 and GLM-Z1, of which 32B has no biases.
_GLM4 = _GLM._replace(
    name="Glm4ForCausalLM",
    families=("glm4-0414",),
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    fields={
        **_GLM.fields,
        "attention_bias": ("attention_bias", True),
        "rope_table_dtype": ("rope_table_dtype", "float32"),
        "eos_token_id": ("eos_token_id", 151329),
        "pad_token_id": ("pad_token_id", 151329),
    },
    required={key: value for key, value in _GLM.required.items() if key != "attention_bias"},
)

# ChatGLM-6B; the class has the ids of the launch, with 20,000 more rows. max_sequence_length is
# the length of its training: the published code reads longer texts, too.
_CHATGLM = Form(
    "ChatGLM-6B",
    ("chatglm",),
    "chatglm",
    "ChatGLMModel",
    {
        "num_layers": ("num_layers", 28),
        "vocab_size": ("vocab_size", 150528),
        "hidden_size": ("hidden_size", 4096),
        "ffn_hidden_size": ("inner_hidden_size", 16384),
        "num_heads": ("num_attention_heads", 32),
        "seq_length": ("max_sequence_length", 2048),
        "norm_eps": ("layernorm_epsilon", 1e-5),
        "position_encoding_2d": ("position_encoding_2d", True),
        "tied_head": ("tied_head", None),
        "eos_token_id": ("eos_token_id", 150005),
        "pad_token_id": ("pad_token_id", 0),
        "sop_token_id": ("bos_token_id", 150004),
        "mask_token_id": ("mask_token_id", 150000),
        "gmask_token_id": ("gmask_token_id", 150001),
    },
    {},
    _heads,
    marks=frozenset({"position_encoding_2d", "inner_hidden_size"}),
)

# GLM base models. Their files have no ids: `_GLM_IDS` has them by vocabulary.
_GLM_BASE = Form(
    "GLM base models",
    ("glm",),
    "glm",
    "GLMForConditionalGeneration",
    {
        "num_layers": ("num_layers", 24),
        "vocab_size": ("vocab_size", 30592),
        "hidden_size": ("hidden_size", 1024),
        "num_heads": ("num_attention_heads", 16),
        "seq_length": ("max_sequence_length", 512),
        "hidden_dropout": ("output_dropout_prob", 0.1),
        "attention_dropout": ("attention_dropout_prob", 0.1),
        "eos_token_id": ("eop_token_id", int),
        "pad_token_id": ("pad_token_id", int),
        "sop_token_id": ("sop_token_id", int),
        "mask_token_id": ("mask_token_id", int),
        "smask_token_id": ("smask_token_id", None),
        "gmask_token_id": ("gmask_token_id", None),
        "banned_token_ids": ("bad_words_id", ()),
    },
    {
        "block_position_encoding": (True, True),
        "relative_encoding": (False, False),
        "spell_length": (None, None),
    },
    lambda values: {**_heads(values), "ffn_hidden_size": 4 * values["hidden_size"]},
    marks=frozenset({"block_position_encoding", "max_sequence_length"}),
)
_GLM_IDS: Mapping[int, Mapping[str, int]] = {
    50048: {
        "pad_token_id": 50000, "mask_token_id": 50003, "sop_token_id": 50006,
        "eop_token_id": 50007, "smask_token_id": 50008, "gmask_token_id": 50009,
    },
}  # fmt: skip
"""The special ids of glm-large-chinese and glm-10b-chinese, by the size of the vocabulary."""
_ENGLISH = {50304: "GPT-2 or RoBERTa", 30592: "BERT"}  # GLM base models of other tokenizers

# The first of a model_type is that of a file without any marks.
_FORMS = (_CHATGLM2, _GLM, _GLM4, _CHATGLM, _GLM_BASE)
FORMS = {
    family: form for form in (_CHATGLM2, _GLM4, _CHATGLM, _GLM_BASE) for family in form.families
}
"""By family: the kind of file in which it was published first."""
NATIVE = {family: form for form in (_GLM, _GLM4) for family in form.families}
"""By family: the kind of file of its class in transformers."""

# model_type -> what it is. Those that begin so are named so, too.
_OTHERS = {
    "glm4v": "GLM-4V, which reads images",
    "glm46v": "GLM-4.6V, which reads images",
    "glm4_moe": "GLM-4.5 or later, a mixture of experts",
    "glm_moe": "a later GLM, a mixture of experts",
}


def form_of(raw: Mapping[str, Any]) -> Form:
    """Return the kind of a parsed `config.json`; CheckpointError for another model, by its name."""
    model_type = raw.get("model_type")
    # Only a path's last part: a folder above it may have any name.
    name = raw.get("_name_or_path")
    name = re.split(r"[/\\]", name.lower().rstrip("/\\"))[-1] if isinstance(name, str) else ""
    if "vision_config" in raw or re.search(r"(?<!chat)glm-?4(\.\d)?-?v", name):
        raise CheckpointError(
            "GLM-4V is not supported.", "It reads images; only text is implemented.", _SUPPORTED
        )
    if model_type is None or isinstance(model_type, str):
        absent = model_type is None  # which transformers never writes
        forms = [
            form for form in _FORMS if form.model_type == model_type or (absent and not form.native)
        ]
        marked = [form for form in forms if not form.marks.isdisjoint(raw)]
        if found := marked or forms:
            return found[0]
    known = [what for start, what in _OTHERS.items() if str(model_type).startswith(start)]
    raise CheckpointError(
        f"config.json: model_type {shorten(model_type)} is not supported.",
        f"It is {known[0]}." if known else "Implemented are 'chatglm', 'glm' and 'glm4'.",
        _SUPPORTED,
    )


def read_fields(form: Form, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `GLMConfig` in a parsed `config.json`, without the rotary ones of the
    classes of transformers (`read_rope`) and without the family.

    Unknown keys are ignored. A CheckpointError for a key whose value this implementation does not
    compute, one of a wrong type, or one that is missing.
    """
    if form is _GLM_BASE:
        raw = {**_glm_ids(raw), **raw}
    lacks = [key for key, default in form.fields.values() if isinstance(default, type)]
    if lacks := [key for key in lacks if raw.get(key) is None]:
        kind = "the HF-native layout" if form.native else form.name
        raise CheckpointError(
            f"config.json of {kind} lacks {', '.join(lacks)}.",
            f"Its model_type is {form.model_type!r}; without these keys the model is not known.",
            "Download config.json again, or add them.",
        )
    for key, (wanted, default) in form.required.items():
        if raw.get(key, default) != wanted:
            raise _unsupported(key, raw.get(key, default), repr(wanted), absent=key not in raw)
    values = {}
    for name, (key, default) in form.fields.items():
        value = raw.get(key, default)
        if name in ("eos_token_id", "pad_token_id"):  # of a list the first; null = the default
            value = value[0] if isinstance(value, list) and value else value
            value = default if value is None else value
        values[name] = _typed(key, value, default)
    return values | form.derive(values)


def read_rope(form: Form, raw: Mapping[str, Any]) -> tuple[float, str | None]:
    """Return rope_ratio, and its meaning where the file says it."""
    if not form.native:
        key, default = form.fields.get("rope_ratio", ("", 1.0))
        return _typed(key, raw.get(key, default), default), raw.get("rope_kind")
    rope = {key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if key in raw}
    for key in ("rope_scaling", "rope_parameters"):  # newer files have the second
        found = raw.get(key) or {}
        if not isinstance(found, Mapping):
            raise _unsupported(key, found, "an object")
        rope |= found
    if rope.get("partial_rotary_factor", 0.5) != 0.5:
        raise _unsupported("partial_rotary_factor", rope["partial_rotary_factor"], "0.5")
    theta = rope.get("rope_theta", THETA)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < 1e30:
        raise _unsupported("rope_theta", theta, "a number above 0 that float32 can hold")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":  # at the published base nothing is scaled, whatever the family would do
        return theta / THETA, None if theta == THETA else "base"
    if kind == "yarn":
        raise CheckpointError(
            "config.json: rope_scaling of the type 'yarn' is not supported.",
            "It changes the rotary angles of every position, for texts beyond the length of the "
            "training; only linear scaling is implemented.",
            "Remove rope_scaling: the model then has the context that it was trained with.",
        )
    if kind != "linear" or theta != THETA:
        raise _unsupported("rope_parameters", dict(rope), f"linear with rope_theta {THETA:g}")
    return _typed("rope_ratio", rope.get("factor"), 1.0), "linear"


def write_fields(form: Form, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of `GLMConfig`, by name, under the keys of a kind of file, for `read_fields`
    and `read_rope`."""
    keys = {key: values[name] for name, (key, _) in form.fields.items() if values[name] is not None}
    required = {key: wanted for key, (wanted, _) in form.required.items() if wanted is not None}
    return {
        "model_type": form.model_type,
        "architectures": [form.architecture],
        **{key: list(x) if isinstance(x, tuple) else x for key, x in keys.items()},
        **(_native_rope(values) if form.native else {}),
        **required,
    }


def _native_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary keys of transformers, the newer and the older ones."""
    theta, scaling = values["rope_base"], {}
    if values["rope_kind"] == "base":
        theta *= values["rope_ratio"]
    elif values["rope_ratio"] != 1:
        scaling = {"rope_type": "linear", "factor": values["rope_ratio"]}
    rope = {"rope_theta": theta, "partial_rotary_factor": 0.5}
    return {
        "rope_parameters": {"rope_type": "default", **rope, **scaling},
        **rope,
        **({"rope_scaling": scaling} if scaling else {}),
    }


def _glm_ids(raw: Mapping[str, Any]) -> Mapping[str, int]:
    """Return the special ids of a GLM base model; {} where no published one has its vocabulary."""
    size = raw.get("vocab_size", _GLM_BASE.fields["vocab_size"][1])
    if not is_integer(size):
        return {}
    if size in _ENGLISH:
        raise CheckpointError(
            f"config.json: a GLM base model with vocab_size = {size} is not supported.",
            f"It has a {_ENGLISH[size]} tokenizer; only the Chinese SentencePiece one is "
            "implemented.",
            "Use glm-large-chinese or glm-10b-chinese.",
        )
    return _GLM_IDS.get(size, {})


def bad_value(key: str, value: Any, wanted: str) -> CheckpointError:
    """Return the error about the value of a key that is not `wanted`."""
    return CheckpointError(
        f"config: {key} = {shorten(value)} is not valid.",
        f"It must be {wanted}.",
        "Correct it, or download config.json again.",
    )


def is_integer(value: Any) -> bool:
    """Return whether a value is a whole number, which a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _typed(key: str, value: Any, default: Any) -> Any:
    """Return the value of a key, of the type of its default; what has none is not checked here."""
    kind = default if isinstance(default, type) else type(default)
    if default is None or value is default:
        return value
    if kind is tuple:
        ok, wanted = isinstance(value, list) and all(map(is_integer, value)), "a list of ids"
        value = tuple(value) if ok else value
    elif kind is float:
        ok, wanted = is_integer(value) or isinstance(value, float), "a number"
        if ok:
            value = float(min(max(value, -1e300), 1e300))  # far beyond what any key may hold
    else:
        ok = is_integer(value) if kind is int else isinstance(value, kind)
        wanted = {int: "a whole number", bool: "true or false", str: "a text"}[kind]
    if not ok:
        raise bad_value(key, value, wanted)
    return value


def _unsupported(key: str, value: Any, wanted: str, *, absent: bool = False) -> CheckpointError:
    note = " (the key is absent, which means that)" if absent else ""
    return CheckpointError(
        f"config.json: {key} = {shorten(value)} is not supported{note}.",
        f"It changes what the model computes; only {key} = {wanted} is implemented.",
        _SUPPORTED,
    )
