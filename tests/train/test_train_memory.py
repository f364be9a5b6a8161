"""What training the real 6B shapes takes, compiled from abstract values; nothing is run.

LoRA of rank 8 on query_key_value, 4 rows of 512 tokens, blocks computed again in the backward pass.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from glm2_jax import PRESETS, init_lora
from infer.memory.precision import Precision
from infer.memory.shares import abstract_params
from tests.support.mesh_shapes import compiled, int32
from train.data.batch import Batch
from train.optim import make_optimizer, make_schedule
from train.step import init_state, train_step

CONFIG = PRESETS["chatglm2-6b"]
GB = 10**9


def step_memory(platform: str, quantization: str | None, accumulate: int = 1):
    """What the compiler says of a step, and the bytes of the base and of what is trained."""
    optimizer = make_optimizer(make_schedule("cosine", lr=5e-5, steps=100, warmup=0.03))
    base = abstract_params(CONFIG, Precision("bfloat16", quantization))
    key = jax.eval_shape(lambda: jax.random.key(0))
    lora = jax.eval_shape(lambda key: init_lora(CONFIG, key, rank=8, dropout=0.1), key)
    state = jax.eval_shape(partial(init_state, optimizer), lora)
    tokens = int32(accumulate, 4, 512)
    learned = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)
    batch = Batch(tokens, tokens, tokens, learned)
    step = partial(train_step, CONFIG, optimizer)
    args = base, lora, state, batch, key, int32()
    memory = compiled(platform, step, *args, donate=(1, 2)).memory_analysis()
    trained = lora.num_params
    return memory, nbytes(base), nbytes((lora, state)), trained


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("platform", "quantization"),
    [("cpu", None), ("cuda", None), ("cuda", "int8"), ("cuda", "int4")],
)
def test_memory_of_a_step(platform, quantization):
    memory, weights, state, trained = step_memory(platform, quantization)
    assert trained == 1_949_696
    beside = memory.temp_size_in_bytes + state  # gradients are temporaries
    print(f"{platform} {quantization}: weights {weights / GB:.2f} GB, adapter and optimizer "
          f"{state / GB:.3f} GB, temporaries {memory.temp_size_in_bytes / GB:.2f} GB")  # fmt: skip
    assert memory.alias_size_in_bytes >= state - 16  # nothing of it exists twice
    assert beside < 6 * GB
    if quantization == "int4":
        assert weights + beside < 10 * GB


def test_accumulating_takes_no_more_than_the_gradients():
    one, *_ = step_memory("cuda", None)
    eight, _, _, trained = step_memory("cuda", None, accumulate=8)
    more = eight.temp_size_in_bytes - one.temp_size_in_bytes
    assert more < 3 * 4 * trained
