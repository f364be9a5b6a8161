"""GLMConfig: what published files mean, and what is refused by name."""

import dataclasses
import json

import pytest

from glm2_jax import PRESETS, CheckpointError, GLMConfig
from tests.support.shared_data import shared_file

CHATGLM2 = {
    "_name_or_path": "THUDM/chatglm2-6b",
    "model_type": "chatglm",
    "add_qkv_bias": True,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "seq_length": 32768,
    "padded_vocab_size": 65024,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_files(name):
    assert PRESETS[name].num_params == 6_243_584_000
    raw = json.loads(shared_file(f"configs/{name}.json", missing_ok=True) or "null")
    if raw is None:
        assert name == "chatglm3-6b-32k", "only this one has no published file here"
        return
    assert GLMConfig.from_hf(raw) == PRESETS[name]


def test_glm4_is_refused_by_name():
    raw = json.loads(shared_file("configs/glm-4-9b-chat.json"))
    with pytest.raises(CheckpointError, match="GLM-4") as error:
        GLMConfig.from_hf(raw)
    assert "tokenizer" in str(error.value)


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


def test_harmless_keys_are_ignored():
    raw = {**CHATGLM2, "use_cache": False, "something_new": 3, "bias_dropout_fusion": False}
    assert GLMConfig.from_hf(raw) == GLMConfig.from_hf(CHATGLM2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("hidden_size", value) for value in ("4096", 0, True, float("inf"))),
        *(("seq_length", value) for value in (-1, 3.5, 10**15, 10**400)),
        *(("layernorm_epsilon", value) for value in (float("nan"), "small", 10**400, 1e-60)),
        *(("rope_ratio", value) for value in (0, True, -(10**400))),
        *(("eos_token_id", value) for value in (-1, 10**400)),
        ("multi_query_group_num", 3),
        ("kv_channels", 6),
        ("hidden_dropout", 1.0),
        ("attention_dropout", float("nan")),
        ("family", "chatglm9"),
        ("rope_kind", "yarn"),
        ("padded_vocab_size", None),
        ("pad_token_id", 65024),
        ("logn_scaling", "false"),
        ("rmsnorm", "x" * 10**6),
        ("model_type", ["chatglm"]),
        ("model_type", "llama"),
    ],
)
def test_impossible_values_are_refused_by_name(key, value):
    with pytest.raises(CheckpointError, match=key) as caught:
        GLMConfig.from_hf({**CHATGLM2, key: value})
    assert len(str(caught.value)) < 400


def test_the_first_generation_is_refused():
    for raw in ({"position_encoding_2d": True}, {"inner_hidden_size": 16384}):
        with pytest.raises(CheckpointError, match="first-generation"):
            GLMConfig.from_hf({"model_type": "chatglm", **raw})


@pytest.mark.parametrize(
    ("own_name", "tokenizer_name", "family", "kind"),
    [
        ("THUDM/chatglm2-6b-32k", None, "chatglm2", "linear"),
        ("THUDM/chatglm3-6b-32k", None, "chatglm3", "base"),
        ("/data/models/ChatGLM2-6B-32K", None, "chatglm2", "linear"),
        (None, "THUDM/chatglm3-6b-128k", "chatglm3", "base"),
        # The int4 folder's tokenizer_config names the first generation: config.json decides.
        ("THUDM/chatglm2-6b", "THUDM/chatglm-6b", "chatglm2", "linear"),
    ],
)
def test_family_and_meaning_of_the_ratio(own_name, tokenizer_name, family, kind):
    raw = {**CHATGLM2, "_name_or_path": own_name, "rope_ratio": 16}
    config = GLMConfig.from_hf(raw, tokenizer_config={"name_or_path": tokenizer_name})
    assert (config.family, config.rope_kind, config.rope_ratio) == (family, kind, 16.0)


def test_a_ratio_without_a_family_is_refused_and_the_flag_named():
    raw = {**CHATGLM2, "_name_or_path": "my-model", "rope_ratio": 16}
    with pytest.raises(CheckpointError, match="--rope-scaling"):
        GLMConfig.from_hf(raw)
    assert GLMConfig.from_hf(raw, rope_kind="linear").rope_kind == "linear"
    chatglm3 = GLMConfig.from_hf(raw, rope_kind="base")
    assert (chatglm3.rope_kind, chatglm3.family) == ("base", "chatglm3")

    raw["rope_ratio"] = 1  # for which the family does not matter
    assert GLMConfig.from_hf(raw).family == "chatglm2"


def test_codegeex_is_told_by_its_keys():
    raw = {**CHATGLM2, "_name_or_path": "", "rotary_percent": 0.5, "interleaved_qkv": False}
    config = GLMConfig.from_hf(raw)
    assert (config.family, config.default_template) == ("codegeex2", "raw")


def test_own_keys_round_trip():
    for preset in PRESETS.values():
        config = dataclasses.replace(
            preset, rope_table_dtype="reference", logn_scaling=True, hidden_dropout=0.1
        )
        assert GLMConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_aligned_lengths():
    longer = {"chatglm2-6b-32k": 32768, "chatglm3-6b-32k": 32768, "chatglm3-6b-128k": 131072}
    for name, config in PRESETS.items():
        assert config.aligned_length == longer.get(name, 8192), name
