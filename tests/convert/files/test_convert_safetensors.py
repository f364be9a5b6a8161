"""The strict reader of safetensors headers."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.files.safetensors_reader import read_safetensors_file
from glm2_jax import CheckpointError

TENSORS = {
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "brain": np.linspace(-3, 3, 8).astype(ml_dtypes.bfloat16),
    "single": np.float32([[1.5], [-2.5]]),
    "empty": np.zeros((0, 3), np.float16),
}


def write_raw(path, header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        read_safetensors_file(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_reads_what_the_library_writes(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    found = read_safetensors_file(path)
    assert set(found) == set(TENSORS)
    for name, expected in TENSORS.items():
        array = found[name].read()
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"[]", "not a JSON object"),
        (b"{", "cannot be parsed"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"\xff": 1}', "cannot be parsed"),
        (b'{"a":' + b"[" * 100_000, "cannot be parsed"),
        ({"a": 1}, "not an object"),
        ({"a": entry("F8_E4M3")}, "F8_E4M3 is not supported"),
        ({"a": entry(shape=(3,))}, "does not fill 8 bytes"),
        ({"a": entry(shape=(-2,))}, "is not a size"),
        ({"a": entry(shape=(2.0,))}, "is not a size"),
        ({"a": entry(offsets=(8, 0))}, "does not fill"),
        ({"a": entry(offsets=(0, 8, 9))}, "has a wrong entry"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, "overlap or leave a gap"),
        ({"a": entry(offsets=(4, 12))}, "overlap or leave a gap"),
        ({"a": entry(shape=(1,), offsets=(0, 4))}, "does not end with its tensors"),
        ({"a": entry(shape=(4,), offsets=(0, 16))}, "is truncated"),
        ({"a": {"dtype": "F32"}}, "has a wrong entry"),
    ],
)
def test_bad_headers(tmp_path, header, reason):
    assert reason in refusal(write_raw(tmp_path / "bad.safetensors", header))


def test_header_length(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    assert "limit" in refusal(path)
    path.write_bytes(b"\x05\0")
    assert "is truncated" in refusal(path)


def test_cut_at_any_byte(tmp_path):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    save_file(TENSORS, whole)
    data = whole.read_bytes()
    for size in range(len(data)):
        cut.write_bytes(data[:size])
        refusal(cut)
    assert f"should have {len(data)} bytes and has {len(data) - 1}" in refusal(cut)
