"""Our own format: what is written is read back, complete or not at all."""

import errno
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import load_checkpoint, verify_checkpoint
from convert.files.safetensors_writer import HashingFile
from convert.loading.folder import open_folder
from glm2_jax import CheckpointError, InputError, UsageError
from tests.support.checkpoints import (
    TINY,
    convert_folder,
    names,
    random_params,
    save,
    tiny_config,
    write_official,
)


@pytest.mark.parametrize(("dtype", "shard"), [("bfloat16", 50_000), ("float32", 10**9)])
def test_saved_parameters_come_back(tmp_path, dtype, shard):
    params = jax.tree.map(lambda array: jnp.asarray(array, dtype), random_params(TINY))
    manifest = save(tmp_path / "own", params, max_shard_size=shard, template="raw")
    checkpoint = load_checkpoint(tmp_path / "own", dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.params, params)
    assert (checkpoint.config, checkpoint.template, checkpoint.notes) == (TINY, "raw", ())
    assert checkpoint.summary.layout == "own" and checkpoint.summary.stored_dtype == dtype
    assert manifest == verify_checkpoint(tmp_path / "own")
    assert manifest.dtype == dtype and manifest.source == "a test"
    assert set(manifest.files) == set(names(tmp_path / "own")) - {"manifest.json"}
    shards = sorted((tmp_path / "own").glob("*.safetensors"))
    assert (len(shards) > 1) == (shard < 10**6)
    stored = {name: array for shard in shards for name, array in load_file(shard).items()}
    np.testing.assert_array_equal(stored["layers.1.q"], params["layers"]["q"][1])
    assert names(tmp_path) == ["own"]


@pytest.mark.parametrize(("kind", "dtype"), [("bin", None), ("safetensors", "float32")])
def test_converting_is_loading_and_saving(tmp_path, kind, dtype):
    unknown = dict.fromkeys(("rope_kind", "family", "interleaved_qkv", "rotary_percent"))
    raw = {"rope_ratio": 16} | unknown  # whose meaning is given by hand, and kept
    source = write_official(tmp_path / "official", kind=kind, dtype="bfloat16", raw=raw)
    form = {"rope_kind": "linear", "template": "raw"}
    manifest = convert_folder(open_folder(source, **form), tmp_path / "own", dtype=dtype)
    assert (manifest.rope_kind, manifest.template) == ("linear", "raw")
    assert manifest.dtype == (dtype or "bfloat16")
    verify_checkpoint(tmp_path / "own")
    first = load_checkpoint(source, dtype=dtype or "bfloat16", **form)
    second = load_checkpoint(tmp_path / "own", dtype=dtype or "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert (first.config, first.template) == (second.config, second.template)
    again = convert_folder(open_folder(tmp_path / "own"), tmp_path / "again", dtype=dtype)
    assert {n: e.sha256 for n, e in again.files.items()} == {
        n: e.sha256 for n, e in manifest.files.items()
    }


def interrupted(monkeypatch):
    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    return {"progress": stop}


def interrupted_at_the_last_rename(monkeypatch):
    rename = Path.rename

    def fail(path, target):
        if path.name == "new" and not target.exists():
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    return {}


def on_a_disk_that_fills_up(monkeypatch):
    write, written = HashingFile.write, []

    def full(self, data):
        written.append(len(data))
        if len(written) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(HashingFile, "write", full)
    return {}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "stop", [interrupted, interrupted_at_the_last_rename, on_a_disk_that_fills_up]
)
def test_what_is_stopped_leaves_the_old_folder_or_none(tmp_path, monkeypatch, overwrite, stop):
    if overwrite:
        save(tmp_path / "deep" / "own")
    error = InputError if stop is on_a_disk_that_fills_up else KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(error):
        save(tmp_path / "deep" / "own", overwrite=overwrite, dtype="float16", **stop(patch))
    assert names(tmp_path) == (["deep"] if overwrite else [])  # a new parent goes, too
    if overwrite:
        assert verify_checkpoint(tmp_path / "deep" / "own").dtype == "float32"


def test_everything_is_on_the_disk_before_the_name_appears(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def synced(fd):
        events.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def renamed(path, to):
        events.append("rename")
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    save(tmp_path / "own")
    before = [Path(name).name for name in events[: events.index("rename")]]
    files = ["config.json", "tokenizer.model", "model.safetensors", "manifest.json"]
    assert before == [*files, "new"]
    assert events[events.index("rename") + 1 :] == [str(tmp_path)]


def test_bad_parameters_are_not_written(tmp_path):
    params = random_params(TINY)
    params["layers"]["down"][1, 0, 0] = np.nan
    with pytest.raises(CheckpointError, match="layers.1.down holds NaN"):
        save(tmp_path / "own", params)
    with pytest.raises(CheckpointError):
        convert_folder(open_folder(write_official(tmp_path / "a", params=params)), tmp_path / "own")
    with pytest.raises(CheckpointError, match="has the shape"):
        save(tmp_path / "own", random_params(tiny_config(hidden_size=64)))
    params = random_params(TINY)
    params["head"][0, 0] = 1e6
    with pytest.raises(CheckpointError, match="float16 cannot represent"):
        save(tmp_path / "own", params, dtype="float16")
    with pytest.raises(UsageError, match="int3"):
        save(tmp_path / "own", dtype="int3")
    assert names(tmp_path) == ["a"]


def test_verify_names_the_file(tmp_path):
    save(tmp_path / "own")
    path = tmp_path / "own" / "model.safetensors"
    data = path.read_bytes()
    flipped = data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]
    short = f"has {len(data) - 1} bytes"
    for stored, said in ((flipped, "differs"), (data[:-1], short), (None, "is missing")):
        path.unlink()
        if stored is not None:
            path.write_bytes(stored)
        with pytest.raises(CheckpointError, match=f"model.safetensors {said}"):
            verify_checkpoint(tmp_path / "own")
