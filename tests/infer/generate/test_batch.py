"""Batch files inside this process, with a toy engine: order, bad lines, outputs, interruptions."""

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from glm2_jax.cli.messages import Progress
from glm2_jax.errors import DeviceError, GLMError, InputError, UsageError
from infer.batching.batcher import Batcher
from infer.engine.loops import LoopDetector
from infer.generate.__main__ import main
from infer.generate.output import InOrder
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
def output(tmp_path) -> Path:
    return tmp_path / "out.jsonl"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_batch_file_in_order(batch, warm, output, capsys):
    rows = [{"prompt": word, "id": n} for n, word in enumerate(["hi", "hello", "你好"])]
    rows[1] |= {"history": [["a", "b"]], "system": "s"}
    assert run(*batch(*rows), "--output", str(output), "--batch-size", "2") == 0
    out, err = capsys.readouterr()
    got = read(output)
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


def test_bad_lines_are_reported_and_the_others_answered(loaded, output, monkeypatch, capsys):
    good, long = json.dumps({"prompt": "hi"}), json.dumps({"prompt": "hello " * 99})
    lines = ["\ufeff" + good, "nope", '{"prompt": ""}', long, '{"messages": [{}]}', good]
    data = "\n".join(lines).encode() + b'\n{"prompt": "\xc4\xe3\xba\xc3"}\n'
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    monkeypatch.setattr(LoopDetector, "push", lambda self, token: True)
    flags = ["--output", str(output), "--batch-size", "2", "--loop-stop", "6"]
    assert run("--batch-file", "-", *flags) == 3
    err = capsys.readouterr().err
    assert err.startswith("no --model given: using the bundled demo model")
    for line in (
        "2: not JSON: ",
        "3: The prompt is empty: There is nothing to answer.",
        "4: The prompt is too long: ",
        "5: messages need the template chatglm3 or glm4: ",
        "7: not UTF-8: byte 13",
    ):
        assert f"standard input:{line}" in err
    assert "2 answered, 5 bad lines, 2 stopped because they repeated themselves" in err
    assert [answer["prompt"] for answer in read(output)] == ["hi", "hi"]
    assert [answer["finish_reason"] for answer in read(output)] == ["loop"] * 2


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
    assert f"{file[1]}:1: The messages are too long: {len(want)} tokens" in capsys.readouterr().err


def test_outputs_that_are_refused(batch, loaded, tmp_path):
    flags = batch({"prompt": "hi"})
    history = tmp_path / "history.json"
    history.write_text("[]")
    (tmp_path / "link").symlink_to(flags[1])
    named = [*flags, "--history", str(history), "--output"]
    for output in (flags[1], str(tmp_path / "link")):
        assert "same file as --batch-file" in failure(UsageError, *named, output)
    assert "same file as --history" in failure(UsageError, *named, str(history))
    assert "is a folder" in failure(InputError, *named, str(tmp_path))
    inside = [*named, str(tmp_path / "model" / "out"), "--model", str(tmp_path / "model")]
    (tmp_path / "model").mkdir()
    assert "inside the model's folder" in failure(UsageError, *inside)
    assert "folder not found" in failure(InputError, *named, str(tmp_path / "a" / "b"))
    saved = os.dup(0)
    try:
        with open(flags[1]) as file:
            os.dup2(file.fileno(), 0)
        message = failure(UsageError, "--batch-file", "-", "--output", flags[1])
    finally:
        os.dup2(saved, 0)
        os.close(saved)
    assert "same file as standard input" in message
    os.rename(flags[1], tmp_path / "x.partial")
    flags[1] = str(tmp_path / "x.partial")
    message = failure(UsageError, *flags, "--output", str(tmp_path / "x"))
    assert "x.partial, which --output needs, is the same file as --batch-file" in message
    flags = [*batch({"promt": "hi"}), "--output", str(tmp_path / "new")]
    assert "no prompt that can be answered" in failure(InputError, *flags)
    assert not loaded and not (tmp_path / "new").exists()


def test_answers_go_to_a_stream_in_the_order_of_the_lines_as_soon_as_they_can():
    stream = io.StringIO()
    sink = InOrder([2, 3, 7, 9], stream)
    for rows, shown in (([(7, "c"), (3, "b")], ""), ([(2, "a")], "a\nb\nc\n")):
        sink.append(rows)
        assert stream.getvalue() == shown


def test_a_stream_does_not_wait_for_the_end_of_the_file(batch, capsys, monkeypatch):
    shown, step = [], Batcher.step

    def counted(self):
        shown.append(capsys.readouterr().out.count("\n"))
        return step(self)

    monkeypatch.setattr(Batcher, "step", counted)
    assert run(*batch(*[{"prompt": "hi"}] * 6), "--batch-size", "2") == 0
    assert sum(shown) == 4  # before the last two are answered


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
    with pytest.raises(OSError, match="No space left.*/dev/full"):
        run(*flags, "--output", "/dev/full")
    assert not os.path.exists("/dev/null.partial") and os.listdir(tmp_path) == ["in.jsonl"]


def test_an_existing_output_is_not_replaced_unasked(batch, loaded, tmp_path, output):
    flags = [*batch({"prompt": "hi"}), "--output", str(output)]
    output.write_text("")  # as mktemp leaves it
    assert run(*flags) == 0
    before = read(output)
    assert "exists already" in failure(UsageError, *flags, "--seed", "1")
    assert read(output) == before and len(loaded) == 1
    assert run(*flags, "--system", "s", "--overwrite") == 0
    assert read(output) != before
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]
    (tmp_path / "link").symlink_to(tmp_path / "new")  # stays a link
    assert run(*flags[:2], "--output", str(tmp_path / "link")) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "new").stat().st_size


def test_progress_leaves_out_what_was_there_before():
    stream = io.StringIO()
    bar = Progress("rows", 100, stream=stream, interval=0, done=90)
    bar.start -= 10
    bar(95, "7 tokens/s")
    assert stream.getvalue() == "rows: 95 of 100, 0/s, 7 tokens/s, 10 s left\n"


@pytest.fixture
def command(batch, output, monkeypatch):
    """Runs the tool on three lines; `asked` has the rows that were given to the engine."""
    submit, step = Batcher.submit, Batcher.step
    flags = [*batch(*({"prompt": word * 2} for word in "abc")), "--output", str(output), *SAMPLED]

    def counted(self, job):
        run.asked.append(job.row.draw)
        submit(self, job)

    def breaking(self):
        if self.ended == run.breaks_after:
            raise DeviceError("out of device memory")
        return step(self)

    def run(*more: str) -> int:
        run.asked = []  # pyright: ignore
        return main([*flags, "--batch-size", "1", *more])

    run.breaks_after = None  # pyright: ignore
    monkeypatch.setattr(Batcher, "submit", counted)
    monkeypatch.setattr(Batcher, "step", breaking)
    return run


def test_a_broken_run_continues(command, output, tmp_path, capsys):
    assert command() == 0
    expected = output.read_bytes()
    output.unlink()
    command.breaks_after = 1
    with pytest.raises(DeviceError):
        command()
    assert command.asked == [0, 1, 2] and not output.exists()
    command.breaks_after = None
    path = output.with_name("out.jsonl.partial")
    header, answer = path.read_bytes().splitlines(keepends=True)

    assert command() == 0  # what was answered is not asked again
    assert command.asked == [1, 2] and output.read_bytes() == expected
    assert "continuing: 1 of 3 answered already" in capsys.readouterr().err

    output.unlink()
    path.write_bytes(header + b"junk\n" + answer)
    assert command("--batch-size", "2") == 0  # which may change
    assert command.asked == [0, 1, 2]
    assert output.read_bytes() == expected
    assert "its last 2 lines are answered again" in capsys.readouterr().err

    output.unlink()
    path.write_bytes(header + answer)
    flags = ["--clean-text", "--truncate-prompt", "30", "--seed", "1"]
    with pytest.raises(UsageError, match="clean_text was false .*, truncate_prompt .*, seed was 0"):
        command(*flags)
    (tmp_path / "in.jsonl").write_text((tmp_path / "in.jsonl").read_text() + "\n")
    with pytest.raises(UsageError, match="the batch file has changed"):
        command()
    assert not command.asked and not output.exists()
    assert command(*flags, "--restart") == 0 and command.asked == [0, 1, 2]
    again = "to continue after a stop, run the same command without --restart\n"
    assert again in capsys.readouterr().err


def test_killed_between_the_last_two_steps(command, output, monkeypatch):
    unlink = Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda path, **kw: None if path.suffix == ".partial" else unlink(path, **kw)
    )
    assert command() == 0
    monkeypatch.setattr(Path, "unlink", unlink)
    expected = output.read_bytes()
    output.with_name(".out.jsonl.unfinished").mkdir()
    output.with_name(".out.jsonl.unfinished").joinpath("new").write_bytes(b"torn")
    assert command() == 0  # output and journal are there, and belong together
    assert not command.asked and output.read_bytes() == expected
    assert sorted(os.listdir(output.parent)) == ["in.jsonl", "out.jsonl"]
