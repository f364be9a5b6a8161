"""Names of dtypes and the automatic choice."""

from types import SimpleNamespace

import pytest

from glm2_jax import UsageError
from glm2_jax.runtime import dtypes
from glm2_jax.runtime.dtypes import dtype_name, resolve_dtype


def device(platform, capability=None):
    return SimpleNamespace(platform=platform, compute_capability=capability)


def test_names():
    for name, expected in (("bf16", "bfloat16"), ("half", "float16"), ("float32", "float32")):
        assert dtype_name(resolve_dtype(name, num_params=1)) == expected
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
    monkeypatch.undo()
    assert 2**28 < dtypes.available_memory() < 2**50
