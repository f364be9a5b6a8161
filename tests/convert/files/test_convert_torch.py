"""The reader of `.bin` files: what torch writes is read, everything else is refused."""

import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert.files import torch_pickle, torch_zip
from convert.files.tensor import StoredTensor
from convert.files.torch_zip import read_torch_file
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


def write_pickle(path: Path, data: bytes, **storages: bytes) -> Path:
    members = {"archive/data.pkl": data}
    write_members(path, members | {f"archive/data/{key[1:]}": v for key, v in storages.items()})
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_reads_every_type(tmp_path):
    path = tmp_path / "weights.bin"
    write_torch_file(path, TENSORS)
    found = read_torch_file(path)
    assert list(found) == list(TENSORS)
    for name, expected in TENSORS.items():
        array = found[name].read()
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def test_reads_what_torch_writes(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    path = tmp_path / "weights.bin"
    state = torch.nn.Linear(3, 4).state_dict()  # carries _metadata, as every published file does
    state["transposed"] = torch.arange(12.0).reshape(3, 4).t().to(torch.bfloat16)
    state["shared"] = state["weight"]
    state["parameter"] = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float16))
    state["slice"] = torch.arange(10.0)[3:7]
    torch.save(state, path)
    found = read_torch_file(path)
    assert list(found) == list(state)
    for name, expected in state.items():
        array = np.asarray(found[name].read(), np.float32)
        np.testing.assert_array_equal(array, expected.detach().float().numpy(), err_msg=name)


def test_newer_pickle_protocols_of_torch(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    path = tmp_path / "weights.bin"
    torch.save({"w": torch.ones(2)}, path, pickle_protocol=5)
    np.testing.assert_array_equal(read_torch_file(path)["w"].read(), [1, 1])


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


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (pickle_global("torch._utils", "_rebuild_tensor") + b")R", "_rebuild_tensor"),
        (pickle_global("torch", "FloatStorage") + b")R", "calls torch.FloatStorage"),
        (pickle_global("torch._utils", "_rebuild_parameter") + b"(K\x01tR", "_rebuild_parameter"),
        (pickle_global("torch.serialization", "load") + b")R", "torch.serialization.load"),
        (b"X\x02\x00\x00\x00os)R", "not a name"),
        (b")K\x01b", "sets the state"),
        (b"}}K\x01s", "dictionary key"),
        (b"c__builtin__\ngetattr\n", "__builtin__.getattr"),
        (b"(ios\nsystem\n", "opcode INST"),
        (b"\x82\x01", "opcode EXT1"),
        (b"(X\x07\x00\x00\x00storageX\x01\x00\x00\x00aX\x01\x00\x00\x000K\x01K\x01tQ", "storage"),
    ],
)
def test_other_calls_are_refused(tmp_path, value, reason):
    path = write_pickle(tmp_path / "evil.bin", state_dict_pickle({"weight": value}))
    message = refusal(path)
    assert "is refused" in message and reason in message


def test_names_are_never_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "surprise.py").write_text("raise SystemExit('imported')")
    value = pickle_global("surprise", "thing") + b")R"
    path = write_pickle(tmp_path / "evil.bin", state_dict_pickle({"w": value}))
    assert "surprise.thing" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"numel": 3}, "reaches beyond"),
        ({"offset": 3}, "reaches beyond"),
        ({"strides": (4, 1)}, "reaches beyond"),
        ({"strides": (0, 0), "shape": (1000, 1000)}, "reaches beyond"),
        ({"strides": (-1, 1)}, "not an integer"),
        ({"shape": (2, -2), "numel": 4}, "not an integer"),
        ({"offset": -1}, "not an integer"),
        ({"strides": (1,)}, "do not fit"),
        ({"shape": (1,) * 9, "strides": (1,) * 9}, "do not fit"),
        ({"shape": (2**40, 2**40)}, "reaches beyond"),
        ({"numel": 5}, "8 bytes instead of 10"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, changes, reason):
    arguments = {"shape": (2, 2), "numel": 4, **changes}
    value = tensor_pickle("0", np.dtype(np.float16), **arguments)
    path = write_pickle(tmp_path / "bad.bin", state_dict_pickle({"w": value}), _0=b"\0" * 8)
    assert reason in refusal(path)


def test_storages_are_looked_up_not_opened(tmp_path):
    (tmp_path / "secret").write_bytes(b"\0" * 4)
    for key in ("../../secret", str(tmp_path / "secret")):
        value = tensor_pickle(key, np.dtype(np.float32), (1,))
        path = write_pickle(tmp_path / "bad.bin", state_dict_pickle({"w": value}))
        assert "is missing" in refusal(path)


def test_a_name_twice_is_refused(tmp_path):
    value = tensor_pickle("0", np.dtype(np.float32), (1,))
    data = state_dict_pickle({"w": value}).replace(b"u.", b"X\x01\x00\x00\x00w" + value + b"u.")
    path = write_pickle(tmp_path / "bad.bin", data, _0=b"\0" * 4)
    assert "'w' appears twice" in refusal(path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_not_a_dictionary_of_tensors_is_refused(tmp_path, protocol):
    path = write_pickle(tmp_path / "bad.bin", pickle.dumps([1], protocol=protocol))
    assert "does not hold a dictionary" in refusal(path)
    data = pickle.dumps({"epoch": 3, "model": {}}, protocol=protocol)
    assert "'epoch' is not a tensor" in refusal(write_pickle(path, data))


def test_zip_bombs_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.bin"
    write_torch_file(path, {"w": np.zeros(2**20, np.float32)}, compressed=True)
    assert path.stat().st_size < 2**14
    assert "is compressed" in refusal(path)
    monkeypatch.setattr(torch_zip, "MAX_PICKLE_BYTES", 100)
    write_torch_file(path, TENSORS)
    assert "100 are the limit" in refusal(path)
    monkeypatch.setattr(torch_zip, "MAX_MEMBERS", 3)
    assert "3 are the limit" in refusal(path)


def test_endless_pickles_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_OPCODES", 1000)
    path = write_pickle(tmp_path / "bomb.bin", b"\x80\x02" + b"(" * 2000 + b".")
    assert "more than 1000 opcodes" in refusal(path)


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
    path, empty = tmp_path / "bad.bin", state_dict_pickle({})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", empty)
        archive.writestr("archive/data.pkl", empty)
    assert "appears twice" in refusal(path)
    for names in (["a/data.pkl", "b/data.pkl"], ["data.pkl"], ["x/y/data.pkl"]):
        write_members(path, dict.fromkeys(names, empty))
        assert "instead of one" in refusal(path)
    write_members(path, {"a/data.pkl": empty, "a/byteorder": b"big"})
    assert "little-endian" in refusal(path)


def test_other_formats_are_refused_with_what_to_do(tmp_path):
    path = tmp_path / "old.bin"
    (tmp_path / "member").write_bytes(b"1")
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "member", "member")
    legacy = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"\0" * 100
    for data in (path.read_bytes(), legacy, pickle.dumps({"a": 1})):
        path.write_bytes(data)
        message = refusal(path)
        assert "bare pickle or of torch < 1.6" in message and "torch.save" in message
    path.write_bytes(b"<!DOCTYPE html><html>")
    assert "is not a torch file" in refusal(path)
    path.write_bytes(b"")
    assert "It is empty" in refusal(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    assert "git lfs pull" in refusal(path)


def test_truncated_at_any_byte(tmp_path):
    whole = tmp_path / "whole.bin"
    write_torch_file(whole, TENSORS)
    data = whole.read_bytes()
    cut = tmp_path / "cut.bin"
    for size in {*range(0, len(data), 37), *range(len(data) - 60, len(data))}:
        cut.write_bytes(data[:size])
        refusal(cut)


def test_reading_maps_the_file(tmp_path):
    path = tmp_path / "weights.bin"
    write_torch_file(path, TENSORS)
    tensor = read_torch_file(path)["half"]
    assert isinstance(tensor, StoredTensor) and not tensor.read().flags.writeable
    assert tensor.offset % 64 == 0
