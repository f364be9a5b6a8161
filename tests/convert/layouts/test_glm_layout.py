"""Configurations of HF-native folders: what is read, and what is refused."""

import json

import numpy as np
import pytest

from convert import export_folder, open_folder
from glm2_jax import CheckpointError, GLMConfig
from tests.support.checkpoints import random_params, save, tiny_config, write_official

NATIVE = {
    "model_type": "glm", "vocab_size": 640, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "attention_bias": True,
    "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
}  # fmt: skip


def native_folder(folder, **changes):
    """An HF-native folder with other keys in its configuration; None removes one."""
    config = {key: value for key, value in (NATIVE | changes).items() if value is not None}
    write_official(folder, tensors={"x": np.ones(1, np.float16)})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": None, "vocab_size": None}, "lacks vocab_size, head_dim"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"partial_rotary_factor": 1.0}, "partial_rotary_factor = 1.0"),
        ({"rope_theta": 10**400}, "rope_theta = 1000"),
        ({"rope_parameters": 5}, "rope_parameters = 5"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5}, "linear"),
        ({"rope_scaling": {"type": "linear"}}, "rope_ratio = None"),
        ({"vocab_size": 151552}, "belong to different models"),
        ({}, "missing: model.embed_tokens.weight"),
    ],
)
def test_an_hf_native_configuration_that_is_not_ours(tmp_path, changes, reason):
    with pytest.raises(CheckpointError) as caught:
        open_folder(native_folder(tmp_path, **changes))
    assert reason in str(caught.value)


JUNK = (None, True, -1, 0, 10**400, 1e308, float("nan"), "", "x" * 999, [], [1], {}, {"a": 1})


def test_junk_in_an_hf_native_configuration():
    """Whatever a key holds: a configuration, or an error that says why there is none."""
    further = "rope_parameters rope_scaling eos_token_id pad_token_id family hidden_act"
    nested = [{"rope_type": x, "factor": x, "rope_theta": x} for x in JUNK]
    for key in (*NATIVE, *further.split(), "tie_word_embeddings", "_name_or_path"):
        for value in (*JUNK, *nested):
            try:
                assert GLMConfig.from_hf(NATIVE | {key: value})
            except CheckpointError as error:
                assert len(str(error)) < 1000


def test_the_rotary_kinds_of_hf_native_folders(tmp_path):
    """In rope_parameters, and in the keys that older readers know."""
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    older = ("rope_theta", "partial_rotary_factor", "rope_scaling")
    for number, rope in enumerate(
        ({}, {"rope_ratio": 50.0}, {"rope_ratio": 16.0, "rope_kind": "linear"})
    ):
        config = tiny_config(**rope)
        save(tmp_path / f"own{number}", random_params(config), config)
        native = tmp_path / f"glm{number}"
        export_folder(open_folder(tmp_path / f"own{number}"), native, layout="glm")
        raw = json.loads((native / "config.json").read_text())
        for removed in (older, ("rope_parameters",)):
            some = {key: value for key, value in raw.items() if key not in removed}
            (native / "config.json").write_text(json.dumps(some))
            found = open_folder(native).config
            assert found.rope_ratio == config.rope_ratio
            assert found.rope_ratio == 1 or found.rope_kind == config.rope_kind
