"""The readers of `.bin` and safetensors files: what is valid is read, everything else refused."""

import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.files import torch_reader
from convert.files.shards import read_weight_file
from glm2_jax import CheckpointError
from tests.support.torch_zip import (
    pickle_global,
    state_dict_pickle,
    tensor_pickle,
    write_members,
    write_torch_file,
)

TENSORS = {
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "brain": np.linspace(-3, 3, 8).astype(ml_dtypes.bfloat16),
    "single": np.float32([[1.5], [-2.5]]),
    "bytes": np.int8([[-128, 127]]),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float16),
}
WRITERS = {"bin": write_torch_file, "safetensors": lambda path, x: save_file(x, path)}


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        read_weight_file(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", WRITERS)
def test_every_type_is_a_view_of_the_file(tmp_path, kind):
    path = tmp_path / f"weights.{kind}"
    WRITERS[kind](path, TENSORS)
    found = read_weight_file(path)
    assert found.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        array = found[name].read()
        assert array.dtype == expected.dtype and (not array.size or not array.flags.writeable)
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_cut_at_any_byte_is_refused(tmp_path, kind):
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    WRITERS[kind](whole, TENSORS)
    data = whole.read_bytes()
    for size in {*range(0, len(data), 37), *range(len(data) - 60, len(data))}:
        cut.write_bytes(data[:size])
        refusal(cut)


@pytest.mark.parametrize("protocol", [2, 5])
def test_what_torch_writes(tmp_path, protocol):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    path = tmp_path / "weights.bin"
    state = torch.nn.Linear(3, 4).state_dict()  # carries _metadata, as every published file does
    state["transposed"] = torch.arange(12.0).reshape(3, 4).t().to(torch.bfloat16)
    state["shared"] = state["weight"]
    state["parameter"] = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float16))
    state["slice"] = torch.arange(10.0)[3:7]
    torch.save(state, path, pickle_protocol=protocol)
    found = read_weight_file(path)
    assert list(found) == list(state)
    for name, expected in state.items():
        array = np.asarray(found[name].read(), np.float32)
        np.testing.assert_array_equal(array, expected.detach().float().numpy(), err_msg=name)


def write_pickle(path, data, **storages):
    members = {"archive/data.pkl": data}
    write_members(path, members | {f"archive/data/{key[1:]}": v for key, v in storages.items()})
    return path


class Runs:
    """Unpickled by Python, this calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_calls_is_refused_by_name(tmp_path, protocol):
    mark = tmp_path / "executed"
    for function, argument in ((os.system, f"touch {mark}"), (eval, f"open('{mark}', 'w')")):
        data = pickle.dumps({"weight": Runs(function, argument)}, protocol=protocol)
        message = refusal(write_pickle(tmp_path / "evil.bin", data))
        assert not mark.exists()
        if protocol >= 2:
            assert function.__name__ in message and "asks for" in message


REBUILD = pickle_global("torch._utils", "_rebuild_tensor_v2")
PAIR = b"q\x00h\x00\x86"  # what is on the stack twice, as a tuple: a hundred of them hash forever


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (pickle_global("torch._utils", "_rebuild_tensor") + b")R", "is refused.*_rebuild_tensor"),
        (pickle_global("torch.serialization", "load") + b")R", "is refused.*serialization.load"),
        (b"c__builtin__\ngetattr\n", r"is refused.*__builtin__\.getattr"),
        (pickle_global("surprise", "thing") + b")R", r"is refused.*surprise\.thing"),
        (b"(ios\nsystem\n", "is refused.*opcode INST"),
        (b"\x82\x01", "is refused.*opcode EXT1"),
        (b"(X\x07\x00\x00\x00storageX\x01\x00\x00\x00aX\x01\x00\x00\x000K\x01K\x01tQ", "storage"),
        (b"}}K\x01s", "is refused.*dictionary key"),
        (b"}\x8b\x01\x00\x00\x00\x11Ns", "is refused.*opcode LONG4"),
        (REBUILD + b"(NNNNNNNNtR", "is refused.*more than 7 arguments"),
        (b"}(K\x00" + PAIR * 100 + b"K\x01u", "is refused.*key of type tuple"),
        (pickle_global("torch", "FloatStorage") + b")R", "is damaged.*not callable"),
        (pickle_global("torch._utils", "_rebuild_parameter") + b"(K\x01tR", "is damaged"),
        (b"X\x02\x00\x00\x00os)R", "is damaged.*not callable"),
    ],
)
def test_a_pickle_with_anything_but_tensors_is_refused(tmp_path, monkeypatch, value, reason):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "surprise.py").write_text("raise SystemExit('imported')")
    path = write_pickle(tmp_path / "evil.bin", state_dict_pickle({"weight": value}))
    with pytest.raises(CheckpointError, match=f"(?s){reason}"):
        read_weight_file(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"numel": 3}, "reaches beyond"),
        ({"offset": 3}, "reaches beyond"),
        ({"strides": (4, 1)}, "reaches beyond"),
        ({"strides": (0, 0), "shape": (1000, 1000)}, "reaches beyond"),
        ({"shape": (2, -2), "numel": 4}, "not an integer"),
        ({"offset": -1}, "not an integer"),
        ({"strides": (1,)}, "damaged"),
        ({"shape": (1,) * 9, "strides": (1,) * 9}, "9 dimensions"),
        ({"shape": (2**40, 2**40)}, "too large"),
        ({"numel": 5}, "8 bytes instead of 10"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, changes, reason):
    arguments = {"shape": (2, 2), "numel": 4, **changes}
    value = tensor_pickle("0", np.dtype(np.float16), **arguments)
    path = write_pickle(tmp_path / "bad.bin", state_dict_pickle({"w": value}), _0=b"\0" * 8)
    assert reason in refusal(path)


def test_what_is_not_a_dictionary_of_tensors_is_refused(tmp_path):
    """Nor one whose tensors are elsewhere: storages are looked up, not opened."""
    (tmp_path / "secret").write_bytes(b"\0" * 4)
    value, outside, absolute = (
        tensor_pickle(key, np.dtype(np.float32), (1,))
        for key in ("0", "../../secret", str(tmp_path / "secret"))
    )
    twice = state_dict_pickle({"w": value}).replace(b"u.", b"X\x01\x00\x00\x00w" + value + b"u.")
    for data, reason in (
        (pickle.dumps([1], protocol=2), "does not hold a dictionary"),
        (b"\x80\x02" + value + b".", "does not hold a dictionary"),
        (pickle.dumps({"epoch": 3, "model": {}}, protocol=4), "'epoch' is not a tensor"),
        (twice, "'w' appears twice"),
        (state_dict_pickle({"w": outside}), "is missing"),
        (state_dict_pickle({"w": absolute}), "is missing"),
    ):
        assert reason in refusal(write_pickle(tmp_path / "bad.bin", data, _0=b"\0" * 4))


def test_archives_that_torch_does_not_write_are_refused(tmp_path, monkeypatch):
    path, empty = tmp_path / "bad.bin", state_dict_pickle({})
    write_torch_file(path, {"w": np.zeros(2**20, np.float32)}, compressed=True)
    assert path.stat().st_size < 2**14 and "is compressed" in refusal(path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", empty)
        archive.writestr("archive/data.pkl", empty)
    assert "appears twice" in refusal(path)
    for names in (["a/data.pkl", "b/data.pkl"], ["data.pkl"], ["x/y/data.pkl"]):
        write_members(path, dict.fromkeys(names, empty))
        assert "instead of one" in refusal(path)
    write_members(path, {"a/data.pkl": empty, "a/byteorder": b"big"})
    assert "little-endian" in refusal(path)
    monkeypatch.setattr(torch_reader, "MAX_PICKLE_BYTES", 100)
    write_torch_file(path, TENSORS)
    assert "100 are the limit" in refusal(path)
    monkeypatch.setattr(torch_reader, "_MAX_READ", 600)
    assert "directory at the end" in refusal(path) and "600 are the limit" in refusal(path)


def test_other_formats_are_refused_with_what_to_do(tmp_path):
    path, legacy = tmp_path / "old.bin", "bare pickle or of torch < 1.6"
    for data, reason in (
        (b"member" + bytes(251) + b"ustar\x0000" + bytes(300), legacy),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(100), legacy),
        (b"<!DOCTYPE html><html>", "is not a torch file"),
        (b"", "It is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git lfs pull"),
    ):
        path.write_bytes(data)
        assert reason in refusal(path)


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
        ({"a": 1}, "has a wrong entry"),
        ({"a": entry("F8_E4M3")}, "F8_E4M3 is not supported"),
        ({"a": entry(shape=(3,))}, "does not fill 8 bytes"),
        ({"a": entry(shape=(2.0,))}, "is not a size"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, "overlap or leave a gap"),
        ({"a": entry(offsets=(4, 12))}, "overlap or leave a gap"),
        ({"a": entry(shape=(1,), offsets=(0, 4))}, "does not end with its tensors"),
        ({"a": entry(shape=(4,), offsets=(0, 16))}, "should have .* bytes and has"),
    ],
)
def test_safetensors_headers_that_do_not_describe_the_file(tmp_path, header, reason):
    path = tmp_path / "bad.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=reason):
        read_weight_file(path)
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    assert "limit" in refusal(path)
