"""Batch files inside this process, with a toy engine: order, bad lines, places to write to."""

import io
import json
import os
import sys
from types import SimpleNamespace

import pytest

from glm2_jax.cli.messages import Progress
from glm2_jax.errors import GLMError, InputError, UsageError
from glm2_jax.runtime.buckets import bucket
from infer.engine.engine import Engine
from infer.engine.loops import LoopDetector
from infer.generate.__main__ import main
from infer.generate.batch import Row, batches
from infer.generate.output import InOrder
from infer.requests.request import Request
from tests.support.engine_toy import toy_engine

SAMPLED = ["--temperature", "1", "--max-new-tokens", "6", "--json", "--compile-cache", "off"]


def run(*args: str) -> int:
    return main([*args, "--greedy", "--max-new-tokens", "6", "--compile-cache", "off"])


def failure(kind: type[GLMError], *args: str) -> str:
    with pytest.raises(kind) as caught:
        run(*args)
    return str(caught.value)


@pytest.fixture
def batch(loaded, tmp_path):
    """Writes rows to a batch file; returns the flags that name it."""

    def write(*rows) -> list[str]:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return ["--batch-file", str(path)]

    return write


@pytest.fixture
def answers(tmp_path):
    """Where the answers to a batch go, and how to read them."""
    path = tmp_path / "out.jsonl"

    def read():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    return SimpleNamespace(path=str(path), read=read)


def test_a_batch_file_in_order(batch, warm, answers, capsys):
    rows = [{"prompt": word, "id": n} for n, word in enumerate(["hi", "hello", "你好"])]
    rows[1] |= {"history": [["a", "b"]], "system": "s"}
    assert run(*batch(*rows), "--output", answers.path, "--batch-size", "2") == 0
    out, err = capsys.readouterr()
    got = answers.read()
    assert out == "" and "3 answered, 0 bad lines" in err
    assert [answer["id"] for answer in got] == [0, 1, 2]
    prompts = [
        warm.build_prompt("hi"),
        warm.build_prompt("hello", history=[("a", "b")], system="s"),
        warm.build_prompt("你好"),
    ]
    assert [answer["prompt_ids"] for answer in got] == prompts
    (single,) = warm.generate(prompts[:1], temperature=0, max_new_tokens=6)
    assert got[0]["output_ids"] == list(single.output_ids)
    assert got[0]["usage"]["completion_tokens"] == 6


def test_sampled_rows_depend_neither_on_the_batch_nor_on_its_size(batch, capsys):
    flags, outputs = batch({"prompt": "hi"}, {"prompt": "hi"}, {"prompt": "hello " * 9}), []
    for size in ("1", "2"):
        main([*flags, *SAMPLED, "--batch-size", size])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    main(["--prompt", "hi", *SAMPLED])
    first, second, _ = outputs[0].splitlines(keepends=True)
    assert first == capsys.readouterr().out  # the answer to a single prompt
    assert json.loads(first)["output_ids"] != json.loads(second)["output_ids"]


def test_bad_lines_are_reported_and_the_others_answered(loaded, tmp_path, answers, capsys):
    path = tmp_path / "in.jsonl"
    good, long = json.dumps({"prompt": "hi"}), json.dumps({"prompt": "hello " * 99})
    lines = [good, "nope", '{"prompt": ""}', long, '{"messages": [{}]}', good]
    path.write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xc4\xe3\xba\xc3"}\n')
    assert run("--batch-file", str(path), "--output", answers.path, "--batch-size", "2") == 3
    err = capsys.readouterr().err
    assert err.startswith("no --model given: using the bundled demo model")
    assert f"{path}:2: not JSON: " in err
    assert f"{path}:3: empty prompt: " in err
    assert f"{path}:4: the prompt is too long: " in err
    assert f"{path}:5: messages need the template chatglm3: " in err
    assert f"{path}:7: not UTF-8: byte 13" in err
    assert "2 answered, 5 bad lines" in err
    assert [answer["prompt"] for answer in answers.read()] == ["hi", "hi"]


def test_messages_of_chatglm3(batch, capsys):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    bad = [{"role": "nobody", "content": "q"}]
    file = batch({"messages": messages}, {"messages": bad})
    flags = [*file, "--template", "chatglm3", "--batch-size", "1"]
    assert run(*flags) == 3
    out, err = capsys.readouterr()
    answer = json.loads(out)
    want = toy_engine(family="chatglm3").build_prompt("q", system="s")
    assert (answer["messages"], answer["prompt_ids"]) == (messages, want)
    assert f"{file[1]}:2: Message 1 has the role 'nobody'" in err
    assert run(*flags, "--truncate-prompt", "3") == 3
    assert f"{file[1]}:1: the messages are too long: {len(want)} tokens" in capsys.readouterr().err


def test_outputs_that_are_refused(batch, loaded, tmp_path, monkeypatch):
    flags = batch({"prompt": "hi"})
    history, model = tmp_path / "history.json", tmp_path / "model"
    history.write_text("[]")
    model.mkdir()
    (tmp_path / "link").symlink_to(flags[1])
    flags += ["--history", str(history), "--model", str(model), "--output"]
    for output in (flags[1], str(tmp_path / "link")):
        assert "same file as --batch-file" in failure(UsageError, *flags, output)
    assert "same file as --history" in failure(UsageError, *flags, str(history))
    assert "inside the model's folder" in failure(UsageError, *flags, str(model / "out"))
    assert "is a folder" in failure(InputError, *flags, str(tmp_path))
    assert "folder not found" in failure(InputError, *flags, str(tmp_path / "a" / "b"))
    os.rename(flags[1], tmp_path / "x.partial")
    flags[1] = str(tmp_path / "x.partial")
    message = failure(UsageError, *flags, str(tmp_path / "x"))
    assert "x.partial, which --output needs, is the same file as --batch-file" in message
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert "permission denied" in failure(InputError, *flags, str(tmp_path / "x"))
    assert not loaded and os.listdir(model) == []


def test_standard_input_is_never_overwritten(batch):
    path = batch({"prompt": "hi"})[1]
    saved = os.dup(0)
    try:
        with open(path) as file:
            os.dup2(file.fileno(), 0)
        message = failure(UsageError, "--batch-file", "-", "--output", path)
    finally:
        os.dup2(saved, 0)
        os.close(saved)
    assert "same file as standard input" in message


def test_a_batch_file_without_a_good_line(batch, loaded, answers):
    message = failure(InputError, *batch({"promt": "hi"}), "--output", answers.path)
    assert "no prompt that can be answered" in message
    assert not loaded and not os.path.exists(answers.path)


def rows_of(*lengths):
    return [Row(number, Request("q"), [5] * length) for number, length in enumerate(lengths, 1)]


def test_batches_are_of_similar_length_and_the_longest_come_first():
    got = [[row.number for row in part] for part in batches(rows_of(3, 90, 3, 70, 5), 2)]
    assert got == [[2, 4], [5, 1], [3]]

    def padded(parts) -> int:
        """How many positions are computed, padding included."""
        return sum(len(part) * bucket(max(len(row.ids) for row in part), 8192) for part in parts)

    rows = rows_of(*[20, 30, 700, 40, 25, 60, 100, 35] * 8)
    plain = [rows[start : start + 8] for start in range(0, len(rows), 8)]
    assert (padded(plain), padded(batches(rows, 8))) == (65_536, 12_288)


def test_answers_go_to_a_stream_in_the_order_of_the_lines_as_soon_as_they_can():
    stream = io.StringIO()
    sink = InOrder([2, 3, 7, 9], stream)
    shown = []
    for rows in ([(7, "c"), (3, "b")], [(2, "a")], [], [(9, "d")]):
        sink.append(rows)
        shown.append(stream.getvalue())
    assert shown == ["", "a\nb\nc\n", "a\nb\nc\n", "a\nb\nc\nd\n"]


def test_a_stream_does_not_wait_for_the_end_of_the_file(batch, capsys, monkeypatch):
    asked = []
    complete = Engine.complete

    def counted(self, prompts, *args, **kwargs):
        asked.append((len(prompts), capsys.readouterr().out.count("\n")))
        return complete(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Engine, "complete", counted)
    flags = batch(*[{"prompt": "hi"}] * 20, {"prompt": "hello " * 9})
    assert run(*flags, "--batch-size", "1") == 0
    # The long last line is not among the first sixteen, which are out when it is read.
    assert [count for count, _ in asked] == [1] * 21
    assert sum(lines for _, lines in asked[:17]) == 16


def test_an_output_that_is_a_stream_has_no_journal(batch, tmp_path, capsys):
    flags = batch({"prompt": "hi"})
    for device in ("/dev/null", "-"):
        assert run(*flags, "--output", device) == 0
        assert capsys.readouterr().out.count("\n") == (device == "-")
    reading, writing = os.pipe()
    link = f"/dev/fd/{writing}"  # leads to a name that does not exist, as /dev/stdout does
    assert run(*flags, "--output", link) == 0
    os.close(writing)
    with open(reading) as pipe:
        assert len(pipe.readlines()) == 1
    with pytest.raises(OSError) as caught:
        run(*flags, "--output", "/dev/full")
    assert caught.value.filename == "/dev/full"
    assert not os.path.exists("/dev/null.partial") and os.listdir(tmp_path) == ["in.jsonl"]


def test_standard_input_is_read(loaded, answers, monkeypatch, capsys):
    lines = b'{"prompt": "hi"}\nnope\n'
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines)))
    assert run("--batch-file", "-", "--output", answers.path) == 3
    assert "standard input:2: not JSON" in capsys.readouterr().err
    assert len(answers.read()) == 1


def test_an_existing_output_is_not_replaced_unasked(batch, loaded, tmp_path, answers):
    flags = [*batch({"prompt": "hi"}), "--output", answers.path]
    (tmp_path / "out.jsonl").write_text("")  # as mktemp leaves it
    assert run(*flags) == 0
    before = answers.read()
    assert "exists already" in failure(UsageError, *flags, "--seed", "1")
    assert answers.read() == before and len(loaded) == 1
    assert run(*flags, "--system", "s", "--overwrite") == 0
    assert answers.read() != before
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_a_link_stays_a_link(batch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "out")
    assert run(*batch({"prompt": "hi"}), "--output", str(tmp_path / "link")) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "out").stat().st_size


def test_progress_leaves_out_what_was_there_before():
    stream = io.StringIO()
    bar = Progress("rows", 100, stream=stream, interval=0, done=90)
    bar.start -= 10
    bar(95, "7 tokens/s")
    assert stream.getvalue() == "rows: 95 of 100, 0/s, 7 tokens/s, 10 s left\n"


def test_loops_are_counted(batch, monkeypatch, capsys):
    monkeypatch.setattr(LoopDetector, "push", lambda self, token: True)
    assert run(*batch({"prompt": "hi"}, {"prompt": "you"})) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["finish_reason"] for line in out.splitlines()] == ["loop"] * 2
    assert "2 answered, 0 bad lines, 2 stopped because they repeated themselves" in err
