"""The folder of a run, its log and its checkpoints."""

import contextlib
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm2_jax.errors import CheckpointError, InputError, UsageError
from train.loop import Position
from train.run_folder.checkpoints import Checkpoints
from train.run_folder.checkpoints import _quieten as quieten
from train.run_folder.folder import RunFolder
from train.run_folder.log import Log, cut_log, read_log

RUN = {"base": "abc", "lr": 0.1}


def opened(path, resume="auto", **identity) -> RunFolder:
    return RunFolder(path, resume=resume, identity=RUN | identity)


def begun(path, **identity) -> None:
    with opened(path, "none", **identity) as folder:
        folder.begin({"lr": 0.1})
        (folder.state / "3").mkdir(parents=True)


def test_a_run_without_a_checkpoint_is_started_over(tmp_path):
    opened(tmp_path, "none", base="wrong").__exit__()
    assert not (tmp_path / "run.json").exists()
    with opened(tmp_path, "none", lr=1e30) as folder:
        folder.begin({"lr": 1e30})
        folder.state.mkdir()
    begun(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text()) == RUN
    with opened(tmp_path) as folder:
        assert folder.state.is_dir()


def test_a_run_is_neither_overwritten_nor_changed(tmp_path):
    begun(tmp_path)
    with pytest.raises(UsageError, match="holds a training already"):
        opened(tmp_path, "none")
    with pytest.raises(UsageError, match=r'base was "abc" and is "x"; lr was 0.1 and is 0.2'):
        opened(tmp_path, base="x", lr=0.2)
    with opened(tmp_path), pytest.raises(InputError, match="Another process is writing"):
        opened(tmp_path)


def test_folders_that_are_refused(tmp_path):
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
    assert position == {"best": 3}
    jax.tree.map(np.testing.assert_array_equal, found, saved)
    assert jax.tree.structure(found) == jax.tree.structure(saved)
    assert not (tmp_path / "1").exists()


def test_a_damaged_checkpoint_is_refused(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state(), {})
    for path in (tmp_path / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(CheckpointError, match="cannot be read\n.*\n.* starts over"):
            checkpoints.restore(1, state())


@pytest.mark.parametrize("saved", [{}, {"step": 3}, {"step": "2"}, {"step": 2, "waited": "1"}])
def test_a_damaged_position_is_refused(saved):
    with pytest.raises(CheckpointError, match="after step 2 is damaged"):
        Position.restored(saved, 2)
    assert Position.restored({"step": 2, "best": 1.5}, 2) == Position(2, 1.5)


def test_a_cut_checkpoint_is_refused_and_the_one_before_it_named(tmp_path, caplog, capfd):
    saved = {"a": jnp.arange(60_000.0), "b": jnp.zeros(3)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, saved, {})
        checkpoints.save(2, saved, {})
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file()]
    os.truncate(max(files, key=lambda path: path.stat().st_size), 10)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(CheckpointError, match="--resume auto resumes after step 1") as error:
            checkpoints.restore(2, saved)
    assert error.value.why.startswith("Requested byte range") and error.value.why.endswith("10")
    assert not caplog.records and "Traceback" not in capfd.readouterr().err


def test_only_messages_of_orbax_are_hidden(monkeypatch, caplog):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    quieten.__wrapped__()
    sys.unraisablehook(unraised(None, "Event loop is closed"))  # from a thread of TensorStore
    kept = [unraised(None, "something else"), unraised(object(), "Event loop is closed")]
    for one in kept:
        sys.unraisablehook(one)
    assert printed == kept
    logging.getLogger("absl").error("of another library")
    logging.getLogger("asyncio").error("slow")
    logging.getLogger("asyncio").error("Future exception was never retrieved")
    assert caplog.messages == ["of another library", "slow"]


def unraised(owner, message: str) -> Any:
    return SimpleNamespace(object=owner, exc_value=RuntimeError(message))


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
    with pytest.raises(InputError, match="cannot be written"):
        Log(1, every=1, path=tmp_path / "none" / "log.jsonl")


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, earlier, caplog, capfd):
    large = {"a": jnp.asarray(np.random.default_rng(0).normal(size=2**16).astype(np.float32))}
    with pytest.raises(InputError, match="cannot be written\n.*File too large") as error:
        with Checkpoints(tmp_path, keep=2) as checkpoints, contextlib.ExitStack() as stack:
            if earlier:
                checkpoints.save(1, large, {})
                checkpoints.finish()
            stack.enter_context(largest_file(4096))
            checkpoints.save(2, large, {})
            checkpoints.finish()
    assert ("resumes after step 1" if earlier else "starts over") in error.value.fix
    assert not caplog.records and capfd.readouterr().err == ""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.newest == (1 if earlier else None)
        if earlier:
            found, _ = checkpoints.restore(1, large)
            np.testing.assert_array_equal(found["a"], large["a"])


def test_the_log_prints_what_is_due(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    with Log(5, every=2, path=path) as log:
        for step in range(1, 6):
            log.step(step, 10, 1000, loss=1.0 / step, lr=0.1)
        log.evaluation(5, "validation", loss=float("nan"))  # JSON has no NaN
    lines = read_log(path)
    assert [line["step"] for line in lines] == [1, 2, 4, 5, 5]
    assert lines[-1] == {"step": 5, "loss": None, "split": "validation"}
    assert set(lines[0]) == {
        "step", "loss", "lr", "tokens_per_second", "memory_bytes", "split",
    }  # fmt: skip
    assert "step 2/5, loss 0.5, lr 0.1" in capsys.readouterr().err


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
