"""The programs of the real 6B shapes, compiled from abstract values for devices that are not here.

No weights and no device are needed: only the compiler's figures of memory are read. The
CPU is always there; an H200 needs JAX's CUDA plugin, a TPU the libtpu package.
"""

import dataclasses
import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from glm2_jax import PRESETS, KVCache, last_logits
from glm2_jax.attention import ATTENTION, Visibility
from glm2_jax.products import in_usual_form
from glm2_jax.quant import QTensor
from glm2_jax.runtime.xla import cache_dtype
from infer.engine import steps
from infer.memory.precision import Precision
from infer.memory.shares import abstract_params, total_bytes
from tests.support.mesh_shapes import compiled, int32

CONFIG = PRESETS["chatglm2-6b-32k"]
MB, GB = 10**6, 10**9


def params_of(quantization: str | None = None) -> Any:
    return abstract_params(CONFIG, Precision("bfloat16", quantization))


def abstract_cache(platform: str, slots: int, rows: int = 1) -> Any:
    dtype = cache_dtype(platform, jnp.bfloat16)
    return jax.eval_shape(lambda: KVCache.zeros(CONFIG, rows, slots, dtype))


def greedy_step(params, token, cache):
    logits, cache = last_logits(CONFIG, params, token, jnp.zeros(1, jnp.int32), cache=cache)
    return jnp.argmax(logits, -1).astype(jnp.int32)[:, None], cache


def largest_results(text: str) -> list[int]:
    """Elements of what each instruction writes to memory, but for those that only name a buffer,
    and updates of a buffer in place."""
    elements = []
    fused = False
    for line in text.splitlines():
        if re.match(r"(%|ENTRY)", line):
            fused = line.startswith(("%fused", "%wrapped", "%gemm_fusion"))
        found = re.match(r"\s+(?:ROOT )?%\S+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if fused or not found or found[2] in ("parameter", "get-tuple-element", "bitcast"):
            continue
        if not re.search("dynamic.update.slice|scatter_fusion", line):
            elements.append(math.prod(map(int, found[1].split(","))))
    return sorted(elements)


@pytest.mark.parametrize(
    ("platform", "quantization"),
    [
        *[("cuda", name) for name in (None, "int8", "int4", "int4-row")],
        *[("tpu", name) for name in (None, "int8")],  # 4 bits: see below
    ],
)
def test_a_step_copies_and_converts_no_weight(platform, quantization):
    args = params_of(quantization), int32(1, 1), abstract_cache(platform, 2048)
    program = compiled(platform, greedy_step, *args, donate=2)
    memory = program.memory_analysis()
    weights = {None: 12.49, "int8": 6.79, "int4": 4.11, "int4-row": 3.95}[quantization]
    assert memory.argument_size_in_bytes / GB == pytest.approx(weights + 0.059, abs=0.03)
    # The weights of one layer's q alone are 33 MB as bfloat16 and 8 MB as int4; k and v are small.
    print(f"{platform} {quantization}: {memory.temp_size_in_bytes / MB:.1f} MB of temporaries")
    assert memory.temp_size_in_bytes < 5 * MB
    assert memory.alias_size_in_bytes >= 2 * 28 * 2048 * 2 * 128 * 2
    if platform == "cuda":
        smallest_weight = 2 * 128 * 4096  # of k
        assert largest_results(program.as_text())[-1] < smallest_weight


@pytest.mark.parametrize("view", [None, 2048])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_step_of_many_rows_copies_no_layer_of_the_cache(platform, view):
    """In the form of layers that is faster there: stacked ones on a GPU copy each layer's weights,
    and of a list on a TPU each layer's keys and values are copied."""
    rows, slots = 64, 4096
    config = dataclasses.replace(CONFIG, num_layers=4)
    params = abstract_params(config, Precision("bfloat16", None), stacked=platform == "tpu")
    cache = jax.eval_shape(lambda: KVCache.zeros(config, rows, slots, jnp.bfloat16))

    def step(params, tokens, cache):
        index = jnp.zeros(rows, jnp.int32)
        return last_logits(config, params, tokens, index, cache=cache, view=view)

    program = compiled(platform, step, params, int32(rows, 1), cache, donate=2)
    memory = program.memory_analysis()
    print(f"{platform} {view}: {memory.temp_size_in_bytes / MB:.1f} MB of temporaries")
    assert memory.temp_size_in_bytes < 100 * MB
    assert memory.alias_size_in_bytes >= 2 * math.prod(cache.k.shape) * 2
    layer = math.prod(cache.k.shape[1:]) * (1 if view is None else view / slots)
    assert largest_results(program.as_text())[-1] < layer


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_step_makes_no_float_copy_of_an_int8_cache(platform):
    rows, slots = 64, 4096
    config = dataclasses.replace(CONFIG, num_layers=4)
    params = abstract_params(config, Precision("bfloat16", None), stacked=platform == "tpu")
    cache = jax.eval_shape(lambda: KVCache.zeros(config, rows, slots, jnp.int8))

    def step(params, tokens, cache):
        return last_logits(config, params, tokens, jnp.zeros(rows, jnp.int32), cache=cache)

    program = compiled(platform, step, params, int32(rows, 1), cache, donate=2)
    memory = program.memory_analysis()
    print(f"{platform}: {memory.temp_size_in_bytes / MB:.1f} MB of temporaries")
    layer = math.prod(cache.k.shape[1:])
    assert memory.temp_size_in_bytes < layer  # 67 MB; in bfloat16 it is twice that
    assert memory.alias_size_in_bytes >= total_bytes((cache.k, cache.v))
    if platform == "cuda":
        assert largest_results(program.as_text())[-1] < layer


@pytest.mark.parametrize("quantization", ["int4", "int4-row"])
def test_int4_on_a_tpu_is_never_a_whole_weight_unpacked(quantization):
    args = params_of(quantization), int32(1, 1), abstract_cache("tpu", 2048)
    memory = compiled("tpu", greedy_step, *args, donate=2).memory_analysis()
    print(f"tpu {quantization}: {memory.temp_size_in_bytes / MB:.1f} MB of temporaries")
    gate_up = 2 * 13696 * 4096 * 2
    assert memory.temp_size_in_bytes < gate_up / 5


def test_the_text_of_a_program_shows_copies():
    def copies(w, x):
        return (w.T.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16)).sum(), w[::-1] * 2

    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 32), (64,)))
    text = jax.jit(copies).lower(w, x).compile().as_text()
    assert largest_results(text or "")[-1] >= 64 * 32


@pytest.mark.parametrize(("platform", "tokens"), [("cpu", 2048), ("cuda", 2048), ("tpu", 512)])
def test_memory_of_a_32k_prompt(platform, tokens):
    row = int32(1)
    cache = abstract_cache(platform, 32768)
    args = params_of(), steps.Part(int32(1, tokens), row, row), cache
    memory = compiled(platform, partial(steps.read, CONFIG), *args, donate=2).memory_analysis()
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= whole - 8  # the lengths are new
    print(f"{platform}: cache {whole / GB:.2f} GB, {memory.temp_size_in_bytes / MB:.0f} MB more")
    assert whole + memory.temp_size_in_bytes < (0.94 + 2) * GB


def test_prompts_of_several_rows_copy_no_cache_on_a_tpu():
    cache = abstract_cache("tpu", 2048, rows=8)
    args = params_of(), steps.Part(int32(8, 256), int32(8), int32(8)), cache
    memory = compiled("tpu", partial(steps.read, CONFIG), *args, donate=2).memory_analysis()
    keys = cache.k.size * cache.k.dtype.itemsize
    print(f"tpu: 8 x 256 tokens, {memory.temp_size_in_bytes / MB:.0f} MB of temporaries")
    # Keys and values by head first, to which the compiler likes to transpose them, are 470 MB.
    assert memory.temp_size_in_bytes < 1.2 * keys < 300 * MB


def test_a_step_in_a_32k_cache_copies_no_more_of_it_than_a_layer():
    args = params_of(), int32(1, 1), abstract_cache("cuda", 32768)
    memory = compiled("cuda", greedy_step, *args, donate=2).memory_analysis()
    layer = 32768 * 2 * 128 * 2
    assert memory.temp_size_in_bytes < 3 * layer < 0.06 * memory.alias_size_in_bytes


@pytest.mark.parametrize(
    ("platform", "name", "whole"),
    [
        ("cuda", "triton", True),
        ("tpu", "splash", True),
        ("cuda", "cudnn", True),
        ("cuda", "cudnn", False),
    ],
)
def test_fused_attention_writes_no_scores(platform, name, whole):
    """A text of 2048 tokens with its gradients, or 1024 tokens after a cache of 16384 slots."""
    T, S = (2048, 2048) if whole else (1024, 16384)
    q = jax.ShapeDtypeStruct((1, T, 32, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 2, S, 128), jnp.bfloat16)
    visible = Visibility(int32(1, T), int32(1, T), int32(1, S), whole=whole)

    def form(q, k, v, visible):
        return ATTENTION[name](q, k, v, visible).astype(jnp.float32).sum()

    function = jax.grad(form, (0, 1, 2)) if whole else form
    program = compiled(platform, function, q, k, k, visible, donate=())
    memory = program.memory_analysis()
    print(f"{platform} {name} {T} x {S}: {memory.temp_size_in_bytes / MB:.0f} MB of temporaries")
    assert memory.temp_size_in_bytes < 32 * T * S * 4 / 4
    masks = name == "cudnn"  # [T, S] for all heads together
    assert largest_results(program.as_text())[-1] <= max(T * S * masks, 32 * T * 128)


def test_a_product_of_several_rows_makes_no_float_copy_of_int8_weights():
    R, C = 4096, 4096
    scale = jax.ShapeDtypeStruct((R,), jnp.float32)
    w = QTensor(jax.ShapeDtypeStruct((R, C), jnp.int8), scale, 8)
    x = jax.ShapeDtypeStruct((8, C), jnp.bfloat16)
    program = compiled("cuda", partial(in_usual_form, "gpu"), x, w, donate=())
    assert largest_results(program.as_text())[-1] < R * C / 4
