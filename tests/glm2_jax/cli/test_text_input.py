"""Text from outside: encodings and their guesses, the largest texts and lines."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from glm2_jax.cli import text_input
from glm2_jax.cli.messages import human_size
from glm2_jax.cli.text_input import EndlessLine, open_input, read_lines, read_utf8
from glm2_jax.errors import InputError
from infer.requests.request import read_prompt
from tests.support.paths import ROOT

CHINESE = "今天天气怎么样？请写一首关于春天的诗。"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "a.txt"


def test_utf8_is_read_with_and_without_a_mark_and_nothing_else(file):
    for mark in (b"", b"\xef\xbb\xbf"):
        file.write_bytes(mark + f"{CHINESE}\0\n".encode())
        assert read_utf8(file) == f"{CHINESE}\0\n"  # single NULs are text
    for data, why in (
        (CHINESE.encode("gb18030"), "byte 1 cannot be read\n.*iconv -f GB18030"),
        (CHINESE.encode("utf-16"), "UTF-16"),
        ("hello 你好".encode("utf-16-be"), "UTF-16"),
        ("hello".encode("utf-32"), "UTF-32"),
        (b"one\ntw\xff", "line 2, byte 7"),
    ):
        file.write_bytes(data)
        with pytest.raises(InputError, match=rf"a\.txt is not UTF-8 text\n.*{why}"):
            read_utf8(file)


def test_files_that_cannot_be_read(tmp_path, file, monkeypatch):
    file.touch(mode=0)
    for path in (tmp_path / "missing", tmp_path, "a\0b", *[file] * bool(os.getuid())):
        with pytest.raises(InputError, match="cannot read"):
            read_utf8(path)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InputError, match="closed"):
        read_prompt("-")


@pytest.mark.parametrize("name", ["/dev/zero", "-"])
def test_what_has_no_end_is_refused(monkeypatch, name):
    """A character device, and a pipe into which another process keeps writing."""
    with subprocess.Popen(["cat", "/dev/zero"], stdout=subprocess.PIPE) as process:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=process.stdout))
        with pytest.raises(InputError, match="it has more, and a text may have 256.0 MB"):
            read_utf8(name)
        what = f"(?s)cannot read {name}:1.*a line may have 16.8 MB, this has 256.9 MB so far"
        with open_input(name) as file, pytest.raises(EndlessLine, match=what):
            list(read_lines(file, name))
        process.kill()


def test_the_largest_text(file, monkeypatch):
    for size in (0, 1, 1000):
        monkeypatch.setattr(text_input, "LARGEST", size)
        file.write_bytes(b"a" * size)
        assert read_utf8(file) == "a" * size
        file.write_bytes(b"a" * (size + 1))
        with pytest.raises(InputError, match=f"it has {human_size(size + 1)}, and a text may have"):
            read_utf8(file)


def test_lines_one_at_a_time(file, monkeypatch):
    monkeypatch.setattr(text_input, "MAX_LINE", 8)
    monkeypatch.setattr(text_input, "_PIECE", 4)
    data = b"\xef\xbb\xbf1234\n\n1234567\n12345678\n  \r\n" + b"9" * 30 + b"\nlast"
    file.write_bytes(data)
    seen = []
    with open_input(file) as opened:
        lines = dict(read_lines(opened, "a", seen.append))
    assert b"".join(seen) == data
    assert {number: str(line) for number, line in lines.items()} == {
        1: "b'1234'",
        3: "b'1234567'",
        4: "a line may have 8 B, this has 9 B",
        6: "a line may have 8 B, this has 31 B",
        7: "b'last'",
    }


LONG_LINES = """
import resource, sys
from glm2_jax.cli import main as cli
from glm2_jax.datasets.rows import read_rows
from infer.generate.__main__ import main
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
_, row = list(read_rows(sys.argv[1]))[0]
print(row, file=sys.stderr)
for flags in (["--batch-file"], ["--prompt", "x", "--history"]):
    try: cli.run_main(main, [*flags, sys.argv[1]])
    except SystemExit as ending: assert ending.code == 3
print(peak() - before)
"""


def test_memory_for_a_line_that_is_too_long(tmp_path):
    path = tmp_path / "F.jsonl"
    with path.open("wb") as file:
        file.truncate(3 * 10**8)  # takes no space
    done = subprocess.run(
        [sys.executable, "-c", LONG_LINES, path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for message in (
        "the row is too long to be read\n300000000 bytes",
        "F.jsonl:1: a line may have 16.8 MB, this has 300.0 MB",
        "it has 300.0 MB, and a text may have 256.0 MB",
    ):
        assert message in done.stderr
    assert int(done.stdout) < 100 * 10**6
