"""Rows of data files: found by their place, whatever the file holds, in little memory."""

import hashlib
import json
import os
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax.errors import InputError
from infer.datasets import index
from infer.datasets.index import MAX_ROW, DataFile
from infer.evaluate.rows import read_rows

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
BLANKS = st.text(" \t\r\n", max_size=3)


def write(folder, data: str | bytes, name: str = "data.json"):
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def rows_of(path, **kwargs):
    file = DataFile(path, **kwargs)
    rows = list(file.rows())
    data = path.read_bytes()
    assert file.sha256 == hashlib.sha256(data).hexdigest() and file.size == len(data)
    for row in rows:
        assert data.count(b"\n", 0, row.offset) == row.line - 1
        assert isinstance(row.data, InputError) or file.read(row.offset, row.size) == row.data
    return rows


def peak_of(action):
    tracemalloc.start()
    try:
        return action(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_lines(tmp_path, bom):
    path = write(tmp_path, bom + b'{"a": 1}\r\n\n  \n{"b":\t"\xe4\xbd\xa0"}\nnonsense')
    rows = rows_of(path)
    assert [row.line for row in rows] == [1, 4, 5]
    assert [row.data for row in rows] == [b'{"a": 1}\r\n', b'{"b":\t"\xe4\xbd\xa0"}\n', b"nonsense"]


@settings(deadline=None, database=None, max_examples=60)
@given(values=st.lists(st.tuples(BLANKS, VALUE, BLANKS), max_size=6), bom=st.booleans())
@pytest.mark.parametrize(("piece", "ascii_only"), [(5, True), (5, False), (1 << 20, False)])
def test_elements_of_an_array(tmp_path_factory, piece, ascii_only, values, bom):
    texts = [a + json.dumps(v, ensure_ascii=ascii_only) + b for a, v, b in values]
    data = ("\ufeff" if bom else "") + "\n[" + ",".join(texts) + "]\n"
    path = write(tmp_path_factory.mktemp("array"), data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "_PIECE", piece)
        rows = rows_of(path)
    assert [json.loads(row.data or b"") for row in rows] == [value for _, value, _ in values]


def test_a_broken_array_is_refused(tmp_path):
    for data, message in (
        ('[{"a": 1},\n {"b": }]', ":2: not JSON: Expecting value"),
        ('[{"a": 1}\n {"b": 2}]', ":2: a comma is missing after a row"),
        ('[{"a": 1},\n]', ":2: not JSON: Expecting value"),
        ('[{"a": 1},\n {"b": 2}\n', ":3: the end of the array is missing"),
        ('[{"a": 1}]\n\n{"b": 2}', ":3: extra text after the end of the array"),
        ("[" * 200_000, ":1: a row is nested too deeply"),
    ):
        path = write(tmp_path, data)
        with pytest.raises(InputError, match="JSON lines") as error:
            list(DataFile(path).rows())
        assert error.value.what.startswith(f"{path}{message}")


def test_an_error_early_in_a_long_array_is_found_early(tmp_path, monkeypatch):
    path = write(tmp_path, '[{"a" 1}' + " " * 5_000_000)

    def check():
        with pytest.raises(InputError, match=":1: not JSON: Expecting ':' delimiter"):
            list(DataFile(path).rows())

    assert peak_of(check)[1] < 5_000_000
    path = write(tmp_path, '[{"a": "' + "x" * 10_000)
    monkeypatch.setattr(index, "_PIECE", 100)
    with pytest.raises(InputError, match=":1: a row is longer than 1000 bytes, or its end"):
        list(DataFile(path, max_row=1000).rows())


def test_a_row_of_an_array_that_is_too_long_is_not_kept(tmp_path):
    long = json.dumps({"a": "x" * 3000})
    found = rows_of(write(tmp_path, f'[{{"a": 1}},{long},{{"a": 1}}]'), max_row=1000)
    assert [isinstance(row.data, InputError) for row in found] == [False, True, False]
    assert found[1].size == len(long) and found[2].data == b'{"a": 1}'


def test_an_immense_line_takes_little_memory(tmp_path):
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n{"a": "x')
        file.seek(60_000_000)  # leaves a hole, which takes no space on the disk
        file.write(b'"}\n{"a": 2}\n')
    rows, peak = peak_of(lambda: list(DataFile(path).rows()))
    assert [row.line for row in rows] == [1, 2, 3]
    assert [isinstance(row.data, InputError) for row in rows] == [False, True, False]
    assert rows[1].size > 59_000_000 and peak < 2.5 * MAX_ROW
    found = list(read_rows(str(path)))  # evaluation reads alike
    assert [where for where, _ in found] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert "too long to be read" in str(found[1][1]) and found[2][1] == {"a": 2}


@pytest.mark.parametrize("as_array", [False, True])
def test_a_long_file_takes_little_memory(tmp_path, as_array):
    row = json.dumps({"instruction": "问" * 300, "output": "答" * 300}, ensure_ascii=False)
    joint, ends = (",\n", "[]") if as_array else ("\n", ("", ""))
    path = write(tmp_path, ends[0] + joint.join([row] * 5000) + ends[1])
    count, peak = peak_of(lambda: sum(1 for _ in DataFile(path).rows()))
    assert count == 5000 and path.stat().st_size > 9_000_000 and peak < 8_000_000


def test_what_cannot_be_read(tmp_path):
    assert rows_of(write(tmp_path, " [ \n ] ")) == []
    for data, message in (
        (b" \r\n\n\t", "has no rows\nit is empty"),
        (b"\xef\xbb\xbf", "has no rows\nit is empty"),
        ('{"a": "问"}'.encode("utf-16"), "is not UTF-8 text\nit looks like UTF-16"),
        ('{"a": 1}\n'.encode("utf-32"), "is not UTF-8 text\nit looks like UTF-32"),
    ):
        with pytest.raises(InputError, match=message):
            DataFile(write(tmp_path, data))
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("missing", "No such file"),
        (".", "it is a folder"),
        ("pipe", "it is a pipe"),
        ("a\0b", "null"),
    ):
        with pytest.raises(InputError, match=f"cannot read .*\n.*{message}"):
            DataFile(tmp_path / name)
