"""A conversation and the commands that change it, with a toy engine."""

import json
import os
from typing import Any

import pytest

from glm2_jax.errors import GLMError, InputError, UsageError
from glm2_jax.runtime import buckets
from infer.chat import commands as chat_commands
from infer.chat import files as chat_files
from infer.engine.call import Call
from infer.engine.params import SamplingParams
from infer.requests.conversation import Conversation
from tests.support.engine_toy import toy_engine, warm_engine


@pytest.fixture(autouse=True)
def one_shape(monkeypatch):
    """Every prompt and cache has the same padded size, so that little has to be compiled."""
    monkeypatch.setattr(buckets, "SMALLEST_BUCKET", 256)


@pytest.fixture(scope="module")
def warm():
    return warm_engine()


def toy(warm, family="chatglm2", fingerprint="a" * 64):
    engine = (
        toy_engine(share=warm, family=family) if family == "chatglm2" else toy_engine(family=family)
    )
    checkpoint: Any = engine.checkpoint
    checkpoint.fingerprint = fingerprint
    return Conversation(engine, SamplingParams(temperature=0, max_new_tokens=6))


@pytest.fixture
def conversation(warm):
    return toy(warm)


def said(events):
    return "".join(event.text for event in events)


def command(conversation, line, capsys):
    chat_commands.run(conversation, line)
    return capsys.readouterr().err


def test_undo_and_retry(conversation, capsys):
    with pytest.raises(InputError, match="no question yet"):
        said(conversation.retry())
    first = said(conversation.reply("one"))
    second = said(conversation.reply("two"))
    assert conversation.history == [("one", first), ("two", second)]
    assert said(conversation.retry()) == second  # greedy
    assert len(conversation.turns) == 2
    assert command(conversation, "/undo", capsys) == "taken back, 1 turn left\n"
    assert conversation.history == [("one", first)]
    assert command(conversation, "/undo", capsys) == "taken back, 0 turns left\n"
    with pytest.raises(InputError, match="no turn"):
        chat_commands.run(conversation, "/undo")


def test_an_interrupted_answer_is_kept_as_far_as_it_came(conversation):
    whole = said(conversation.reply("one"))
    conversation.undo()
    events = conversation.reply("one")
    part = ""
    while not part:
        part += next(events).text
    events.close()
    assert conversation.history == [("one", part)] and whole.startswith(part)
    ids = conversation.turns[0].ids
    said(conversation.reply("two"))
    assert ids is not None and conversation.stats.reused_tokens == len(ids) - 1


def test_nothing_of_an_answer_leaves_no_turn(conversation):
    first = said(conversation.reply("one"))
    conversation.reply("two").close()  # before it began
    retried = conversation.retry()
    while not next(retried).text:
        pass
    retried.close()  # after the first piece: that is the answer now
    ((question, answer),) = conversation.history
    assert question == "one" and answer and first.startswith(answer)


def no_answer(*args, **kwargs):
    return Call((event for event in ()), [])


def test_a_retry_of_which_nothing_comes_leaves_the_old_answer(conversation, monkeypatch):
    first = said(conversation.reply("one"))
    monkeypatch.setattr(
        conversation._session, "run", lambda *a, **k: Call((event for event in ()), [])
    )
    said(conversation.retry())
    assert conversation.history == [("one", first)] and conversation.unanswered is None


def test_a_question_without_an_answer_can_be_asked_again(conversation, monkeypatch):
    said(conversation.reply("one"))
    with monkeypatch.context() as patch:
        patch.setattr(
            conversation._session, "run", lambda *a, **k: Call((event for event in ()), [])
        )
        said(conversation.reply("two"))
        assert conversation.unanswered == "two" and len(conversation.turns) == 1
        said(conversation.retry())
        assert conversation.unanswered == "two"
    said(conversation.retry())
    assert conversation.history[1][0] == "two" and conversation.unanswered is None


def test_bad_questions_change_nothing(conversation):
    said(conversation.reply("one"))
    before = list(conversation.turns)
    for bad in ("  ", "\ud800", "x" * 2000):
        with pytest.raises(InputError):
            said(conversation.reply(bad))
        assert conversation.turns == before


def test_system(conversation, capsys):
    assert command(conversation, "/system", capsys) == "system: (none)\n"
    assert command(conversation, "/system be kind", capsys) == "system: be kind\n"
    said(conversation.reply("one"))
    build = conversation.engine.build_prompt
    ids = conversation.turns[0].ids
    assert list(ids[: len(ids) - 6]) == build("one", (), "be kind")
    command(conversation, "/system -", capsys)
    assert conversation.system is None
    said(conversation.reply("two"))
    read = conversation.turns[1].ids
    assert list(read[:-6]) == build("two", [conversation.history[0]])


def test_set(conversation, capsys):
    shown = command(conversation, "/set", capsys)
    assert "temperature = 0\n" in shown and "max_length = 256, the most that" in shown
    assert command(conversation, "/set top-k 7", capsys) == "top_k = 7\n"
    assert command(conversation, "/set greedy off", capsys) == "temperature = 0.8\n"
    assert command(conversation, "/set greedy on", capsys) == "temperature = 0\n"
    assert command(conversation, "/set stop END", capsys) == "stop = 'END'\n"
    assert command(conversation, "/set stop none", capsys) == "stop = none\n"
    assert command(conversation, "/set max_new_tokens none", capsys) == "max_new_tokens = none\n"
    assert command(conversation, "/set max_length 99", capsys) == "max_length = 99\n"
    assert "max_length = 256, the most" in command(conversation, "/set max_length 8192", capsys)
    before = conversation.sampling
    for bad in ("top_p 2", "top_p x", "top_q 1", "top_p", "greedy 7", "logprobs 3", "seed 1.5"):
        with pytest.raises((InputError, UsageError)):
            chat_commands.run(conversation, f"/set {bad}")
    assert conversation.sampling == before
    with pytest.raises(InputError, match="did you mean temperature"):
        chat_commands.run(conversation, "/set temprature 1")


def test_help_names_every_command(conversation, capsys):
    shown = command(conversation, "/help", capsys)
    assert all(name in shown.replace("clear ", "/clear").replace("stop ", "/stop")
               for name in chat_commands.NAMES)  # fmt: skip
    assert all(len(line) <= 100 for line in shown.splitlines())
    assert "Ctrl-C ends a reply" in shown


def test_unknown_commands(conversation):
    for line, near in (("/unod", "/undo"), ("/retri", "/retry"), ("/xyzzy", "/help lists")):
        with pytest.raises(InputError, match=near):
            chat_commands.run(conversation, line)


def test_commands_that_stand_alone(conversation):
    said(conversation.reply("one"))
    for name in ("/undo", "/stats", "/help", "/retry", "/clear", "/stop"):
        with pytest.raises(InputError, match=f"{name} stands alone, without '3'"):
            chat_commands.run(conversation, f"{name} 3")
    assert len(conversation.turns) == 1


def test_stats(conversation, capsys):
    assert "turns        0" in command(conversation, "/stats", capsys)
    said(conversation.reply("one"))
    used = len(conversation.turns[0].ids)
    shown = command(conversation, "/stats", capsys)
    assert f"{used} of 256, room left {256 - used}" in shown and "reused" in shown
    assert "speculation" not in shown
    assert conversation.total is not None
    conversation.total.passes, conversation.total.drafted_tokens = 2, 8
    assert "speculation  0 of 8 draft tokens accepted" in command(conversation, "/stats", capsys)


def test_saved_and_loaded(conversation, warm, tmp_path, capsys):
    path = tmp_path / "talk.json"
    command(conversation, "/system s", capsys)
    said(conversation.reply("你好"))
    shown = command(conversation, f"/save {path}", capsys)
    assert shown == f"saved 1 turn to {path}\n"
    assert os.listdir(tmp_path) == ["talk.json"]
    said(conversation.reply("再见"))
    command(conversation, f"/save {path}", capsys)  # a save may be replaced
    other = toy(warm)
    other.sampling = SamplingParams()
    assert command(other, f"/load {path}", capsys) == "loaded 2 turns\n"
    assert other.history == conversation.history and other.system == "s"
    assert other.sampling == conversation.sampling
    stranger = toy(warm, fingerprint="b" * 64)
    assert "another model" in command(stranger, f"/load {path}", capsys)


def test_what_is_no_save_is_not_overwritten(conversation, tmp_path):
    for name, text in (("a", "notes"), ("b", "[]"), ("c", "{}"), ("d", '{"format": 1}')):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(InputError, match="not a saved conversation"):
            chat_commands.run(conversation, f"/save {path}")
        assert path.read_text() == text
    with pytest.raises(InputError, match="not a saved conversation"):
        chat_commands.run(conversation, f"/save {tmp_path}")
    for bad in (f"/save {tmp_path}/none/x", "/save", "/load"):
        with pytest.raises(InputError):
            chat_commands.run(conversation, bad)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c", "d"]


def test_a_disk_that_fills_up_leaves_the_old_file(conversation, tmp_path, monkeypatch):
    path = tmp_path / "talk.json"
    chat_files.save(str(path), conversation)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        chat_files.save(str(path), conversation)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["talk.json"]


GOOD = {
    "format": "glm2-jax chat",
    "version": 1,
    "model": "a" * 64,
    "template": "chatglm2",
    "system": None,
    "sampling": {"temperature": 0.5},
    "history": [["a", "b"]],
}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"version": 2},
        {"history": [["a"]]},
        {"history": [["\ud800", "b"]]},
        {"sampling": {"top_p": 5}},
        {"sampling": {"unknown": 5}},
        {"sampling": {"stop": ["\ud800"]}},
        {"sampling": None},
        {"system": 5},
        {"model": 5},
    ],
)
def test_a_bad_file_changes_nothing(conversation, tmp_path, change):
    path = tmp_path / "talk.json"
    conversation.replace([("x", "y")], "s")
    before = conversation.history, conversation.system, conversation.sampling
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(GLMError):
        chat_commands.run(conversation, f"/load {path}")
    assert (conversation.history, conversation.system, conversation.sampling) == before
    path.write_text(json.dumps(GOOD))
    chat_commands.run(conversation, f"/load {path}")
    assert conversation.history == [("a", "b")] and conversation.sampling.temperature == 0.5


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"5", b"[" * 100_000, b'"x"'])
def test_files_that_are_nothing(conversation, tmp_path, data):
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(InputError):
        chat_commands.run(conversation, f"/load {path}")


def test_chatglm3_reads_only_the_new_part_too(warm):
    conversation = toy(warm, "chatglm3")
    said(conversation.reply("one"))
    said(conversation.reply("two"))
    stats = conversation.stats
    assert stats.reused_tokens > 5
    with pytest.raises(InputError):
        conversation.replace([("a", [{"role": "tool", "content": "b"}])], None)
    assert len(conversation.turns) == 2
    conversation.replace([("a", ""), ("", " \n")], None)
    said(conversation.reply("three"))
    assert conversation.history[:2] == [("a", ""), ("", " \n")]
