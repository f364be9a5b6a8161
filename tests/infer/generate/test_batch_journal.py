"""The journal of a batch: cut at any byte, full disks, other runs, two processes at once."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from glm2_jax.errors import DeviceError, InputError, UsageError
from infer.engine.engine import Engine
from infer.generate import journal as journal_module
from infer.generate.__main__ import main
from infer.generate.journal import Journal
from tests.support.engine_toy import toy_engine, warm_engine

RUN = {"input": "00ff", "temperature": 0.8, "stop": ["a"], "system": None, "seed": 0}
ANSWERS = {3: '{"text": "三"}', 1: '{"text": "\\u2028}\\n"}', 2: '{"text": ""}'}


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out.jsonl"


def written(output: Path, answers=ANSWERS) -> bytes:
    """The journal of a run that was killed after these answers."""
    with Journal(output) as journal:
        journal.begin(RUN)
        for row in answers.items():
            journal.append([row])
    return journal.path.read_bytes()


def test_answers_come_in_the_order_of_the_lines(output):
    written(output)
    with Journal(output) as journal:
        journal.begin(RUN)
        assert set(journal.done) == {1, 2, 3} and not output.exists()
        journal.append([(10, '{"a": 10}'), (9, '{"a": 9}')])
        journal.finish()
    lines = output.read_text(encoding="utf-8").split("\n")
    assert lines == [ANSWERS[1], ANSWERS[2], ANSWERS[3], '{"a": 9}', '{"a": 10}', ""]
    assert os.listdir(output.parent) == ["out.jsonl"]


def test_a_run_begun_with_the_old_spelling_continues(output):
    with Journal(output) as journal:
        journal.begin(RUN | {"quantisation": "int8"})
        journal.append(ANSWERS.items())
    with Journal(output) as journal:
        with pytest.raises(UsageError, match='quantization was "int8" and is null'):
            journal.check(RUN | {"quantization": None})
        journal.begin(RUN | {"quantization": "int8"})
        assert set(journal.done) == set(ANSWERS)


def test_cut_at_any_byte(output):
    whole = written(output)
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    path = output.with_name("out.jsonl.partial")
    for length in sorted({*range(0, len(whole), 9), *ends, *(end + 1 for end in ends[:-1])}):
        path.write_bytes(whole[:length])
        with Journal(output) as journal:
            journal.begin(RUN)
            kept = sum(end < length for end in ends)
            assert list(journal.done) == list(ANSWERS)[: max(kept - 1, 0)]
            assert path.read_bytes() == whole[: ends[max(kept - 1, 0)] + 1]
            for number, answer in list(ANSWERS.items())[max(kept - 1, 0) :]:
                journal.append([(number, answer)])
            assert path.read_bytes() == whole
            path.write_bytes(b"")


LONG = b'{"line": %s, "answer": {}}\n' % (b"9" * 5000)  # a number that Python refuses to read


@pytest.mark.parametrize(
    "junk",
    [b"\0" * 50, b'{"line": 0, "answer": {}}\n', LONG],
    ids=["zeros", "line 0", "long number"],
)
def test_what_follows_a_damaged_line_is_answered_again(output, junk):
    whole = written(output)
    path = output.with_name("out.jsonl.partial")
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], junk, *lines[2:]]))
    with Journal(output) as journal:
        journal.begin(RUN)
        assert list(journal.done) == [3] and journal.lost == 2 + junk.endswith(b"\n")
    assert path.read_bytes() == b"".join(lines[:2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": "11"}, "the batch file has changed"),
        ({"system": "s" * 99}, 'system was null and is "sss'),
        ({"stop": [], "seed": 1}, r'stop was \["a"\] and is \[\], seed was 0 and is 1'),
    ],
)
def test_another_run_is_refused_in_one_line(output, change, words):
    before = written(output)
    with Journal(output) as journal, pytest.raises(UsageError, match=words) as caught:
        journal.begin(RUN | change)
    assert len(str(caught.value).splitlines()) == 3
    assert "--restart" in caught.value.fix
    assert journal.path.read_bytes() == before
    with Journal(output, restart=True) as journal:
        journal.begin(RUN | change)
        assert not journal.done


@pytest.mark.parametrize(
    "content", [b"my notes", b'{"journal": "glm2-jax answers", "version": 9, "a": 1}\n']
)
def test_a_file_that_is_no_journal_is_left_alone(output, content):
    path = output.with_name("out.jsonl.partial")
    path.write_bytes(content)
    for restart in (False, True):
        with pytest.raises(InputError, match="not a journal"):
            Journal(output, restart=restart)
        assert path.read_bytes() == content


def test_two_at_once(output):
    with Journal(output) as first:
        with pytest.raises(InputError, match="Another process"):
            Journal(output)
        first.begin(RUN)
        first.append([(1, ANSWERS[1])])
        with pytest.raises(InputError, match="Another process"):
            Journal(output, restart=True)
        first.finish()
    assert output.read_text(encoding="utf-8") == ANSWERS[1] + "\n"
    with Journal(output):  # which is not begun
        assert len(os.listdir(output.parent)) == 2
    assert os.listdir(output.parent) == ["out.jsonl"]


def full_disk(monkeypatch, after: int) -> None:
    """Every write fails once `after` more bytes are written, the last one in its middle."""
    write, left = os.write, [after]

    def limited(file, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(file, data[: left[0]])
        left[0] -= count
        return count

    fake = SimpleNamespace(**{name: getattr(os, name) for name in dir(os)})
    fake.write = limited
    monkeypatch.setattr(journal_module, "os", fake)


@pytest.mark.parametrize("after", [0, 20])
def test_a_full_disk_keeps_what_is_whole(output, monkeypatch, after):
    before = written(output)
    with Journal(output) as journal:
        journal.begin(RUN)
        full_disk(monkeypatch, after)
        with pytest.raises(InputError, match="No space left(.|\n)*3 answers are safe") as caught:
            journal.append([(7, '{"text": "seven"}')])
    assert "Free some space and run the same command to continue" in caught.value.fix
    assert journal.path.read_bytes() == before
    monkeypatch.undo()
    with Journal(output) as journal:
        journal.begin(RUN)
        assert set(journal.done) == {1, 2, 3}


def test_an_end_that_fails_keeps_the_journal(output, monkeypatch):
    before = written(output)
    with Journal(output) as journal:
        journal.begin(RUN)
        monkeypatch.setattr(Path, "replace", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            journal.finish()
    assert os.listdir(output.parent) == ["out.jsonl.partial"]
    assert journal.path.read_bytes() == before


# The whole way, in this process.


@pytest.fixture(scope="module")
def warm():
    """An engine whose compiled programs all tests share."""
    return warm_engine()


@pytest.fixture
def command(warm, monkeypatch, tmp_path):
    """Runs the tool on three lines; `asked` has the rows of each call of the engine."""
    asked = []

    def load(choice, options, *, folder, **kwargs) -> Engine:
        engine = toy_engine(share=warm)
        checkpoint: SimpleNamespace = engine.checkpoint  # pyright: ignore
        checkpoint.summary = SimpleNamespace(dtype="float32", quantization=None)
        checkpoint.notes = ()
        checkpoint.fingerprint = folder.name
        return engine

    complete = Engine.complete

    def counted(self, prompts, sampling, *, row_ids, **kwargs):
        asked.append(list(row_ids))
        if list(row_ids) == run.breaks_at:
            raise DeviceError("out of device memory")
        return complete(self, prompts, sampling, row_ids=row_ids, **kwargs)

    batch = tmp_path / "in.jsonl"
    batch.write_text("".join(json.dumps({"prompt": word * 2}) + "\n" for word in ("a", "b", "c")))

    def run(*flags: str) -> int:
        asked.clear()
        basic = ["--batch-file", str(batch), "--output", str(tmp_path / "out.jsonl")]
        sampling = ["--temperature", "1", "--max-new-tokens", "6", "--compile-cache", "off"]
        return main([*basic, *sampling, "--batch-size", "1", *flags])

    run.breaks_at, run.asked, run.batch = None, asked, batch  # pyright: ignore
    monkeypatch.setattr("infer.engine.load.open_choice", load)
    monkeypatch.setattr(Engine, "complete", counted)
    return run


@pytest.fixture
def broken(command, output):
    """The bytes of an uninterrupted run, and a journal that has the first line's answer."""
    assert command() == 0
    expected = output.read_bytes()
    output.unlink()
    command.breaks_at = [1]
    with pytest.raises(DeviceError):
        command()
    command.breaks_at = None
    assert command.asked == [[0], [1]]
    return expected


def test_what_was_answered_is_not_asked_again(command, broken, output, capsys):
    capsys.readouterr()
    assert command() == 0
    assert command.asked == [[1], [2]]
    assert output.read_bytes() == broken
    assert "continuing: 1 of 3 answered already" in capsys.readouterr().err


def test_answers_after_a_damaged_line_are_computed_again(command, broken, output, capsys):
    path = output.with_name("out.jsonl.partial")
    header, answer = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(header + b"junk\n" + answer)
    capsys.readouterr()
    command.breaks_at = [0, 1]
    with pytest.raises(DeviceError):
        command("--batch-size", "2")  # which may change
    assert command() == 0
    assert command.asked == [[0], [1], [2]] and output.read_bytes() == broken
    assert "its last 2 lines are answered again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "1"], "seed was 0 and is 1"),
        (["--model", "other"], "the model has changed"),
        (["--clean-text", "--truncate-prompt", "30"], "clean_text was false .*, truncate_prompt"),
    ],
)
def test_other_flags_are_refused(command, broken, output, capsys, flags, words):
    with pytest.raises(UsageError, match=words):
        command(*flags)
    assert not command.asked and not output.exists()
    assert command(*flags, "--restart") == 0
    assert command.asked == [[0], [1], [2]]
    again = "to continue after a stop, run the same command without --restart\n"
    assert again in capsys.readouterr().err


def test_another_input_is_refused(command, broken, output):
    command.batch.write_text(command.batch.read_text() + "\n")
    with pytest.raises(UsageError, match="the batch file has changed"):
        command()
    assert not command.asked and not output.exists()


def test_killed_between_the_last_two_steps(command, output, monkeypatch):
    unlink = Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda path, **kw: None if path.suffix == ".partial" else unlink(path, **kw)
    )
    assert command() == 0
    monkeypatch.setattr(Path, "unlink", unlink)
    expected = output.read_bytes()
    output.with_name("out.jsonl.partial.ordered").write_bytes(b"torn")
    assert command() == 0  # output and journal are there, and belong together
    assert not command.asked and output.read_bytes() == expected
    assert sorted(os.listdir(output.parent)) == ["in.jsonl", "out.jsonl"]


def test_an_output_of_another_time_is_kept(command, broken, output):
    output.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        command()
    assert output.read_text() == "mine"
    assert command("--overwrite") == 0 and output.read_bytes() == broken
