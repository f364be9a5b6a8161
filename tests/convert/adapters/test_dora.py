"""DoRA: as the real PEFT library computes, saves, and merges it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import load_checkpoint, open_folder
from convert.adapters.adapter import attach, load_adapter, open_adapter, save_adapter
from glm2_jax.dora import norms, with_own_gains
from glm2_jax.errors import CheckpointError, UsageError
from glm2_jax.lora import TARGETS
from glm2_jax.model import unstack_layers
from glm2_jax.schemes import SCHEMES
from tests.convert.adapters.test_adapter import CONFIG, WEIGHTS, refusal, replaced
from tests.support.checkpoints import convert_folder, save, tiny_config
from tests.support.peft_oracle import oracle_of
from tests.support.toy import TOY, jit_forward, quantized, random_tokens, toy_params

BASE = dataclasses.replace(TOY, num_layers=2)
TOKENS = random_tokens(1, 9, BASE)


@pytest.fixture(scope="module")
def of_peft(tmp_path_factory):
    """A folder of PEFT, its rows longer or shorter than those of the base, and its logits."""
    torch, peft, model = oracle_of(BASE, toy_params(BASE))
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, task_type="CAUSAL_LM", init_lora_weights=False, use_dora=True,
        use_rslora=True, target_modules=list(TARGETS), rank_pattern={"dense": 3},
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, x in wrapped.named_parameters():
            if "magnitude" in name:
                x *= 0.5 + torch.rand_like(x)
        logits = wrapped(torch.tensor(np.asarray(TOKENS)).long())
    folder = tmp_path_factory.mktemp("dora")
    wrapped.save_pretrained(str(folder))
    return folder, getattr(logits, "logits", logits).numpy()


def test_logits_and_files_are_those_of_peft(of_peft, tmp_path):
    folder, expected = of_peft
    adapter = load_adapter(folder, BASE)
    assert adapter.dora and adapter.rslora
    params = toy_params(BASE)
    lora = with_own_gains(params, jax.tree.map(jnp.asarray, adapter.lora))
    logits, _ = jit_forward(BASE, params, TOKENS, lora=lora)
    assert np.abs(logits - expected).max() <= 2e-4
    assert np.abs(lora.layers["dense"]["gain_b"] - 1).max() > 0.2
    apart = load_adapter(folder, BASE, apart=True)
    save_adapter(tmp_path / "again", apart)
    one, again = (load_file(x / WEIGHTS) for x in (folder, tmp_path / "again"))
    assert apart.shape is not None and one.keys() == again.keys()
    assert any(name.endswith("query_key_value.lora_magnitude_vector") for name in one)
    assert all(np.array_equal(again[name], x) for name, x in one.items())
    assert apart.shape.num_params(apart.lora) == sum(x.size for x in one.values())
    raw = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert raw["use_dora"] is True and raw["use_rslora"] is True


def test_both_layouts(of_peft, tmp_path):
    """Three matrices of rows have lengths of their own; one of them cannot be all three."""
    adapter = load_adapter(of_peft[0], BASE)
    save_adapter(tmp_path / "glm", adapter, layout="glm")
    again = load_adapter(tmp_path / "glm", BASE)
    jax.tree.map(np.testing.assert_array_equal, again.lora.layers, adapter.lora.layers)
    tensors = load_file(tmp_path / "glm" / WEIGHTS)
    kept = {name: x for name, x in tensors.items() if ".k_proj." not in name}
    raw = json.loads((tmp_path / "glm" / CONFIG).read_text())
    raw["target_modules"].remove("k_proj")
    (tmp_path / "glm" / CONFIG).write_text(json.dumps(raw))
    (tmp_path / "glm" / "glm2_jax_adapter.json").unlink()
    some = load_adapter(replaced(tmp_path / "glm", kept), BASE)
    with pytest.raises(UsageError, match="only a part of its rows"):
        save_adapter(tmp_path / "one", some, layout="chatglm")
    gains = with_own_gains(toy_params(BASE), some.lora).layers["query_key_value"]
    assert (gains["gain_k"] == 1).all() and not (gains["gain_q"] == 1).any()


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_norms_without_the_matrix(of_peft, scheme):
    lora, exact = load_adapter(of_peft[0], BASE).lora, toy_params(BASE)
    params = exact
    if scheme is not None:
        params, exact = quantized(toy_params(BASE), SCHEMES[scheme])
    found = jax.jit(norms)(unstack_layers(params), lora)
    weights = lora.layers["query_key_value"]
    update = np.einsum("lkhr,lrd->lkhd", weights["k"], weights["a"])
    complete = np.asarray(exact["layers"]["k"]) + lora.scale["query_key_value"] * update
    found = found["query_key_value"]["k"]
    np.testing.assert_allclose(found, np.linalg.norm(complete, axis=-1), rtol=1e-4)


def test_it_is_merged_and_not_chosen_by_request(tmp_path, of_peft):
    config = dataclasses.replace(BASE, vocab_size=tiny_config().vocab_size)
    save(tmp_path / "base", config=config)
    folder = open_folder(tmp_path / "base")
    adapter = open_adapter(of_peft[0], folder)
    convert_folder(folder, tmp_path / "merged", adapter=adapter)
    base, merged = (load_checkpoint(tmp_path / x, dtype="float32") for x in ("base", "merged"))
    one, _ = jit_forward(config, attach(base, adapter).params, TOKENS)
    other, _ = jit_forward(config, merged.params, TOKENS)
    assert np.abs(one - other).max() <= 2e-4
    with pytest.raises(CheckpointError, match="cannot be chosen by request"):
        attach(base, adapter, joined=True)


def test_a_folder_without_its_lengths(of_peft, tmp_path):
    folder, _ = of_peft
    save_adapter(tmp_path, load_adapter(folder, BASE, apart=True))
    (tmp_path / "glm2_jax_adapter.json").unlink()
    tensors = load_file(tmp_path / WEIGHTS)
    plain = {name: x for name, x in tensors.items() if "magnitude" not in name}
    said = refusal(replaced(tmp_path, plain), BASE)
    assert "missing: lora_magnitude_vector of transformer.encoder.layers.0" in said
    short = {name: x[:-1] if "magnitude" in name else x for name, x in tensors.items()}
    assert "wrong shape" in refusal(replaced(tmp_path, short), BASE)
