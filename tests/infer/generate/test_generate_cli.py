"""`python -m infer.generate` inside this process, with a toy engine."""

import dataclasses
import io
import json
from types import SimpleNamespace

import pytest

from glm2_jax.cli.parser import from_flags
from glm2_jax.errors import GLMError, InputError, UsageError
from infer import options
from infer.engine.answer import Completion
from infer.engine.engine import Engine
from infer.engine.params import PRESETS
from infer.engine.rows import TokenEvent
from infer.generate.__main__ import main, parser

HUGE = str(10**30)


def run(*args: str) -> int:
    return main([*args, "--greedy", "--max-new-tokens", "6", "--compile-cache", "off"])


def failure(kind: type[GLMError], *args: str) -> str:
    with pytest.raises(kind) as caught:
        main([*args, "--compile-cache", "off"])
    return str(caught.value)


@pytest.fixture
def answer(loaded, capsys):
    """Runs the command with `--json`; returns what it prints."""

    def ask(*args: str) -> dict:
        capsys.readouterr()
        run(*args, "--json")
        return json.loads(capsys.readouterr().out)

    return ask


def test_the_answer_alone_is_on_standard_output(loaded, warm, capsys):
    assert run("--prompt", "你好", "--stats") == 0
    out, err = capsys.readouterr()
    (answer,) = warm.generate(["你好"], temperature=0, max_new_tokens=6)
    assert out == answer.text + "\n"
    lines = err.splitlines()
    assert "bundled demo" in lines[0]
    assert lines[1:3] == [
        "computing in float32",
        "the weights are stored in float16; converted to float32",
    ]
    for name in ("load ", "compile ", "first token ", "prefill ", "decode ", "peak memory "):
        assert sum(line.startswith(name) for line in lines) == 1, name
    assert run("--prompt", "你好", "--stream") == 0
    assert capsys.readouterr().out == out


def test_what_the_flags_say_of_the_model(loaded, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "infer.memory.budget.prepare", lambda choice, options, *_, **__: (choice, options)
    )
    flags = ["--dtype", "bf16", "--device", "cpu", "--rope_scaling", "base"]
    assert run("--prompt", "hi", "--model", str(tmp_path), *flags) == 0
    assert "demo" not in capsys.readouterr().err
    choice, _ = loaded[0]
    assert (choice.path, choice.dtype, choice.device) == (str(tmp_path), "bf16", "cpu")
    assert choice.rope_kind == "base"


class Terminal(io.StringIO):
    flushes = 0

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.flushes += 1


@pytest.mark.parametrize(("flags", "flushes"), [((), 3), (("--no-stream",), 1)])
def test_a_terminal_gets_pieces_and_no_control_characters(loaded, monkeypatch, flags, flushes):
    texts = ["a\x07\x1b[2J", "\x9b\n"]
    done = Completion((1,), (2,), "".join(texts), "stop")
    events = [TokenEvent(0, None, texts[0], None, None, None)]
    events += [TokenEvent(0, None, texts[1], None, "stop", done)]
    monkeypatch.setattr(Engine, "run", lambda *args, **kwargs: iter(events))
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        monkeypatch.setattr("sys.stdout", stream)
        run("--prompt", "hi", *flags)
    assert terminal.getvalue() == "a\ufffd\ufffd[2J\ufffd\n\n" and terminal.flushes == flushes
    assert file.getvalue() == done.text + "\n"


def test_json(answer, warm):
    got = answer("--prompt", "hi", "--logprobs", "2")
    (want,) = warm.generate(["hi"], temperature=0, max_new_tokens=6)
    logprobs, usage = got.pop("logprobs"), got.pop("usage")
    assert got == {
        "prompt": "hi",
        "prompt_ids": warm.build_prompt("hi"),
        "output_ids": list(want.output_ids),
        "text": want.text,
        "finish_reason": "length",
    }
    read = len(want.prompt_ids)
    assert usage == {"prompt_tokens": read, "completion_tokens": 6, "total_tokens": read + 6}
    assert [entry["id"] for entry in logprobs] == list(want.output_ids)
    assert [len(entry["top"]) for entry in logprobs] == [2] * 6
    assert all(entry["logprob"] == entry["top"][0]["logprob"] for entry in logprobs)
    stopped = answer("--prompt", "hi", "--stop", want.text[2:4])
    assert (stopped["finish_reason"], stopped["text"]) == ("stop", want.text[:2])
    assert stopped["stop_reason"] == {"string": want.text[2:4]}


def test_where_the_prompt_comes_from(answer, warm, tmp_path, monkeypatch):
    (tmp_path / "q.txt").write_text("\ufeff你好\n", encoding="utf-8")
    for source in (["--prompt-file", str(tmp_path / "q.txt")], ["--prompt", "-"], []):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("你好\n".encode())))
        assert answer(*source)["prompt"] == "你好"
    for closed in (SimpleNamespace(isatty=lambda: True), None):
        monkeypatch.setattr("sys.stdin", closed)
        assert "Add --prompt TEXT." in failure(UsageError)
    (tmp_path / "h.json").write_text('[["a", "b"]]')
    flags = ["--history", str(tmp_path / "h.json"), "--system", "s"]
    ids = answer("--prompt", "c", *flags)["prompt_ids"]
    assert ids == warm.build_prompt("c", history=[("a", "b")], system="s")
    assert answer("--prompt", "a\u3000b", "--clean-text")["prompt"] == "a b"


def test_cutting_is_reported_with_counts(loaded, warm, tmp_path, capsys):
    (tmp_path / "h.json").write_text('[["a", "b"], ["c", "d"]]')
    ids = warm.build_prompt("hello")
    flags = ["--history", str(tmp_path / "h.json"), "--truncate-prompt", str(len(ids)), "--json"]
    run("--prompt", "hello", *flags)
    out, err = capsys.readouterr()
    assert json.loads(out)["prompt_ids"] == ids
    assert f"prompt cut to {len(ids)} tokens: left out the oldest 2 of 2 turns\n" in err
    run("--prompt", "hello hello hello", *flags)
    out, err = capsys.readouterr()
    assert len(json.loads(out)["prompt_ids"]) <= len(ids) and "tokens of the question" in err


def test_prompts_that_are_refused_and_one_that_is_warned_of(loaded, warm, monkeypatch, capsys):
    ids = len(warm.build_prompt("hello " * 99))
    message = failure(InputError, "--prompt", "hello " * 99)
    assert f"{ids} tokens" in message and "256" in message and "--truncate-prompt" in message
    assert "may have 8" in failure(InputError, "--prompt", "hello", "--max-length", "8")
    assert "The prompt is empty." in failure(InputError, "--prompt", " \n\u3000")
    assert "half of a character" in failure(InputError, "--prompt", "a\udce4")
    run("--prompt", "hi")
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr("glm2_jax.config.GLMConfig.aligned_length", property(lambda self: 20))
    run("--prompt", "hi")
    assert "warning: prompt and answer may reach 24 tokens; beyond 20" in capsys.readouterr().err


def test_values_that_make_no_sense_and_unknown_flags(loaded, capsys):
    for flags, words in (
        ("--temp nan", "--temperature must be a finite number, 0 or more"),
        ("--max-new-tokens -1", "--max-new-tokens must be a whole number, 1 or more, got -1."),
        ("--stop=", "stop"),
        (f"--seed {HUGE}", "seed"),
        ("--num-beams 4", "--num-beams=4: beam search"),
        ("--greedy --temperature 0.5", "--greedy contradicts --temperature"),
        ("--logprobs 1", "--logprobs needs --json"),
        ("--stream --json", "--stream excludes --json"),
        ("--output x", "--output needs --batch-file"),
        ("--restart", "--restart needs --output"),
    ):
        assert words in failure(UsageError, "--prompt", "hi", *flags.split(" "))
    paths = "model", "output", "history", "compile-cache", "batch-file"
    for flags, words in (
        (["--device", "npu"], "tpu"),
        (["--seed", "x"], "--seed"),
        (["--truncate-prompt", "0"], "at least 1"),
        (["--prompt-file", "x"], "not allowed with"),
        (["-p", "b"], "given twice"),
        (["--history", "a", "--history", "b"], "given twice"),
        *((["--" + flag, ""], "path is empty") for flag in paths),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["--prompt", "hi", *flags])
        assert caught.value.code == 2 and words in capsys.readouterr().err
    assert not loaded


def sampling(*flags: str):
    return from_flags(options.SamplingFlags, parser().parse_args(list(flags))).params()


def test_sampling_flags():
    assert sampling() == PRESETS["official"]
    assert sampling("--preset", "api") == PRESETS["api"]
    given = sampling("--preset", "api", "--top_k", "3", "--stop", "a", "--stop", "b")
    assert given == dataclasses.replace(PRESETS["api"], top_k=3, stop=("a", "b"))
    assert sampling("--greedy").temperature == sampling("--temp", "0").temperature == 0
    assert sampling("--num-beams", "1") == sampling()
    asked = sampling("--max-length", HUGE, "--max-new-tokens", HUGE, "--top-k", HUGE)
    assert asked.max_length == asked.max_new_tokens == asked.top_k == 10**30


def test_the_defaults_in_help_are_true():
    text = " ".join(parser().format_help().split())
    official, api = PRESETS["official"], PRESETS["api"]
    for value in (official.temperature, official.top_k, official.top_p):
        assert f"(default: {value})" in text
    assert f"(default: {official.max_length}" in text
    assert f"temperature {api.temperature}" in text and f"top-p {api.top_p}" in text
    for group in ("model:", "prompt:", "sampling:", "performance:", "output:", "example:"):
        assert group in text
