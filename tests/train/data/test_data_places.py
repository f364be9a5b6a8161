"""What distinguishes a row from all others, and where it is for people."""

import json

import pytest

from glm2_jax.errors import InputError
from infer.evaluate.rows import read_rows
from tests.support.training_data import alpaca, open_files, open_rows, write_rows
from train.data.batches import Batches
from train.data.check import check
from train.data.split import split

ROWS = [alpaca(f"Q{n}", f"A{n}") for n in range(40)]
LAYOUTS = {
    "one line": json.dumps(ROWS),
    "four lines": "[" + ",\n".join(", ".join(map(json.dumps, ROWS[n::4])) for n in range(4)) + "]",
    "a row a line": json.dumps(ROWS, indent=1),
    "lines": "\n".join(map(json.dumps, ROWS)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_split_and_named_however_the_file_is_laid_out(tmp_path, layout):
    path = tmp_path / "data.json"
    path.write_text(LAYOUTS[layout])
    dataset = open_files([path])
    kept, out = split(dataset, 0.25, 3)
    assert (len(kept), len(out)) == (30, 10)
    expected = split(open_rows(tmp_path / "lines", ROWS), 0.25, 3)[1]
    if layout != "four lines":  # another order
        assert [out.sample(n).ids for n in range(10)] == [expected.sample(n).ids for n in range(10)]
    places = [dataset.source(index) for index in range(40)]
    assert len(set(places)) == 40
    one = {"one line": ", row 18", "four lines": ", row 18", "lines": ":18"}.get(layout, ":70")
    assert f"{path}{one}" in places
    batches = Batches(dataset, batch_size=4, accumulate=10)
    assert set(batches.at(0, 0).sources) == set(places)
    assert [where for where, _ in read_rows(str(path))] == places  # evaluation names the same


def test_all_sequences_of_a_row_stay_together_in_one_line(tmp_path):
    rows = [alpaca(f"Q{n}", history=[["a", "b"], ["c", "d"]]) for n in range(8)]
    dataset = open_rows(tmp_path / "data", rows, array=True)
    for part in split(dataset, 0.5, 0):
        names = [part.source(index) for index in range(len(part))]
        assert len(names) == 12 and sorted(names) == sorted(3 * list(dict.fromkeys(names)))


def test_a_row_of_a_file_that_is_given_twice_is_on_one_side(tmp_path):
    path = write_rows(tmp_path / "data", ROWS, array=True)
    copy = write_rows(tmp_path / "copy", ROWS, array=True)
    kept, out = split(open_files([path, path, copy]), 0.25, 1)
    assert (len(kept), len(out)) == (90, 30)
    sides = [{tuple(part.sample(n).ids) for n in range(len(part))} for part in (kept, out)]
    assert not sides[0] & sides[1]


def test_bad_rows_of_one_line_are_told_apart(tmp_path):
    rows = [*ROWS[:17], alpaca(answer=""), *ROWS[:15], alpaca(answer=5), alpaca(answer="")]
    path, notes = tmp_path / "data", []
    dataset = open_rows(path, rows, array=True, max_bad=3, on_note=notes.append)
    assert [where for where, _ in dataset.bad] == [f"{path}, row {n}" for n in (18, 34, 35)]
    assert notes[0] == f"{path}, row 18, 35: output is empty (2 rows)"
    report = check(dataset)
    assert f"{path}, row 34: output is not a string: it is of type int" in report.text()
    repeated = [pair for pair in report.repeats if pair[0] == f"{path}, row 19"]
    assert repeated == [(f"{path}, row 19", f"{path}, row 1")]
    rows = [alpaca(), alpaca(), {"content": "Q", "summary": "A"}]
    with pytest.raises(InputError, match="row 1 is alpaca, row 3 is adgen"):
        open_rows(path, rows, array=True)


def test_a_file_of_immense_rows_is_read_in_little_memory(tmp_path):
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.write(json.dumps(ROWS[0]).encode() + b'\n{"text": "x')
        file.seek(60_000_000)  # leaves a hole, which takes no space on the disk
        file.write(b'"}\n' + json.dumps(ROWS[1]).encode())
    found = list(read_rows(str(path)))
    assert [where for where, _ in found] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert "too long to be read" in str(found[1][1]) and found[2][1] == ROWS[1]
    dataset = open_files([path], max_bad=1)
    assert dataset.bad[0][0] == f"{path}:2"
    assert dataset.lengths.tolist() == open_rows(tmp_path / "a", ROWS[:2]).lengths.tolist()
