"""The plan of a cache in int8, compared with its arrays and with compiled programs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from glm2_jax import PRESETS, KVCache, last_logits
from glm2_jax.prefix import Prefix
from infer.memory.plan import Plan, largest_context, program_bytes, rate_bound
from infer.memory.precision import Precision
from infer.memory.shares import abstract_params, sizes_of, total_bytes
from tests.support.mesh_shapes import compiled, int32

SIX = PRESETS["chatglm2-6b"]
SMALL = dataclasses.replace(
    SIX, num_layers=4, vocab_size=8192, hidden_size=256, ffn_hidden_size=704, num_heads=8,
    head_dim=32,
)  # fmt: skip
BF16 = Precision("bfloat16")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_cache_is_counted_as_its_arrays(platform):
    def cache(config, prefix=None):
        return jax.eval_shape(lambda: KVCache.new(config, 2, 512, jnp.int8, prefix))

    for config in (SIX, SMALL, PRESETS["glm-4-9b-chat-1m"]):
        arrays = cache(config)
        plan = Plan(config, BF16, 512, 2, platform, kv="int8")
        assert plan.cache == total_bytes((arrays.k, arrays.v))
    shape = (SMALL.num_layers, 9, SMALL.num_kv_heads, SMALL.head_dim)
    begun = cache(SMALL, Prefix(jnp.zeros(shape), jnp.zeros(shape)))
    plan = Plan(SMALL, BF16, 512, 2, platform, prefix=9, kv="int8")
    assert plan.cache == total_bytes((begun.k, begun.v))
    # Cut over a mesh: by rows, and by key/value heads.
    mesh = sizes_of({"data": 2, "tensor": 2})
    arrays = cache(SIX)
    shared = Plan(SIX, BF16, 512, 2, platform, mesh=mesh, kv="int8")
    assert shared.cache == total_bytes((arrays.k, arrays.v)) // 4


def test_long_contexts_take_about_half():
    plain, small = (Plan(SIX, BF16, 32768, kv=kv) for kv in ("auto", "int8"))
    assert plain.cache == 28_672 * 32768 and small.cache / plain.cache == (128 + 4) / 256
    assert small.weights == plain.weights and small.temporary <= plain.temporary
    assert rate_bound(small, 1e12) > rate_bound(plain, 1e12)
    memory, long = 40 * 10**9, PRESETS["glm-4-9b-chat-1m"]
    plain, small = (largest_context(Plan(long, BF16, 1, kv=kv), memory) for kv in ("auto", "int8"))
    assert 1.8 * plain < small <= 2 * plain


@pytest.mark.parametrize(("dtype", "width"), [("float32", 1), ("bfloat16", 1), ("float32", 128)])
def test_temporaries_are_those_of_compiled_programs(dtype, width):
    rows, slots, precision = 2, 4096, Precision(dtype)
    params = abstract_params(SMALL, precision, stacked=False)
    cache = jax.eval_shape(lambda: KVCache.zeros(SMALL, rows, slots, jnp.int8))

    def read(params, tokens, last, cache):
        return last_logits(SMALL, params, tokens, last, cache=cache)

    args = params, int32(rows, width), int32(rows), cache
    memory = compiled("cpu", partial(read), *args, donate=3).memory_analysis()
    planned = program_bytes(SMALL, precision, "cpu", slots, rows, width, kv="int8")
    found = memory.temp_size_in_bytes + rows * SMALL.vocab_size * 4
    print(f"{found / 1e6:.1f} MB of temporaries, planned {planned / 1e6:.1f}")
    assert planned == pytest.approx(found, rel=0.1, abs=2e6)
