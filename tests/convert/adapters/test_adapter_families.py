"""Adapters of ChatGLM-6B, whose B has its rows by head, and of GLM; and the peft library."""

import numpy as np
import pytest

from convert.adapters.adapter import load_adapter
from convert.adapters.layouts import layouts_of
from convert.layouts.names import rules_of
from tests.convert.adapters.test_adapter_layouts import assert_equal_files, deltas, run
from tests.glm2_jax.test_family_parity import pairs, params_of
from tests.support.checkpoints import write_official
from tests.support.engine_toy import FILES, family_config
from tests.support.toy import jit_forward, random_tokens

FAMILIES = ["chatglm", "glm"]
MODULES = ["query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"]


def published(config):
    """Random weights under the published names."""
    random, tensors = np.random.default_rng(2), {}
    for rule in rules_of(config):
        for layer in rule.layers(config):
            shape = rule.shape(config)
            size = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
            array = random.normal("norm" in rule.name and "weight" in rule.name, size, shape)
            tensors[rule.full_name(layer)] = array.astype(np.float32)
    return tensors


def initialized(config, weights, **settings):
    """(peft, the matrices of the layers with an adapter around them, random numbers in it)."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    peft = pytest.importorskip("peft", reason="the PEFT library is not installed")
    model = torch.nn.Module()
    model.prepare_inputs_for_generation = None  # peft asks that a causal model has it
    for name in layouts_of(config)[0].places(config.num_layers):
        *path, last = name.split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        rows, columns = weights[f"{name}.weight"].shape
        parent.add_module(last, torch.nn.Linear(columns, rows))
    torch.manual_seed(3)
    return peft, peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **settings))


def added_by(wrapped):
    """What an adapter of peft adds to each matrix: name -> [rows, columns], as stored."""
    return {
        name.removeprefix("base_model.model."): x.get_delta_weight("default").detach().numpy()
        for name, x in wrapped.named_modules()
        if hasattr(x, "get_delta_weight")
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": MODULES, "r": 3, "lora_alpha": 6},
        {
            "target_modules": ["query_key_value"], "r": 2, "lora_alpha": 3, "use_rslora": True,
            "rank_pattern": {"layers.1.attention.query_key_value": 4},
        },
    ],
    ids=["all", "patterns"],
)  # fmt: skip
def test_an_adapter_of_peft_adds_the_same_and_comes_back(tmp_path, family, settings):
    """The logits are those of the published weights plus B A, in the published order."""
    config = family_config(family)
    weights = published(config)
    peft, wrapped = initialized(config, weights, **settings)
    added = added_by(wrapped)
    wrapped.save_pretrained(str(tmp_path / "peft"))
    lora = load_adapter(tmp_path / "peft", config).lora
    tokens = random_tokens(2, 12, config).at[:, 9].set(config.sop_token_id)
    merged = {f"{name}.weight": weights[f"{name}.weight"] + x for name, x in added.items()}
    expected, _ = jit_forward(config, params_of(config, weights | merged), tokens)
    base = params_of(config, weights)
    logits, _ = jit_forward(config, base, tokens, lora=lora)
    size = np.abs(expected).max()
    assert np.abs(logits - expected).max() <= 1e-4 * size
    assert np.abs(logits - jit_forward(config, base, tokens)[0]).max() > 0.05 * size

    folder = write_official(
        tmp_path / "base", config, tensors=weights, kind="safetensors", shards=1,
        tokenizer=FILES[family](),
    )  # fmt: skip
    asked = (tmp_path / "peft", tmp_path / "back", "--layout", "chatglm", "--base", folder)
    assert run(*asked) == 0
    again = peft.PeftModel.from_pretrained(wrapped.unload(), str(tmp_path / "back"))
    for name, delta in added_by(again).items():
        np.testing.assert_allclose(delta, added.pop(name), rtol=1e-5, atol=1e-6)
    assert not added
    if "rank_pattern" not in settings:
        assert_equal_files(tmp_path / "peft", tmp_path / "back")
    assert run(*asked[:1], tmp_path / "glm", "--layout", "glm", "--base", folder) == 2


def test_the_rows_of_a_head_follow_each_other(tmp_path):
    """By hand: q, k and v of head 0, then of head 1; of q and k the halves are rotated together."""
    config = family_config("chatglm", head_dim=16)
    _, wrapped = initialized(config, published(config), target_modules=MODULES, r=3)
    added = added_by(wrapped)
    wrapped.save_pretrained(str(tmp_path))
    found = deltas(load_adapter(tmp_path, config).lora)
    for layer in range(config.num_layers):
        fused = added[f"transformer.layers.{layer}.attention.query_key_value"]
        heads = fused.reshape(config.num_heads, 3, 16, config.hidden_size).swapaxes(2, 3)
        for part, order in zip("qkv", (pairs, pairs, np.asarray), strict=True):
            rows = order(heads[:, "qkv".index(part)]).swapaxes(1, 2)
            ours = found["query_key_value", part][layer].reshape(rows.shape)
            np.testing.assert_allclose(ours, rows, rtol=1e-5, atol=1e-6)
