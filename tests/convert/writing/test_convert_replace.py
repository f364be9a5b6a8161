"""What a new folder may replace, and what it must leave alone."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from convert import load_checkpoint, verify_checkpoint
from convert.files.safetensors_writer import HashingFile
from convert.loading.folder import open_folder
from convert.writing.destination import check_destination
from convert.writing.own import convert_folder
from glm2_jax import CheckpointError, InputError, UsageError
from tests.support.checkpoints import names, save, tiny_config, write_official

DEAD, OTHER = "0123456789abcdef", "fedcba9876543210"


def test_nothing_is_overwritten_unasked(tmp_path):
    save(tmp_path / "own")
    before = (tmp_path / "own/manifest.json").read_bytes()
    with pytest.raises(UsageError, match="--overwrite"):
        save(tmp_path / "own", config=tiny_config(num_layers=1))
    assert (tmp_path / "own/manifest.json").read_bytes() == before
    save(tmp_path / "own", config=tiny_config(num_layers=1), overwrite=True)
    assert load_checkpoint(tmp_path / "own").config.num_layers == 1
    assert names(tmp_path) == ["own"]


def test_only_our_own_folders_are_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("important")
    (tmp_path / "file").write_text("important")
    (tmp_path / "loop").symlink_to("loop")
    source = open_folder(write_official(tmp_path / "official"))
    for overwrite in (False, True):
        with pytest.raises(InputError, match="link that leads back to itself"):
            save(tmp_path / "loop", overwrite=overwrite)
    for target in ("home", "file"):
        with pytest.raises(UsageError, match="not a folder of this project"):
            convert_folder(source, tmp_path / target, overwrite=True)
        with pytest.raises(UsageError, match="exists"):
            save(tmp_path / target)
        with pytest.raises(UsageError, match="not a folder of this project"):
            save(tmp_path / target, overwrite=True)
    with pytest.raises(UsageError, match="exists"):
        save("/")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty")
    assert (tmp_path / "home/thesis.tex").read_text() == "important"


@pytest.mark.parametrize("name", ["notes.txt", "logs/today.txt", "config.json/x"])
def test_files_that_the_manifest_does_not_list_are_kept(tmp_path, name):
    save(tmp_path / "own")
    path = tmp_path / "own" / name
    if path.parent.is_file():
        path.parent.unlink()
    path.parent.mkdir(exist_ok=True)
    path.write_text("important")
    with pytest.raises(UsageError, match=f"holds {name.split('/')[0]}"):
        save(tmp_path / "own", overwrite=True)
    assert path.read_text() == "important" and names(tmp_path) == ["own"]


def test_the_current_folder_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="the current folder"):
            save(".", overwrite=overwrite)
    assert names(tmp_path) == []


def test_a_folder_is_not_converted_onto_itself(tmp_path):
    save(tmp_path / "own")
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for target in ("own", "link"):
        with pytest.raises(UsageError, match=r"onto itself\.\n.+\n.+"):
            convert_folder(open_folder(tmp_path / "own"), tmp_path / target, overwrite=True)
    verify_checkpoint(tmp_path / "own")


def test_a_source_inside_the_destination_is_kept(tmp_path):
    save(tmp_path / "own")
    inside = write_official(tmp_path / "own" / "official")
    linked = tmp_path / "linked"  # as a folder of the hub's cache: links to the files themselves
    linked.mkdir()
    for name in names(inside):
        (linked / name).symlink_to(inside / name)
    for source in (inside, linked):
        with pytest.raises(UsageError, match="lies in"):
            convert_folder(open_folder(source), tmp_path / "own", overwrite=True)
    open_folder(inside)


@pytest.mark.parametrize("kind", ["folder", "file", "empty"])
def test_what_appears_while_writing_is_kept(tmp_path, kind):
    target = tmp_path / "own"

    def appear(done, total):
        if kind == "file":
            target.write_text("important")
        else:
            target.mkdir(exist_ok=True)
        if kind == "folder":
            (target / "thesis.tex").write_text("important")

    if kind == "empty":
        save(target, progress=appear)
        verify_checkpoint(target)
    else:
        with pytest.raises(UsageError, match="exists"):
            save(target, progress=appear)
        kept = target if kind == "file" else target / "thesis.tex"
        assert kept.read_text() == "important"
    assert names(tmp_path) == ["own"]


def test_a_file_added_while_replacing_is_kept(tmp_path):
    save(tmp_path / "own")
    note = tmp_path / "own/notes.txt"
    with pytest.raises(UsageError, match="holds notes.txt"):
        save(tmp_path / "own", overwrite=True, progress=lambda *_: note.write_text("important"))
    assert note.read_text() == "important" and names(tmp_path) == ["own"]


@pytest.mark.parametrize("twin", [False, True])
def test_killed_between_the_last_renames(tmp_path, twin):
    """The old folder has been moved aside, the new one has not come: the old one comes back."""
    save(tmp_path / "own")
    (tmp_path / "own").rename(tmp_path / f".own.old-{DEAD}")
    if twin:
        (tmp_path / f".own.tmp-{DEAD}").mkdir()
    with pytest.raises(UsageError, match="exists"):  # a look changes nothing
        check_destination(tmp_path / "own", overwrite=False)
    assert "own" not in names(tmp_path)
    with pytest.raises(UsageError, match="exists"):
        save(tmp_path / "own")
    verify_checkpoint(tmp_path / "own")
    save(tmp_path / "own", overwrite=True)
    assert names(tmp_path) == ["own"]


def test_the_last_renames_of_a_living_process_are_left_alone(tmp_path):
    save(tmp_path / "own")
    (tmp_path / "own").rename(tmp_path / f".own.old-{DEAD}")
    (tmp_path / f".own.tmp-{DEAD}").mkdir()
    alive = os.open(tmp_path / f".own.tmp-{DEAD}", os.O_RDONLY)
    try:
        fcntl.flock(alive, fcntl.LOCK_EX)
        save(tmp_path / "own")
    finally:
        os.close(alive)
    assert names(tmp_path) == [f".own.old-{DEAD}", f".own.tmp-{DEAD}", "own"]
    verify_checkpoint(tmp_path / f".own.old-{DEAD}")


@pytest.mark.parametrize("name", ["own", "own[1-9]", "o*", "-o?"])
def test_leftovers_of_dead_processes_are_removed_and_nothing_else(tmp_path, name):
    foreign = [
        f".{name}.tmp-xyz",
        f".{name}.tmp-{DEAD}.bak",
        f".own1.tmp-{DEAD}",
        f".oh.tmp-{DEAD}",
        f".other.tmp-{DEAD}",
        f".{name}.tmp-{OTHER}",
    ]
    for leftover in (*foreign, f".{name}.tmp-{DEAD}", f".{name}.old-{DEAD[:-1]}0"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_bytes(b"x")
    (tmp_path / f".{name}.tmp-{DEAD[:-1]}1").symlink_to(tmp_path / ".oh.tmp-0123456789abcdef")
    foreign.append(f".{name}.tmp-{DEAD[:-1]}1")
    (tmp_path / f".{name}.tmp-{DEAD[:-1]}2").write_text("a file")
    foreign.append(f".{name}.tmp-{DEAD[:-1]}2")
    alive = os.open(tmp_path / f".{name}.tmp-{OTHER}", os.O_RDONLY)
    before = names(tmp_path)
    try:
        fcntl.flock(alive, fcntl.LOCK_EX)
        (tmp_path / name).write_text("in the way")
        with pytest.raises(UsageError):
            save(tmp_path / name)
        assert names(tmp_path) == sorted([*before, name])
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        save(tmp_path / name)
    finally:
        os.close(alive)
    assert names(tmp_path) == sorted([*foreign, name])


@pytest.mark.parametrize("path", ["file/own", "n" * 300, "n" * 240, "n" * 300 + "/own"])
def test_a_place_that_cannot_be_written(tmp_path, path):
    (tmp_path / "file").write_text("x")
    for action in (save, lambda folder: check_destination(folder, overwrite=False)):
        with pytest.raises(InputError, match="cannot be written"):
            action(tmp_path / path)
    assert names(tmp_path) == ["file"]


def test_a_folder_without_the_right_to_write(tmp_path, monkeypatch):
    def refuse(self, mode=0o777):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        check_destination(tmp_path / "deep" / "own", overwrite=False)


def test_new_parents_go_with_what_failed(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(HashingFile, "write", full)
    with pytest.raises(InputError, match="No space left"):
        save(tmp_path / "deep" / "deeper" / "own")
    assert names(tmp_path) == []


def test_an_error_of_reading_is_not_one_of_writing(tmp_path, monkeypatch):
    def broken(self):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    source = open_folder(write_official(tmp_path / "official"))
    monkeypatch.setattr("convert.files.tensor.StoredTensor.read", broken)
    with pytest.raises(CheckpointError, match=r"\.bin cannot be read"):
        convert_folder(source, tmp_path / "own")
    assert names(tmp_path) == ["official"]


def test_a_source_whose_name_is_not_utf8(tmp_path):
    source = write_official(tmp_path / os.fsdecode(b"caf\xe9"))
    manifest = convert_folder(open_folder(source), tmp_path / "own")
    assert manifest.source.endswith("/caf\N{REPLACEMENT CHARACTER}")
    verify_checkpoint(tmp_path / "own")
