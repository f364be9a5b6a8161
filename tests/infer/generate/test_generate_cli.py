"""`python -m infer.generate` inside this process, with a toy engine."""

import dataclasses
import io
import json
from types import SimpleNamespace

import pytest

import infer
from glm2_jax.cli.parser import from_flags
from glm2_jax.errors import GLMError, InputError, UsageError
from infer import options
from infer.engine.answer import Completion
from infer.engine.engine import Engine
from infer.engine.params import PRESETS
from infer.engine.rows import TokenEvent
from infer.generate.__main__ import main, parser
from tests.support.engine_toy import toy_engine, warm_engine

QUICK = ["--greedy", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def warm():
    """An engine whose compiled programs all tests share."""
    return warm_engine()


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
        checkpoint.summary = SimpleNamespace(dtype="float32", quantization=None)
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


@pytest.mark.parametrize("flag", ["--stream", "--no-stream"])
def test_a_terminal_is_shown_no_control_characters(loaded, monkeypatch, capsys, flag):
    done = Completion((1,), (2,), "a\x07\x1b[2J\x9b\n", "stop")
    event = TokenEvent(0, None, done.text, None, "stop", done)
    monkeypatch.setattr(Engine, "run", lambda *args, **kwargs: iter([event]))
    run("--prompt", "hi", flag)
    assert capsys.readouterr().out == done.text + "\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    run("--prompt", "hi", flag)
    assert capsys.readouterr().out == "a\ufffd\ufffd[2J\ufffd\n\n"


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
        (["--restart"], "--restart goes with --output"),
        (["--overwrite"], "--overwrite goes with --output"),
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
    return from_flags(options.SamplingFlags, parser().parse_args(list(flags))).params()


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


def test_a_loop_and_a_stop_string_end_an_answer(loaded, warm, capsys):
    (answer,) = warm.generate(["hi"], temperature=0, max_new_tokens=6)
    run("--prompt", "hi", "--json", "--stop", answer.text[2:4])
    stopped = json.loads(capsys.readouterr().out)
    assert (stopped["finish_reason"], stopped["text"]) == ("stop", answer.text[:2])
