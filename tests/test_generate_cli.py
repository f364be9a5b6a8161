"""`python -m infer.generate` inside this process, with a toy engine."""

import dataclasses
import io
import json
import os
from types import SimpleNamespace

import pytest

import infer
from glm2_jax.errors import DeviceError, GLMError, InputError, UsageError
from infer import options
from infer.engine import Engine
from infer.generate import main, parser
from infer.job import Stats
from infer.params import PRESETS
from infer.respond import add_stats
from tests.engine_toy import toy_engine

QUICK = ["--greedy", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def warm():
    """An engine whose compiled programs all tests share."""
    return toy_engine()


@pytest.fixture
def loaded(warm, monkeypatch):
    """Replaces `infer.load`; collects the arguments it was called with."""
    calls = []

    def load(path, *, max_length=None, template=None, **kwargs) -> Engine:
        calls.append({"path": path, "max_length": max_length, "template": template, **kwargs})
        if template == "chatglm3":  # other stop ids, hence other programs
            engine = toy_engine(max_length=max_length, family=template)
        else:
            engine = toy_engine(share=warm, max_length=max_length, template=template)
        checkpoint: SimpleNamespace = engine.checkpoint  # pyright: ignore
        checkpoint.summary = SimpleNamespace(dtype="float32")
        checkpoint.notes = ("the weights are stored in float16; converted to float32",)
        return engine

    monkeypatch.setattr(infer, "load", load, raising=False)
    return calls


def run(*args: str) -> int:
    return main([*args, *QUICK, "--compile-cache", "off"])


def failure(kind: type[GLMError], *args: str) -> str:
    with pytest.raises(kind) as caught:
        main([*args, "--compile-cache", "off"])
    return str(caught.value)


def expected(prompt: str, **kwargs):
    return toy_engine().build_prompt(prompt, **kwargs)


def test_the_answer_alone_is_on_standard_output(loaded, warm, capsys):
    assert run("--prompt", "你好") == 0
    out, err = capsys.readouterr()
    (answer,) = warm.generate(["你好"], temperature=0, max_new_tokens=6)
    assert out == answer.text + "\n"
    lines = err.splitlines()
    assert "bundled demo" in lines[0]
    assert lines[1:] == [
        "computing in float32",
        "the weights are stored in float16; converted to float32",
    ]
    assert run("--prompt", "你好", "--stream") == 0
    assert capsys.readouterr().out == out


def test_with_a_model_nothing_is_said_about_the_demo(loaded, capsys):
    flags = ["--model", "folder", "--dtype", "bf16", "--device", "cpu", "--rope_scaling", "base"]
    assert run("--prompt", "hi", *flags) == 0
    assert "demo" not in capsys.readouterr().err
    want = {"path": "folder", "dtype": "bf16", "device": "cpu", "rope_kind": "base"}
    assert want.items() <= loaded[0].items()


def test_streaming_writes_pieces(loaded, monkeypatch):
    class Terminal(io.StringIO):
        writes: list[str] = []

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.writes.append(text)
            return super().write(text)

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    run("--prompt", "你好")
    assert len(Terminal.writes) > 3
    Terminal.writes.clear()
    run("--prompt", "你好", "--no-stream")
    assert len(Terminal.writes) <= 2


def test_json(loaded, warm, capsys):
    assert run("--prompt", "hi", "--json", "--logprobs", "2") == 0
    answer = json.loads(capsys.readouterr().out)
    (want,) = warm.generate(["hi"], temperature=0, max_new_tokens=6)
    assert answer.pop("prompt") == "hi"
    assert answer.pop("prompt_ids") == expected("hi") == list(want.prompt_ids)
    assert answer.pop("output_ids") == list(want.output_ids)
    assert answer.pop("text") == want.text
    assert answer.pop("finish_reason") == "length"
    read = len(want.prompt_ids)
    assert answer.pop("usage") == {
        "prompt_tokens": read,
        "completion_tokens": 6,
        "total_tokens": read + 6,
    }
    logprobs = answer.pop("logprobs")
    assert [entry["id"] for entry in logprobs] == list(want.output_ids)
    assert [len(entry["top"]) for entry in logprobs] == [2] * 6
    assert all(entry["logprob"] == entry["top"][0]["logprob"] for entry in logprobs)
    assert not answer


def test_the_prompt_may_come_from_a_file_or_standard_input(loaded, tmp_path, capsys, monkeypatch):
    (tmp_path / "q.txt").write_text("\ufeff你好\n", encoding="utf-8")
    asked = []
    for source in (["--prompt-file", str(tmp_path / "q.txt")], ["--prompt", "-"], []):
        stdin = io.TextIOWrapper(io.BytesIO("你好\n".encode()))
        monkeypatch.setattr("sys.stdin", stdin)
        run(*source, "--json")
        asked.append(json.loads(capsys.readouterr().out)["prompt"])
    assert asked == ["你好"] * 3


def test_no_prompt_at_all(loaded, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert "--prompt TEXT" in failure(UsageError)
    monkeypatch.setattr("sys.stdin", None)
    assert "no prompt" in failure(UsageError)
    assert not loaded


def test_history_and_system_reach_the_prompt(loaded, tmp_path, capsys):
    (tmp_path / "h.json").write_text('[["a", "b"]]')
    run("--prompt", "c", "--history", str(tmp_path / "h.json"), "--system", "s", "--json")
    ids = json.loads(capsys.readouterr().out)["prompt_ids"]
    assert ids == expected("c", history=[("a", "b")], system="s")


def test_clean_text(loaded, capsys):
    run("--prompt", "a\u3000b", "--json", "--clean-text")
    assert json.loads(capsys.readouterr().out)["prompt"] == "a b"
    run("--prompt", "a\u3000b", "--json")
    assert json.loads(capsys.readouterr().out)["prompt"] == "a\u3000b"


def test_cutting_is_said_with_counts(loaded, tmp_path, capsys):
    (tmp_path / "h.json").write_text('[["a", "b"], ["c", "d"]]')
    limit = str(len(expected("hello")))
    flags = ["--history", str(tmp_path / "h.json"), "--truncate-prompt", limit, "--json"]
    run("--prompt", "hello", *flags)
    out, err = capsys.readouterr()
    assert json.loads(out)["prompt_ids"] == expected("hello")
    assert f"prompt cut to {limit} tokens: left out the oldest 2 of 2 turns\n" in err
    run("--prompt", "hello hello hello", *flags)
    out, err = capsys.readouterr()
    assert len(json.loads(out)["prompt_ids"]) <= int(limit)
    assert "tokens of the question" in err


def test_a_prompt_that_is_too_long_is_refused_with_numbers(loaded):
    ids = len(expected("hello " * 99))
    message = failure(InputError, "--prompt", "hello " * 99)
    assert f"{ids} tokens" in message and "256" in message and "--truncate-prompt" in message
    message = failure(InputError, "--prompt", "hello", "--max-length", "8")
    assert "may have 8" in message


def test_beyond_the_aligned_length_there_is_a_warning(loaded, monkeypatch, capsys):
    run("--prompt", "hi")
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr("glm2_jax.config.GLMConfig.aligned_length", property(lambda self: 20))
    run("--prompt", "hi")
    assert "warning: prompt and answer may reach 24 tokens; beyond 20" in capsys.readouterr().err


def test_empty_and_broken_prompts(loaded):
    assert "empty prompt" in failure(InputError, "--prompt", " \n\u3000")
    assert "half of a character" in failure(InputError, "--prompt", "a\udce4")
    assert not loaded


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "-0.1"], "temperature"),
        (["--temp", "nan"], "temperature"),
        (["--temp", "inf"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--top_p", "1.1"], "top_p"),
        (["--top-p", "nan"], "top_p"),
        (["--top-k", "-1"], "top_k"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--max-tokens", "0"], "max_new_tokens"),
        (["--loop-stop", "1"], "loop_stop"),
        (["--stop", ""], "stop"),
        (["--seed", "-1"], "seed"),
        (["--logprobs", "99", "--json"], "logprobs"),
        (["--num-beams", "4"], "num_beams"),
        (["--greedy", "--temperature", "0.5"], "--greedy contradicts --temperature"),
        (["--logprobs", "1"], "--json"),
        (["--stream", "--json"], "--stream contradicts --json"),
        (["--output", "x"], "--batch-file"),
    ],
)
def test_values_that_make_no_sense(loaded, flags, words):
    assert words in failure(UsageError, "--prompt", "hi", *flags)
    assert not loaded


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--template", "chatglm9"], "chatglm3"),
        (["--dtype", "int3"], "bfloat16"),
        (["--device", "npu"], "tpu"),
        (["--preset", "mine"], "official"),
        (["--rope-scaling", "yarn"], "linear"),
        (["--seed", "x"], "--seed"),
        (["--truncate-prompt", "0"], "1 or more"),
        (["--batch-size", "-3"], "1 or more"),
        (["--temprature", "1"], "did you mean --temperature?"),
        (["--prompt-file", "x"], "not allowed with"),
    ],
)
def test_unknown_flags_and_values(capsys, flags, words):
    with pytest.raises(SystemExit) as caught:
        main(["--prompt", "hi", *flags])
    assert caught.value.code == 2 and words in capsys.readouterr().err


def sampling(*flags: str):
    return options.sampling_params(parser().parse_args(list(flags)))


def test_sampling_flags():
    assert sampling() == PRESETS["official"]
    assert sampling("--preset", "api") == PRESETS["api"]
    given = sampling("--preset", "api", "--top_k", "3", "--stop", "a", "--stop", "b")
    assert given == dataclasses.replace(PRESETS["api"], top_k=3, stop=("a", "b"))
    assert sampling("--greedy").temperature == sampling("--temp", "0").temperature == 0
    assert sampling("--num-beams", "1") == sampling()


def test_the_defaults_in_help_are_true():
    text = " ".join(parser().format_help().split())
    official, api = PRESETS["official"], PRESETS["api"]
    assert f"0 = greedy (default: {official.temperature})" in text
    assert f"0 = all (default: {official.top_k})" in text
    assert f"(0, 1] (default: {official.top_p})" in text
    assert f"in tokens (default: {official.max_length}," in text
    assert (
        f"(temperature {api.temperature}, top-p {api.top_p}, max-length {api.max_length})" in text
    )
    assert "ChatGLM2 has no system slot" in text
    for group in ("model:", "prompt:", "sampling:", "performance:", "output:", "example:"):
        assert group in text


def test_stats_are_told_apart(loaded, capsys):
    run("--prompt", "hi", "--stats")
    err = capsys.readouterr().err
    for name in ("load ", "compile ", "first token ", "prefill ", "decode ", "peak memory "):
        assert sum(line.startswith(name) for line in err.splitlines()) == 1, name


def test_stats_of_several_calls_add_up():
    first = Stats(1.0, 2.0, 0.5, 10, 0.5, 4, 1.0)
    total = add_stats(add_stats(None, first), Stats(1.0, 0.0, 0.1, 20, 0.5, 8, 3.0))
    assert total == Stats(1.0, 2.0, 0.5, 30, 1.0, 12, 4.0)
    assert first.prefill_tokens == 10


def test_a_loop_and_a_stop_string_end_an_answer(loaded, warm, capsys):
    (answer,) = warm.generate(["hi"], temperature=0, max_new_tokens=6)
    run("--prompt", "hi", "--json", "--stop", answer.text[2:4])
    stopped = json.loads(capsys.readouterr().out)
    assert (stopped["finish_reason"], stopped["text"]) == ("stop", answer.text[:2])


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
        expected("hi"),
        expected("hello", history=[("a", "b")], system="s"),
        expected("你好"),
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


def test_what_was_answered_stays_when_something_breaks(loaded, tmp_path, answers, monkeypatch):
    complete = Engine.complete

    def breaks(self, prompts, sampling, *, row_ids, **kwargs):
        if row_ids[0]:
            raise DeviceError("out of device memory")
        return complete(self, prompts, sampling, row_ids=row_ids, **kwargs)

    monkeypatch.setattr(Engine, "complete", breaks)
    batch = write_lines(tmp_path / "in.jsonl", {"prompt": "hi"}, {"prompt": "you"})
    with pytest.raises(DeviceError):
        run("--batch-file", batch, "--output", answers.path, "--batch-size", "1")
    assert [answer["prompt"] for answer in answers.read()] == ["hi"]
