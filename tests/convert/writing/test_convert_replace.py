"""What a new folder may replace, and what it must leave alone."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from convert import load_checkpoint, verify_checkpoint
from convert.loading.folder import open_folder
from convert.writing.destination import check_destination
from glm2_jax import CheckpointError, InputError, UsageError
from glm2_jax.cli.files import writer_lock
from tests.support.checkpoints import convert_folder, names, save, tiny_config, write_official


def test_nothing_is_overwritten_unasked(tmp_path):
    save(tmp_path / "own")
    before = (tmp_path / "own/manifest.json").read_bytes()
    with pytest.raises(UsageError, match="--overwrite"):
        save(tmp_path / "own", config=tiny_config(num_layers=1))
    assert (tmp_path / "own/manifest.json").read_bytes() == before
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
    for name in ("notes.txt", "logs/today.txt", "config.json/x"):
        save(tmp_path / "own")
        path = tmp_path / "own" / name
        if path.parent.is_file():
            path.parent.unlink()
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


@pytest.mark.parametrize("kind", ["folder", "file", "empty", "note"])
def test_what_appears_while_writing_is_kept(tmp_path, kind):
    target = tmp_path / "own"
    kept = {"folder": target / "thesis.tex", "file": target, "note": target / "notes.txt"}.get(kind)
    if kind == "note":
        save(target)

    def appear(done, total):
        if kind != "file":
            target.mkdir(exist_ok=True)
        if kept:
            kept.write_text("important")

    if kept is None:
        save(target, progress=appear)
        verify_checkpoint(target)
    else:
        with pytest.raises(UsageError, match="holds notes.txt" if kind == "note" else "exists"):
            save(target, progress=appear, overwrite=kind == "note")
        assert kept.read_text() == "important"
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


@pytest.mark.parametrize("name", ["own", "o*"])
def test_leftovers_of_dead_processes_are_removed_and_nothing_else(tmp_path, name):
    save(tmp_path / name)
    foreign = [".oh.unfinished", f".{name}.unfinished.bak", ".own.tmp-0123"]
    for folder in (*foreign, f".{name}.unfinished/old", f".{name}.unfinished/new"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").write_bytes(b"x")
    save(tmp_path / name, overwrite=True)
    verify_checkpoint(tmp_path / name)
    assert names(tmp_path) == sorted([*foreign, name])


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


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for path in ("file/own", "n" * 300, "n" * 300 + "/own"):
        for action in (save, check_destination):
            with pytest.raises(InputError, match="cannot write"):
                action(tmp_path / path)
    assert names(tmp_path) == ["file"]

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
