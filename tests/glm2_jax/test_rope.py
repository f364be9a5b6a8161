"""Rotary embedding: tables against the published ones, rotation by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import PRESETS
from glm2_jax.rope import apply_rope, rope_tables
from tests.support.shared_data import shared_path

CONFIG = PRESETS["chatglm2-6b"]
tables = jax.jit(rope_tables, static_argnums=(0, 2))


def cos_sin(positions, dtype=jnp.float32, **changes) -> np.ndarray:
    """[positions, H / 4, 2] cosine and sine."""
    config = dataclasses.replace(CONFIG, **changes)
    cos, sin = tables(config, jnp.asarray([positions], jnp.int32), dtype)
    assert cos.dtype == sin.dtype == jnp.float32
    return np.stack([cos[0], sin[0]], axis=-1)


@pytest.mark.parametrize(
    ("stored", "dtype", "table_dtype", "tolerance"),
    [
        ("fp32", jnp.float16, "float32", 1e-7),
        ("fp32", jnp.float32, "reference", 1e-7),
        ("fp16", jnp.float16, "reference", 0.0),
        ("bf16", jnp.bfloat16, "reference", 0.0),
    ],
)
def test_tables_of_the_published_code(stored, dtype, table_dtype, tolerance):
    reference = np.load(shared_path("reference/hf_rope_tables.npz"))
    ours = cos_sin(reference["positions"], dtype, rope_table_dtype=table_dtype)
    assert np.abs(ours - reference[stored]).max() <= tolerance


def test_angles_by_hand():
    # theta = 1, 10000^(-1/2) = 0.01
    expected = [[[np.cos(a), np.sin(a)] for a in (p, p / 100)] for p in (0, 3, 7)]
    np.testing.assert_allclose(cos_sin([0, 3, 7], head_dim=8), expected, atol=1e-6)
    # A ratio divides positions, or multiplies the base.
    scaled = cos_sin([0, 16, 32, 16 * 500], rope_ratio=16.0, rope_kind="linear")
    np.testing.assert_array_equal(scaled, cos_sin([0, 1, 2, 500]))
    scaled = cos_sin([5, 31], rope_ratio=50.0, rope_kind="base")
    np.testing.assert_array_equal(scaled, cos_sin([5, 31], rope_base=500_000.0))
    # ChatGLM3 rounds only the finished table.
    changes = {"family": "chatglm3", "rope_table_dtype": "reference"}
    rounded = cos_sin([4097, 30000], jnp.float16, **changes)
    exact = cos_sin([4097, 30000])
    np.testing.assert_array_equal(rounded, exact.astype(np.float16).astype(np.float32))


def test_rotation_pairs_neighbors_and_passes_the_second_half():
    x = jnp.arange(1.0, 9.0).reshape(1, 1, 1, 8)
    cos, sin = jnp.asarray([[[0.6, 0.0]]]), jnp.asarray([[[0.8, 1.0]]])
    expected = [1 * 0.6 - 2 * 0.8, 2 * 0.6 + 1 * 0.8, -4, 3, 5, 6, 7, 8]
    np.testing.assert_allclose(apply_rope(x, cos, sin)[0, 0, 0], expected, rtol=1e-6)
    assert apply_rope(x.astype(jnp.bfloat16), cos, sin).dtype == jnp.bfloat16
