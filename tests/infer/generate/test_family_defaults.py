"""What the flags of sampling leave out is the default of the published code of the model."""

import io

import pytest

from glm2_jax.choices import FAMILIES
from infer.chat.__main__ import main as chat
from infer.engine import load
from infer.engine.engine import Engine
from infer.engine.params import PRESETS, SamplingParams
from infer.fill.__main__ import main as fill
from infer.generate.__main__ import main as generate
from infer.serve.options import RequestOptions
from tests.support.engine_toy import family_engine, for_commands, toy_engine, warm_engine
from tests.support.serve import serving

OWN = {"chatglm": "api", "glm": "greedy"}


class Asked(Exception):
    """Ends a command where it asks the engine."""


@pytest.fixture
def sampled(monkeypatch):
    """Gives what the engine is asked with, by a command that is run for a family."""

    def run(command, family: str, *flags: str, stdin: bytes = b"") -> SamplingParams:
        if family in ("glm4", "chatglm", "glm"):
            engine = family_engine(family)
        else:
            engine = toy_engine(share=warm_engine(), family=family.partition("-")[0])
        monkeypatch.setattr(load, "open_choice", lambda *args, **kwargs: for_commands(engine))
        monkeypatch.setattr("infer.fill.run.check_model", lambda choice: choice)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(Asked) as asked:
            command([*flags, "--compile-cache", "off"])
        return asked.value.args[0]

    def rows(self, prompts, sampling, **kwargs):
        raise Asked(sampling)

    monkeypatch.setattr(Engine, "rows", rows)
    return run


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"glm4-0414"}))
def test_generate(sampled, family):
    preset = PRESETS[OWN.get(family, "official")]
    for flags in ((), ("--preset", "official")):
        assert sampled(generate, family, "--prompt", "hi", *flags) == preset
    assert sampled(generate, family, "--prompt", "hi", "--preset", "api") == PRESETS["api"]


def test_flags_win(sampled):
    flags = ("--top-p", "0.8", "--max-length", "64")
    drawn = sampled(generate, "chatglm", "--prompt", "hi", *flags)
    assert (drawn.temperature, drawn.top_p, drawn.max_length) == (0.95, 0.8, 64)
    assert sampled(generate, "chatglm", "--prompt", "hi", "--greedy").temperature == 0
    assert sampled(generate, "glm", "--prompt", "hi", "--temperature", "1").temperature == 1


def test_a_batch_file_a_chat_and_blanks_have_the_same(sampled, tmp_path):
    asked, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text('{"prompt": "hi"}\n')
    flags = ("--batch-file", str(asked), "--output", str(output))
    assert sampled(generate, "chatglm", *flags) == PRESETS["api"]
    journal = output.with_name("out.jsonl.partial").read_text()
    assert '"top_p": 0.7' in journal and '"seed": 0' in journal
    assert sampled(chat, "chatglm", stdin=b"hi\n").top_p == 0.7
    assert sampled(chat, "chatglm3", stdin=b"hi\n").top_p == 0.8
    assert sampled(fill, "glm", "--prompt", "a[MASK]b").temperature == 0


def test_the_server_and_the_engine_have_the_same(monkeypatch):
    def rows(self, prompts, sampling, **kwargs):
        raise Asked(sampling)

    with monkeypatch.context() as patch, pytest.raises(Asked) as asked:
        patch.setattr(Engine, "rows", rows)
        family_engine("chatglm").generate(["hi"], preset="official")
    assert asked.value.args[0].top_p == 0.7
    for preset, top_p in {"official": 0.7, "api": 0.7, "openai": 1.0}.items():
        with serving("a", family="chatglm", options=RequestOptions(preset=preset)) as served:
            assert served.service.defaults.top_p == top_p
