"""What large files hold is kept: the same dataset from it, and never another one."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from glm2_jax.text.tokenizer import AddedToken
from infer.datasets.encode import Encoder
from tests.support.paths import ROOT
from tests.support.training_data import GLM2, GLM3, alpaca, open_files, write_rows
from train.data import cache
from train.data.cache import cached_scan

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


def opened(path, folder, **options):
    """The dataset with a cache for any file, and how often something was encoded."""
    calls = patch.object(Encoder, "encode", autospec=True, side_effect=Encoder.encode)
    with calls as encode:
        scan = partial(cached_scan, folder=str(folder), small=0)
        dataset = open_files([path], scan=scan, max_bad=None, **options)
    return dataset, encode.call_count


def facts(dataset):
    """All that a dataset says of its rows."""
    samples = [dataset.sample(n) for n in range(len(dataset))]
    return (
        samples, dataset.lengths.tolist(), dataset.learned.tolist(), dataset.rows, dataset.bad,
        dataset.bad_reasons, dataset.unused, dataset.marked, dataset.files,
        dataset.groups, dataset.first_of_rows().tolist(), dataset.lengths.dtype,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["lines", "array", "csv"])
def test_a_second_start_encodes_nothing(tmp_path, kind):
    path = tmp_path / ("data.csv" if kind == "csv" else "data")
    if kind == "csv":
        path.write_text('instruction,output,history\nQ,A,\nQ,,\nQ,A,"[[""a"",""b""]]"\n')
    else:
        write_rows(path, ROWS, array=kind == "array")
    first, encoded = opened(path, tmp_path / "cache")
    assert encoded > 0
    second, encoded = opened(path, tmp_path / "cache")
    assert encoded == 0
    assert facts(first) == facts(second) == facts(open_files([path], max_bad=None))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_every_option_and_every_change_has_an_entry_of_its_own(tmp_path):
    path, folder = write_rows(tmp_path / "data", ROWS), tmp_path / "cache"
    for number, options in enumerate(OPTIONS, 1):
        dataset, encoded = opened(path, folder, **options)
        assert encoded > 0 and len(list(folder.iterdir())) == number
        assert facts(dataset) == facts(open_files([path], max_bad=None, **options))
    moved = path.rename(tmp_path / "moved")
    dataset, encoded = opened(moved, folder)
    assert encoded == 0 and dataset.source(0) == f"{moved}:1"
    assert dataset.bad[0][0] == f"{moved}:2"
    assert opened(write_rows(tmp_path / "data", ROWS[::-1]), folder)[1] > 0
    with patch.object(cache, "_code", lambda: "of another version"):
        assert opened(moved, folder)[1] > 0


@pytest.mark.parametrize("damage", [200, -30, None, "method"])
def test_a_damaged_entry_is_made_again(tmp_path, damage):
    path, folder = write_rows(tmp_path / "data", ROWS), tmp_path / "cache"
    expected = facts(opened(path, folder)[0])
    [entry] = folder.iterdir()
    data = entry.read_bytes()
    if damage is None:  # a column is shorter than the others
        with np.load(entry) as stored:
            np.savez(entry.with_suffix(".npz"), **{**stored, "length": stored["length"][:-1]})
        entry.with_suffix(".npz").replace(entry)
    elif damage == "method":  # one that zipfile does not know
        at = data.rindex(b"PK\x01\x02") + 10
        entry.write_bytes(data[:at] + b"\x63" + data[at + 1 :])
    else:
        entry.write_bytes(
            data[:damage] if damage <= 0 else data[:damage] + b"\xff" + data[damage + 1 :]
        )
    dataset, encoded = opened(path, folder)
    assert facts(dataset) == expected and encoded > 0
    assert opened(path, folder)[1] == 0


def test_small_files_and_none_wanted(tmp_path, monkeypatch):
    path, folder = write_rows(tmp_path / "data", ROWS), tmp_path / "cache"
    for scan in (
        partial(cached_scan, folder=str(folder)),
        partial(cached_scan, folder="off", small=0),
    ):
        open_files([path], scan=scan, max_bad=None)
    assert not folder.exists() and not Path("off").exists()
    monkeypatch.setenv(cache.VARIABLE, str(folder))
    open_files([path], scan=partial(cached_scan, folder=None, small=0), max_bad=None)
    assert len(list(folder.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    path, notes = write_rows(tmp_path / "data", ROWS), []
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "cache")
    scan = partial(cached_scan, folder=folder, warn=notes.append, small=0)
    dataset = open_files([path], scan=scan, max_bad=None)
    assert len(dataset) == 4 and "the data cache cannot be written" in notes[0] and len(notes) == 1


OPEN = """
import sys
from functools import partial
from tests.support.training_data import open_files
from train.data.cache import cached_scan
scan = partial(cached_scan, folder=sys.argv[2], small=0)
for n in range(int(sys.argv[3])):
    dataset = open_files([sys.argv[1]], scan=scan, max_length=300 + n)
    assert len(dataset) == 40 and dataset.sample(39).source.endswith(":40"), len(dataset)
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
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    together = [start(20) for _ in range(2)]
    assert [process.communicate()[0] for process in together] == ["good\n"] * 2
    complete = [entry for entry in folder.glob("*-cache") if entry.name.count("-cache") == 1]
    assert complete
    for entry in complete:
        with np.load(entry) as stored:
            assert len(stored["length"]) == json.loads(str(stored["facts"]))["rows"] == 40


def test_a_dataset_of_several_files(tmp_path):
    one = write_rows(tmp_path / "one", ROWS)
    two = write_rows(tmp_path / "two", ROWS[:1], array=True)
    scan = partial(cached_scan, folder=str(tmp_path / "cache"), small=0)
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        dataset = open_files(
            [one, two, one], scan=scan, max_bad=None, mix=(two, 0.5),
            progress=lambda done, total: seen.append((done, total)),
        )  # fmt: skip
        assert seen[-1][0] == seen[-1][1] and len(dataset) == 4 + 1 + 4 + 1
        assert dataset.source(9) == f"{two}:1"
    assert len(list((tmp_path / "cache").iterdir())) == 2
