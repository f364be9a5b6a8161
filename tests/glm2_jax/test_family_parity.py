"""The other models of the family against stored arrays of their published code."""

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.adapters.prefix import load_prefix
from convert.files.shards import open_weights
from convert.layouts.names import match_tensors, rules_of, tied_head
from convert.loading.params import load_params
from glm2_jax import GLMConfig, KVCache, forward
from glm2_jax.block import BLOCKS
from glm2_jax.model import hidden, unstack_layers
from glm2_jax.prefix import Prefix, with_prefix
from glm2_jax.quant import QTensor
from glm2_jax.schemes import SCHEMES
from tests.support.shared_data import shared_path
from tests.support.toy import jit_forward

TOLERANCE = 1e-4

# Case of chatglm6b_tiny.npz -> whether its positions follow from the ids.
CHATGLM = {
    "gmask": True, "gmask_full": True, "mask": True, "both_model_rule": True,
    "both_tokenizer_rule": False, "padded": True, "train": True, "oned_gmask": True,
    "oned_mask": False,
}  # fmt: skip


@functools.cache
def stored(name: str) -> dict[str, np.ndarray]:
    """The arrays of a reference file."""
    return dict(np.load(shared_path(f"glm-family/{name}.npz")))


def chatglm_config(**changes: Any) -> GLMConfig:
    """The tiny ChatGLM-6B of the reference arrays."""
    sizes: dict[str, Any] = dict(
        num_layers=2, vocab_size=128, hidden_size=64, ffn_hidden_size=72, num_heads=4,
        num_kv_heads=4, head_dim=16, seq_length=2048, family="chatglm", sop_token_id=124,
        mask_token_id=120, gmask_token_id=121, eos_token_id=125, pad_token_id=3,
    )  # fmt: skip
    return GLMConfig(**(sizes | changes))


def glm_config() -> GLMConfig:
    """The tiny GLM base model of the reference arrays."""
    return GLMConfig(
        num_layers=2, vocab_size=112, hidden_size=48, ffn_hidden_size=192, num_heads=4,
        num_kv_heads=4, head_dim=12, seq_length=32, family="glm", sop_token_id=106,
        mask_token_id=103, smask_token_id=108, gmask_token_id=109, eos_token_id=107,
        pad_token_id=100,
    )  # fmt: skip


def glm4_config(family: str) -> GLMConfig:
    """The tiny GLM-4 of the reference arrays."""
    rope: dict[str, Any] = {"rope_ratio": 500.0, "norm_eps": 1.5625e-07}
    return GLMConfig(
        num_layers=2, vocab_size=128, hidden_size=64, ffn_hidden_size=96, num_heads=4,
        num_kv_heads=2, head_dim=16, seq_length=131072, family=family,
        **(rope if family == "glm4" else {}),
    )  # fmt: skip


def params_of(config: GLMConfig, weights, native: bool = False) -> dict:
    """Our parameters from the published names."""
    params: dict = {"layers": {}}
    for rule in rules_of(config, native=native):
        shapes = [part.shape(config) for part in rule.parts]
        order = rule.order(shapes)
        layers = [np.asarray(weights[rule.full_name(i)], np.float32) for i in rule.layers(config)]
        if order is not None:
            layers = [array[order] for array in layers]
        rows = np.stack([array.reshape(-1) for array in layers])
        for part, start, stop in rule.ranges(config):
            array = jnp.asarray(rows[:, start:stop].reshape(-1, *part.shape(config)))
            if part.in_layers:
                params["layers"][part.name] = array
            else:
                params[part.name] = array[0]
    return params


def weights_of(arrays, start: str = "sd/") -> dict[str, np.ndarray]:
    """The state dictionary among stored arrays."""
    return {name[len(start) :]: x for name, x in arrays.items() if name.startswith(start)}


def read(config, params, ids, cache: KVCache | None = None):
    """The logits after every id of one row [T, V], and the cache; padded, so that rows of all
    lengths run one program."""
    real = len(ids)
    tokens = np.zeros((1, 48), np.int32)
    tokens[0, :real] = ids
    segments = jnp.asarray(np.arange(48) < real, jnp.int32)[None]
    logits, cache = jit_forward(
        config, params, jnp.asarray(tokens), segment_ids=segments, cache=cache
    )
    return logits[0, :real], cache


def greedy(config, params, ids, steps: int, ends: tuple[int, ...]) -> list[int]:
    """The greedy tokens after the ids of one row, with a cache; up to the end token."""
    logits, cache = read(config, params, ids, KVCache.zeros(config, 1, 64, jnp.float32))
    answer = [int(jnp.argmax(logits[-1]))]
    while len(answer) < steps and answer[-1] not in ends:
        logits, cache = jit_forward(config, params, jnp.asarray([answer[-1:]]), cache=cache)
        answer.append(int(jnp.argmax(logits[0, -1])))
    return answer


def first_layer(config, params, ids, **how) -> list[np.ndarray]:
    """Keys and values of the first layer, each [B, S, K, H], after reading the ids."""
    empty = KVCache.new(config, len(ids), 32, jnp.float32, params.get("prefix"))
    _, cache = jit_forward(config, params, jnp.asarray(ids), cache=empty, **how)
    assert cache is not None
    return [np.asarray(x)[0].swapaxes(1, 2) for x in (cache.k, cache.v)]


def pairs(x: np.ndarray) -> np.ndarray:
    """Stored keys of ChatGLM-6B [..., 16] with the two of a rotation next to each other."""
    return x.reshape(*x.shape[:-1], 2, 2, 4).swapaxes(-1, -2).reshape(x.shape)


@pytest.mark.parametrize("case", CHATGLM)
def test_chatglm_6b(case):
    arrays = stored("chatglm6b_tiny")
    config = chatglm_config(position_encoding_2d=not case.startswith("oned"))
    params = params_of(config, weights_of(arrays))
    ids, positions = arrays[f"{case}/input_ids"], jnp.asarray(arrays[f"{case}/position_ids"])
    real = np.ones(ids.shape, bool)
    if f"{case}/attention_mask" in arrays:  # of a pad the complete column is hidden
        real = ~arrays[f"{case}/attention_mask"][:, 0].all(axis=1)
    tokens, segments = jnp.asarray(ids), jnp.asarray(real, jnp.int32)
    for where in (None, positions) if CHATGLM[case] else (positions,):
        logits, _ = jit_forward(config, params, tokens, segment_ids=segments, positions=where)
        assert np.abs(logits - arrays[f"{case}/logits"])[real].max() <= TOLERANCE
    if f"{case}/greedy" in arrays and CHATGLM[case]:
        for row, expected in enumerate(arrays[f"{case}/greedy"]):
            answer = greedy(config, params, ids[row][real[row]], len(expected), (125,))
            assert answer == list(expected[: len(answer)])
            assert set(expected[len(answer) :]) <= {3}


def test_chatglm_6b_keys_and_loss():
    arrays = stored("chatglm6b_tiny")
    config = chatglm_config()
    params = params_of(config, weights_of(arrays))
    k, v = first_layer(config, params, arrays["gmask/input_ids"])
    key, value = (arrays[f"gmask/layer0_{name}"].swapaxes(0, 1) for name in ("key", "value"))
    T = key.shape[1]
    assert np.abs(k[:, :T] - pairs(key)).max() <= TOLERANCE
    assert np.abs(v[:, :T] - value).max() <= TOLERANCE
    logits, _ = jit_forward(config, params, jnp.asarray(arrays["train/input_ids"]))
    labels = arrays["train/labels"][:, 1:]
    scores = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
    picked = np.take_along_axis(scores, np.where(labels < 0, 0, labels)[..., None], 2)[..., 0]
    assert -picked[labels >= 0].mean() == pytest.approx(float(arrays["train/loss"]), abs=1e-5)


def test_packed_contexts_do_not_see_each_other():
    arrays = stored("chatglm6b_tiny")
    config = chatglm_config()
    params = params_of(config, weights_of(arrays))
    parts = [arrays["gmask/input_ids"][0], arrays["mask/input_ids"][0]]
    tokens = jnp.asarray(np.concatenate(parts))[None]
    segments = jnp.asarray([number for number, x in enumerate(parts, 1) for _ in x])[None]
    logits, _ = jit_forward(config, params, tokens, segment_ids=segments)
    alone = [arrays[f"{case}/logits"][0] for case in ("gmask", "mask")]
    assert np.abs(logits[0] - np.concatenate(alone)).max() <= TOLERANCE


@pytest.mark.parametrize("case", ["mask", "gmask", "gmask_no_eos", "padded"])
def test_glm_base(case):
    arrays = stored("glm_base_tiny")
    config, ids = glm_config(), arrays[f"{case}/input_ids"]
    params = params_of(config, weights_of(arrays))
    length = ids.shape[1]
    visible = arrays[f"{case}/generation_attention_mask"][:, 0, length - 1, :length] > 0
    expected = arrays[f"{case}/logits"][:, :length]
    positions = jnp.asarray(arrays[f"{case}/position_ids"][:, :, :length])
    for where in (None, positions):
        segments = jnp.asarray(visible, jnp.int32)
        logits, _ = jit_forward(
            config, params, jnp.asarray(ids), segment_ids=segments, positions=where
        )
        assert np.abs(logits - expected)[visible].max() <= TOLERANCE
    for row, answer in enumerate(arrays[f"{case}/greedy"]):
        found = greedy(config, params, ids[row][visible[row]], len(answer), (107,))
        assert found == list(answer[: len(found)])


def test_the_input_of_the_second_layer_of_glm_base():
    """The published code keeps it; here the first layer alone gives it."""
    arrays, config = stored("glm_base_tiny"), glm_config()
    params = params_of(config, weights_of(arrays))
    one = {**params, "layers": unstack_layers(params)["layers"][:1]}
    x = hidden(config, one, jnp.asarray(arrays["mask/input_ids"]))
    assert np.abs(x - arrays["mask/mem_layer1"]).max() <= TOLERANCE


@pytest.mark.parametrize("case", ["mask", "gmask", "gmask_no_eos", "padded"])
def test_glm_base_with_the_other_gelu(case, monkeypatch):
    """By the tanh formula, which some copies of the published code compute."""
    monkeypatch.setitem(BLOCKS, "glm", dataclasses.replace(BLOCKS["glm"], mlp="gelu_tanh"))
    arrays, config = stored("glm_base_tiny"), glm_config()
    params, ids = params_of(config, weights_of(arrays)), arrays[f"{case}/input_ids"]
    length = ids.shape[1]
    visible = arrays[f"{case}/generation_attention_mask"][:, 0, length - 1, :length] > 0
    # Not compiled: a program of an equal configuration has the table as it was.
    segments = jnp.asarray(visible, jnp.int32)
    logits, _ = forward(config, params, jnp.asarray(ids), segment_ids=segments)
    expected, erf = arrays[f"{case}/logits_tanh_gelu"], arrays[f"{case}/logits"][:, length - 1 :]
    assert np.abs(logits[:, -1:] - expected).max() <= TOLERANCE / 10
    assert np.abs(erf[:, :1] - expected).max() > TOLERANCE


def test_several_blanks():
    arrays = stored("glm_base_tiny")
    config, context = glm_config(), arrays["several/context"].reshape(-1)
    params = params_of(config, weights_of(arrays))
    ids, steps = [*context], 0
    for filled in (arrays["several/filled_0"], arrays["several/filled_1"]):
        answer = [int(token) for token in filled.reshape(-1)]
        for known in range(1, len(answer)):
            for cache in (None, KVCache.zeros(config, 1, 64, jnp.float32)):
                logits, _ = read(config, params, ids + answer[:known], cache)
                expected = arrays["several/step_logits"][steps].reshape(-1)
                assert np.abs(logits[-1] - expected).max() <= TOLERANCE
            steps += 1
        ids += answer[:-1]  # the published loop never reads the token that it draws last
    assert steps == len(arrays["several/step_logits"]) > 2


@pytest.mark.parametrize("family", ["glm4", "glm4-0414"])
def test_glm4(family):
    arrays = stored("glm4_9b_tiny" if family == "glm4" else "glm4_0414_tiny")
    config = glm4_config(family)
    params = params_of(config, weights_of(arrays), native=family != "glm4")
    ids, mask = jnp.asarray(arrays["input_ids"]), arrays["attention_mask"]
    for start, tolerance in (("", TOLERANCE), ("gap_", 2e-3), ("far_", 1e-2)):
        positions = jnp.asarray(arrays[f"{start}position_ids"], jnp.int32)
        logits, _ = jit_forward(
            config,
            params,
            ids[: len(positions)],
            positions=positions,
            segment_ids=jnp.asarray(mask[: len(positions)]),
        )
        wrong = np.abs(logits - arrays[f"{start}logits"])[mask[: len(positions)] > 0].max()
        assert wrong <= tolerance, start
    positions = jnp.asarray(arrays["position_ids"], jnp.int32)
    # In the cache only real tokens have slots, from the first one on.
    found = first_layer(config, params, ids, positions=positions, segment_ids=jnp.asarray(mask))
    for ours, name in zip(found, ("key", "value"), strict=True):
        for row, real in enumerate(mask > 0):
            reference = arrays[f"layer0_{name}"][row][:, real].swapaxes(0, 1)
            assert np.abs(ours[row, : real.sum()] - reference).max() <= TOLERANCE
    for row, answer in enumerate(arrays["greedy"]):
        found = greedy(config, params, ids[row][mask[row] > 0], len(answer), (119, 122, 124))
        assert found == list(answer[: len(found)])
        assert set(answer[len(found) :]) <= {119}


def test_the_table_says_what_was_published():
    block = chatglm_config().block
    assert block.residual_scale == pytest.approx(7.483314773547883) == math.sqrt(2 * 28)
    assert (block.mlp_inputs, glm4_config("glm4").block.mlp_inputs) == (1, 2)


@pytest.mark.parametrize("form", ["int8", "int4", "int4_qe"])
@pytest.mark.parametrize("kept", [True, False], ids=["quantized", "dequantized"])
def test_quantized_chatglm_6b(tmp_path, form, kept):
    """The published quantized tensors, by the loader, as they are and dequantized."""
    base, arrays = stored("chatglm6b_tiny"), stored("chatglm6b_tiny_quant")
    quantized = weights_of(arrays, f"{form.removesuffix('_qe')}/sd/")
    quantized |= weights_of(arrays, f"{form}/sd/")
    tensors = weights_of(base) | quantized
    name = {"int8": "int8", "int4": "int4-row", "int4_qe": "int4-row+embeddings"}[form]
    embed = "transformer.word_embeddings.weight"
    if form == "int4_qe":
        tensors |= {f"lm_head.weight{end}": tensors[embed + end] for end in ("", "_scale")}
    save_file(tensors, tmp_path / "model.safetensors")
    read = open_weights(tmp_path).tensors
    config, read = tied_head(chatglm_config(), read)
    assert config.block.tied_head and "lm_head.weight" not in read
    scheme = SCHEMES[name]
    matches = match_tensors(config, read, rules_of(config), scheme)
    folder = SimpleNamespace(config=config, matches=matches, scheme=scheme)
    params = load_params(
        cast(Any, folder), np.dtype(np.float32), scheme if kept else None, False, None,
        lambda done, total: None,
    )  # fmt: skip
    assert isinstance(params["layers"]["q"], QTensor) == kept
    logits, _ = jit_forward(config, params, jnp.asarray(arrays["input_ids"]))
    assert np.abs(logits - arrays[f"{form}/logits"]).max() <= TOLERANCE
    expected = arrays.get(f"{form}/greedy")
    if expected is not None:
        found = greedy(config, params, arrays["input_ids"][0], 8, (125,))
        assert found == list(expected[0][: len(found)])


def test_a_head_that_differs_from_the_embedding_is_a_parameter(tmp_path):
    tensors = weights_of(stored("chatglm6b_tiny"))
    head = tensors["transformer.word_embeddings.weight"] * 2
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    config, read = tied_head(chatglm_config(), open_weights(tmp_path).tensors)
    assert config.tied_head is False and "lm_head.weight" in read
    matches = match_tensors(config, read, rules_of(config))
    assert any(match.name == "lm_head.weight" for match in matches)


@pytest.mark.parametrize("form", ["plain", "projected"])
def test_prefixes_of_chatglm_6b(tmp_path, form):
    arrays, base = stored("chatglm6b_tiny_prefix"), stored("chatglm6b_tiny")
    config = chatglm_config()
    save_file(weights_of(arrays, f"{form}/sd/"), tmp_path / "model.safetensors")
    found = load_prefix(tmp_path, config)
    prefix = Prefix(jnp.asarray(found.k), jnp.asarray(found.v))
    params = with_prefix(params_of(config, weights_of(base)), prefix)
    ids = jnp.asarray(base["gmask/input_ids"])
    cache = KVCache.new(config, 1, 32, jnp.float32, prefix)
    for how in ({}, {"cache": cache}):
        logits, _ = jit_forward(config, params, ids, **how)
        assert np.abs(logits - arrays[f"{form}/logits"]).max() <= TOLERANCE
    k, v = first_layer(config, params, ids)
    key, value = (arrays[f"{form}/layer0_{name}"].swapaxes(0, 1) for name in ("key", "value"))
    T = key.shape[1]
    assert np.abs(k[:, :T] - pairs(key)).max() <= TOLERANCE
    assert np.abs(v[:, :T] - value).max() <= TOLERANCE
    real = ~base["padded/attention_mask"][:, 0].all(axis=1)
    segments = jnp.asarray(real, jnp.int32)
    logits, _ = jit_forward(config, params, base["padded/input_ids"], segment_ids=segments)
    assert np.abs(logits - arrays[f"{form}/padded_logits"])[real].max() <= TOLERANCE


def test_training_rows_and_choices_of_glm_base():
    arrays, config = stored("glm_base_tiny"), glm_config()
    params = params_of(config, weights_of(arrays))
    ids, labels = arrays["train/input_ids"], arrays["train/labels"]
    seen = arrays["train/attention_mask"][:, 0, -1] > 0  # of the last row, which sees all but pads
    segments = jnp.asarray(seen, jnp.int32)
    logits, _ = jit_forward(config, params, jnp.asarray(ids), segment_ids=segments)
    learned = labels >= 0
    assert np.abs(logits - arrays["train/logits"])[learned].max() <= TOLERANCE
    scores = np.asarray(jax.nn.log_softmax(logits))  # the labels are not shifted
    picked = np.take_along_axis(scores, np.where(learned, labels, 0)[..., None], 2)[..., 0]
    assert -picked[learned].mean() == pytest.approx(float(arrays["train/loss"]), abs=1e-5)
    context = [int(x) for x in arrays["choice/input_ids"][0]]
    context = context[: context.index(106)]
    for number, expected in enumerate(arrays["choice/log_prob"][0]):
        choice = [int(x) for x in arrays[f"choice/choice_{number}"]]
        scores = jax.nn.log_softmax(read(config, params, [*context, 106, *choice[:-1]])[0])
        found = sum(float(scores[len(context) + i, token]) for i, token in enumerate(choice))
        assert found == pytest.approx(float(expected), abs=1e-4)
