"""Batch files inside this process, with a toy engine: order, bad lines, places to write to."""

import io
import json
import os
import sys
from types import SimpleNamespace

import pytest

import infer
from glm2_jax.cli.messages import Progress
from glm2_jax.errors import GLMError, InputError, UsageError
from infer.engine.call import bucket
from infer.engine.engine import Engine
from infer.engine.loops import LoopDetector
from infer.generate.__main__ import main
from infer.generate.batch import InOrder, Row, chunks
from infer.requests.request import Request
from tests.support.engine_toy import toy_engine, warm_engine

QUICK = ["--greedy", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def warm():
    """An engine whose compiled programs all tests share."""
    return warm_engine()


@pytest.fixture
def loaded(warm, monkeypatch):
    """Replaces `infer.load`; collects the calls."""
    calls = []

    def load(path, *, max_length=None, template=None, **kwargs) -> Engine:
        calls.append(path)
        family = "chatglm3" if template == "chatglm3" else "chatglm2"
        share = warm if family == "chatglm2" else None
        engine = toy_engine(share=share, max_length=max_length, family=family)
        checkpoint: SimpleNamespace = engine.checkpoint  # pyright: ignore
        checkpoint.summary, checkpoint.notes = (
            SimpleNamespace(dtype="float32", quantization=None),
            (),
        )
        return engine

    monkeypatch.setattr(infer, "load", load, raising=False)
    return calls


def run(*args: str) -> int:
    return main([*args, *QUICK, "--compile-cache", "off"])


def failure(kind: type[GLMError], *args: str) -> str:
    with pytest.raises(kind) as caught:
        run(*args)
    return str(caught.value)


def write_lines(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def answers(tmp_path):
    """Where the answers to a batch go, and how to read them."""
    path = tmp_path / "out.jsonl"

    def read():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    return SimpleNamespace(path=str(path), read=read)


def test_a_batch_file_in_order(loaded, warm, tmp_path, answers, capsys):
    rows = [{"prompt": word, "id": n} for n, word in enumerate(["hi", "hello", "你好"])]
    rows[1] |= {"history": [["a", "b"]], "system": "s"}
    batch = write_lines(tmp_path / "in.jsonl", *rows)
    assert run("--batch-file", batch, "--output", answers.path, "--batch-size", "2") == 0
    out, err = capsys.readouterr()
    got = answers.read()
    assert out == "" and "3 answered, 0 bad lines" in err
    assert [answer["id"] for answer in got] == [0, 1, 2]
    prompts = [
        toy_engine().build_prompt("hi"),
        toy_engine().build_prompt("hello", history=[("a", "b")], system="s"),
        toy_engine().build_prompt("你好"),
    ]
    assert [answer["prompt_ids"] for answer in got] == prompts
    single = [warm.generate([ids], temperature=0, max_new_tokens=6)[0] for ids in prompts[:1]]
    assert got[0]["output_ids"] == list(single[0].output_ids)
    assert got[0]["usage"]["completion_tokens"] == 6


def test_sampled_rows_do_not_depend_on_the_batch_size(loaded, tmp_path, capsys):
    batch = write_lines(tmp_path / "in.jsonl", {"prompt": "hi"}, {"prompt": "hi"}, {"prompt": "hi"})
    outputs = []
    for size in ("1", "2"):
        flags = ["--batch-size", size, "--temperature", "1", "--max-new-tokens", "6"]
        main(["--batch-file", batch, *flags, "--compile-cache", "off"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    texts = [json.loads(line)["output_ids"] for line in outputs[0].splitlines()]
    assert texts[0] != texts[1] != texts[2]


def test_bad_lines_are_reported_and_the_rest_goes_on(loaded, tmp_path, answers, capsys):
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
    assert f"{path}:7: not UTF-8: byte 13 cannot be read; it may be GB18030" in err
    assert "2 answered, 5 bad lines" in err
    assert [answer["prompt"] for answer in answers.read()] == ["hi", "hi"]


def test_messages_of_chatglm3(loaded, tmp_path, capsys):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    bad = [{"role": "nobody", "content": "q"}]
    batch = write_lines(tmp_path / "in.jsonl", {"messages": messages}, {"messages": bad})
    flags = ["--template", "chatglm3", "--batch-size", "1"]
    assert run("--batch-file", batch, *flags) == 3
    out, err = capsys.readouterr()
    answer = json.loads(out)
    want = toy_engine(family="chatglm3").build_prompt("q", system="s")
    assert (answer["messages"], answer["prompt_ids"]) == (messages, want)
    assert f"{batch}:2: Message 1 has the role 'nobody'" in err
    assert run("--batch-file", batch, *flags, "--truncate-prompt", "3") == 3
    assert f"{batch}:1: the messages are too long: {len(want)} tokens" in capsys.readouterr().err


def test_the_input_is_never_overwritten(loaded, tmp_path):
    batch = write_lines(tmp_path / "in.jsonl", {"prompt": "hi"})
    (tmp_path / "link").symlink_to(batch)
    for output in (batch, str(tmp_path / "link")):
        assert "same file" in failure(UsageError, "--batch-file", batch, "--output", output)
    assert json.loads((tmp_path / "in.jsonl").read_text()) == {"prompt": "hi"}


def test_outputs_that_cannot_be_written(loaded, tmp_path):
    batch = write_lines(tmp_path / "in.jsonl", {"prompt": "hi"})
    flags = ["--batch-file", batch, "--output"]
    assert "is a folder" in failure(InputError, *flags, str(tmp_path))
    assert "no folder" in failure(InputError, *flags, str(tmp_path / "a" / "b"))
    if os.geteuid():  # root may write everything
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "permission" in failure(InputError, *flags, str(tmp_path / "locked" / "x"))
    assert not loaded


def test_a_batch_file_without_a_good_line(loaded, tmp_path, answers):
    batch = write_lines(tmp_path / "in.jsonl", {"promt": "hi"})
    message = failure(InputError, "--batch-file", batch, "--output", answers.path)
    assert "no prompt that can be answered" in message
    assert not loaded and not os.path.exists(answers.path)


def test_a_single_question_and_the_first_line_get_the_same_answer(loaded, tmp_path, capsys):
    sampled = ["--temperature", "1", "--max-new-tokens", "6", "--json", "--compile-cache", "off"]
    main(["--prompt", "hi", *sampled])
    alone = capsys.readouterr().out
    batch = write_lines(tmp_path / "in.jsonl", {"prompt": "hi"}, {"prompt": "hello " * 9})
    main(["--batch-file", batch, *sampled])
    assert capsys.readouterr().out.splitlines()[0] == alone.rstrip("\n")


def rows_of(*lengths):
    return [Row(number, Request("q"), [5] * length) for number, length in enumerate(lengths, 1)]


def test_chunks_are_of_like_length_and_the_longest_come_first():
    got = [[row.number for row in chunk] for chunk in chunks(rows_of(3, 90, 3, 70, 5), 2)]
    assert got == [[2, 4], [5, 1], [3]]


def cells(parts) -> int:
    """How many places of the prompts' arrays are computed, padding included."""
    total = 0
    for part in parts:
        longest = max(len(row.ids) for row in part)
        total += (1 << (len(part) - 1).bit_length()) * bucket(longest, 8192)
    return total


def test_sorting_saves_padding():
    rows = rows_of(*[20, 30, 700, 40, 25, 60, 100, 35] * 8)
    plain = [rows[start : start + 8] for start in range(0, len(rows), 8)]
    assert (cells(plain), cells(chunks(rows, 8))) == (65_536, 12_288)


def test_answers_go_to_a_stream_in_the_order_of_the_lines_as_soon_as_they_can():
    stream = io.StringIO()
    sink = InOrder([2, 3, 7, 9], stream)
    shown = []
    for rows in ([(7, "c"), (3, "b")], [(2, "a")], [], [(9, "d")]):
        sink.append(rows)
        shown.append(stream.getvalue())
    assert shown == ["", "a\nb\nc\n", "a\nb\nc\n", "a\nb\nc\nd\n"]


def test_a_stream_does_not_wait_for_the_end_of_the_file(loaded, tmp_path, capsys, monkeypatch):
    asked = []
    complete = Engine.complete

    def counted(self, prompts, *args, **kwargs):
        asked.append((len(prompts), capsys.readouterr().out.count("\n")))
        return complete(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Engine, "complete", counted)
    batch = write_lines(tmp_path / "in.jsonl", *[{"prompt": "hi"}] * 20, {"prompt": "hello " * 9})
    assert run("--batch-file", batch, "--batch-size", "1") == 0
    # The long last line is not among the first sixteen, which are out when it is read.
    assert [count for count, _ in asked] == [1] * 21
    assert sum(lines for _, lines in asked[:17]) == 16


@pytest.mark.parametrize("device", ["/dev/null", "-"])
def test_an_output_that_is_no_file_has_no_journal(loaded, tmp_path, device, capsys):
    batch = write_lines(tmp_path / "in.jsonl", {"prompt": "hi"})
    assert run("--batch-file", batch, "--output", device) == 0
    assert capsys.readouterr().out.count("\n") == (device == "-")
    assert not os.path.exists("/dev/null.partial") and os.listdir(tmp_path) == ["in.jsonl"]


def test_names_of_standard_output(loaded, tmp_path):
    batch = write_lines(tmp_path / "in.jsonl", {"prompt": "hi"})
    reading, writing = os.pipe()
    link = f"/dev/fd/{writing}"  # leads to a name that is none, as /dev/stdout does
    assert run("--batch-file", batch, "--output", link) == 0
    os.close(writing)
    with open(reading) as pipe:
        assert len(pipe.readlines()) == 1
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_a_device_that_is_full_is_named(loaded, tmp_path):
    batch = write_lines(tmp_path / "in.jsonl", {"prompt": "hi"})
    with pytest.raises(OSError) as caught:
        run("--batch-file", batch, "--output", "/dev/full")
    assert caught.value.filename == "/dev/full"


def test_ids_that_are_there_twice_are_told(loaded, tmp_path, capsys):
    rows = [{"prompt": "hi", "id": name} for name in ("a", 1, "1", "a", 1, "a")]
    batch = write_lines(tmp_path / "in.jsonl", *rows, {"prompt": "hi"}, {"prompt": "hi"})
    assert run("--batch-file", batch) == 0
    err = capsys.readouterr().err
    assert "warning: 3 lines have an id that an earlier one has" in err
    assert f"the first is {batch}:4 with 'a' of line 1" in err


def test_standard_input_is_read(loaded, tmp_path, answers, monkeypatch, capsys):
    lines = b'{"prompt": "hi"}\nnope\n'
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines)))
    assert run("--batch-file", "-", "--output", answers.path) == 3
    assert "standard input:2: not JSON" in capsys.readouterr().err
    assert len(answers.read()) == 1


def test_an_output_that_is_there_is_not_replaced_unasked(loaded, tmp_path, answers):
    batch = write_lines(tmp_path / "in.jsonl", {"prompt": "hi"})
    flags = ["--batch-file", batch, "--output", answers.path]
    (tmp_path / "out.jsonl").write_text("")  # as mktemp leaves it
    assert run(*flags) == 0
    before = answers.read()
    assert "there already" in failure(UsageError, *flags, "--seed", "1")
    assert answers.read() == before and len(loaded) == 1
    assert run(*flags, "--system", "s", "--overwrite") == 0
    assert answers.read() != before
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_a_link_stays_a_link(loaded, tmp_path):
    batch = write_lines(tmp_path / "in.jsonl", {"prompt": "hi"})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "out")
    assert run("--batch-file", batch, "--output", str(tmp_path / "link")) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "out").stat().st_size


def test_more_outputs_that_are_refused(loaded, tmp_path, monkeypatch):
    batch = write_lines(tmp_path / "in.jsonl", {"prompt": "hi"})
    history = tmp_path / "history.json"
    history.write_text("[]")
    model = tmp_path / "model"
    model.mkdir()
    flags = ["--batch-file", batch, "--history", str(history), "--output"]
    assert "same file as --history" in failure(UsageError, *flags, str(history))
    inside = failure(UsageError, *flags, str(model / "out"), "--model", str(model))
    assert "inside the model's folder" in inside
    os.rename(batch, tmp_path / "x.partial")
    flags[1] = str(tmp_path / "x.partial")
    message = failure(UsageError, *flags, str(tmp_path / "x"))
    assert "x.partial, which goes with --output, is the same file as --batch-file" in message
    assert not loaded and sorted(os.listdir(model)) == []


def test_standard_input_is_never_overwritten(loaded, tmp_path):
    path = tmp_path / "in.jsonl"
    write_lines(path, {"prompt": "hi"})
    saved = os.dup(0)
    try:
        with path.open() as file:
            os.dup2(file.fileno(), 0)
        message = failure(UsageError, "--batch-file", "-", "--output", str(path))
    finally:
        os.dup2(saved, 0)
        os.close(saved)
    assert "same file as standard input" in message


def test_progress_leaves_out_what_was_there_before():
    stream = io.StringIO()
    bar = Progress("rows", 100, stream=stream, interval=0, done=90)
    bar.start -= 10
    bar(95, "7 tokens/s")
    assert stream.getvalue() == "rows: 95 of 100, 0/s, 7 tokens/s, 10 s left\n"


def test_loops_are_counted(loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LoopDetector, "push", lambda self, token: True)
    batch = write_lines(tmp_path / "in.jsonl", {"prompt": "hi"}, {"prompt": "you"})
    assert run("--batch-file", batch) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["finish_reason"] for line in out.splitlines()] == ["loop"] * 2
    assert "2 answered, 0 bad lines, 2 stopped because they repeated themselves" in err
