"""The folder of a run, its log and its checkpoints: also elsewhere, in a bucket, and of several
processes."""

import argparse
import contextlib
import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fsspec.implementations.local import LocalFileSystem

from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.processes import join
from train import lora
from train.options import checkpoint_place
from train.run_folder.checkpoints import Checkpoints
from train.run_folder.folder import RunFolder, check_shared, recorded
from train.run_folder.log import Log, cut_log, read_log

RUN = {"command": "train.lora", "base": "abc", "lr": 0.1}


def opened(path, resume="auto", place=None, **identity) -> RunFolder:
    return RunFolder(path, resume=resume, identity=RUN | identity, checkpoints=place)


def begun(path, place=None) -> RunFolder:
    with opened(path, place=place) as folder:
        folder.begin({"lr": 0.1})
        (folder.state / "3").mkdir(parents=True)
    return folder


def test_a_setting_is_known_of_a_run_that_can_be_resumed_alone(tmp_path):
    assert recorded(tmp_path / "none", "lr") is None
    with opened(tmp_path / "a") as folder:
        folder.begin({})
    assert recorded(tmp_path / "a", "lr") is None  # no checkpoint
    begun(tmp_path / "a")
    assert (recorded(tmp_path / "a", "lr"), recorded(tmp_path / "a", "--pack")) == (0.1, None)
    (tmp_path / "a" / "run.json").write_text("{")
    assert recorded(tmp_path / "a", "lr") is None


@pytest.mark.parametrize(("written", "meant"), [(True, "full"), (False, "none"), ("full", "full")])
def test_a_run_of_an_earlier_version_can_be_resumed(written, meant, tmp_path):
    begun(tmp_path)
    flag = "--grad-checkpoint"
    (tmp_path / "run.json").write_text(json.dumps(RUN | {flag: written}))
    assert recorded(tmp_path, flag) == meant
    with opened(tmp_path, **{flag: meant}):
        pass
    with pytest.raises(UsageError, match=f'{flag} was "{meant}" and is "products"'):
        opened(tmp_path, **{flag: "products"})


def test_a_run_is_neither_overwritten_nor_changed(tmp_path):
    with opened(tmp_path / "a", "none", lr=1e30) as folder:  # started over: it has no checkpoint
        folder.begin({"lr": 1e30})
        folder.state.mkdir()
    begun(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "run.json").read_text()) == RUN
    with pytest.raises(UsageError, match=r'base was "abc" and is "x"; lr was 0.1 and is 0.2'):
        opened(tmp_path / "a", base="x", lr=0.2)
    with opened(tmp_path / "a"), pytest.raises(InputError, match="Another process is writing"):
        opened(tmp_path / "a")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis.txt"):
        opened(tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        opened(tmp_path / "thesis.txt" / "out")


def state() -> dict:
    trained = {"a": jnp.arange(6.0).reshape(2, 3)}
    return {"trained": trained, "optimizer": optax.adamw(1e-3).init(trained)}


def test_checkpoints_come_back_to_the_bit(tmp_path):
    saved = jax.tree.map(lambda x: x + 1, state())
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.newest is None
        for step in (1, 2, 3):
            checkpoints.save(step, saved, {"best": step})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.newest == 3
        found, position = checkpoints.restore(3, state())
    assert position == {"best": 3} and not (tmp_path / "1").exists()
    jax.tree.map(np.testing.assert_array_equal, found, saved)
    assert jax.tree.structure(found) == jax.tree.structure(saved)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_named(tmp_path, caplog, capfd):
    saved = {"a": jnp.arange(60_000.0), "b": jnp.zeros(3)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, saved, {})
        checkpoints.save(2, saved, {})

    def restoring(step: int, said: str) -> str | None:
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            with pytest.raises(CheckpointError, match=f"cannot be read\n.*\n.*{said}") as error:
                checkpoints.restore(step, saved)
        return error.value.why

    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file()]
    os.truncate(max(files, key=lambda path: path.stat().st_size), 10)
    why = restoring(2, "--resume auto resumes after step 1") or ""
    assert why.startswith("Requested byte range") and why.endswith("10")
    assert not caplog.records and "Traceback" not in capfd.readouterr().err
    (tmp_path / "2").rename(tmp_path / "two")
    os.truncate(next((tmp_path / "1" / "state").rglob("_METADATA")), 0)
    restoring(1, "--resume auto starts over")


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As a full disk: no file of this process can be longer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_reported_with_the_path(tmp_path):
    with opened(tmp_path) as folder, largest_file(4):
        with pytest.raises(InputError, match=f"{tmp_path} cannot be written\nFile too large"):
            folder.begin({"lr": 0.1})
    path = tmp_path / "log"
    with pytest.raises(InputError, match=f"{path} cannot be written"), largest_file(4):
        with Log(1, every=1, path=path) as log:
            log.step(1, 1, None, loss=1.0)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, caplog, capfd):
    large = {"a": jnp.asarray(np.random.default_rng(0).normal(size=2**16).astype(np.float32))}
    with pytest.raises(InputError, match="cannot be written\n.*File too large") as error:
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            checkpoints.save(1, large, {})
            checkpoints.finish()
            with largest_file(4096):
                checkpoints.save(2, large, {})
                checkpoints.finish()
    assert "resumes after step 1" in error.value.fix
    assert not caplog.records and capfd.readouterr().err == ""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.newest == 1
        found, _ = checkpoints.restore(1, large)
        np.testing.assert_array_equal(found["a"], large["a"])


def test_the_log_prints_the_first_the_last_and_what_is_due(tmp_path, capsys):
    for total, until in ((7, 7), (30, 13), (1, 1)):
        path = tmp_path / f"{total}.jsonl"
        with Log(total, every=10, path=path) as log:
            for step in range(1, until + 1):
                log.step(step, 5, 1000, loss=1.0 / step, lr=0.1)
            log.finish()
            log.finish()
            log.evaluation(until, "validation", loss=float("nan"))  # JSON has no NaN
        *lines, last = read_log(path)
        wanted = sorted({1, until} | set(range(10, until + 1, 10)))
        assert [line["step"] for line in lines] == wanted
        assert last == {"step": until, "loss": None, "split": "validation"}
        keys = {"step", "loss", "lr", "tokens_per_second", "memory_bytes", "split"}
        assert set(lines[0]) == keys
    shown = capsys.readouterr().err
    assert shown.count("tokens/s") == 2 + 3 + 1 and "step 10/30, loss 0.1, lr 0.1, " in shown


def test_a_log_is_continued_from_where_the_run_is(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "split": "train"}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "los')
    cut_log(path, 2)
    with Log(5, every=1, path=path, taken=2) as log:
        log.step(3, 1, None, loss=0.0)
    assert [line["step"] for line in read_log(path)] == [1, 2, 3]
    path.write_text("mine\n")
    with pytest.raises(InputError, match="is not the log of a training"):
        cut_log(path, 0)
    assert path.read_text() == "mine\n"
    cut_log("/dev/null", 0)
    cut_log(tmp_path / "none", 0)


# What follows is about checkpoints that are stored elsewhere.
@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs:// is a folder here; returns it."""

    class Bucket(LocalFileSystem):
        protocol, cachable = ("gcs", "gs"), False

        @classmethod
        def _strip_protocol(cls, path):
            return str(path).replace("gs://", f"{tmp_path}/gs/")

    (tmp_path / "gs/bucket").mkdir(parents=True)
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    monkeypatch.setattr(
        "etils.epath.backend._FileSystemSpecBackend._get_filesystem",
        lambda self, name: Bucket(auto_mkdir=True),
    )
    return tmp_path / "gs/bucket"


@pytest.mark.parametrize("place", ["kept", "gs://bucket/run"])
def test_another_machine_resumes_from_them(tmp_path, monkeypatch, bucket, place):
    monkeypatch.chdir(tmp_path)
    out = begun("one", place)
    assert {path.name for path in Path("one").iterdir()} == {".lock", "recipe.yml", "run.json"}
    assert {path.name for path in out.checkpoints.iterdir()} == {"run.json", "state"}
    assert out.log == Path("one/log.jsonl") and out.best == out.checkpoints / "best"
    with opened("two", place=place) as out:
        assert [path.name for path in out.state.iterdir()] == ["3"]
    with pytest.raises(UsageError, match=f"{place} holds another training: lr was 0.1 and is 1"):
        opened("three", place=place, lr=1)
    with pytest.raises(UsageError, match="holds a training already"):
        opened("four", "none", place)
    (kept,) = tmp_path.rglob("run/run.json") if "gs" in place else [tmp_path / "kept/run.json"]
    assert json.loads(kept.read_text()) == RUN
    kept.write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        opened("two", place=place)
    begun("five")
    with pytest.raises(UsageError, match="holds checkpoints itself"):
        opened("five", place=place)


def test_a_bucket_that_cannot_be_used(tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "out", place="gs://other/run")
    assert caught.value.what == "gs://other/run cannot be used"
    assert "install gcsfs" in caught.value.why and "Install gcsfs" in caught.value.fix
    with pytest.raises(InputError, match="gs://other/run/state cannot be used"):
        Checkpoints("gs://other/run/state", keep=1)


def test_what_may_be_named():
    flags = ["--data", "d", "--checkpoints"]
    for place in ("gs://bucket/run", "folder/run"):
        assert lora.parser().parse_args([*flags, place]).checkpoints == place
    with pytest.raises(UsageError, match="file system"):
        checkpoint_place("s3://bucket/run")
    for place in (" ", "gs:///"):
        with pytest.raises(argparse.ArgumentTypeError):
            checkpoint_place(place)


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    begun(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    monkeypatch.setattr(join, "is_first", lambda: False)
    with opened(tmp_path / "out") as one, opened(tmp_path / "out"):
        one.begin({"lr": 2})
    assert before == {path: path.read_bytes() for path in before}


def test_a_folder_that_not_all_see(tmp_path, monkeypatch):
    monkeypatch.setattr(join, "are_several", lambda: True)
    monkeypatch.setattr(join, "highest", lambda number: 1)  # another process does not see it
    for first in (True, False):
        monkeypatch.setattr(join, "is_first", lambda first=first: first)
        with pytest.raises(InputError, match="is not the same folder for all processes"):
            check_shared(tmp_path)
    assert not list(tmp_path.iterdir())
