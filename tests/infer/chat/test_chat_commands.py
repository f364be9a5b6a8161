"""A conversation and the commands that change it, with a toy engine."""

import json
import os
from typing import Any

import pytest

from glm2_jax.errors import GLMError, InputError, UsageError
from infer.chat import commands as chat_commands
from infer.engine.call import Call
from infer.engine.params import SamplingParams
from infer.requests.conversation import Conversation
from tests.support.engine_toy import toy_engine


def toy(warm, family="chatglm2", fingerprint="a" * 64):
    engine = toy_engine(share=warm if family == "chatglm2" else None, family=family)
    checkpoint: Any = engine.checkpoint
    checkpoint.fingerprint = fingerprint
    return Conversation(engine, SamplingParams(temperature=0, max_new_tokens=6))


@pytest.fixture
def conversation(warm):
    return toy(warm)


@pytest.fixture
def command(capsys):
    """Runs a command and returns what it says."""

    def run(conversation, line) -> str:
        chat_commands.run(conversation, line)
        return capsys.readouterr().err

    return run


def said(events):
    return "".join(event.text for event in events)


def test_undo_and_retry(conversation, command):
    with pytest.raises(InputError, match="no question yet"):
        said(conversation.retry())
    first = said(conversation.reply("one"))
    second = said(conversation.reply("two"))
    assert conversation.history == [("one", first), ("two", second)]
    assert said(conversation.retry()) == second  # greedy
    assert len(conversation.turns) == 2
    assert command(conversation, "/undo") == "removed, 1 turn left\n"
    assert conversation.history == [("one", first)]
    assert command(conversation, "/undo") == "removed, 0 turns left\n"
    with pytest.raises(InputError, match="no turn"):
        command(conversation, "/undo")


def test_an_interrupted_answer_is_kept_as_far_as_it_came(conversation):
    complete = said(conversation.reply("one"))
    conversation.undo()
    events = conversation.reply("one")
    part = ""
    while not part:
        part += next(events).text
    events.close()
    assert conversation.history == [("one", part)] and complete.startswith(part)
    ids = conversation.turns[0].ids
    said(conversation.reply("two"))
    assert ids is not None and conversation.stats.reused_tokens == len(ids) - 1
    conversation.reply("three").close()  # before it began: no turn
    assert len(conversation.turns) == 2


def test_without_an_answer_the_old_one_stays_and_the_question_can_be_retried(
    conversation, monkeypatch
):
    first = said(conversation.reply("one"))
    with monkeypatch.context() as patch:
        nothing = lambda *args, **kwargs: Call((event for event in ()), [])  # noqa: E731
        patch.setattr(conversation._session, "run", nothing)
        said(conversation.retry())
        assert conversation.history == [("one", first)] and conversation.unanswered is None
        said(conversation.reply("two"))
        said(conversation.retry())
        assert conversation.unanswered == "two" and len(conversation.turns) == 1
    said(conversation.retry())
    assert conversation.history[1][0] == "two" and conversation.unanswered is None


def test_bad_questions_change_nothing(conversation):
    said(conversation.reply("one"))
    before = list(conversation.turns)
    for bad in ("  ", "\ud800", "x" * 2000):
        with pytest.raises(InputError):
            said(conversation.reply(bad))
        assert conversation.turns == before


def test_system(conversation, command):
    assert command(conversation, "/system") == "system: (none)\n"
    assert command(conversation, "/system be kind") == "system: be kind\n"
    said(conversation.reply("one"))
    build = conversation.engine.build_prompt
    assert list(conversation.turns[0].ids[:-6]) == build("one", (), "be kind")
    command(conversation, "/system -")
    assert conversation.system is None
    said(conversation.reply("two"))
    assert list(conversation.turns[1].ids[:-6]) == build("two", [conversation.history[0]])


def test_set(conversation, command):
    shown = command(conversation, "/set")
    assert "temperature = 0" in shown and "stop = none" in shown and "logprobs" not in shown
    for line, expected in (
        ("/set greedy off", "temperature = 0.8\n"),
        ("/set top-p 0.5", "top_p = 0.5\n"),
        ("/set stop END", "stop = 'END'\n"),
        ("/set stop none", "stop = none\n"),
        ("/set max_new_tokens none", "max_new_tokens = none\n"),
        ("/set max_length 99", "max_length = 99\n"),
    ):
        assert command(conversation, line) == expected
    assert "max_length = 256, the most" in command(conversation, "/set max_length 8192")
    before = conversation.sampling
    for bad in ("top_p 2", "top_p x", "temprature 1", "top_p", "greedy 7", "logprobs 3"):
        with pytest.raises((InputError, UsageError)):
            command(conversation, f"/set {bad}")
    assert conversation.sampling == before


def test_help_names_every_command_and_bad_ones_are_refused(conversation, command):
    shown = command(conversation, "/help").replace("clear ", "/clear").replace("stop ", "/stop")
    assert all(name in shown for name in chat_commands.NAMES)
    assert all(len(line) <= 100 for line in shown.splitlines())
    for line, reason in (
        ("/unod", "/undo"),
        ("/retri", "/retry"),
        ("/xyzzy", "/help lists"),
        ("/undo 3", "/undo takes no argument, got '3'"),
        ("/save", "/save needs the name of a file"),
        ("/set temprature 1", "did you mean temperature"),
    ):
        with pytest.raises(InputError, match=reason):
            command(conversation, line)


def test_stats(conversation, command):
    assert "turns        0" in command(conversation, "/stats")
    said(conversation.reply("one"))
    used = len(conversation.turns[0].ids)
    shown = command(conversation, "/stats")
    assert f"{used} of 256, room left {256 - used}" in shown and "prefill" in shown
    assert "speculation" not in shown
    conversation.total.passes, conversation.total.drafted_tokens = 2, 8
    assert "speculation  0 of 8 draft tokens accepted" in command(conversation, "/stats")


def test_saved_and_loaded(conversation, warm, tmp_path, command, monkeypatch):
    path = tmp_path / "talk.json"
    command(conversation, "/system s")
    said(conversation.reply("你好"))
    assert command(conversation, f"/save {path}") == f"saved 1 turn to {path}\n"
    said(conversation.reply("再见"))
    command(conversation, f"/save {path}")  # a saved conversation may be replaced
    assert os.listdir(tmp_path) == ["talk.json"]
    other = toy(warm)
    other.sampling = SamplingParams()
    assert command(other, f"/load {path}") == "loaded 2 turns\n"
    assert other.history == conversation.history and other.system == "s"
    assert other.sampling == conversation.sampling
    stranger = toy(warm, fingerprint="b" * 64)
    assert "another model" in command(stranger, f"/load {path}")
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        command(conversation, f"/save {path}")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["talk.json"]


def test_what_is_not_a_saved_conversation_is_not_overwritten(conversation, tmp_path, command):
    for name, text in (("a", "notes"), ("b", "[]"), ("c", '{"format": 1}')):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(InputError, match="not a saved conversation"):
            command(conversation, f"/save {path}")
        assert path.read_text() == text
    for bad in (tmp_path, f"{tmp_path}/none/x"):
        with pytest.raises(InputError):
            command(conversation, f"/save {bad}")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


GOOD = {
    "format": "glm2-jax chat",
    "version": 1,
    "model": "a" * 64,
    "template": "chatglm2",
    "system": None,
    "sampling": {"temperature": 0.5},
    "history": [["a", "b"]],
}
CHANGES = [
    {"version": 2},
    {"history": [["a"]]},
    {"history": [["\ud800", "b"]]},
    {"system": "\ud800"},
    {"sampling": {"top_p": 5}},
    {"sampling": None},
    {"model": 5},
    {"ids": [-1]},
]


def test_a_bad_file_changes_nothing(conversation, tmp_path, command):
    path = tmp_path / "talk.json"
    conversation.replace([("x", "y")], "s")
    before = conversation.history, conversation.system, conversation.sampling
    texts = [json.dumps(GOOD | change).encode() for change in CHANGES]
    for text in (*texts, b"", b"{", b"\xff\xfe", b"5", b"[" * 100_000):
        path.write_bytes(text)
        with pytest.raises(GLMError):
            command(conversation, f"/load {path}")
        assert (conversation.history, conversation.system, conversation.sampling) == before
    path.write_text(json.dumps(GOOD))
    command(conversation, f"/load {path}")
    assert conversation.history == [("a", "b")] and conversation.sampling.temperature == 0.5


def test_chatglm3_reads_only_the_new_part_too(warm):
    conversation = toy(warm, "chatglm3")
    said(conversation.reply("one"))
    said(conversation.reply("two"))
    assert conversation.stats.reused_tokens > 5
    with pytest.raises(InputError):
        conversation.replace([("a", [{"role": "tool", "content": "b"}])], None)
    assert len(conversation.turns) == 2
    conversation.replace([("a", ""), ("", " \n")], None)
    said(conversation.reply("three"))
    assert conversation.history[:2] == [("a", ""), ("", " \n")]
