"""Batch files inside this process, with a toy engine: order, bad lines, continuing, refusals."""

import json
import os
from types import SimpleNamespace

import pytest

import infer
from glm2_jax.errors import GLMError, InputError, UsageError
from infer.engine import Engine
from infer.generate import main
from tests.engine_toy import toy_engine

QUICK = ["--greedy", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def warm():
    """An engine whose compiled programs all tests share."""
    return toy_engine()


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
        checkpoint.summary, checkpoint.notes = SimpleNamespace(dtype="float32"), ()
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
    assert f"{path}:7: not UTF-8: byte 13 cannot be read; GB18030" in err
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
