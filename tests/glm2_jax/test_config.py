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
    preset = PRESETS[name]
    assert preset.num_params == 6_243_584_000
    longer = {"chatglm2-6b-32k": 32768, "chatglm3-6b-32k": 32768, "chatglm3-6b-128k": 131072}
    assert preset.aligned_length == longer.get(name, 8192)
    own = dataclasses.replace(
        preset, rope_table_dtype="reference", logn_scaling=True, hidden_dropout=0.1
    )
    assert GLMConfig.from_hf(json.loads(json.dumps(own.to_hf()))) == own
    raw = json.loads(shared_file(f"configs/{name}.json", missing_ok=True) or "null")
    if raw is None:
        assert name == "chatglm3-6b-32k", "only this one has no published file here"
    else:
        assert GLMConfig.from_hf(raw) == preset


def test_other_models_are_refused_by_name():
    for raw in ({"position_encoding_2d": True}, {"inner_hidden_size": 16384}):
        with pytest.raises(CheckpointError, match="first-generation"):
            GLMConfig.from_hf({"model_type": "chatglm", **raw})
    raw = json.loads(shared_file("configs/glm-4-9b-chat.json"))
    with pytest.raises(CheckpointError, match="GLM-4(.|\n)*tokenizer"):
        GLMConfig.from_hf(raw)


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
