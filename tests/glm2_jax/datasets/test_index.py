"""Rows of data files and tables: found by their place, whatever they hold, in little memory."""

import gzip
import hashlib
import json
import os
import sys
import tracemalloc
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax.datasets import index
from glm2_jax.datasets.index import MAX_ROW, PACKED, DataFile
from glm2_jax.datasets.rows import parse_row, read_rows
from glm2_jax.errors import InputError
from infer.evaluate.rows import BadRows
from tests.support.training_data import alpaca, open_files, write_rows

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
        ('{"a": "问"}'.encode("utf-16"), "it looks like UTF-16\n.*iconv -f UTF-16 "),
        ('{"a": 1}\n'.encode("utf-32"), "it looks like UTF-32\n.*iconv -f UTF-32 "),
        (("你好世界" * 9).encode("utf-32"), "it looks like UTF-32\n.*iconv -f UTF-32 "),
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


# What follows is about tables and packed files: CSV, TSV, Parquet, gzip.
ROWS = [
    alpaca("一加一，等于几？", 'He said "2".\nTwo.', input="", history=[["a", "b"]]),
    alpaca("Q2", "A2", input=" ", history=None),
    alpaca("Q3", "A3", input="x,y", history=[]),
]
CSV = (
    ",instruction,input,output,history,weight\r\n"
    '0,一加一，等于几？,,"He said ""2"".\nTwo.","[[""a"", ""b""]]",1\r\n'
    "\r\n"
    '1,Q2," ",A2,,\r\n'
    '2,Q3,"x,y",A3,[],1\r\n'
)


def messages(path, **options):
    dataset = open_files([path], **options)
    return [dataset.messages(int(n)) for n in dataset.first_of_rows()], dataset


@pytest.fixture
def expected(tmp_path):
    return messages(write_rows(tmp_path / "lines", ROWS))[0]


@pytest.mark.parametrize("name", ["DATA.CSV", "d.tsv.gz"])
def test_a_table_in_text(tmp_path, expected, name):
    text = "\ufeff" * name.isupper() + CSV
    if ".tsv" in name:
        text = CSV.replace("x,y", "xTy").replace(",", "\t")
        text = text.replace('""\t ""', '"", ""').replace("xTy", "x,y")
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found, dataset = messages(path)
    assert found == expected and dataset.unused == {"column 1": 3}
    places = [dataset.source(int(n)) for n in dataset.first_of_rows()]
    assert places == [f"{path}:{n}" for n in (2, 5, 6)]
    evaluated = BadRows().keep(read_rows(str(path)), parse_row)
    assert evaluated == list(zip(places, expected, strict=True))


def test_bad_rows_of_a_table(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(
        'instruction,output,train\nQ,A,\nQ,A,1,2\n"Q\nQ",A\nQ,A,no way\nQ,A,0\nQ,"",1\n'
    )
    dataset = open_files([path], max_bad=None)
    why = ": a text with the separator or a line break must be in quotes"
    mark = "train of the row is 'no way': write 1 or true to learn the answer, 0 or false to leave"
    assert dataset.bad == [
        (f"{path}:3", f"4 cells, but the header has 3{why}"),
        (f"{path}:4", f"2 cells, but the header has 3{why}"),
        (f"{path}:6", f"{mark} it out"),
        (f"{path}:8", "output is empty"),
    ]
    assert len(dataset) == 1 and dataset.marked == 1


def test_tables_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "data.csv"
    monkeypatch.setattr("train.data.dataset.DataFile", partial(DataFile, max_row=60))
    for data, message in (
        (b"", "has no rows\nit is empty"),
        (b"instruction,output\n", "has no rows\nit has only a header"),
        (b"a,b,a\n1,2,3\n", "has the column 'a' twice"),
        ("instruction,output\n今天天气很好,今天\n".encode("gb18030"), ":2: not UTF-8\nbyte 1 "),
        (b'instruction,output\n"Q,A\n' + b"x\n" * 40, ":2: not CSV\nfield larger"),
        (b"instruction,output\nQ," + b"A" * 100, ":2: the line is longer than 60 bytes"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            open_files([path])


@pytest.mark.parametrize("array", [False, True])
def test_rows_packed_by_gzip(tmp_path, expected, array):
    plain = write_rows(tmp_path / "plain", ROWS, array=array)
    path = tmp_path / "data"  # by what it holds, not by its name
    path.write_bytes(gzip.compress(plain.read_bytes()))
    found, dataset = messages(path)
    assert found == expected and dataset.source(0) == f"{path}{', row 1' if array else ':1'}"
    for cut in (12, -4):
        path.write_bytes(gzip.compress(plain.read_bytes())[:cut])
        with pytest.raises(InputError, match="its gzip data are damaged"):
            open_files([path])


def test_parquet(tmp_path, expected, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "data"
    rows = [row | {"tools": None, "made": None} for row in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found, dataset = messages(path)
    assert found == expected and dataset.source(0) == f"{path}, row 1" and not dataset.unused
    talk = {
        "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "w": 1}]
    }
    none = dict.fromkeys(alpaca())
    parquet.write_table(pyarrow.Table.from_pylist([talk | none, alpaca()]), path)  # NULLs in both
    with pytest.raises(InputError, match="row 1 is sharegpt, row 2 is alpaca"):
        open_files([path])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="it is not a Parquet file"):
        open_files([path])
    rows = [alpaca("问".encode(), b"A", picture=b"\x89\xff"), alpaca(b"Q", b"\xff")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)  # bytes are text, or not learned
    dataset = open_files([path], max_bad=None)
    assert [message["content"] for message in dataset.messages(0)] == ["问", "A"]
    assert dataset.unused == {"picture": 1}
    assert dataset.bad == [(f"{path}, row 2", "output is not a string: it is of type dict")]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pyarrow is not installed\npip install pyarrow, or write"):
        open_files([path])


def test_files_that_have_to_be_converted_first(tmp_path):
    twice = gzip.compress(gzip.compress(b"{}\n"))
    path = tmp_path / "data.csv"
    for start in PACKED:
        path.write_bytes(twice if twice.startswith(start) else start.ljust(8, b"\0"))
        for read in (lambda: open_files([path]), lambda: list(read_rows(str(path)))):
            with pytest.raises(InputError, match="it is (a|an|packed) ") as caught:
                read()
            assert caught.value.fix


def test_evaluation_reads_standard_input(tmp_path, monkeypatch):
    rows = "\n".join(map(json.dumps, ROWS))
    for data, places in ((rows, ["-:1", "-:2", "-:3"]), ("just a text", ["-"])):
        with open(write_rows(tmp_path / "in", [data]), "rb") as file:
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
            assert [where for where, _ in read_rows("-")] == places
