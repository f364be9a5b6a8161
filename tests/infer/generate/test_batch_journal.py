"""The journal of a batch: cut at any byte, full disks, other runs, two processes at once."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from glm2_jax.errors import InputError, UsageError
from infer.generate import output as output_module
from infer.generate.output import Journal

RUN = {"input": "00ff", "temperature": 0.8, "stop": ["a"], "system": None, "seed": 0}
ANSWERS = {3: '{"text": "三"}', 1: '{"text": "\\u2028}\\n"}', 2: '{"text": ""}'}
LONG = b'{"line": %s, "answer": {}}\n' % (b"9" * 5000)  # a number that Python refuses to read


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def path(output) -> Path:
    return output.with_name("out.jsonl.partial")


@pytest.fixture
def written(output, path) -> bytes:
    """The journal of a run that was killed after these answers."""
    with Journal(output) as journal:
        journal.begin(RUN | {"quantisation": "int8"})  # the old spelling
        for row in ANSWERS.items():
            journal.append([row])
    return path.read_bytes()


def test_answers_come_in_the_order_of_the_lines(output, written):
    with Journal(output) as journal:
        with pytest.raises(UsageError, match='quantization was "int8" and is null'):
            journal.check(RUN | {"quantization": None})
        journal.begin(RUN | {"quantization": "int8"})
        assert set(journal.done) == {1, 2, 3} and not output.exists()
        journal.append([(10, '{"a": 10}'), (9, '{"a": 9}')])
        journal.finish()
    lines = output.read_text(encoding="utf-8").split("\n")
    assert lines == [ANSWERS[1], ANSWERS[2], ANSWERS[3], '{"a": 9}', '{"a": 10}', ""]
    assert os.listdir(output.parent) == ["out.jsonl"]


def test_cut_at_any_byte(output, path, written):
    ends = [place for place, byte in enumerate(written) if byte == ord("\n")]
    for length in sorted({*range(0, len(written), 9), *ends, *(end + 1 for end in ends[:-1])}):
        path.write_bytes(written[:length])
        with Journal(output) as journal:
            journal.begin(RUN | {"quantisation": "int8"} if length <= ends[0] else RUN)
            kept = sum(end < length for end in ends)
            assert list(journal.done) == list(ANSWERS)[: max(kept - 1, 0)]
            assert path.read_bytes() == written[: ends[max(kept - 1, 0)] + 1]
            for number, answer in list(ANSWERS.items())[max(kept - 1, 0) :]:
                journal.append([(number, answer)])
            assert path.read_bytes() == written
            path.write_bytes(b"")


def test_what_follows_a_damaged_line_is_answered_again(output, path, written):
    lines = written.splitlines(keepends=True)
    for junk in (b"\0" * 50, b'{"line": 0, "answer": {}}\n', LONG):
        path.write_bytes(b"".join([*lines[:2], junk, *lines[2:]]))
        with Journal(output) as journal:
            journal.begin(RUN)
            assert list(journal.done) == [3] and journal.lost == 2 + junk.endswith(b"\n")
        assert path.read_bytes() == b"".join(lines[:2])


def test_another_run_is_refused_in_one_line(output, path, written):
    change = {"system": "s" * 99, "stop": [], "seed": 1}
    words = r'stop was \["a"\] and is \[\], system was null and is "sss.*, seed was 0 and is 1'
    with Journal(output) as journal, pytest.raises(UsageError, match=words) as caught:
        journal.begin(RUN | change)
    assert len(str(caught.value).splitlines()) == 3 and "--restart" in caught.value.fix
    assert path.read_bytes() == written
    with Journal(output, restart=True) as journal:
        journal.begin(RUN | change)
        assert not journal.done


def test_a_file_that_is_no_journal_is_left_alone(output, path):
    newer = b'{"journal": "glm2-jax answers", "version": 9, "a": 1}\n'
    for content in (b"my notes", newer):
        path.write_bytes(content)
        for restart in (False, True):
            with pytest.raises(InputError, match="not a journal"):
                Journal(output, restart=restart)
            assert path.read_bytes() == content


def test_two_at_once(output):
    with Journal(output) as first:
        first.begin(RUN)
        first.append([(1, ANSWERS[1])])
        for restart in (False, True):
            with pytest.raises(InputError, match="Another process"):
                Journal(output, restart=restart)
        first.finish()
    assert output.read_text(encoding="utf-8") == ANSWERS[1] + "\n"
    with Journal(output):  # which is not begun
        assert len(os.listdir(output.parent)) == 2
    assert os.listdir(output.parent) == ["out.jsonl"]


def test_a_full_disk_keeps_what_is_whole(output, path, written, monkeypatch):
    """Every write fails once 20 more bytes are written, in the middle of an answer."""
    write, left = os.write, [20]

    def limited(file, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(file, data[: left[0]])
        left[0] -= count
        return count

    fake = SimpleNamespace(**{name: getattr(os, name) for name in dir(os)})
    fake.write = limited
    with Journal(output) as journal:
        journal.begin(RUN)
        monkeypatch.setattr(output_module, "os", fake)
        with pytest.raises(InputError, match="No space left(.|\n)*Free some space"):
            journal.append([(7, '{"text": "seven"}')])
    assert path.read_bytes() == written
    monkeypatch.undo()
    with Journal(output) as journal:
        assert set(journal.done) == {1, 2, 3}


def test_an_end_that_fails_keeps_the_journal(output, path, written, monkeypatch):
    with Journal(output) as journal:
        journal.begin(RUN)
        monkeypatch.setattr(Path, "rename", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            journal.finish()
    assert os.listdir(output.parent) == ["out.jsonl.partial"] and path.read_bytes() == written
