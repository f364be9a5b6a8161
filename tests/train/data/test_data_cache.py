"""What large files hold is kept: the same dataset from it, and never another one."""

import json
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from glm2_jax.datasets.encode import Encoder
from glm2_jax.text.tokenizer import AddedToken
from tests.support.paths import ROOT
from tests.support.training_data import GLM2, GLM3, alpaca, open_files, write_rows
from train.data import scan as cache

ROWS = [
    alpaca("Q1", "A1", topic="x"),
    alpaca("", "A"),
    alpaca("Q2", "A2", history=[["a", "b"]]),
    alpaca("Q3", "A3", train=False),
    alpaca("Q4", "A4" * 60),
]
OPTIONS = [
    {},
    {"fmt": "alpaca"},
    {"max_length": 60},
    {"train_on_prompt": True},
    {"tokenizer": GLM3},
    {"tokenizer": GLM2.with_tokens("chatglm2", added=[AddedToken("Q", GLM2.size)])},
    {"tokenizer": GLM3, "template": "chatglm3"},
    {"preferred": "sharegpt"},
]


@pytest.fixture(autouse=True)
def any_file(monkeypatch):
    """Files of any size are kept."""
    monkeypatch.setattr(cache, "SMALL", 0)


def opened(paths, folder, **options):
    """The dataset with a cache, and how often something was encoded."""
    calls = patch.object(Encoder, "encode", autospec=True, side_effect=Encoder.encode)
    with calls as encode:
        dataset = open_files(paths, cache=str(folder), max_bad=None, **options)
    return dataset, encode.call_count


def facts(dataset):
    """All that a dataset says of its rows."""
    samples = [dataset.sample(n) for n in range(len(dataset))]
    return (
        samples, dataset.lengths.tolist(), dataset.learned.tolist(), dataset.rows, dataset.bad,
        dataset.bad_reasons, dataset.unused, dataset.marked, dataset.files,
        dataset.groups, dataset.first_of_rows().tolist(), dataset.lengths.dtype,
    )  # fmt: skip


def test_a_second_start_encodes_nothing(tmp_path):
    paths = [write_rows(tmp_path / "lines", ROWS), write_rows(tmp_path / "array", ROWS, array=True)]
    paths += [tmp_path / "data.csv", paths[0]]
    paths[2].write_text('instruction,output,history\nQ,A,\nQ,,\nQ,A,"[[""a"",""b""]]"\n')
    options = {"mix": (paths[1], 0.5)}
    first, encoded = opened(paths, tmp_path / "cache", **options)
    assert encoded > 0 and len(list((tmp_path / "cache").iterdir())) == 3
    second, encoded = opened(paths, tmp_path / "cache", **options)
    assert encoded == 0 and len(list((tmp_path / "cache").iterdir())) == 3
    plain = open_files(paths, max_bad=None, cache="off", **options)
    assert facts(first) == facts(second) == facts(plain) and not Path("off").exists()


def test_every_option_and_every_change_has_an_entry_of_its_own(tmp_path):
    path, folder = write_rows(tmp_path / "data", ROWS), tmp_path / "cache"
    for number, options in enumerate(OPTIONS, 1):
        dataset, encoded = opened([path], folder, **options)
        assert encoded > 0 and len(list(folder.iterdir())) == number
        assert facts(dataset) == facts(open_files([path], max_bad=None, cache="off", **options))
    moved = path.rename(tmp_path / "moved")
    dataset, encoded = opened([moved], folder)
    assert encoded == 0 and dataset.source(0) == f"{moved}:1"
    assert dataset.bad[0][0] == f"{moved}:2"
    assert opened([write_rows(tmp_path / "data", ROWS[::-1])], folder)[1] > 0
    with patch.object(cache, "_code", lambda: "of another version"):
        assert opened([moved], folder)[1] > 0


@pytest.mark.parametrize("damage", ["bit", "cut", "column"])
def test_a_damaged_entry_is_made_again(tmp_path, damage):
    path, folder = write_rows(tmp_path / "data", ROWS), tmp_path / "cache"
    expected = facts(opened([path], folder)[0])
    [entry] = folder.iterdir()
    data = bytearray(entry.read_bytes())
    if damage == "column":  # one is shorter than the others
        with np.load(entry) as stored, open(entry.with_suffix(".new"), "wb") as file:
            np.savez(file, **{**stored, "length": stored["length"][:-1]})
        data = entry.with_suffix(".new").read_bytes()
    elif damage == "cut":
        del data[-30:]
    else:
        data[200] = 0x63
    entry.write_bytes(data)
    dataset, encoded = opened([path], folder)
    assert facts(dataset) == expected and encoded > 0
    assert opened([path], folder)[1] == 0


def test_small_files_other_places_and_folders_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    path, folder = write_rows(tmp_path / "data", ROWS), tmp_path / "cache"
    monkeypatch.setattr(cache, "SMALL", 2**20)
    opened([path], folder)
    assert not folder.exists()
    monkeypatch.setattr(cache, "SMALL", 0)
    monkeypatch.setenv(cache.VARIABLE, str(folder))
    open_files([path], max_bad=None)
    assert len(list(folder.iterdir())) == 1 and capsys.readouterr().err == ""
    dataset, _ = opened([path], path / "cache")
    assert len(dataset) == 4
    assert capsys.readouterr().err.count("warning: the data cache cannot be written") == 1


OPEN = """
import sys
from tests.support.training_data import open_files
from train.data import scan as cache
cache.SMALL = 0
for n in range(int(sys.argv[3])):
    dataset = open_files([sys.argv[1]], cache=sys.argv[2], max_length=300 + n)
    assert len(dataset) == 40 and dataset.source(39).endswith(":40"), len(dataset)
print("good")
"""


def test_parallel_and_killed_processes(tmp_path):
    path = write_rows(tmp_path / "data", [alpaca(f"Q{n}") for n in range(40)])
    command = [sys.executable, "-c", OPEN, str(path), str(tmp_path / "cache")]

    def start(count):
        return subprocess.Popen([*command, str(count)], cwd=ROOT, stdout=subprocess.PIPE, text=True)

    killed = start(10_000)
    folder, until = tmp_path / "cache", time.monotonic() + 120
    while (not folder.exists() or not any(folder.iterdir())) and time.monotonic() < until:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    together = [start(20) for _ in range(2)]
    assert [process.communicate()[0] for process in together] == ["good\n"] * 2
    complete = [entry for entry in folder.glob("*-cache") if entry.name.count("-cache") == 1]
    assert complete
    for entry in complete:
        with np.load(entry) as stored:
            assert len(stored["length"]) == json.loads(str(stored["facts"]))["rows"] == 40
