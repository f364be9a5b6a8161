"""Our own format: what is written is read back, complete or not at all."""

import errno
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import load_checkpoint, verify_checkpoint
from convert.files.safetensors_writer import HashingFile
from convert.loading.folder import open_folder
from convert.writing.own import convert_folder
from glm2_jax import CheckpointError, InputError, UsageError
from tests.support.checkpoints import TINY, names, random_params, save, tiny_config, write_official

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def leaves_equal(first, second):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))


@pytest.mark.parametrize(
    ("dtype", "max_shard_size"), [("float16", 10**9), ("bfloat16", 50_000), ("float32", 50_000)]
)
def test_saved_parameters_come_back(tmp_path, dtype, max_shard_size):
    params = jax.tree.map(lambda array: jnp.asarray(array, DTYPES[dtype]), random_params(TINY))
    manifest = save(tmp_path / "own", params, max_shard_size=max_shard_size, template="raw")
    checkpoint = load_checkpoint(tmp_path / "own", dtype=dtype)
    assert leaves_equal(checkpoint.params, params)
    assert (checkpoint.config, checkpoint.template) == (TINY, "raw")
    assert checkpoint.summary.layout == "own" and checkpoint.summary.stored_dtype == dtype
    assert checkpoint.notes == ()
    assert manifest == verify_checkpoint(tmp_path / "own")
    assert manifest.dtype == dtype and manifest.source == "a test"
    assert set(manifest.files) == set(names(tmp_path / "own")) - {"manifest.json"}
    shards = sorted((tmp_path / "own").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_size < 10**6)
    stored = {name: array for shard in shards for name, array in load_file(shard).items()}
    np.testing.assert_array_equal(stored["layers.1.q"], params["layers"]["q"][1])
    assert names(tmp_path) == ["own"]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("bin", None), ("bin", "float16"), ("safetensors", "float32")]
)
def test_converting_is_loading_and_saving(tmp_path, kind, dtype):
    source = write_official(tmp_path / "official", kind=kind, dtype="bfloat16")
    manifest = convert_folder(open_folder(source), tmp_path / "own", dtype=dtype)
    assert manifest.dtype == (dtype or "bfloat16")
    verify_checkpoint(tmp_path / "own")
    first = load_checkpoint(source, dtype=dtype or "bfloat16")
    second = load_checkpoint(tmp_path / "own", dtype=dtype or "bfloat16")
    assert leaves_equal(first.params, second.params)
    assert (first.config, first.template) == (second.config, second.template)
    again = convert_folder(open_folder(tmp_path / "own"), tmp_path / "again", dtype=dtype)
    assert {n: e.sha256 for n, e in again.files.items()} == {
        n: e.sha256 for n, e in manifest.files.items()
    }


def test_a_rope_kind_given_by_hand_is_kept(tmp_path):
    unknown = dict.fromkeys(("rope_kind", "family", "interleaved_qkv", "rotary_percent"))
    source = write_official(tmp_path / "official", raw={"rope_ratio": 16} | unknown)
    folder = open_folder(source, rope_kind="linear", template="raw")
    manifest = convert_folder(folder, tmp_path / "own")
    assert (manifest.rope_kind, manifest.template) == ("linear", "raw")
    found = load_checkpoint(tmp_path / "own")
    assert (found.config.rope_kind, found.config.rope_ratio) == ("linear", 16.0)
    assert found.template == "raw"


@pytest.mark.parametrize(("error", "overwrite"), [(KeyboardInterrupt, True), (RuntimeError, False)])
def test_stopped_in_the_middle(tmp_path, error, overwrite):
    if overwrite:
        save(tmp_path / "own")

    def stop(done, total):
        if done > total / 2:
            raise error

    with pytest.raises(error):
        save(tmp_path / "own", overwrite=overwrite, progress=stop, dtype="float16")
    assert names(tmp_path) == (["own"] if overwrite else [])
    if overwrite:
        assert verify_checkpoint(tmp_path / "own").dtype == "float32"


def test_stopped_between_the_last_renames(tmp_path, monkeypatch):
    save(tmp_path / "own")
    rename = Path.rename

    def fail(path, target):
        if path.name == "new" and not target.exists():
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "own", overwrite=True)
    assert names(tmp_path) == ["own"]
    verify_checkpoint(tmp_path / "own")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_fills_up_while_writing(tmp_path, monkeypatch, overwrite):
    if overwrite:
        save(tmp_path / "own")
    write, written = HashingFile.write, []

    def full(self, data):
        written.append(len(data))
        if len(written) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(HashingFile, "write", full)
    with pytest.raises(InputError, match="No space left on device"):
        save(tmp_path / "own", overwrite=overwrite)
    assert names(tmp_path) == (["own"] if overwrite else [])


def test_everything_is_on_the_disk_before_the_name_appears(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1],
    )
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (events.append("rename"), rename(path, to))[1]
    )
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
    params = random_params(tiny_config(hidden_size=64))
    with pytest.raises(CheckpointError, match="has the shape"):
        save(tmp_path / "own", params)
    params = random_params(TINY)
    params["head"][0, 0] = 1e6
    with pytest.raises(CheckpointError, match="float16 cannot represent"):
        save(tmp_path / "own", params, dtype="float16")
    with pytest.raises(UsageError, match="int3"):
        save(tmp_path / "own", dtype="int3")
    assert names(tmp_path) == []


def test_a_conversion_finds_nan_and_a_broken_tokenizer(tmp_path):
    tokenizer = write_official(tmp_path / "a", tokenizer=b"nonsense")
    params = random_params(TINY)
    params["layers"]["q_bias"][0, 0, 0] = np.nan
    bad = write_official(tmp_path / "b", params=params)
    for source in (tokenizer, bad):
        with pytest.raises(CheckpointError):
            convert_folder(open_folder(source), tmp_path / "own")
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors"])
def test_verify_names_the_file(tmp_path, name):
    save(tmp_path / "own")
    path = tmp_path / "own" / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} differs"):
        verify_checkpoint(tmp_path / "own")
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"{name} has {len(data) - 1} bytes"):
        verify_checkpoint(tmp_path / "own")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        verify_checkpoint(tmp_path / "own")
