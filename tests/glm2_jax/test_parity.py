"""The model against PyTorch: stored arrays of the published code, and GlmForCausalLM."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.layouts.names import PUBLISHED, rules_of
from glm2_jax import GLMConfig, KVCache
from tests.support.shared_data import shared_path
from tests.support.toy import TOY, jit_forward, random_tokens, toy_params

TOLERANCE = 2e-4


def published_params(config: GLMConfig, weights) -> dict:
    """Our layout from the published names."""
    params: dict = {"layers": {}}
    for rule in PUBLISHED:
        rows = np.stack([weights[rule.full_name(i)].reshape(-1) for i in rule.layers(config)])
        for part, start, stop in rule.ranges(config):
            array = rows[:, start:stop].reshape(-1, *part.shape(config))
            if part.in_layers:
                params["layers"][part.path[-1]] = array
            else:
                params[part.path[-1]] = array[0]
    return params


def greedy(config, params, logits, cache, steps: int) -> np.ndarray:
    """The next greedy tokens [B, steps] after logits [B, T, V] and their cache."""
    answers = []
    for _ in range(steps):
        token = jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32)
        answers.append(np.asarray(token))
        logits, cache = jit_forward(config, params, token, cache=cache)
    return np.concatenate(answers, axis=1)


def test_published_code():
    raw = json.loads(shared_path("reference/hf_tiny_chatglm2_config.json").read_bytes())
    arrays = dict(np.load(shared_path("reference/hf_tiny_chatglm2.npz")))
    config = GLMConfig.from_hf(raw)
    weights = {name[3:]: value for name, value in arrays.items() if name.startswith("sd/")}
    params = jax.tree.map(jnp.asarray, published_params(config, weights))
    tokens, mask, positions = (
        jnp.asarray(arrays[name], jnp.int32)
        for name in ("input_ids", "attention_mask", "position_ids")
    )
    real = arrays["attention_mask"] > 0
    logits, _ = jit_forward(config, params, tokens, positions=positions, segment_ids=mask)
    assert np.abs(logits - arrays["logits"])[real].max() <= TOLERANCE
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    labels = arrays["labels"][:, 1:]
    learned = labels != -100
    picked = np.take_along_axis(np.asarray(log_probs), np.where(learned, labels, 0)[..., None], 2)
    assert -picked[..., 0][learned].mean() == pytest.approx(float(arrays["loss"]), abs=1e-5)

    cache = KVCache.zeros(config, 2, 32, jnp.float32)
    logits, cache = jit_forward(config, params, tokens, segment_ids=mask, cache=cache)
    for row in range(2):
        length = int(mask[row].sum())
        for ours, stored in ((cache.k, arrays["k0"]), (cache.v, arrays["v0"])):
            reference = stored[-length:, row]  # left-padded
            assert np.abs(ours[0, row, :, :length].swapaxes(0, 1) - reference).max() <= TOLERANCE
    expected = arrays["greedy"][:, tokens.shape[1] :]
    answers = greedy(config, params, logits, cache, expected.shape[1])
    np.testing.assert_array_equal(answers, expected)


# Sizes and rope of ours, and the rope of theirs.
CASES = {
    "grouped, as chatglm3-32k": (
        {"rope_ratio": 50.0, "rope_kind": "base"},
        {"rope_type": "default", "rope_theta": 500000.0},
    ),
    "one group, odd ffn, as chatglm2-32k": (
        {"num_kv_heads": 1, "ffn_hidden_size": 53, "num_layers": 2, "hidden_size": 40}
        | {"head_dim": 8, "rope_ratio": 16.0, "rope_kind": "linear"},
        {"rope_type": "linear", "factor": 16.0, "rope_theta": 10000.0},
    ),
    "full heads, real head size, plain": (
        {"num_kv_heads": 4, "head_dim": 128, "hidden_size": 96, "vocab_size": 301, "num_layers": 2},
        {"rope_type": "default", "rope_theta": 10000.0},
    ),
}


def torch_model(config: GLMConfig, params, rope: dict):
    """GlmForCausalLM, which is the same network under other names, with our weights."""
    torch = pytest.importorskip("torch", reason="the PyTorch reference is not installed")
    from transformers import GlmConfig, GlmForCausalLM

    reference = GlmForCausalLM(
        GlmConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            attention_bias=True,
            max_position_embeddings=config.seq_length,
            rope_parameters={"partial_rotary_factor": 0.5, **rope},
            pad_token_id=0,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
    ).eval()
    tensors = {}
    for rule in rules_of(config, native=True):
        name = rule.parts[0].path[-1]
        for layer in rule.layers(config):
            array = params[name] if layer is None else params["layers"][name][layer]
            array = np.asarray(array).reshape(rule.shape(config))
            tensors[rule.full_name(layer)] = torch.tensor(array)
    reference.load_state_dict(tensors, strict=True)
    return torch, reference


@pytest.mark.parametrize("case", CASES)
def test_glm_for_causal_lm(case):
    changes, rope = CASES[case]
    config = dataclasses.replace(TOY, **changes)
    params = toy_params(config)
    torch, reference = torch_model(config, params, rope)
    tokens = random_tokens(2, 40, config)
    with torch.no_grad():
        expected = reference(torch.tensor(np.asarray(tokens))).logits.numpy()
    logits, _ = jit_forward(config, params, tokens)
    assert np.abs(expected).max() > 0.5, "logits of unit scale, or the bound means nothing"
    assert np.abs(logits - expected).max() <= TOLERANCE
    with torch.no_grad():
        answers = reference.generate(
            torch.tensor(np.asarray(tokens[:, :8])),
            attention_mask=torch.ones(2, 8, dtype=torch.long),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        ).numpy()
    cache = KVCache.zeros(config, 2, 24, jnp.float32)
    logits, cache = jit_forward(config, params, tokens[:, :8], cache=cache)
    np.testing.assert_array_equal(greedy(config, params, logits, cache, 12), answers[:, 8:])
