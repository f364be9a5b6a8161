"""Adapters against the real PEFT library, in both directions, around a model with the published
names."""

import dataclasses

import jax
import numpy as np
import pytest

from convert.adapters.adapter import Adapter, load_adapter, save_adapter
from glm2_jax import init_lora
from glm2_jax.lora import GROUPS, LoRA
from tests.support.peft_oracle import oracle_of
from tests.support.toy import TOY as THREE_LAYERS
from tests.support.toy import jit_forward, random_tokens, toy_params

TOY = dataclasses.replace(THREE_LAYERS, num_layers=2)
TOKENS = random_tokens(2, 10)


def trained(targets, seed: int = 0, **kwargs) -> LoRA:
    """A new adapter of ours with a random B."""
    lora = init_lora(TOY, jax.random.key(seed), targets=targets, **{"rank": 4, "alpha": 8} | kwargs)
    leaves, tree = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    random = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, random)


def ours(lora: LoRA | None):
    return np.asarray(jit_forward(TOY, toy_params(TOY), TOKENS, lora=lora)[0])


def theirs(torch, model):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(TOKENS), dtype=torch.long)).numpy()


@pytest.mark.parametrize(
    ("targets", "rslora"), list(zip(GROUPS, (False, True, False), strict=True))
)
def test_peft_loads_ours(tmp_path, targets, rslora):
    torch, peft, model = oracle_of(TOY, toy_params(TOY))
    np.testing.assert_allclose(theirs(torch, model), ours(None), atol=2e-5)
    lora = trained(targets, rslora=rslora)
    save_adapter(tmp_path, Adapter(lora, rslora=rslora, base="abc", template="chatglm2"))
    wrapped = peft.PeftModel.from_pretrained(model, str(tmp_path)).eval()
    found = theirs(torch, wrapped)
    np.testing.assert_allclose(found, ours(lora), atol=2e-5)
    assert np.abs(found - ours(None)).max() > 0.05
    config = wrapped.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 8, rslora)
    assert sum(x.numel() for n, x in wrapped.named_parameters() if "lora_" in n) == lora.num_params


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
        {"target_modules": ["query_key_value"], "use_rslora": True, "r": 3, "lora_alpha": 5},
        {
            "target_modules": ["query_key_value", "dense"],
            "r": 4,
            "rank_pattern": {"layers.1.self_attention.query_key_value": 2, "dense": 6},
            "alpha_pattern": {"^transformer.encoder.layers.0.self_attention.dense": 20},
        },
        {"target_modules": ["query_key_value"], "layers_to_transform": [1]},
    ],
    ids=["all", "rslora", "patterns", "one layer"],
)
def test_we_load_what_peft_saves(tmp_path, settings):
    torch, peft, model = oracle_of(TOY, toy_params(TOY))
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    expected = theirs(torch, wrapped)
    assert np.abs(expected - ours(None)).max() > 0.02
    for form in ("safetensors", "bin"):
        wrapped.save_pretrained(str(tmp_path / form), safe_serialization=form == "safetensors")
        assert (tmp_path / form / f"adapter_model.{form}").exists()
        adapter = load_adapter(tmp_path / form, TOY)
        assert adapter.notes and adapter.base is None and adapter.template is None
        np.testing.assert_allclose(ours(adapter.lora), expected, atol=2e-5)
    save_adapter(tmp_path / "again", adapter)
    again = load_adapter(tmp_path / "again", TOY)
    np.testing.assert_allclose(ours(again.lora), expected, atol=2e-5)
