"""Tables and packed files as rows: CSV, TSV, Parquet, gzip."""

import gzip
import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from glm2_jax.errors import InputError
from infer.datasets.index import PACKED, DataFile
from infer.evaluate.rows import BadRows, parse_row, read_rows
from tests.support.training_data import alpaca, open_files, write_rows

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
