"""Names of dtypes and the automatic choice."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from glm2_jax import UsageError
from glm2_jax.runtime import dtypes
from glm2_jax.runtime.dtypes import dtype_name, resolve_dtype


def device(platform, capability=None):
    return SimpleNamespace(platform=platform, compute_capability=capability)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bf16", jnp.bfloat16), ("half", jnp.float16), ("float32", jnp.float32)],
)
def test_names(name, expected):
    assert resolve_dtype(name, num_params=1) == expected
    assert dtype_name(expected) == jnp.dtype(expected).name


def test_unknown_name():
    with pytest.raises(UsageError, match="float64"):
        resolve_dtype("float64", num_params=1)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (device("tpu"), "bfloat16"),
        (device("gpu", "9.0"), "bfloat16"),
        (device("gpu", "8.0"), "bfloat16"),
        (device("gpu", "7.5"), "float16"),
        (device("gpu", "gfx90a"), "bfloat16"),
    ],
)
def test_auto_on_accelerators(where, expected):
    assert dtype_name(resolve_dtype("auto", num_params=6_243_584_000, device=where)) == expected


def test_auto_on_a_cpu_is_float32_where_it_fits(monkeypatch):
    monkeypatch.setattr(dtypes, "available_memory", lambda: 24 * 10**9)
    small = resolve_dtype("auto", num_params=5 * 10**9, device=device("cpu"))
    large = resolve_dtype("auto", num_params=6_243_584_000, device=device("cpu"))
    assert (dtype_name(small), dtype_name(large)) == ("float32", "bfloat16")


def test_available_memory_is_a_plausible_number():
    assert 2**28 < dtypes.available_memory() < 2**50
