"""Where the checkpoints of a training are: elsewhere, in a bucket, of several processes."""

import argparse
import json
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from glm2_jax.errors import InputError, UsageError
from glm2_jax.processes import join
from train import lora
from train.options import checkpoint_place
from train.run_folder.checkpoints import Checkpoints
from train.run_folder.folder import RunFolder, check_shared

RUN = {"command": "train.lora", "lr": 0.1}


def opened(output, place, *, resume="auto", identity=None):
    return RunFolder(output, resume=resume, identity=identity or RUN, checkpoints=str(place))


def begun(output, place):
    with opened(output, place) as out:
        out.begin({"lr": 0.1})
        (out.state / "3").mkdir(parents=True)
        return out


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
    with opened("two", place) as out:
        assert [path.name for path in out.state.iterdir()] == ["3"]
    with pytest.raises(UsageError, match=f"{place} holds another training: lr was 0.1 and is 1"):
        opened("three", place, identity=RUN | {"lr": 1})
    with pytest.raises(UsageError, match="holds a training already"):
        opened("four", place, resume="none")
    (kept,) = tmp_path.rglob("run/run.json") if "gs" in place else [tmp_path / "kept/run.json"]
    assert json.loads(kept.read_text()) == RUN
    kept.write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        opened("two", place)
    begun("five", "five")
    with pytest.raises(UsageError, match="holds checkpoints itself"):
        opened("five", place)


def test_a_bucket_that_cannot_be_used(tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "out", "gs://other/run")
    assert caught.value.what == "gs://other/run cannot be used"
    assert "install gcsfs" in caught.value.why and "extra gcs" in caught.value.fix
    with pytest.raises(InputError, match="gs://other/run/state cannot be used"):
        Checkpoints("gs://other/run/state", keep=1)


def test_what_may_be_named():
    for place in ("gs://bucket/run", "folder/run", "/run"):
        assert checkpoint_place(place) == place
    for place in ("s3://bucket/run", "https://host/run"):
        with pytest.raises(UsageError, match="file system"):
            checkpoint_place(place)
    for place in ("", " ", "gs://", "gs:///"):
        with pytest.raises(argparse.ArgumentTypeError):
            checkpoint_place(place)
    assert lora.parser().parse_args(["--data", "d", "--checkpoints", "gs://b"]).checkpoints


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    begun(tmp_path / "out", tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    monkeypatch.setattr(join, "is_first", lambda: False)
    with opened(tmp_path / "out", tmp_path / "out") as one, opened(tmp_path / "out", one.path):
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
