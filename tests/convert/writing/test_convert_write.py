"""Our own format: what is written is read back, complete or not at all, and what it may replace."""

import errno
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import load_checkpoint, verify_checkpoint
from convert.files.safetensors_writer import HashingFile
from convert.loading.folder import open_folder
from convert.writing.destination import check_destination
from glm2_jax import CheckpointError, InputError, UsageError
from glm2_jax.cli.files import writer_lock
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


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stop", ["half-way", "at the last rename", "full disk"])
def test_what_is_stopped_leaves_the_old_folder_or_none(tmp_path, monkeypatch, overwrite, stop):
    target, rename, write, written = tmp_path / "deep" / "own", Path.rename, HashingFile.write, []
    if overwrite:
        save(target)

    def interrupt(done, total):
        if stop == "half-way" and done > total / 2:
            raise KeyboardInterrupt

    def interrupted_rename(path, target):
        if path.name == "new" and not target.exists():
            raise KeyboardInterrupt
        return rename(path, target)

    def full(self, data):
        written.append(len(data))
        if len(written) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    with monkeypatch.context() as patch:
        if stop == "at the last rename":
            patch.setattr(Path, "rename", interrupted_rename)
        if stop == "full disk":
            patch.setattr(HashingFile, "write", full)
        with pytest.raises(InputError if stop == "full disk" else KeyboardInterrupt):
            save(target, overwrite=overwrite, dtype="float16", progress=interrupt)
    assert names(tmp_path) == (["deep"] if overwrite else [])  # a new parent goes, too
    if overwrite:
        assert verify_checkpoint(target).dtype == "float32"


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
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"model.safetensors has {len(data) - 1} bytes"):
        verify_checkpoint(tmp_path / "own")
    path.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        verify_checkpoint(tmp_path / "own")


def test_nothing_is_overwritten_unasked(tmp_path):
    save(tmp_path / "own")
    with pytest.raises(UsageError, match="--overwrite"):
        save(tmp_path / "own", config=tiny_config(num_layers=1))
    assert load_checkpoint(tmp_path / "own").config.num_layers == 2
    save(tmp_path / "own", config=tiny_config(num_layers=1), overwrite=True)
    assert load_checkpoint(tmp_path / "own").config.num_layers == 1
    assert names(tmp_path) == ["own"]


def test_only_our_own_folders_are_replaced(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("important")
    (tmp_path / "file").write_text("important")
    (tmp_path / "loop").symlink_to("loop")
    source = open_folder(write_official(tmp_path / "official"))
    with pytest.raises(InputError, match="link that points to itself"):
        save(tmp_path / "loop", overwrite=True)
    for target in ("home", "file"):
        with pytest.raises(UsageError, match="not a folder of this project"):
            convert_folder(source, tmp_path / target, overwrite=True)
        with pytest.raises(UsageError, match="exists"):
            save(tmp_path / target)
    with pytest.raises(UsageError, match="exists"):
        save("/")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UsageError, match="the current folder"):
        save(".", overwrite=True)
    assert (tmp_path / "home/thesis.tex").read_text() == "important"
    assert names(tmp_path) == ["empty", "file", "home", "loop", "official"]


def test_files_that_the_manifest_does_not_list_are_kept(tmp_path):
    for name in ("notes.txt", "logs/today.txt"):
        save(tmp_path / "own")
        path = tmp_path / "own" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("important")
        with pytest.raises(UsageError, match=f"holds {name.split('/')[0]}"):
            save(tmp_path / "own", overwrite=True)
        assert path.read_text() == "important" and names(tmp_path) == ["own"]
        shutil.rmtree(tmp_path / "own")


def test_the_source_is_not_replaced(tmp_path):
    save(tmp_path / "own")
    (tmp_path / "link").symlink_to(tmp_path / "own")
    with pytest.raises(UsageError, match=r"holds the source .*own\.\n.+\n.+"):
        convert_folder(open_folder(tmp_path / "own"), tmp_path / "link", overwrite=True)
    verify_checkpoint(tmp_path / "own")
    inside = write_official(tmp_path / "own" / "official")
    linked = tmp_path / "linked"  # as a folder of the hub's cache: links to the files themselves
    linked.mkdir()
    for name in names(inside):
        (linked / name).symlink_to(inside / name)
    for source in (inside, linked):
        with pytest.raises(UsageError, match="holds the source"):
            convert_folder(open_folder(source), tmp_path / "own", overwrite=True)
    open_folder(inside)


@pytest.mark.parametrize("kept", ["own/thesis.tex", "own", "own/notes.txt", None])
def test_what_appears_while_writing_is_kept(tmp_path, kept):
    target, listed = tmp_path / "own", kept == "own/notes.txt"
    if listed:
        save(target)

    def appear(done, total):
        if kept != "own":
            target.mkdir(exist_ok=True)
        if kept:
            (tmp_path / kept).write_text("important")

    if kept is None:  # an empty folder
        save(target, progress=appear)
        verify_checkpoint(target)
    else:
        with pytest.raises(UsageError, match="holds notes.txt" if listed else "exists"):
            save(target, progress=appear, overwrite=listed)
        assert (tmp_path / kept).read_text() == "important"
    assert names(tmp_path) == ["own"]


def test_killed_between_the_last_renames(tmp_path):
    """The old folder has been moved aside, the new one has not come: the old one comes back."""
    work = tmp_path / ".own.unfinished"
    (work / "new").mkdir(parents=True)
    (work / "new/model.safetensors").touch()
    (work / "lock").touch()
    save(tmp_path / "other")
    (tmp_path / "other").rename(work / "old")
    with pytest.raises(UsageError, match="exists"):  # a look changes nothing
        check_destination(tmp_path / "own", overwrite=False)
    assert names(work) == ["lock", "new", "old"] and names(tmp_path) == [".own.unfinished"]
    with pytest.raises(UsageError, match="exists"):
        save(tmp_path / "own")
    verify_checkpoint(tmp_path / "own")
    assert names(tmp_path) == ["own"]


def test_leftovers_of_dead_processes_are_removed_and_nothing_else(tmp_path):
    save(tmp_path / "o*")
    foreign = [".oh.unfinished", ".o*.unfinished.bak", ".own.tmp-0123"]
    for folder in (*foreign, ".o*.unfinished/old", ".o*.unfinished/new"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").write_bytes(b"x")
    save(tmp_path / "o*", overwrite=True)
    verify_checkpoint(tmp_path / "o*")
    assert names(tmp_path) == sorted([*foreign, "o*"])


def test_one_process_at_a_time(tmp_path):
    def another(done, total):
        with pytest.raises(InputError, match="Another process is writing .*own"):
            save(tmp_path / "own")

    save(tmp_path / "own", progress=another)
    verify_checkpoint(tmp_path / "own")
    (tmp_path / ".own.unfinished/new").mkdir(parents=True)
    with writer_lock(tmp_path / ".own.unfinished/lock", tmp_path / "own"):
        with pytest.raises(InputError, match="It holds the lock .*/lock"):
            save(tmp_path / "own", overwrite=True)
        assert names(tmp_path / ".own.unfinished") == ["lock", "new"]


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    save(tmp_path / "own")
    assert "has no locks" in capsys.readouterr().err and names(tmp_path) == ["own"]
    (tmp_path / ".own.unfinished/new").mkdir(parents=True)
    with pytest.raises(InputError, match="another process may be using .*own.unfinished"):
        save(tmp_path / "own", overwrite=True)
    assert names(tmp_path) == [".own.unfinished", "own"]


def test_the_folder_of_another_user_is_not_written_into(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / ".own.unfinished").symlink_to("theirs")
    with pytest.raises(InputError, match="belongs to another user"):
        save(tmp_path / "own")
    assert names(tmp_path / "theirs") == []


def test_a_place_that_may_not_be_written(tmp_path, monkeypatch):
    def refuse(self, mode=0o777, exist_ok=False):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        check_destination(tmp_path / "deep" / "own")


def test_an_error_of_reading_is_not_one_of_writing(tmp_path, monkeypatch):
    def broken(self):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    source = open_folder(write_official(tmp_path / "official"))
    monkeypatch.setattr("convert.files.tensor.StoredTensor.read", broken)
    with pytest.raises(CheckpointError, match=r"\.bin cannot be read"):
        convert_folder(source, tmp_path / "own")
    assert names(tmp_path) == ["official"]
