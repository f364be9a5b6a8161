"""GLMConfig: what published files mean, and what is refused by name."""

import dataclasses
import json

import pytest

from glm2_jax import PRESETS, CheckpointError, GLMConfig
from glm2_jax.published import FORMS
from tests.support.shared_data import shared_file

ADDED = {"add_qkv_bias": True, "multi_query_attention": True}
CHATGLM2 = {
    "_name_or_path": "THUDM/chatglm2-6b",
    "model_type": "chatglm",
    **ADDED,
    "multi_query_group_num": 2,
    "seq_length": 32768,
    "padded_vocab_size": 65024,
}


PARAMS = {
    "glm-4-9b": 9_399_951_360,
    "glm-4-9b-chat": 9_399_951_360,
    "glm-4-9b-chat-1m": 9_483_857_920,
    "glm-4-9b-0414": 9_399_951_360 + 40 * 2 * 4096,
    "glm-4-32b-0414": 32_566_081_536,
    "chatglm-6b": 6_173_286_400,
    "chatglm-6b-int4": 6_173_286_400,
    "chatglm-6b-int8": 6_173_286_400,
    "glm-large-chinese": 355_659_776,
    "glm-10b-chinese": 9_879_633_920,
}
ALIGNED = {
    "chatglm2-6b": 8192, "chatglm2-6b-int4": 8192, "chatglm3-6b": 8192, "codegeex2-6b": 8192,
    "chatglm2-6b-32k": 32768, "chatglm3-6b-32k": 32768, "chatglm3-6b-128k": 131072,
    "glm-4-9b": 8192, "glm-4-9b-chat": 131072, "glm-4-9b-chat-1m": 1048576,
    "glm-4-9b-0414": 32768, "glm-4-32b-0414": 32768,
    "chatglm-6b": 2048, "chatglm-6b-int4": 2048, "chatglm-6b-int8": 2048,
    "glm-large-chinese": 1024, "glm-10b-chinese": 1024,
}  # fmt: skip
# The file where it is not configs/NAME.json, and the keys that it has instead of the published.
FILES = {
    "chatglm-6b": ("glm-family/configs/chatglm-6b.json", {}),
    "glm-4-9b-chat": ("configs/glm-4-9b-chat.json", {"seq_length": 131072}),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_files(name):
    preset = PRESETS[name]
    assert preset.num_params == PARAMS.get(name, 6_243_584_000)
    assert preset.aligned_length == ALIGNED[name]
    assert preset.context_limit == (2**31 - 1 if "chatglm-6b" in name else preset.seq_length)
    own = dataclasses.replace(preset, **OPTIONS[preset.family])
    assert GLMConfig.from_hf(json.loads(json.dumps(own.to_hf()))) == own
    path, changes = FILES.get(name, (f"configs/{name}.json", {}))
    raw = json.loads(shared_file(path, missing_ok=True) or "null")
    if raw is not None:
        assert GLMConfig.from_hf(raw | changes) == preset
    assert raw is not None or name in UNSEEN


# What a model may have of its own, by family.
_GLM2 = {"rope_table_dtype": "reference", "logn_scaling": True, "hidden_dropout": 0.1}
OPTIONS = {
    "chatglm2": _GLM2, "chatglm3": _GLM2, "codegeex2": _GLM2, "glm4": _GLM2,
    "glm4-0414": {"attention_bias": False, "rope_ratio": 50.0, "attention_dropout": 0.1},
    "chatglm": {"tied_head": False, "position_encoding_2d": False, "pad_token_id": 20},
    "glm": {"banned_token_ids": (5, 7), "eos_token_id": 9, "attention_dropout": 0.0},
}  # fmt: skip
UNSEEN = {
    "chatglm3-6b-32k", "chatglm-6b-int4", "chatglm-6b-int8", "glm-4-9b", "glm-4-9b-chat-1m",
    "glm-4-9b-0414", "glm-4-32b-0414", "glm-large-chinese", "glm-10b-chinese",
}  # fmt: skip
"""No published file is here."""


def test_the_ids_of_the_launch_of_chatglm_6b_are_those_of_the_class():
    config = GLMConfig.from_hf({"model_type": "chatglm", "inner_hidden_size": 16384})
    ids = {"sop_token_id": 150004, "eos_token_id": 150005, "mask_token_id": 150000}
    launch = dataclasses.replace(
        PRESETS["chatglm-6b"], **ids, gmask_token_id=150001, pad_token_id=0, vocab_size=150528
    )
    assert config == launch
    raw = json.loads(shared_file("glm-family/configs/chatglm-6b-launch.json"))
    assert GLMConfig.from_hf(raw) == launch


NATIVE = {
    "vocab_size": 151552, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
BLANK_FILLING = {
    "model_type": "glm", "num_layers": 2, "hidden_size": 48, "num_attention_heads": 4,
    "vocab_size": 50048, "max_sequence_length": 32, "block_position_encoding": True,
}  # fmt: skip


def test_the_kinds_of_files_with_one_model_type():
    """Of "glm" two, of "chatglm" two; each key that shows which it is is enough."""
    for raw, family in (
        ({"model_type": "glm", **NATIVE}, "glm4"),
        ({"model_type": "glm4", **NATIVE}, "glm4-0414"),
        ({"model_type": "glm", **NATIVE, "vocab_size": 640}, "chatglm2"),
        ({"model_type": "chatglm", "padded_vocab_size": 151552, **ADDED}, "glm4"),
        ({"model_type": "chatglm", "position_encoding_2d": True}, "chatglm"),
        ({"inner_hidden_size": 72}, "chatglm"),
        (BLANK_FILLING, "glm"),
        ({"model_type": "glm", "max_sequence_length": 32, "vocab_size": 50048}, "glm"),
    ):
        config = GLMConfig.from_hf(raw)
        assert config.family == family
        for other in ("chatglm3", "glm4-0414", "chatglm", "glm"):
            if FORMS[other] is not FORMS[family]:
                with pytest.raises(CheckpointError, match=f"not of a {other} model"):
                    GLMConfig.from_hf(raw, family=other)
    both = {**NATIVE, **BLANK_FILLING, "vocab_size": 151552}
    assert GLMConfig.from_hf(both).num_kv_heads == 2  # GlmConfig needs its keys: it is that


def test_the_ids_of_glm_4_are_known_without_their_keys():
    found = GLMConfig.from_hf({"model_type": "glm", **NATIVE})
    assert (found.eos_token_id, found.pad_token_id) == (151329, 151329)
    with pytest.raises(CheckpointError, match="eos_token_id = 151329"):
        GLMConfig.from_hf({"model_type": "glm", **NATIVE, "vocab_size": 640}, family="glm4")


def test_sizes_that_a_file_does_not_hold():
    config = GLMConfig.from_hf(BLANK_FILLING)
    assert (config.head_dim, config.num_kv_heads, config.ffn_hidden_size) == (12, 4, 192)
    ids = (config.pad_token_id, config.sop_token_id, config.eos_token_id, config.mask_token_id)
    assert ids == (50000, 50006, 50007, 50003)
    assert (config.smask_token_id, config.gmask_token_id) == (50008, 50009)
    with pytest.raises(CheckpointError, match="hidden_size = 50.*\n.*num_attention_heads = 4"):
        GLMConfig.from_hf({**BLANK_FILLING, "hidden_size": 50})
    with pytest.raises(CheckpointError, match="lacks eop_token_id, pad_token_id, sop_token_id"):
        GLMConfig.from_hf({**BLANK_FILLING, "vocab_size": 112})
    named = {"eop_token_id": 107, "pad_token_id": 100, "sop_token_id": 106, "mask_token_id": 103}
    assert GLMConfig.from_hf({**BLANK_FILLING, "vocab_size": 112, **named}).eos_token_id == 107


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({**BLANK_FILLING, "vocab_size": 50304}, "GPT-2"),
        ({**BLANK_FILLING, "vocab_size": 30592}, "BERT"),
        ({**BLANK_FILLING, "relative_encoding": True}, "relative_encoding"),
        ({"model_type": "glm4v"}, "GLM-4V, which reads images"),
        ({"model_type": "glm4_moe"}, "mixture of experts"),
        ({"model_type": "chatglm", "vision_config": {}}, "GLM-4V is not supported"),
        ({"model_type": "chatglm", "_name_or_path": "THUDM/glm-4v-9b"}, "GLM-4V"),
        ({"model_type": "glm4", **NATIVE, "rope_scaling": {"type": "yarn"}}, "yarn"),
        ({"model_type": "glm4", **NATIVE, "rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"model_type": "glm4", **NATIVE, "tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"model_type": "glm4", **NATIVE, "attention_bias": 1}, "attention_bias = 1"),
        ({"model_type": "glm", **NATIVE, "attention_bias": False}, "attention_bias = False"),
        ({"inner_hidden_size": 72, "bos_token_id": 150528}, "bos_token_id = 150528"),
        ({"inner_hidden_size": "72"}, "inner_hidden_size = '72'"),
    ],
)
def test_other_models_are_refused_by_name(raw, reason):
    with pytest.raises(CheckpointError) as caught:
        GLMConfig.from_hf(raw)
    assert reason in str(caught.value)


def test_other_mathematics_is_refused_by_name():
    for key, value in {
        "rmsnorm": False,
        "add_bias_linear": True,
        "add_qkv_bias": False,
        "apply_residual_connection_post_layernorm": True,
        "original_rope": False,
        "post_layer_norm": False,
        "tie_word_embeddings": True,
        "multi_query_attention": False,
        "fp32_residual_connection": True,
        "interleaved_qkv": True,
        "rotary_percent": 1.0,
    }.items():
        with pytest.raises(CheckpointError, match=key):
            GLMConfig.from_hf({**CHATGLM2, key: value})
    # A missing bias key means no bias.
    raw = {key: value for key, value in CHATGLM2.items() if key != "add_qkv_bias"}
    with pytest.raises(CheckpointError, match="add_qkv_bias.*absent"):
        GLMConfig.from_hf(raw)
    raw = {**CHATGLM2, "use_cache": False, "something_new": 3, "bias_dropout_fusion": False}
    assert GLMConfig.from_hf(raw) == GLMConfig.from_hf(CHATGLM2)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("hidden_size", ("4096", 0, True, float("inf"))),
        ("seq_length", (3.5, 10**15, 10**400)),
        ("layernorm_epsilon", (float("nan"), "small", 10**400, 1e-60)),
        ("rope_ratio", (0, True, -(10**400))),
        ("eos_token_id", (-1, 10**400)),
        ("pad_token_id", (65024,)),
        ("multi_query_group_num", (3,)),
        ("kv_channels", (6,)),
        ("hidden_dropout", (1.0,)),
        ("attention_dropout", (float("nan"),)),
        ("family", ("chatglm9",)),
        ("rope_kind", ("yarn",)),
        ("padded_vocab_size", (None,)),
        ("logn_scaling", ("false",)),
        ("rmsnorm", ("x" * 10**6,)),
        ("model_type", (["chatglm"], "llama")),
    ],
)
def test_impossible_values_are_refused_by_name(key, values):
    for value in values:
        with pytest.raises(CheckpointError, match=key) as caught:
            GLMConfig.from_hf({**CHATGLM2, key: value})
        assert len(str(caught.value)) < 400


def test_family_and_meaning_of_the_ratio():
    """By the name; without one, the keys or the flags decide."""
    for name, family, kind in (
        ("THUDM/chatglm2-6b-32k", "chatglm2", "linear"),
        ("/data/models/ChatGLM3-6B-32K", "chatglm3", "base"),
    ):
        config = GLMConfig.from_hf({**CHATGLM2, "_name_or_path": name, "rope_ratio": 16})
        assert (config.family, config.rope_kind, config.rope_ratio) == (family, kind, 16.0)
    raw = {**CHATGLM2, "_name_or_path": "my-model", "rope_ratio": 16}
    with pytest.raises(CheckpointError, match="--rope-scaling"):
        GLMConfig.from_hf(raw)
    for kind, family in (("linear", "chatglm2"), ("base", "chatglm3")):
        config = GLMConfig.from_hf(raw, rope_kind=kind)
        assert (config.rope_kind, config.family) == (kind, family)
    raw["rope_ratio"] = 1  # for which the family does not matter
    assert GLMConfig.from_hf(raw).family == "chatglm2"
    config = GLMConfig.from_hf({**raw, "rotary_percent": 0.5, "interleaved_qkv": False})
    assert (config.family, config.default_template) == ("codegeex2", "raw")


@pytest.mark.parametrize("name", PRESETS)
def test_another_process_gets_the_same_configuration(name):
    config = PRESETS[name]
    assert GLMConfig.from_fields(json.loads(json.dumps(config.to_fields()))) == config
